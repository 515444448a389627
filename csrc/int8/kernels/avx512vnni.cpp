// The kernels in AVX-512 VNNI. Roof: two vpdpbusd a cycle, 128 multiply-adds; everything else that
// needs a vector port (conversion, packing, byte interleaving) takes from it.
// Depthwise convolutions have a file of their own.

#if defined(__x86_64__)

#define VITKD_ZMM VITKD_VNNI

#include <chrono>
#include <cstring>

#include "int8/kernels/epilogue_avx512.h"

VITKD_TARGET_BEGIN(VITKD_ZMM)
namespace vitkd::int8 {
namespace {

struct Dot {
  static constexpr bool kPairs = false;
  static VITKD_INLINE void add(__m512i& acc, __m512i x, __m512i w) { dot4(acc, x, w); }
};

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

#include "int8/kernels/gemm_zmm.h"

namespace vitkd::int8 {
VITKD_TARGET_BEGIN(VITKD_ZMM)
namespace {

// ---- elementwise ----

VITKD_INLINE __m512 centred(const uint8_t* x, __m512i zero_point) {
  const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(q, zero_point));
}

VITKD_INLINE void store16(uint8_t* y, __m512 v, const EpilogueConstants& f) {
  const __m512i dword = _mm512_cvtps_epi32(v);
  __m256i word = _mm512_cvtsepi32_epi16(dword);
  word = _mm256_adds_epi16(word, *reinterpret_cast<const __m256i*>(f.zero_point));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(word, word), 0x08);
  __m128i byte = _mm256_castsi256_si128(packed);
  byte = _mm_max_epu8(byte, *reinterpret_cast<const __m128i*>(f.lo));
  byte = _mm_min_epu8(byte, *reinterpret_cast<const __m128i*>(f.hi));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), byte);
}

void add(const uint8_t* a, int z_a, float m_a, const uint8_t* b, int z_b, float m_b,
         const Requantize& requantize, int64_t n, uint8_t* y) {
  const EpilogueConstants f = epilogue_constants({requantize, EpilogueKind::bytes, 0, 0}, false);
  const __m512i zero_a = _mm512_set1_epi32(z_a), zero_b = _mm512_set1_epi32(z_b);
  const __m512 scale_a = _mm512_set1_ps(m_a), scale_b = _mm512_set1_ps(m_b);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 v = _mm512_mul_ps(centred(a + i, zero_a), scale_a);
    store16(y + i, _mm512_add_ps(v, _mm512_mul_ps(centred(b + i, zero_b), scale_b)), f);
  }
}

void channel_sums(const uint8_t* x, int64_t pixels, int64_t pixel, int64_t channels,
                  int32_t* sums) {
  for (int64_t c = 0; c < channels; c += 16) {
    const uint8_t* p = x + c;
    __m512i sum = _mm512_loadu_si512(sums + c);
    for (int64_t left = pixels; left > 0; left -= 256) {
      __m256i part = _mm256_setzero_si256();
      for (int64_t i = std::min<int64_t>(left, 256); i > 0; --i, p += pixel) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        part = _mm256_add_epi16(part, _mm256_cvtepu8_epi16(bytes));
      }
      sum = _mm512_add_epi32(sum, _mm512_cvtepu16_epi32(part));
    }
    _mm512_storeu_si512(sums + c, sum);
  }
}

void scale(const uint8_t* x, int z, const float* factor, const Requantize& requantize,
           int64_t pixels, int64_t pixel, uint8_t* y) {
  const EpilogueConstants f = epilogue_constants({requantize, EpilogueKind::bytes, 0, 0}, false);
  const __m512i zero = _mm512_set1_epi32(z);
  for (int64_t c = 0; c < pixel; c += 64) {
    __m512 factors[4];  // in packed_order
    alignas(kLine) float lanes[16];
    for (int v = 0; v < 4; ++v) {
      for (int i = 0; i < 16; ++i) lanes[i] = factor[c + packed_order(4, v, i)];
      factors[v] = _mm512_load_ps(lanes);
    }
    const __mmask64 mask = ~uint64_t{0} >> (64 - std::min<int64_t>(64, pixel - c));
    for (int64_t p = 0; p < pixels; ++p) {
      const __m512i bytes = _mm512_loadu_si512(x + p * pixel + c);
      __m512 v[4];
      VITKD_UNROLL(4, i) {
        const __m512i q = _mm512_sub_epi32(spread<i>(bytes), zero);
        v[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(q), factors[i]);
      }
      VITKD_END;
      _mm512_mask_storeu_epi8(y + p * pixel + c, mask, pack4(v[0], v[1], v[2], v[3], f));
    }
  }
}

