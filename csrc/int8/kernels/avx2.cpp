// The kernels in AVX2: products by pairs of bytes (pairs.h), depthwise convolutions by words.

#if defined(__x86_64__)

#define VITKD_YMM VITKD_AVX2

#include <immintrin.h>

#include <algorithm>

#include "simd/target.h"

VITKD_TARGET_BEGIN(VITKD_YMM)
namespace vitkd::int8 {
namespace {

alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

struct Dot {
  static constexpr bool kWords = true;
  // asm keeps gcc from forming products early and adding them up late, which spills them
  static VITKD_INLINE void add(__m256i& acc, __m256i x, __m256i w) {
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(x), "xm"(w));
  }
  static VITKD_INLINE void add_bytes(__m256i& acc, __m256i x, __m256i w) {
    // the 1s in memory: 12 accumulators, two weights, bytes and products take all registers
    __m256i pairs = _mm256_maddubs_epi16(x, w);
    asm("vpmaddwd %1, %0, %0" : "+x"(pairs) : "m"(kOnes));
    acc = _mm256_add_epi32(acc, pairs);
  }
};

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

#include "int8/kernels/avx2_sliding.h"
#include "int8/kernels/gemm_ymm.h"
#include "int8/kernels/pairs.h"

VITKD_TARGET_BEGIN(VITKD_YMM)
namespace vitkd::int8 {
namespace {

// ---- elementwise ----

VITKD_INLINE void store_value(uint8_t* y, const __m256 (&v)[2], const EpilogueConstants& f) {
  const __m256i words = pack_values(v[0], v[1], f);
  store16(y, _mm256_castsi256_si128(pack_pixels(words, words, f)));
}

void add(const uint8_t* a, int z_a, float m_a, const uint8_t* b, int z_b, float m_b,
         const Requantize& requantize, int64_t n, uint8_t* y) {
  const EpilogueConstants f = epilogue_constants({requantize, EpilogueKind::bytes, 0, 0}, false);
  const __m256i zero_a = _mm256_set1_epi32(z_a), zero_b = _mm256_set1_epi32(z_b);
  const __m256 scale_a = _mm256_set1_ps(m_a), scale_b = _mm256_set1_ps(m_b);
  for (int64_t i = 0; i < n; i += 16) {
    __m256i q_a[2], q_b[2];
    widen(a + i, q_a), widen(b + i, q_b);
    __m256 v[2];
    for (int h = 0; h < 2; ++h) {
      v[h] = _mm256_mul_ps(centred(q_a[h], zero_a), scale_a);
      v[h] = _mm256_add_ps(v[h], _mm256_mul_ps(centred(q_b[h], zero_b), scale_b));
    }
    store_value(y + i, v, f);
  }
}

void channel_sums(const uint8_t* x, int64_t pixels, int64_t pixel, int64_t channels,
                  int32_t* sums) {
  for (int64_t c = 0; c < channels; c += 16) {
    const uint8_t* p = x + c;
    __m256i low = load(sums + c), high = load(sums + c + 8);
    for (int64_t left = pixels; left > 0; left -= 256) {
      __m256i part = _mm256_setzero_si256();
      for (int64_t i = std::min<int64_t>(left, 256); i > 0; --i, p += pixel) {
        part = _mm256_add_epi16(part, _mm256_cvtepu8_epi16(load16(p)));
      }
      low = _mm256_add_epi32(low, _mm256_cvtepu16_epi32(_mm256_castsi256_si128(part)));
      high = _mm256_add_epi32(high, _mm256_cvtepu16_epi32(_mm256_extracti128_si256(part, 1)));
    }
    store(reinterpret_cast<uint8_t*>(sums + c), low);
    store(reinterpret_cast<uint8_t*>(sums + c + 8), high);
  }
}

void scale(const uint8_t* x, int z, const float* factor, const Requantize& requantize,
           int64_t pixels, int64_t pixel, uint8_t* y) {
  const EpilogueConstants f = epilogue_constants({requantize, EpilogueKind::bytes, 0, 0}, false);
  const __m256i zero = _mm256_set1_epi32(z);
  for (int64_t c = 0; c < pixel; c += 16) {
    // in halves_order
    const __m256 first = _mm256_loadu_ps(factor + c), second = _mm256_loadu_ps(factor + c + 8);
    const __m256 factors[2] = {_mm256_permute2f128_ps(first, second, 0x20),
                               _mm256_permute2f128_ps(first, second, 0x31)};
    for (int64_t p = 0; p < pixels; ++p) {
      __m256i q[2];
      widen(x + p * pixel + c, q);
      __m256 v[2];
      for (int h = 0; h < 2; ++h) v[h] = _mm256_mul_ps(centred(q[h], zero), factors[h]);
      store_value(y + p * pixel + c, v, f);
    }
  }
}

void linear(const int8_t* q, int64_t stride, const float* s, const int32_t* inputs, const float* x,
            int count, int out, float* h) {
  // four vectors at once: additions to one sum wait for each other
  for (int j = 0; j < out; j += 32) {
    __m256 sum[4], scale[4];
    const int vectors = std::min(4, (out - j) / 8);
    for (int v = 0; v < 4; ++v) {
      sum[v] = v < vectors ? _mm256_loadu_ps(h + j + v * 8) : _mm256_setzero_ps();
      scale[v] = v < vectors ? _mm256_loadu_ps(s + j + v * 8) : _mm256_setzero_ps();
    }
    // what lies past `out` is computed and thrown away: rows have slack
    for (int i = 0; i < count; ++i) {
      const int8_t* from = q + inputs[i] * stride + j;
      const __m256 input = _mm256_set1_ps(x[i]);
      _mm_prefetch(reinterpret_cast<const char*>(from + 16 * stride), _MM_HINT_T0);
      VITKD_UNROLL(4, v) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + v * 8));
        const __m256 w = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), scale[v]);
        sum[v] = _mm256_add_ps(sum[v], _mm256_mul_ps(w, input));
      }
      VITKD_END;
    }
    for (int v = 0; v < vectors; ++v) _mm256_storeu_ps(h + j + v * 8, sum[v]);
  }
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

namespace vitkd::int8 {
namespace {

void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  const bool logits = spec.epilogue.kind == EpilogueKind::logits;
  pack_pairs(spec, pixel, logits ? in_order : halves_order, kRows, packed);
}

void gemm(const Packed& packed, const GemmCall& call) { multiply_in_order(packed, call, multiply); }

const char* gemm_name(const Packed&, const GemmCall& call) {
  return call.pixels < kRows ? "gemm_u8s8_1x16_avx2" : "gemm_u8s8_6x16_avx2";
}

const char* depthwise_name(const Packed& packed, const DepthwiseCall&) {
  const bool two_rows = packed.spec.stride_h == 1;
  if (packed.slides) {
    return two_rows ? "depthwise_3x3_sliding_2x1x16_avx2" : "depthwise_3x3_sliding_1x1x16_avx2";
  }
  return two_rows ? "depthwise_2x4x16_avx2" : "depthwise_1x4x16_avx2";
}

}  // namespace

const Kernels kAvx2{Isa::avx2, gemm_name, depthwise_name, pack_gemm, gemm,  pack_depthwise,
                    depthwise, add,       channel_sums,   scale,     linear};

}  // namespace vitkd::int8

#endif
