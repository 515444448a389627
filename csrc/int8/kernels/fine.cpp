// 16 channels at a time in AVX-512, 8 in AVX2, 4 in NEON, one elsewhere: 7 instructions for each,
// 13 where what the bytes lack is written, too, and 5 for each byte of a residual. Left to gcc 12
// it took five times as long.

#include "int8/kernels/fine.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
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
#elif defined(__aarch64__)
namespace neon {
struct Lanes {
  static constexpr int kCount = 4;
  static float32x4_t load(const float* p, int) { return vld1q_f32(p); }
  static float32x4_t bytes(const uint8_t* p, int) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    const uint16x8_t words = vmovl_u8(vcreate_u8(four));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(words)));
  }
  static float32x4_t all(float x) { return vdupq_n_f32(x); }
  static float32x4_t add(float32x4_t a, float32x4_t b) { return vaddq_f32(a, b); }
  static float32x4_t sub(float32x4_t a, float32x4_t b) { return vsubq_f32(a, b); }
  static float32x4_t mul(float32x4_t a, float32x4_t b) { return vmulq_f32(a, b); }
  static float32x4_t clamped(float32x4_t x, float32x4_t lo, float32x4_t hi) {
    return vminq_f32(vmaxq_f32(x, lo), hi);
  }
  static float32x4_t rounded(float32x4_t x) { return vrndnq_f32(x); }
  static void store(uint8_t* p, float32x4_t x, int left) {
    const uint16x4_t words = vmovn_u32(vcvtq_u32_f32(x));
    const uint8x8_t eight = vmovn_u16(vcombine_u16(words, words));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(eight), 0);
    left >= 4 ? std::memcpy(p, &four, 4) : std::memcpy(p, &four, left);
  }
};
#include "int8/kernels/fine.inl"
}  // namespace neon
#endif

}  // namespace

void finish_fine([[maybe_unused]] Isa isa, const FineCall& call, const Epilogue& e) {
#if defined(__x86_64__)
  if (contains(isa, Isa::avx512)) return avx512::finish(call, e);
  if (contains(isa, Isa::avx2)) return avx2::finish(call, e);
#elif defined(__aarch64__)
  if (isa != Isa::scalar) return neon::finish(call, e);
#endif
  baseline::finish(call, e);
}

}  // namespace vitkd::int8
