// The kernels in NEON, for any Armv8.0 CPU: products of signed bytes, activations less 128, in
// pairs that fit 16 bits (2 * 127 * 128); depthwise convolutions by words.

#if defined(__aarch64__)

#define VITKD_NEON "arch=armv8-a"
#define VITKD_NEON_NAME "neon"

#include <arm_neon.h>

#include <cmath>

#include "simd/target.h"

namespace vitkd::int8 {
namespace {

struct Dot {
  static constexpr bool kPairs = false, kWords = true, kSigned = true;
  static constexpr int kRows = 2;
  // weights [steps][4][2][4][4]: 4 channels' first and second 4 inputs
  static int64_t place(int channel, int64_t k) {
    return ((k / 8 * 4 + channel / 4) * 2 + k / 4 % 2) * 16 + channel % 4 * 4 + k % 4;
  }
  static VITKD_INLINE int8x16_t signed_bytes(uint8x16_t x) {
    return vreinterpretq_s8_u8(veorq_u8(x, vdupq_n_u8(0x80)));
  }
};

}  // namespace
}  // namespace vitkd::int8

#include "int8/kernels/neon_gemm.h"
#include "int8/kernels/neon_sliding.h"

VITKD_NEON_BEGIN
namespace vitkd::int8 {
namespace {

template <int MR>
VITKD_INLINE void multiply(const GemmTile& t, int32x4_t (&acc)[MR][4]) {
  int32x4_t sums[MR][8];  // of two channels, two each
  VITKD_UNROLL(MR * 8, i) { sums[i / 8][i % 8] = vdupq_n_s32(0); }
  VITKD_END;
  const auto* w = reinterpret_cast<const int8_t*>(t.weights);
  const auto* x = reinterpret_cast<const int32_t*>(t.x);
  for (int64_t step = t.steps; step > 0; --step, x += kStepBytes / 4, w += 128) {
    const int32x4_t bytes = vld1q_s32(x);
    int8x16_t a[MR], b[MR];  // four bytes, four times
    VITKD_UNROLL(MR, r) {
      a[r] = vreinterpretq_s8_s32(vdupq_laneq_s32(bytes, 2 * r));
      b[r] = vreinterpretq_s8_s32(vdupq_laneq_s32(bytes, 2 * r + 1));
    }
    VITKD_END;
    VITKD_UNROLL(4, c) {
      const int8x16_t w0 = vld1q_s8(w + c * 32), w1 = vld1q_s8(w + c * 32 + 16);
      VITKD_UNROLL(MR, r) {
        int16x8_t low = vmull_s8(vget_low_s8(w0), vget_low_s8(a[r]));
        int16x8_t high = vmull_high_s8(w0, a[r]);
        low = vmlal_s8(low, vget_low_s8(w1), vget_low_s8(b[r]));
        high = vmlal_high_s8(high, w1, b[r]);
        sums[r][2 * c] = vpadalq_s16(sums[r][2 * c], low);
        sums[r][2 * c + 1] = vpadalq_s16(sums[r][2 * c + 1], high);
      }
      VITKD_END;
    }
    VITKD_END;
  }
  load_biases(t.constants, acc);
  VITKD_UNROLL(MR * 4, i) {
    constexpr int r = i / 4, c = i % 4;
    acc[r][c] = vaddq_s32(acc[r][c], vpaddq_s32(sums[r][2 * c], sums[r][2 * c + 1]));
  }
  VITKD_END;
}

// ---- elementwise ----

VITKD_INLINE void centred(uint8x16_t q, float zero_point, float32x4_t (&to)[4]) {
  widen(q, vdupq_n_u32(kMagicBits), to);
  VITKD_UNROLL(4, i) { to[i] = vsubq_f32(to[i], vdupq_n_f32(zero_point)); }
  VITKD_END;
}

Form form_of(const Requantize& requantize, float largest) {
  return whole_range(requantize) && largest < 32000 ? Form::words : Form::any;
}

template <Form kForm>
void add_as(const uint8_t* a, int z_a, float m_a, const uint8_t* b, int z_b, float m_b,
            const EpilogueConstants& f, int64_t n, uint8_t* y) {
  const float zero_a = kMagicFloat + static_cast<float>(z_a);
  const float zero_b = kMagicFloat + static_cast<float>(z_b);
  for (int64_t i = 0; i < n; i += 16) {
    float32x4_t v[4], u[4];
    centred(vld1q_u8(a + i), zero_a, v);
    centred(vld1q_u8(b + i), zero_b, u);
    VITKD_UNROLL(4, j) { v[j] = vaddq_f32(vmulq_n_f32(v[j], m_a), vmulq_n_f32(u[j], m_b)); }
    VITKD_END;
    vst1q_u8(y + i, round_values<kForm>(v, f));
  }
}

void add(const uint8_t* a, int z_a, float m_a, const uint8_t* b, int z_b, float m_b,
         const Requantize& requantize, int64_t n, uint8_t* y) {
  const EpilogueConstants f = epilogue_constants({requantize, EpilogueKind::bytes, 0, 0}, false);
  const Form form = form_of(requantize, 256 * (std::abs(m_a) + std::abs(m_b)));
  const auto with = form == Form::words ? add_as<Form::words> : add_as<Form::any>;
  with(a, z_a, m_a, b, z_b, m_b, f, n, y);
}

void channel_sums(const uint8_t* x, int64_t pixels, int64_t pixel, int64_t channels,
                  int32_t* sums) {
  for (int64_t c = 0; c < channels; c += 16) {
    const uint8_t* p = x + c;
    uint32x4_t total[4];
    VITKD_UNROLL(4, i) { total[i] = vreinterpretq_u32_s32(vld1q_s32(sums + c + 4 * i)); }
    VITKD_END;
    for (int64_t left = pixels; left > 0; left -= 256) {
      uint16x8_t low = vdupq_n_u16(0), high = vdupq_n_u16(0);
      for (int64_t i = std::min<int64_t>(left, 256); i > 0; --i, p += pixel) {
        const uint8x16_t q = vld1q_u8(p);
        low = vaddw_u8(low, vget_low_u8(q)), high = vaddw_high_u8(high, q);
      }
      total[0] = vaddw_u16(total[0], vget_low_u16(low)), total[1] = vaddw_high_u16(total[1], low);
      total[2] = vaddw_u16(total[2], vget_low_u16(high)), total[3] = vaddw_high_u16(total[3], high);
    }
    VITKD_UNROLL(4, i) { vst1q_s32(sums + c + 4 * i, vreinterpretq_s32_u32(total[i])); }
    VITKD_END;
  }
}

// 16 channels
template <Form kForm>
VITKD_INLINE void scale_as(const uint8_t* x, float zero_point, const float32x4_t (&factors)[4],
                           const EpilogueConstants& f, int64_t pixels, int64_t pixel, uint8_t* y) {
  for (int64_t p = 0; p < pixels; ++p, x += pixel, y += pixel) {
    float32x4_t v[4];
    centred(vld1q_u8(x), zero_point, v);
    VITKD_UNROLL(4, i) { v[i] = vmulq_f32(v[i], factors[i]); }
    VITKD_END;
    vst1q_u8(y, round_values<kForm>(v, f));
  }
}

void scale(const uint8_t* x, int z, const float* factor, const Requantize& requantize,
           int64_t pixels, int64_t pixel, uint8_t* y) {
  const EpilogueConstants f = epilogue_constants({requantize, EpilogueKind::bytes, 0, 0}, false);
  const float zero_point = kMagicFloat + static_cast<float>(z);
  for (int64_t c = 0; c < pixel; c += 16) {
    float32x4_t factors[4], most = vdupq_n_f32(0);
    VITKD_UNROLL(4, i) {
      factors[i] = vld1q_f32(factor + c + 4 * i);
      most = vmaxq_f32(most, vabsq_f32(factors[i]));
    }
    VITKD_END;
    form_of(requantize, 256 * vmaxvq_f32(most)) == Form::words
        ? scale_as<Form::words>(x + c, zero_point, factors, f, pixels, pixel, y + c)
        : scale_as<Form::any>(x + c, zero_point, factors, f, pixels, pixel, y + c);
  }
}

void linear(const int8_t* q, int64_t stride, const float* s, const int32_t* inputs, const float* x,
            int count, int out, float* h) {
  const int32x4_t magic = vdupq_n_s32(kMagicBits);
  for (int j = 0; j < out; j += 16) {
    float32x4_t sums[4], scales[4];
    VITKD_UNROLL(4, i) { sums[i] = vld1q_f32(h + j + 4 * i), scales[i] = vld1q_f32(s + j + 4 * i); }
    VITKD_END;
    const auto add_row = [&](int row, float input) __attribute__((always_inline)) {
      const int8x16_t bytes = vld1q_s8(q + inputs[row] * stride + j);
      const int16x8_t words[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)};
      VITKD_UNROLL(4, i) {
        const int32x4_t wide = i % 2 == 0 ? vaddw_s16(magic, vget_low_s16(words[i / 2]))
                                          : vaddw_high_s16(magic, words[i / 2]);
        const float32x4_t w = vsubq_f32(vreinterpretq_f32_s32(wide), vdupq_n_f32(kMagicFloat));
        sums[i] = vaddq_f32(sums[i], vmulq_n_f32(vmulq_f32(w, scales[i]), input));
      }
      VITKD_END;
    };
    int row = 0;
    for (; row + 4 <= count; row += 4) {
      const float32x4_t four = vld1q_f32(x + row);
      VITKD_UNROLL(4, i) { add_row(row + i, vgetq_lane_f32(four, i)); }
      VITKD_END;
    }
    for (; row < count; ++row) add_row(row, x[row]);
    VITKD_UNROLL(4, i) { vst1q_f32(h + j + 4 * i, sums[i]); }
    VITKD_END;
  }
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

namespace vitkd::int8 {

const Kernels kNeon{Isa::neon, gemm_name, depthwise_name, pack_gemm, gemm,  pack_depthwise,
                    depthwise, add,       channel_sums,   scale,     linear};

}  // namespace vitkd::int8

#endif
