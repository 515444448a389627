// Products and depthwise convolutions by SDOT, for CPUs with the dot product extension: activations
// become signed bytes, less 128. The rest is as in plain NEON.

#if defined(__aarch64__)

#define VITKD_NEON "arch=armv8.2-a+dotprod"
#define VITKD_NEON_NAME "neondot"

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

const Kernels& neondot_kernels() {
  static const Kernels kernels = kernels_here(Isa::neondot);
  return kernels;
}

}  // namespace vitkd::int8

#endif
