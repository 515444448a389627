// 16 channels at a time in AVX-512, 8 in AVX2, and loops that compilers may turn into vectors
// elsewhere: 7 instructions for each, 13 where what the bytes lack is written, too, and 5 for each
// byte of a residual. Left to compilers alone it took 5 times as long.

#include "int8/kernels/fine.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <cstring>

#include "simd/target.h"

namespace vitkd::int8 {
namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded

struct Constants {
  float zero, lo, hi, residual_zero, multiplier, part;
};

Constants constants(const Epilogue& e) {
  const Requantize& r = e.requantize;
  return {static_cast<float>(r.zero_point),
          static_cast<float>(r.lo - r.zero_point),
          static_cast<float>(r.hi - r.zero_point),
          static_cast<float>(e.residual_zero_point),
          e.residual_multiplier,
          e.residual_multiplier / kFine};
}

namespace baseline {
struct Lanes {
  static constexpr int kCount = 1;
  static float load(const float* p, int) { return *p; }
  static float bytes(const uint8_t* p, int) { return *p; }
  static float all(float x) { return x; }
  static float add(float a, float b) { return a + b; }
  static float sub(float a, float b) { return a - b; }
  static float mul(float a, float b) { return a * b; }
  static float clamped(float x, float lo, float hi) { return clamp(x, lo, hi); }
  static float rounded(float x) { return (x + kRound) - kRound; }
  static void store(uint8_t* p, float x, int) {
    *p = static_cast<uint8_t>(static_cast<int32_t>(x));
  }
};
#include "int8/kernels/fine.inl"
}  // namespace baseline

#if defined(__x86_64__)
VITKD_TARGET_BEGIN(VITKD_AVX2)
namespace avx2 {
// of fewer than 8 channels the last are read and written one by one
struct Lanes {
  static constexpr int kCount = 8;
  static VITKD_INLINE __m256 load(const float* p, int) { return _mm256_loadu_ps(p); }
  static VITKD_INLINE __m256 bytes(const uint8_t* p, int) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static VITKD_INLINE __m256 all(float x) { return _mm256_set1_ps(x); }
  static VITKD_INLINE __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static VITKD_INLINE __m256 sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
  static VITKD_INLINE __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static VITKD_INLINE __m256 clamped(__m256 x, __m256 lo, __m256 hi) {
    return _mm256_min_ps(_mm256_max_ps(x, lo), hi);
  }
  static VITKD_INLINE __m256 rounded(__m256 x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static VITKD_INLINE void store(uint8_t* p, __m256 x, int left) {
    const __m256i n = _mm256_cvtps_epi32(x);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    const int64_t eight = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
    left >= 8 ? std::memcpy(p, &eight, 8) : std::memcpy(p, &eight, left);
  }
};
#include "int8/kernels/fine.inl"
}  // namespace avx2
VITKD_TARGET_END

VITKD_TARGET_BEGIN(VITKD_AVX512)
namespace avx512 {
struct Lanes {
  static constexpr int kCount = 16;
  static VITKD_INLINE __m512 load(const float* p, int) { return _mm512_loadu_ps(p); }
  static VITKD_INLINE __m512 bytes(const uint8_t* p, int) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static VITKD_INLINE __m512 all(float x) { return _mm512_set1_ps(x); }
  static VITKD_INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static VITKD_INLINE __m512 sub(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
  static VITKD_INLINE __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static VITKD_INLINE __m512 clamped(__m512 x, __m512 lo, __m512 hi) {
    return _mm512_min_ps(_mm512_max_ps(x, lo), hi);
  }
  static VITKD_INLINE __m512 rounded(__m512 x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static VITKD_INLINE void store(uint8_t* p, __m512 x, int left) {
    const __mmask16 mask = left >= 16 ? 0xFFFF : (1 << left) - 1;
    _mm512_mask_cvtepi32_storeu_epi8(p, mask, _mm512_cvtps_epi32(x));
  }
};
#include "int8/kernels/fine.inl"
}  // namespace avx512
VITKD_TARGET_END
#endif

}  // namespace

void finish_fine([[maybe_unused]] Isa isa, const FineCall& call, const Epilogue& e) {
#if defined(__x86_64__)
  if (contains(isa, Isa::avx512)) return avx512::finish(call, e);
  if (contains(isa, Isa::avx2)) return avx2::finish(call, e);
#endif
  baseline::finish(call, e);
}

}  // namespace vitkd::int8
