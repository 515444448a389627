// vitkd::avx512::Vec, see simd/vec.h.
#pragma once

#include <immintrin.h>

#include "simd/vec_constants.h"

VITKD_TARGET_BEGIN(VITKD_AVX512)
namespace vitkd::avx512 {

struct Vec {
  static constexpr int kLanes = 16;
  using Mask = __mmask16;
  __m512 v;

  Vec() = default;
  VITKD_INLINE Vec(__m512 x) : v(x) {}
  VITKD_INLINE explicit Vec(float x) : v(_mm512_set1_ps(x)) {}

  static Mask first(int64_t n) { return static_cast<Mask>((1u << n) - 1); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  // the first n lanes of p, and `other` in the rest
  static Vec load_part(const float* p, int64_t n, Vec other) {
    return _mm512_mask_loadu_ps(other.v, first(n), p);
  }
  void store_part(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  static Vec load(const Bfloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(Half* p) const {
    _mm256_storeu_si256((__m256i*)p,
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void store(Bfloat16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
};

VITKD_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
VITKD_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
VITKD_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
VITKD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
// the second argument where either is NaN
VITKD_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }
VITKD_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
VITKD_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
VITKD_INLINE Vec::Mask not_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ); }
VITKD_INLINE bool any_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ) != 0; }
VITKD_INLINE Vec::Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
VITKD_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
VITKD_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
VITKD_INLINE void split(Vec x, Vec& n, Vec& m) {
  n = _mm512_add_ps(_mm512_getexp_ps(x.v), _mm512_set1_ps(1.0f));
  m = _mm512_getmant_ps(x.v, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_src);
}
// a where the mask is set, else b
VITKD_INLINE Vec select(Vec::Mask m, Vec a, Vec b) { return _mm512_mask_mov_ps(b.v, m, a.v); }
VITKD_INLINE Vec select_negative(Vec x, Vec a, Vec b) {
  return _mm512_mask_mov_ps(b.v, _mm512_movepi32_mask(_mm512_castps_si512(x.v)), a.v);
}
VITKD_INLINE Vec minus_abs(Vec x) { return _mm512_or_ps(x.v, _mm512_set1_ps(-0.0f)); }
// the smaller one of |x| and 1, with the sign of x
VITKD_INLINE Vec clamp_to_1(Vec x) { return _mm512_range_ps(x.v, _mm512_set1_ps(1), 2); }
VITKD_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
VITKD_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
VITKD_INLINE Vec exp(Vec x) {
  const Vec::Mask normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(kExpLowest), _CMP_NLT_UQ);
  const __m512 t = _mm512_fmadd_ps(x.v, _mm512_set1_ps(kLog2E), _mm512_set1_ps(kRound));
  const __m512 n = _mm512_sub_ps(t, _mm512_set1_ps(kRound));
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Hi), x.v);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Lo), r);
  __m512 y = _mm512_set1_ps(kExpPoly[0]);
  for (int i = 1; i < 7; ++i) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExpPoly[i]));
  return _mm512_maskz_scalef_ps(normal, y, n);
}
// exp(x) - 1 for x <= 0, relative to the result also near 0
VITKD_INLINE Vec expm1_negative(Vec x) {
  x = max(Vec{kExpLowest}, x);
  const __m512 t = _mm512_fmadd_ps(x.v, _mm512_set1_ps(kLog2E), _mm512_set1_ps(kRound));
  const __m512 n = _mm512_sub_ps(t, _mm512_set1_ps(kRound));
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Hi), x.v);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Lo), r);
  __m512 y = _mm512_set1_ps(kExpPoly[0]);
  for (int i = 1; i < 6; ++i) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExpPoly[i]));
  const Vec scale = _mm512_scalef_ps(_mm512_set1_ps(1.0f), n);
  // 2^n (1 + y r) - 1, and y r itself for n = 0
  return fma(scale, Vec{y} * Vec{r}, scale - Vec{1.f});
}
VITKD_INLINE Vec exp2(Vec x) {
  const Vec::Mask normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 r = _mm512_reduce_ps(x.v, 1);  // x - floor(x)
  __m512 y = _mm512_set1_ps(kExp2Poly[0]);
  for (int i = 1; i < 7; ++i) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExp2Poly[i]));
  return _mm512_maskz_scalef_ps(normal, y, x.v);
}
// log of a normal number > 0
VITKD_INLINE Vec log_normal(Vec x) {
  Vec n, m;
  split(x, n, m);  // x = 2^n m, m in [1/2, 1)
  const Vec::Mask small = less(m, Vec{kSqrtHalf});
  n = select(small, n - Vec{1.f}, n);
  m = select(small, m + m, m) - Vec{1.f};
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
  const Vec::Mask normal = _mm512_cmp_ps_mask(x.v, by.lowest.v, _CMP_NLT_UQ);
  const __m512 t = _mm512_fmadd_ps(x.v, by.log2e.v, _mm512_set1_ps(kRound));
  const __m512 n = _mm512_sub_ps(t, _mm512_set1_ps(kRound));
  const __m512 r = _mm512_fmsub_ps(x.v, by.log2e.v, n);
  __m512 y = _mm512_set1_ps(kExp2NearPoly[0]);
  for (int i = 1; i < 7; ++i) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExp2NearPoly[i]));
  return _mm512_maskz_scalef_ps(normal, y, n);
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

// 16 rows become 16 columns
VITKD_INLINE void transpose(Vec* x) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m512d a = _mm512_castps_pd(t[i / 4 * 4 + i % 4 / 2]);
    const __m512d b = _mm512_castps_pd(t[i / 4 * 4 + i % 4 / 2 + 2]);
    u[i] = _mm512_castpd_ps(i % 2 ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
  }
  // quarter q of u[4 g + c] holds rows 4 g to 4 g + 3 of column 4 q + c
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    x[c].v = _mm512_shuffle_f32x4(even, even2, 0x88);
    x[4 + c].v = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    x[8 + c].v = _mm512_shuffle_f32x4(even, even2, 0xdd);
    x[12 + c].v = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

}  // namespace vitkd::avx512
VITKD_TARGET_END
