// Products by USMMLA and depthwise convolutions by USDOT, for CPUs with the int8 matrix extension:
// activations stay unsigned. The rest is as in plain NEON.

#if defined(__aarch64__)

#define VITKD_NEON "arch=armv8.2-a+dotprod+i8mm"
#define VITKD_NEON_NAME "neoni8mm"

#include <arm_neon.h>

#include "simd/target.h"

VITKD_TARGET_BEGIN(VITKD_NEON)
namespace vitkd::int8 {
namespace {

struct Dot {
  static constexpr bool kPairs = true, kWords = false, kSigned = false;
  static constexpr int kRows = 6;
  static VITKD_INLINE int8x16_t signed_bytes(uint8x16_t x) { return vreinterpretq_s8_u8(x); }
  // weights [steps][16][8]
  static int64_t place(int channel, int64_t k) { return (k / 8 * 16 + channel) * 8 + k % 8; }
  static VITKD_INLINE void add(int32x4_t& acc, int8x16_t x, int8x16_t w) {
    asm("usdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(x), "w"(w));
  }
};

// asm keeps gcc 12 from copying accumulators around
VITKD_INLINE void add_matrix(int32x4_t& acc, int8x16_t x, int8x16_t w) {
  asm("usmmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(x), "w"(w));
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
        constexpr int h = j / 2, c = j % 2 * 2;
        VITKD_UNROLL(MR / 2, i) { add_matrix(sums[2 * i + h][c], a[i], w[0]); }
        VITKD_END;
        VITKD_UNROLL(MR / 2, i) { add_matrix(sums[2 * i + h][c + 1], a[i], w[1]); }
        VITKD_END;
      });
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

namespace vitkd::int8 {

const Kernels& neoni8mm_kernels() {
  static const Kernels kernels = kernels_here(Isa::neoni8mm);
  return kernels;
}

}  // namespace vitkd::int8

#endif
