// A register of floats for each instruction set: vitkd::avx2::Vec (8), vitkd::avx512::Vec (16) and,
// for all others, vitkd::scalar::Vec (8), with the same few operations, so that a kernel is written
// once and included per namespace. (No struct of theirs has default member values: gcc would build
// the constructor for the baseline.)
// exp() is accurate to 2 ulp for x <= 88 and 0 where the result would be below FLT_MIN.
#pragma once

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "target.h"

namespace vitkd {

// Storage formats, by their bits.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// exp(x) = 2^n e^r with n = rint(x / ln 2) and a minimax polynomial for e^r, |r| <= ln(2)/2
// (relative error 2.6e-9, and exp(0) = 1). Adding kRound rounds to an integer and leaves it in the
// low bits.
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2Hi = 0.693359375f;
constexpr float kLn2Lo = -2.12194440e-4f;
constexpr float kRound = 12582912.0f;     // 1.5 * 2^23
constexpr float kExpLowest = -87.33654f;  // exp of anything lower is below FLT_MIN
constexpr float kExpPoly[] = {1.4061422552913427e-3f,
                              8.379058912396431e-3f,
                              4.166477173566818e-2f,
                              1.6666364669799805e-1f,
                              5.000000596046448e-1f,
                              1.0f,
                              1.0f};

// exp2(x) = 2^n 2^r with n = floor(x) and a minimax polynomial for 2^r, 0 <= r < 1 (relative error
// 2.0e-9, and exp2(0) = 1)
constexpr float kExp2Poly[] = {2.1612914861e-4f,
                               1.2467846973e-3f,
                               9.6754515544e-3f,
                               5.5485282093e-2f,
                               2.4022930861e-1f,
                               6.9314706326e-1f,
                               1.0f};

// log(x) = n ln 2 + log(m) for normal x > 0 (-inf for less), m in [sqrt(1/2), sqrt(2)): Cephes'
// polynomial, 2 ulp.
constexpr float kSqrtHalf = 0.707106781186547524f;
constexpr float kLogPoly[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                              -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                              2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};

}  // namespace vitkd

namespace vitkd::scalar {

// loops that a compiler makes vectors of, whatever it has
struct Vec {
  static constexpr int kLanes = 8;
  struct Mask {
    bool v[kLanes];
  };
  float v[kLanes];

  Vec() = default;
  explicit Vec(float x) {
    for (float& lane : v) lane = x;
  }
  template <class F>
  static Vec of(F&& lane) {
    Vec y;
    for (int i = 0; i < kLanes; ++i) y.v[i] = lane(i);
    return y;
  }

