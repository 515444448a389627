// The passes of a resize with NEON, which every aarch64 has: bytes are looked up as 32-bit lanes
// and multiplied as such.

#include "int8/prepare_kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <cstring>

namespace vitkd::int8 {
namespace {

// words of 0 to 255
uint16x4_t rounded(int32x4_t sums) { return vqmovun_s32(vrshrq_n_s32(sums, kWeightBits)); }

void along_rows(const uint8_t* const* rows, const Weights& columns, uint8_t* const* out) {
  // a pixel's three bytes, each a lane; what is past the register is 0
  constexpr uint8_t kNone = 255;
  uint8x16_t lanes[4];
  for (int i = 0; i < 4; ++i) {
    uint8_t from[16];
    std::memset(from, kNone, sizeof from);
    for (int c = 0; c < 3; ++c) from[4 * c] = static_cast<uint8_t>(3 * i + c);
    lanes[i] = vld1q_u8(from);
  }
  for (int x = 0; x < columns.results(); ++x) {
    const auto [first, count] = columns.windows[x];
    const int32_t* weights = columns.of(x);
    int32x4_t sums[kRows];
    for (int32x4_t& sum : sums) sum = vdupq_n_s32(0);
    for (int k = 0; k < count; k += 4) {
      const int32x4_t four = vld1q_s32(weights + k);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const uint8x16_t pixels = vld1q_u8(rows[row] + 3 * (first + k));
        const auto pixel = [&](int i) {
          return vreinterpretq_s32_u8(vqtbl1q_u8(pixels, lanes[i]));
        };
        sums[row] = vmlaq_laneq_s32(sums[row], pixel(0), four, 0);
        sums[row] = vmlaq_laneq_s32(sums[row], pixel(1), four, 1);
        sums[row] = vmlaq_laneq_s32(sums[row], pixel(2), four, 2);
        sums[row] = vmlaq_laneq_s32(sums[row], pixel(3), four, 3);
      }
    }
    for (int row = 0; row < kRows; row += 2) {
      const uint16x8_t two = vcombine_u16(rounded(sums[row]), rounded(sums[row + 1]));
      const uint32x2_t bytes = vreinterpret_u32_u8(vqmovn_u16(two));
      // the fourth byte is the next pixel's
      const uint32_t pixel[2] = {vget_lane_u32(bytes, 0), vget_lane_u32(bytes, 1)};
      std::memcpy(out[row] + 3 * x, pixel, 4);
      std::memcpy(out[row + 1] + 3 * x, pixel + 1, 4);
    }
  }
}

void along_columns(const uint8_t* const* rows, const int32_t* weights, int taps, int bytes,
                   uint8_t* out) {
  for (int from = 0; from < bytes; from += 16) {
    int32x4_t sums[4];
    for (int32x4_t& sum : sums) sum = vdupq_n_s32(0);
    for (int k = 0; k < taps; ++k) {
      const uint8x16_t row = vld1q_u8(rows[k] + from);
      const uint16x8_t halves[2] = {vmovl_u8(vget_low_u8(row)), vmovl_high_u8(row)};
      for (int i = 0; i < 2; ++i) {
        const auto low = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(halves[i])));
        const auto high = vreinterpretq_s32_u32(vmovl_high_u16(halves[i]));
        sums[2 * i] = vmlaq_n_s32(sums[2 * i], low, weights[k]);
        sums[2 * i + 1] = vmlaq_n_s32(sums[2 * i + 1], high, weights[k]);
      }
    }
    const uint16x8_t low = vcombine_u16(rounded(sums[0]), rounded(sums[1]));
    const uint16x8_t high = vcombine_u16(rounded(sums[2]), rounded(sums[3]));
    const uint8x16_t results = vcombine_u8(vqmovn_u16(low), vqmovn_u16(high));
    if (bytes - from >= 16) {
      vst1q_u8(out + from, results);
    } else {
      std::memcpy(out + from, &results, static_cast<size_t>(bytes - from));
    }
  }
}

}  // namespace

const Passes kNeonPasses{along_rows, along_columns};

}  // namespace vitkd::int8

#endif
