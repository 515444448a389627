// Products by USMMLA and depthwise convolutions by USDOT, for CPUs with the int8 matrix extension:
// activations stay unsigned. The rest is as in plain NEON.

#if defined(__aarch64__)

#define VITKD_NEON "arch=armv8.2-a+dotprod+i8mm"

#include <arm_neon.h>

#include "simd/target.h"

VITKD_TARGET_BEGIN(VITKD_NEON)
namespace vitkd::int8 {
namespace {

struct Dot {
  static constexpr bool kPairs = true, kWords = false, kSigned = false;
  static constexpr int kRows = 6, kFewRows = 2;
  static VITKD_INLINE int8x16_t signed_bytes(uint8x16_t x) { return vreinterpretq_s8_u8(x); }
  static VITKD_INLINE int32x4_t add(int32x4_t acc, int8x16_t x, int8x16_t w) {
    return vusdotq_s32(acc, vreinterpretq_u8_s8(x), w);
  }
};

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

#include "int8/kernels/neon_gemm.h"
#include "int8/kernels/neon_sliding.h"

VITKD_NEON_BEGIN
namespace vitkd::int8 {
namespace {

// weights [segments][bytes / 8][16][8]
template <int MR>
VITKD_INLINE void multiply(const GemmTile& t, int32x4_t (&acc)[MR][4]) {
  const auto* bias = reinterpret_cast<const int32_t*>(t.constants);
  VITKD_UNROLL(MR * 4, i) { acc[i / 4][i % 4] = vld1q_s32(bias + i % 8 * 4); }
  VITKD_END;
  const auto* w = reinterpret_cast<const int8_t*>(t.weights);
  for (int64_t segment = 0; segment < t.segments; ++segment) {
    const uint8_t* rows[MR];
    VITKD_UNROLL(MR, r) {
      rows[r] = t.x[segment] + t.x_offset + std::min<int>(r, t.pixels - 1) * t.x_pixel;
      asm("" : "+r"(rows[r]));  // in a register of its own
    }
    VITKD_END;
    for (int64_t k = 0; k < t.bytes; k += 16, w += 256) {
      uint8x16_t x[MR];  // 8 bytes of two pixels, and their next 8
      VITKD_UNROLL(MR / 2, i) {
        const auto a = vreinterpretq_u64_u8(vld1q_u8(rows[2 * i] + k));
        const auto b = vreinterpretq_u64_u8(vld1q_u8(rows[2 * i + 1] + k));
        x[2 * i] = vreinterpretq_u8_u64(vzip1q_u64(a, b));
        x[2 * i + 1] = vreinterpretq_u8_u64(vzip2q_u64(a, b));
      }
      VITKD_END;
      VITKD_UNROLL(8, j) {
        constexpr int step = j / 4, c = j % 4 * 2;
        const int8x16_t a = vld1q_s8(w + step * 128 + c * 16);
        const int8x16_t b = vld1q_s8(w + step * 128 + c * 16 + 16);
        VITKD_UNROLL(MR / 2, i) {
          int32x4_t& sum = acc[2 * i + c / 4][c % 4];
          sum = vusmmlaq_s32(sum, x[2 * i + step], a);
        }
        VITKD_END;
        VITKD_UNROLL(MR / 2, i) {
          int32x4_t& sum = acc[2 * i + c / 4][c % 4 + 1];
          sum = vusmmlaq_s32(sum, x[2 * i + step], b);
        }
        VITKD_END;
      }
      VITKD_END;
    }
  }
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

namespace vitkd::int8 {
namespace {

// constants of two channels, and again, for two pixels
int pairs_order(int, int vector, int lane) { return (16 * vector + lane) / 4 * 2 + lane % 2; }

void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  packed->segments = spec.kernel_h;
  packed->steps = static_cast<int>(((spec.kernel_w - 1) * pixel + spec.in + 3) / 4);
  packed->stride = static_cast<int>(round_up(packed->steps, 4));
  const size_t bytes = size_t{4} * packed->segments * packed->stride;
  lay_out(spec, {1, 2, 8 * bytes, true, pairs_order}, packed);  // in two vectors, as constants are
  for (const Packed::Panel& panel : packed->panels) {
    auto* weights = reinterpret_cast<int8_t*>(packed->own.data() + panel.weights);
    for (int i = 0; i < std::min(16, spec.out - panel.channel); ++i) {
      for (int tap = 0; tap < spec.taps(); ++tap) {
        const int64_t begin = int64_t{tap / spec.kernel_w} * packed->stride * 4;
        for (int c = 0; c < spec.in; ++c) {
          const int64_t k = begin + tap % spec.kernel_w * pixel + c;
          weights[(k / 8 * 16 + i) * 8 + k % 8] = spec.at(panel.channel + i, tap, c);
        }
      }
    }
  }
}

const char* gemm_name(const Packed&, const GemmCall& call) {
  return call.pixels < Dot::kRows ? "gemm_u8s8_2x16_neoni8mm" : "gemm_u8s8_6x16_neoni8mm";
}

const char* depthwise_name(const Packed& packed, const DepthwiseCall&) {
  const bool two_rows = packed.spec.stride_h == 1;
  if (packed.slides) {
    return two_rows ? "depthwise_3x3_sliding_2x1x8_neoni8mm"
                    : "depthwise_3x3_sliding_1x1x16_neoni8mm";
  }
  return two_rows ? "depthwise_2x4x8_neoni8mm" : "depthwise_1x4x8_neoni8mm";
}

}  // namespace

const Kernels& neoni8mm_kernels() {
  static const Kernels kernels = [] {
    Kernels k = kNeon;
    k.isa = Isa::neoni8mm;
    k.gemm_name = gemm_name;
    k.depthwise_name = depthwise_name;
    k.pack_gemm = pack_gemm;
    k.gemm = gemm;
    k.pack_depthwise = pack_depthwise;
    k.depthwise = depthwise;
    return k;
  }();
  return kernels;
}

}  // namespace vitkd::int8

#endif