void linear(const int8_t* q, int64_t stride, const float* s, const int32_t* inputs, const float* x,
            int count, int out, float* h) {
  // eight vectors at once: additions to one sum wait for each other
  for (int j = 0; j < out; j += 128) {
    const int vectors = std::min(8, (out - j) / 16);
    __m512 sum[8] = {}, scale[8] = {};
    for (int v = 0; v < vectors; ++v) {
      sum[v] = _mm512_loadu_ps(h + j + v * 16);
      scale[v] = _mm512_loadu_ps(s + j + v * 16);
    }
    const auto rows = [&]<int kVectors>() __attribute__((always_inline)) {
      for (int i = 0; i < count; ++i) {
        const int8_t* from = q + inputs[i] * stride + j;
        const __m512 input = _mm512_set1_ps(x[i]);
        _mm_prefetch(from + 16 * stride, _MM_HINT_T0);
        _mm_prefetch(from + 16 * stride + 64, _MM_HINT_T0);
        VITKD_UNROLL(kVectors, v) {
          const auto* bytes = reinterpret_cast<const __m128i*>(from + v * 16);
          const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes));
          const __m512 w = _mm512_mul_ps(_mm512_cvtepi32_ps(wide), scale[v]);
          sum[v] = _mm512_add_ps(sum[v], _mm512_mul_ps(w, input));
        }
        VITKD_END;
      }
    };
    // what lies past `out` is computed and thrown away: rows have slack
    vectors > 4   ? rows.template operator()<8>()
    : vectors > 2 ? rows.template operator()<4>()
                  : rows.template operator()<2>();
    for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(h + j + v * 16, sum[v]);
  }
}

// what an instruction that adds products reaches on registers, twelve at a time
template <class F>
VITKD_INLINE void loop(int64_t rounds, F&& instruction) {
  __m512i acc[12] = {};
  for (int64_t i = 0; i < rounds; ++i) {
    VITKD_UNROLL(12, r) { instruction(acc[r]); }
    VITKD_END;
  }
  VITKD_UNROLL(12, r) { asm volatile("" : : "v"(acc[r])); }
  VITKD_END;
}

void dot_loop(int64_t rounds) {
  const __m512i x = _mm512_set1_epi8(3), w = _mm512_set1_epi8(-5);
  loop(rounds, [&](__m512i& acc) __attribute__((always_inline)) { dot4(acc, x, w); });
}

void fma_loop(int64_t rounds) {
  const __m512 x = _mm512_set1_ps(0.5f);
  loop(rounds, [&](__m512i& acc) __attribute__((always_inline)) {
    asm("vfmadd231ps %1, %1, %0" : "+v"(acc) : "v"(x));
  });
}

// multiply-adds a second, the best of many tries
double peak(double seconds, void (*loop)(int64_t), int at_once) {
  constexpr int64_t kRounds = 20000;
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch());
  };
  double best = 0;
  for (const auto start = now(); (now() - start).count() < seconds;) {
    const auto begin = now();
    loop(kRounds);
    best = std::max(best, 12.0 * at_once * kRounds / (now() - begin).count());
  }
  return best;
}

}  // namespace
VITKD_TARGET_END

namespace {

void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  const bool magic = spec.epilogue.kind != EpilogueKind::logits;
  lay_out_gemm<int8_t>(spec, pixel, {4, 0, 0, magic, gemm_order(spec)}, packed);
}

const char* gemm_name(const Packed& packed, const GemmCall& call) {
  static constexpr const char* kOne[] = {"gemm_u8s8_1x16_avx512vnni", "gemm_u8s8_1x32_avx512vnni",
                                         "gemm_u8s8_1x48_avx512vnni", "gemm_u8s8_1x64_avx512vnni"};
  static constexpr const char* kMany[] = {"gemm_u8s8_16x16_avx512vnni",
                                          "gemm_u8s8_12x32_avx512vnni", "gemm_u8s8_8x48_avx512vnni",
                                          "gemm_u8s8_6x64_avx512vnni"};
  const int vectors = packed.panels[call.panel].vectors;  // none is wider than the first
  return (call.pixels < kPixels[vectors] ? kOne : kMany)[vectors - 1];
}

}  // namespace

double vnni_peak(double seconds) {
  return contains(selected_isa(), Isa::avx512vnni) ? peak(seconds, dot_loop, 64) : 0;
}
double fma_peak(double seconds) {
  return contains(selected_isa(), Isa::avx512vnni) ? peak(seconds, fma_loop, 16) : 0;
}

const Kernels kAvx512Vnni{
    Isa::avx512vnni, gemm_name, depthwise_name_vnni, pack_gemm, multiply, pack_depthwise_vnni,
    depthwise_vnni,  add,       channel_sums,        scale,     linear};

}  // namespace vitkd::int8

#endif
