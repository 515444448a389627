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
  static constexpr int kRows = 6;
  static VITKD_INLINE int8x16_t signed_bytes(uint8x16_t x) {
    return vreinterpretq_s8_u8(veorq_u8(x, vdupq_n_u8(0x80)));
  }
  // weights [steps][2][16][4]
  static int64_t place(int channel, int64_t k) { return (k / 4 * 16 + channel) * 4 + k % 4; }
  static VITKD_INLINE void add(int32x4_t& acc, int8x16_t x, int8x16_t w) {
    asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(x), "w"(w));
  }
};

// asm keeps gcc 12 from copying accumulators around
template <int kLane>
VITKD_INLINE void add_by_element(int32x4_t& acc, int8x16_t w, int8x16_t x) {
  asm("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc) : "w"(w), "w"(x), "i"(kLane));
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

#include "int8/kernels/neon_gemm.h"
#include "int8/kernels/neon_sliding.h"

VITKD_NEON_BEGIN
namespace vitkd::int8 {
namespace {

template <int MR>
VITKD_INLINE void multiply(const GemmTile& t, int32x4_t (&acc)[MR][4]) {
  multiply_steps<MR>(
      t, acc, [](auto j, const auto& a, const auto& w, auto& sums) __attribute__((always_inline)) {
        constexpr int four = j / 2, c = j % 2 * 2;
        VITKD_UNROLL(MR, r) { add_by_element<r % 2 * 2 + four>(sums[r][c], w[0], a[r / 2]); }
        VITKD_END;
        VITKD_UNROLL(MR, r) { add_by_element<r % 2 * 2 + four>(sums[r][c + 1], w[1], a[r / 2]); }
        VITKD_END;
      });
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

namespace vitkd::int8 {
namespace {

const char* gemm_name(const Packed&, const GemmCall& call) {
  return call.pixels < Dot::kRows ? "gemm_u8s8_2x16_neondot" : "gemm_u8s8_6x16_neondot";
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