  static Vec load(const float* p) {
    return of([&](int i) { return p[i]; });
  }
  static Vec load(const Bfloat16* p) {
    return of([&](int i) { return std::bit_cast<float>(uint32_t{p[i].bits} << 16); });
  }
  static Vec load(const Half* p) {
    return of([&](int i) { return static_cast<float>(std::bit_cast<_Float16>(p[i].bits)); });
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  void store(Half* p) const {
    for (int i = 0; i < kLanes; ++i) {
      p[i].bits = std::bit_cast<uint16_t>(static_cast<_Float16>(v[i]));
    }
  }
  void store(Bfloat16* p) const {
    for (int i = 0; i < kLanes; ++i) {
      const auto bits = std::bit_cast<uint32_t>(v[i]);
      const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      p[i].bits = static_cast<uint16_t>(v[i] == v[i] ? rounded : 0x7fc0);
    }
  }
};

inline Vec operator+(Vec a, Vec b) {
  return Vec::of([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return Vec::of([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return Vec::of([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return Vec::of([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // quicker than a call, rounded twice
inline Vec max(Vec a, Vec b) {
  return Vec::of([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec::Mask not_equal(Vec a, Vec b) {
  Vec::Mask m;
  for (int i = 0; i < Vec::kLanes; ++i) m.v[i] = a.v[i] != b.v[i];
  return m;
}
inline Vec select(Vec::Mask m, Vec a, Vec b) {
  return Vec::of([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
}
inline float reduce_add(Vec a) {
  float sum = 0;
  for (const float lane : a.v) sum += lane;
  return sum;
}
inline float reduce_max(Vec a) {
  float most = a.v[0];
  for (const float lane : a.v) most = lane > most ? lane : most;
  return most;
}
inline Vec exp(Vec x) {
  return Vec::of([&](int i) { return x.v[i] < kExpLowest ? 0.0f : std::exp(x.v[i]); });
}
inline Vec exp2(Vec x) {
  return Vec::of([&](int i) { return x.v[i] < -126.0f ? 0.0f : std::exp2(x.v[i]); });
}
inline Vec log(Vec x) {
  return Vec::of([&](int i) { return std::log(x.v[i]); });
}
// 8 rows become 8 columns
inline void transpose(Vec* x) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    for (int j = 0; j < i; ++j) std::swap(x[i].v[j], x[j].v[i]);
  }
}

}  // namespace vitkd::scalar

#if defined(__x86_64__)
#include <immintrin.h>

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
VITKD_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
VITKD_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
VITKD_INLINE Vec::Mask not_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ); }
VITKD_INLINE bool any_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ) != 0; }
VITKD_INLINE Vec::Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
VITKD_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
VITKD_INLINE void split(Vec x, Vec& n, Vec& m) {
  n = _mm512_add_ps(_mm512_getexp_ps(x.v), _mm512_set1_ps(1.0f));
  m = _mm512_getmant_ps(x.v, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_src);
}
// a where the mask is set, else b
VITKD_INLINE Vec select(Vec::Mask m, Vec a, Vec b) { return _mm512_mask_mov_ps(b.v, m, a.v); }
VITKD_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
VITKD_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
VITKD_INLINE Vec exp(Vec x, Vec::Mask& normal) {
  normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(kExpLowest), _CMP_NLT_UQ);
  const __m512 t = _mm512_fmadd_ps(x.v, _mm512_set1_ps(kLog2E), _mm512_set1_ps(kRound));
  const __m512 n = _mm512_sub_ps(t, _mm512_set1_ps(kRound));
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Hi), x.v);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Lo), r);
  __m512 y = _mm512_set1_ps(kExpPoly[0]);
  for (int i = 1; i < 7; ++i) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExpPoly[i]));
  return _mm512_maskz_scalef_ps(normal, y, n);
}

VITKD_INLINE Vec exp(Vec x) {
  Vec::Mask normal;
  return exp(x, normal);
}
VITKD_INLINE Vec exp2(Vec x) {
  const Vec::Mask normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 r = _mm512_reduce_ps(x.v, 1);  // x - floor(x)
  __m512 y = _mm512_set1_ps(kExp2Poly[0]);
  for (int i = 1; i < 7; ++i) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExp2Poly[i]));
  return _mm512_maskz_scalef_ps(normal, y, x.v);
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
  return select(less(x, Vec{INFINITY}), y, x);  // a NaN stays one
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
VITKD_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
VITKD_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
VITKD_INLINE Vec::Mask not_equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ); }
VITKD_INLINE bool any_equal(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)) != 0;
}
VITKD_INLINE Vec::Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
VITKD_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
VITKD_INLINE void split(Vec x, Vec& n, Vec& m) {
  const __m256i bits = _mm256_castps_si256(x.v);
  n = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(126)));
  const __m256i mantissa = _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff));
  m = _mm256_castsi256_ps(_mm256_or_si256(mantissa, _mm256_set1_epi32(0x3f000000)));
}
VITKD_INLINE Vec select(Vec::Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, m); }
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
VITKD_INLINE Vec exp(Vec x, Vec::Mask& normal) {
  normal = _mm256_cmp_ps(x.v, _mm256_set1_ps(kExpLowest), _CMP_NLT_UQ);
  const __m256 t = _mm256_fmadd_ps(x.v, _mm256_set1_ps(kLog2E), _mm256_set1_ps(kRound));
  const __m256 n = _mm256_sub_ps(t, _mm256_set1_ps(kRound));
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Hi), x.v);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Lo), r);
  __m256 y = _mm256_set1_ps(kExpPoly[0]);
  for (int i = 1; i < 7; ++i) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(kExpPoly[i]));
  // multiplied and not added to the exponent, so that a NaN stays one
  const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
  const __m256i scale = _mm256_add_epi32(bits, _mm256_castps_si256(_mm256_set1_ps(1.0f)));
  return _mm256_and_ps(normal, _mm256_mul_ps(y, _mm256_castsi256_ps(scale)));
}

VITKD_INLINE Vec exp(Vec x) {
  Vec::Mask normal;
  return exp(x, normal);
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
  return select(less(x, Vec{INFINITY}), y, x);  // a NaN stays one
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
#endif  // __x86_64__
