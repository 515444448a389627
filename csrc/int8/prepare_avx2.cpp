// The passes of a resize with AVX2. vpmaddwd multiplies 16 bits by 16 and adds two products, so a
// weight w is split into upper * 2^16 + lower, both signed: two sums, exact modulo 2^32, of which
// the first is shifted at the end.

#include "int8/prepare_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "simd/target.h"

namespace vitkd::int8 {
namespace {

constexpr int kCarry = 1 << 15;  // of a lower half that is negative

VITKD_TARGET_BEGIN(VITKD_AVX2)

struct Sums {
  __m256i upper, lower;

  VITKD_INLINE void clear() { upper = lower = _mm256_setzero_si256(); }
  // of words, two to a sum; asm keeps gcc from forming products early and spilling sums
  VITKD_INLINE void add(__m256i pixels, __m256i uppers, __m256i lowers) {
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
        : "+x"(upper), "=&x"(products)
        : "x"(pixels), "x"(uppers));
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
        : "+x"(lower), "=&x"(products)
        : "x"(pixels), "x"(lowers));
  }
  VITKD_INLINE __m256i total() const {
    return _mm256_add_epi32(_mm256_slli_epi32(upper, 16), lower);
  }
};

VITKD_INLINE __m256i rounded(__m256i sums) {
  const __m256i half = _mm256_set1_epi32(1 << (kWeightBits - 1));
  return _mm256_srai_epi32(_mm256_add_epi32(sums, half), kWeightBits);
}

VITKD_INLINE __m256i word_pairs(int a, int b) { return _mm256_set1_epi32((a & 0xFFFF) | b << 16); }

// Four pixels a step: the lower half of a register holds the first two, red, green and blue of both
// side by side, as words, and 0; the upper half the other two.
void along_rows(const uint8_t* const* rows, const Weights& columns, uint8_t* const* out) {
  const __m256i pairs =
      _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, 6, -1, 9, -1, 7,
                       -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  const __m256i lower_words =
      _mm256_setr_epi8(0, 1, 4, 5, 0, 1, 4, 5, 0, 1, 4, 5, 0, 1, 4, 5,  //
                       8, 9, 12, 13, 8, 9, 12, 13, 8, 9, 12, 13, 8, 9, 12, 13);
  const __m256i upper_words = _mm256_add_epi8(lower_words, _mm256_set1_epi8(2));
  const __m256i carry = _mm256_set1_epi32(kCarry);
  for (int x = 0; x < columns.results(); ++x) {
    const auto [first, count] = columns.windows[x];
    const int32_t* weights = columns.of(x);
    Sums sums[kRows];
    for (Sums& sum : sums) sum.clear();
    for (int k = 0; k < count; k += 4) {
      const __m256i four = _mm256_broadcastsi128_si256(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + k)));
      const __m256i lowers = _mm256_shuffle_epi8(four, lower_words);
      const __m256i uppers = _mm256_shuffle_epi8(_mm256_add_epi32(four, carry), upper_words);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const __m256i pixels = _mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + 3 * (first + k))));
        sums[row].add(_mm256_shuffle_epi8(pixels, pairs), uppers, lowers);
      }
    }
    // a pixel of rows 0 and 2, and of rows 1 and 3
    __m256i two[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i a = sums[2 * i].total(), b = sums[2 * i + 1].total();
      two[i] = rounded(_mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                                        _mm256_permute2x128_si256(a, b, 0x31)));
    }
    const __m256i words = _mm256_packs_epi32(two[0], two[1]);
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const __m128i even = _mm256_castsi256_si128(bytes), odd = _mm256_extracti128_si256(bytes, 1);
    const int pixel[kRows] = {_mm_cvtsi128_si32(even), _mm_cvtsi128_si32(odd),
                              _mm_extract_epi32(even, 1), _mm_extract_epi32(odd, 1)};
    // the fourth byte is the next pixel's
    for (int row = 0; row < kRows; ++row) std::memcpy(out[row] + 3 * x, pixel + row, 4);
  }
}

void along_columns(const uint8_t* const* rows, const int32_t* weights, int taps, int bytes,
                   uint8_t* out) {
  const __m256i zero = _mm256_setzero_si256();
  for (int from = 0; from < bytes; from += 32) {
    Sums sums[4];
    for (Sums& sum : sums) sum.clear();
    for (int k = 0; k < taps; k += 2) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[k] + from));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[k + 1] + from));
      const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      const __m256i lowers = word_pairs(weights[k], weights[k + 1]);
      const __m256i uppers =
          word_pairs((weights[k] + kCarry) >> 16, (weights[k + 1] + kCarry) >> 16);
      sums[0].add(_mm256_unpacklo_epi8(low, zero), uppers, lowers);
      sums[1].add(_mm256_unpackhi_epi8(low, zero), uppers, lowers);
      sums[2].add(_mm256_unpacklo_epi8(high, zero), uppers, lowers);
      sums[3].add(_mm256_unpackhi_epi8(high, zero), uppers, lowers);
    }
    const __m256i low = _mm256_packs_epi32(rounded(sums[0].total()), rounded(sums[1].total()));
    const __m256i high = _mm256_packs_epi32(rounded(sums[2].total()), rounded(sums[3].total()));
    const __m256i results = _mm256_packus_epi16(low, high);
    if (bytes - from >= 32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + from), results);
    } else {
      std::memcpy(out + from, &results, static_cast<size_t>(bytes - from));
    }
  }
}

VITKD_TARGET_END

}  // namespace

const Passes kAvx2Passes{along_rows, along_columns};

}  // namespace vitkd::int8

#endif
