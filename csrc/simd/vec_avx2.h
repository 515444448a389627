// vitkd::avx2::Vec, see simd/vec.h.
#pragma once

#include <immintrin.h>

#include "simd/vec_constants.h"

VITKD_TARGET_BEGIN(VITKD_AVX2)
namespace vitkd::avx2 {

struct Vec {
  static constexpr int kLanes = 8;
  using Mask = __m256;
  __m256 v;

  Vec() = default;
  VITKD_INLINE Vec(__m256 x) : v(x) {}
  VITKD_INLINE explicit Vec(float x) : v(_mm256_set1_ps(x)) {}

  static Mask first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane));
  }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load_part(const float* p, int64_t n, Vec other) {
    const Mask live = first(n);
    return _mm256_blendv_ps(other.v, _mm256_maskload_ps(p, _mm256_castps_si256(live)), live);
  }
  void store_part(float* p, int64_t n) const {
    _mm256_maskstore_ps(p, _mm256_castps_si256(first(n)), v);
  }
  static Vec load(const Bfloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(Half* p) const {
    _mm_storeu_si128((__m128i*)p,
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void store(Bfloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000),
                                 _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);  // within 128-bit halves
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  }
};

VITKD_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
VITKD_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
VITKD_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
VITKD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
VITKD_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
VITKD_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
VITKD_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
VITKD_INLINE Vec::Mask not_equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ); }
VITKD_INLINE bool any_equal(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)) != 0;
}
VITKD_INLINE Vec::Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
VITKD_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
VITKD_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
VITKD_INLINE void split(Vec x, Vec& n, Vec& m) {
  const __m256i bits = _mm256_castps_si256(x.v);
  n = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(126)));
  const __m256i mantissa = _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff));
  m = _mm256_castsi256_ps(_mm256_or_si256(mantissa, _mm256_set1_epi32(0x3f000000)));
}
VITKD_INLINE Vec select(Vec::Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, m); }
VITKD_INLINE Vec select_negative(Vec x, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, x.v); }
VITKD_INLINE Vec minus_abs(Vec x) { return _mm256_or_ps(x.v, _mm256_set1_ps(-0.0f)); }
VITKD_INLINE Vec clamp_to_1(Vec x) { return min(Vec{1.f}, max(Vec{-1.f}, x)); }
VITKD_INLINE float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
VITKD_INLINE float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
VITKD_INLINE Vec exp(Vec x) {
  const Vec::Mask normal = _mm256_cmp_ps(x.v, _mm256_set1_ps(kExpLowest), _CMP_NLT_UQ);
  const __m256 t = _mm256_fmadd_ps(x.v, _mm256_set1_ps(kLog2E), _mm256_set1_ps(kRound));
  const __m256 n = _mm256_sub_ps(t, _mm256_set1_ps(kRound));
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Hi), x.v);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Lo), r);
  __m256 y = _mm256_set1_ps(kExpPoly[0]);
  for (int i = 1; i < 7; ++i) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(kExpPoly[i]));
  // multiplied and not added to the exponent, so that NaN is preserved
  const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
  const __m256i scale = _mm256_add_epi32(bits, _mm256_castps_si256(_mm256_set1_ps(1.0f)));
  return _mm256_and_ps(normal, _mm256_mul_ps(y, _mm256_castsi256_ps(scale)));
}
// exp(x) - 1 for x <= 0, relative to the result also near 0
VITKD_INLINE Vec expm1_negative(Vec x) {
  x = max(Vec{kExpLowest}, x);
  const __m256 t = _mm256_fmadd_ps(x.v, _mm256_set1_ps(kLog2E), _mm256_set1_ps(kRound));
  const __m256 n = _mm256_sub_ps(t, _mm256_set1_ps(kRound));
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Hi), x.v);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Lo), r);
  __m256 y = _mm256_set1_ps(kExpPoly[0]);
  for (int i = 1; i < 6; ++i) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(kExpPoly[i]));
  const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
  const __m256i one = _mm256_castps_si256(_mm256_set1_ps(1.0f));
  const Vec scale = _mm256_castsi256_ps(_mm256_add_epi32(bits, one));
  // 2^n (1 + y r) - 1, and y r itself for n = 0
  return fma(scale, Vec{y} * Vec{r}, scale - Vec{1.f});
}
VITKD_INLINE Vec exp2(Vec x) {
  const __m256 normal = _mm256_cmp_ps(x.v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m256 n = _mm256_floor_ps(x.v);
  const __m256 r = _mm256_sub_ps(x.v, n);
  __m256 y = _mm256_set1_ps(kExp2Poly[0]);
  for (int i = 1; i < 7; ++i) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(kExp2Poly[i]));
  const __m256i bits = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256i scale = _mm256_add_epi32(bits, _mm256_castps_si256(_mm256_set1_ps(1.0f)));
  return _mm256_and_ps(normal, _mm256_mul_ps(y, _mm256_castsi256_ps(scale)));
}
// log of a normal number > 0
VITKD_INLINE Vec log_normal(Vec x) {
  // x = 2^n (1 + m), 1 + m in [sqrt(1/2), sqrt(2))
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i least = _mm256_castps_si256(_mm256_set1_ps(kSqrtHalf));
  const __m256i above = _mm256_srai_epi32(_mm256_sub_epi32(bits, least), 23);
  const Vec n = _mm256_cvtepi32_ps(above);
  const __m256i rest = _mm256_sub_epi32(bits, _mm256_slli_epi32(above, 23));
  const Vec m = Vec{_mm256_castsi256_ps(rest)} - Vec{1.f};
  const Vec z = m * m, z2 = z * z;
  const auto c = [](int i) { return Vec{kLogPoly[i]}; };
  // in pairs: half the time of one long chain
  Vec y = fma(c(0), m, c(1));
  y = fma(y, z, fma(c(2), m, c(3)));
  const Vec low = fma(fma(c(5), m, c(6)), z, fma(c(7), m, c(8)));
  y = fma(fma(y, m, c(4)), z2, low);
  y = y * m * z;
  y = fma(n, Vec{kLn2Lo}, y);
  y = fma(Vec{-0.5f}, z, y);
  return fma(n, Vec{kLn2Hi}, m + y);
}
struct Scale {  // of exp_scaled
  Vec log2e, lowest;
  VITKD_INLINE explicit Scale(Vec inv_t)
      : log2e(Vec{kLog2E} * inv_t), lowest(Vec{kExpLowest} / inv_t) {}
};
VITKD_INLINE Vec exp_scaled(Vec x, const Scale& by) {
  const __m256 normal = _mm256_cmp_ps(x.v, by.lowest.v, _CMP_NLT_UQ);
  const __m256 t = _mm256_fmadd_ps(x.v, by.log2e.v, _mm256_set1_ps(kRound));
  const __m256 r = _mm256_fmsub_ps(x.v, by.log2e.v, _mm256_sub_ps(t, _mm256_set1_ps(kRound)));
  __m256 y = _mm256_set1_ps(kExp2NearPoly[0]);
  for (int i = 1; i < 7; ++i) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(kExp2NearPoly[i]));
  const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
  const __m256i scale = _mm256_add_epi32(bits, _mm256_castps_si256(_mm256_set1_ps(1.0f)));
  return _mm256_and_ps(normal, _mm256_mul_ps(y, _mm256_castsi256_ps(scale)));
}
VITKD_INLINE Vec twice_atanh(Vec x) {
  const Vec square = x * x, twice = x + x;
  Vec y{kAtanhPoly[0]};
  for (int i = 1; i < 4; ++i) y = fma(y, square, Vec{kAtanhPoly[i]});
  return fma(twice * square, y, twice);
}
VITKD_INLINE Vec log(Vec x) {
  Vec n, m;
  split(x, n, m);  // x = 2^n m, m in [1/2, 1)
  const Vec::Mask small = less(m, Vec{kSqrtHalf});
  n = select(small, n - Vec{1.f}, n);
  m = select(small, m + m, m) - Vec{1.f};
  Vec y{kLogPoly[0]};
  for (int i = 1; i < 9; ++i) y = fma(y, m, Vec{kLogPoly[i]});
  const Vec z = m * m;
  y = y * m * z;
  y = fma(n, Vec{kLn2Lo}, y);
  y = fma(Vec{-0.5f}, z, y);
  y = fma(n, Vec{kLn2Hi}, m + y);
  y = select(less(x, Vec{FLT_MIN}), Vec{-INFINITY}, y);
  return select(less(x, Vec{INFINITY}), y, x);  // NaN is preserved
}

// 8 rows become 8 columns
VITKD_INLINE void transpose(Vec* x) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256d a = _mm256_castps_pd(t[i / 4 * 4 + i % 4 / 2]);
    const __m256d b = _mm256_castps_pd(t[i / 4 * 4 + i % 4 / 2 + 2]);
    u[i] = _mm256_castpd_ps(i % 2 ? _mm256_unpackhi_pd(a, b) : _mm256_unpacklo_pd(a, b));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    x[c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    x[4 + c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
}

}  // namespace vitkd::avx2
VITKD_TARGET_END
