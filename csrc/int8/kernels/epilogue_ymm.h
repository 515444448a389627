// From 32-bit sums to bytes in 256-bit registers, for AVX2 and AVX-VNNI: an fma (kMagicBits),
// cvtps2dq, and packs with saturation, or no conversion (kBitsGrid). The files that include this
// name their instruction set: VITKD_YMM.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "int8/kernels/kernels.h"
#include "simd/target.h"

namespace vitkd::int8 {
namespace {

// two vectors of 8 lanes in the order that packing them leaves: 0-3 and 8-11, 4-7 and 12-15
inline int halves_order(int, int, int lane) { return lane % 8 / 4 * 8 + lane / 8 * 4 + lane % 4; }

inline int in_order(int, int, int lane) { return lane; }

}  // namespace
}  // namespace vitkd::int8

VITKD_TARGET_BEGIN(VITKD_YMM)
#include "int8/kernels/unroll.h"

namespace vitkd::int8 {
namespace {

constexpr int kYmm = 32;  // bytes of a register

// the epilogue's constants, in memory: registers belong to the accumulators
struct EpilogueConstants {
  alignas(kYmm) int16_t zero_point[16];
  alignas(kYmm) uint8_t lo[kYmm], hi[kYmm];
  alignas(kYmm) float hardswish_scale[8], residual_multiplier[8];
  alignas(kYmm) int32_t residual_zero_point[8];
  bool bits, shifts, clamps;
};

inline EpilogueConstants epilogue_constants(const Epilogue& e, bool bits) {
  const Requantize& r = e.requantize;
  EpilogueConstants f;
  std::fill_n(f.zero_point, 16, static_cast<int16_t>(r.zero_point));
  std::fill_n(f.lo, kYmm, static_cast<uint8_t>(r.lo));
  std::fill_n(f.hi, kYmm, static_cast<uint8_t>(r.hi));
  std::fill_n(f.hardswish_scale, 8, r.hardswish_scale);
  std::fill_n(f.residual_multiplier, 8, e.residual_multiplier);
  std::fill_n(f.residual_zero_point, 8, e.residual_zero_point);
  f.bits = bits;
  f.shifts = !bits && r.zero_point != 0;
  f.clamps = r.lo != 0 || r.hi != 255;
  return f;
}

template <class T>
VITKD_INLINE __m256i load(const T* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
VITKD_INLINE __m128i load16(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
VITKD_INLINE void store(uint8_t* p, __m256i x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
}
VITKD_INLINE void store16(uint8_t* p, __m128i x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
}

// `p` and all else in memory is loaded again after this: nothing of it holds a register across a
// main loop
VITKD_INLINE void forget(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

VITKD_INLINE __m256 product(__m256i acc, const float* m, const float* shift, bool magic) {
  const __m256 sum = magic ? _mm256_castsi256_ps(acc) : _mm256_cvtepi32_ps(acc);
  return _mm256_fmadd_ps(sum, _mm256_load_ps(m), _mm256_load_ps(shift));
}

VITKD_INLINE __m256 hardswish(__m256 t, const EpilogueConstants& f) {
  __m256 u = _mm256_add_ps(t, _mm256_set1_ps(3.0f));
  u = _mm256_min_ps(_mm256_max_ps(u, _mm256_setzero_ps()), _mm256_set1_ps(6.0f));
  return _mm256_mul_ps(_mm256_mul_ps(t, u), _mm256_load_ps(f.hardswish_scale));
}

VITKD_INLINE __m256 centred(__m256i q, __m256i zero_point) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(q, zero_point));
}

VITKD_INLINE __m256 plus_residual(__m256 v, __m256i q, const EpilogueConstants& f) {
  const __m256 b = centred(q, load(f.residual_zero_point));
  return _mm256_add_ps(v, _mm256_mul_ps(b, _mm256_load_ps(f.residual_multiplier)));
}

// 16 bytes as two vectors of integers in halves_order
VITKD_INLINE void widen(const uint8_t* p, __m256i (&to)[2]) {
  const __m256i words = _mm256_cvtepu8_epi16(load16(p)), zero = _mm256_setzero_si256();
  to[0] = _mm256_unpacklo_epi16(words, zero);
  to[1] = _mm256_unpackhi_epi16(words, zero);
}

// words from two vectors of values (bits: bytes already)
VITKD_INLINE __m256i pack_values(__m256 a, __m256 b, const EpilogueConstants& f) {
  if (f.bits) return _mm256_packus_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b));
  return _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
}

// bytes from two vectors of words, within 128-bit halves
VITKD_INLINE __m256i pack_words(__m256i ab, __m256i cd, const EpilogueConstants& f) {
  if (f.shifts) {
    ab = _mm256_adds_epi16(ab, load(f.zero_point));
    cd = _mm256_adds_epi16(cd, load(f.zero_point));
  }
  __m256i y = _mm256_packus_epi16(ab, cd);
  if (f.clamps) {
    y = _mm256_max_epu8(y, load(f.lo));
    y = _mm256_min_epu8(y, load(f.hi));
  }
  return y;
}

// 16 bytes of each of two pixels, whose words are in halves_order
VITKD_INLINE __m256i pack_pixels(__m256i first, __m256i second, const EpilogueConstants& f) {
  return _mm256_permute4x64_epi64(pack_words(first, second, f), 0xD8);
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END
