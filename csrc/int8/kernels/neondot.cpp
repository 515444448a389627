// Products and depthwise convolutions by SDOT, for CPUs with the dot product extension: activations
// become signed bytes, less 128. The rest is as in plain NEON.

#if defined(__aarch64__)

#define VITKD_NEON "arch=armv8.2-a+dotprod"

#include <arm_neon.h>

#include "simd/target.h"

VITKD_TARGET_BEGIN(VITKD_NEON)
namespace vitkd::int8 {
namespace {

struct Dot {
  static constexpr bool kPairs = false, kWords = false, kSigned = true;
  static constexpr int kRows = 6, kFewRows = 1;
  static VITKD_INLINE int8x16_t signed_bytes(uint8x16_t x) {
    return vreinterpretq_s8_u8(veorq_u8(x, vdupq_n_u8(0x80)));
  }
  static VITKD_INLINE int32x4_t add(int32x4_t acc, int8x16_t x, int8x16_t w) {
    return vdotq_s32(acc, x, w);
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

// weights [segments][steps][16][4]
template <int MR>
VITKD_INLINE void multiply(const GemmTile& t, int32x4_t (&acc)[MR][4]) {
  const auto* bias = reinterpret_cast<const int32_t*>(t.constants);
  VITKD_UNROLL(MR * 4, i) { acc[i / 4][i % 4] = vld1q_s32(bias + i % 4 * 4); }
  VITKD_END;
  const auto* w = reinterpret_cast<const int8_t*>(t.weights);
  for (int64_t segment = 0; segment < t.segments; ++segment) {
    const uint8_t* rows[MR];
    VITKD_UNROLL(MR, r) {
      rows[r] = t.x[segment] + t.x_offset + r * t.x_pixel;
      asm("" : "+r"(rows[r]));  // in a register of its own
    }
    VITKD_END;
    for (int64_t k = 0; k < t.bytes; k += 16, w += 256) {
      int8x16_t x[MR];
      VITKD_UNROLL(MR, r) { x[r] = Dot::signed_bytes(vld1q_u8(rows[r] + k)); }
      VITKD_END;
      VITKD_UNROLL(4, step) {
        VITKD_UNROLL(2, half) {
          const int8x16_t a = vld1q_s8(w + step * 64 + half * 32);
          const int8x16_t b = vld1q_s8(w + step * 64 + half * 32 + 16);
          VITKD_UNROLL(MR, r) {
            acc[r][2 * half] = vdotq_laneq_s32(acc[r][2 * half], a, x[r], step);
          }
          VITKD_END;
          VITKD_UNROLL(MR, r) {
            acc[r][2 * half + 1] = vdotq_laneq_s32(acc[r][2 * half + 1], b, x[r], step);
          }
          VITKD_END;
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

void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  lay_out_gemm(spec, pixel, {1, 0, 0, true, in_order, 4}, packed);
  add_to_biases(spec, packed);
}

const char* gemm_name(const Packed&, const GemmCall& call) {
  return call.pixels < Dot::kRows ? "gemm_u8s8_1x16_neondot" : "gemm_u8s8_6x16_neondot";
}

const char* depthwise_name(const Packed& packed, const DepthwiseCall&) {
  const bool two_rows = packed.spec.stride_h == 1;
  if (packed.slides) {
    return two_rows ? "depthwise_3x3_sliding_2x1x8_neondot"
                    : "depthwise_3x3_sliding_1x1x16_neondot";
  }
  return two_rows ? "depthwise_2x4x8_neondot" : "depthwise_1x4x8_neondot";
}

}  // namespace

const Kernels& neondot_kernels() {
  static const Kernels kernels = [] {
    Kernels k = kNeon;
    k.isa = Isa::neondot;
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
