// The kernels in AVX-512 without VNNI, for Skylake-X: products by pairs of bytes (pairs.h); the
// rest is as in AVX2.

#if defined(__x86_64__)

#define VITKD_ZMM VITKD_AVX512

#include "int8/kernels/epilogue_avx512.h"
#include "int8/kernels/pairs.h"

VITKD_TARGET_BEGIN(VITKD_ZMM)
namespace vitkd::int8 {
namespace {

struct Dot {
  static constexpr bool kPairs = true;
  static VITKD_INLINE void add(__m512i& acc, __m512i x, __m512i w) {
    const __m512i ones = _mm512_set1_epi16(1);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(x, w), ones));
  }
};

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

#include "int8/kernels/gemm_zmm.h"

namespace vitkd::int8 {
namespace {

void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  pack_pairs(spec, pixel, in_order, kPixels[1], packed);
}

void gemm(const Packed& packed, const GemmCall& call) { multiply_in_order(packed, call, multiply); }

const char* gemm_name(const Packed&, const GemmCall& call) {
  return call.pixels < kPixels[1] ? "gemm_u8s8_1x16_avx512" : "gemm_u8s8_16x16_avx512";
}

}  // namespace

const Kernels& avx512_kernels() {
  static const Kernels kernels = [] {
    Kernels k = kAvx2;
    k.isa = Isa::avx512;
    k.gemm_name = gemm_name;
    k.pack_gemm = pack_gemm;
    k.gemm = gemm;
    return k;
  }();
  return kernels;
}

}  // namespace vitkd::int8

#endif
