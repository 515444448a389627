// The kernels in AVX-512 VNNI. Roof: two vpdpbusd a cycle, 128 multiply-adds; everything else that
// needs a vector port (conversion, packing, byte interleaving) takes from it.
//
// Pointwise: tiles of pixels x channels (6x64, 8x48, 12x32, 16x16), four bytes of a pixel broadcast
// to all lanes. Depthwise convolutions have a file of their own.

#if defined(__x86_64__)

#include <chrono>
#include <cstring>

#include "int8/kernels/epilogue_avx512.h"

namespace vitkd::int8 {
VITKD_TARGET_BEGIN(VITKD_VNNI)
namespace {

constexpr int kPixels[] = {0, 16, 12, 8, 6};  // of a tile, by its vectors of channels
constexpr int kAhead = 8 << 10;               // bytes that a single pass over weights fetches ahead

struct GemmTile {
  const uint8_t* const* x;
  int64_t x_offset;
  int64_t x_pixel;
  int64_t segments;
  int64_t steps;
  int64_t skipped;      // bytes of weights between segments
  const uint8_t* next;  // weights that will be needed soon, fetched to L2 a line a step
  const uint8_t* weights;
  Destination to;
};

// MR pixels and NV vectors of channels
template <int MR, int NV, EpilogueKind kKind>
VITKD_INLINE void gemm_tile(const GemmTile& t) {
  __m512i acc[MR][NV];
  VITKD_UNROLL(NV, v) {
    const __m512i bias = _mm512_load_si512(t.to.constants + v * kLine);
    VITKD_UNROLL(MR, r) { acc[r][v] = bias; }
    VITKD_END;
  }
  VITKD_END;
  {
    const int64_t x_pixel = t.x_pixel;
    const uint8_t* w = t.weights;
    const uint8_t* next = t.next;
    for (int64_t segment = 0; segment < t.segments; ++segment, w += t.skipped) {
      const uint8_t* x = t.x[segment] + t.x_offset;
      for (int64_t step = t.steps; step > 0; --step, x += 4, w += NV * kLine, next += kLine) {
        if constexpr (MR == 1) {
          VITKD_UNROLL(NV, v) { _mm_prefetch(w + v * kLine + kAhead, _MM_HINT_T1); }
          VITKD_END;
        } else {
          _mm_prefetch(next, _MM_HINT_T1);
        }
        __m512i weights[NV];
        VITKD_UNROLL(NV, v) { weights[v] = _mm512_load_si512(w + v * kLine); }
        VITKD_END;
        VITKD_UNROLL(MR, r) {
          int32_t four;
          std::memcpy(&four, x + r * x_pixel, 4);
          const __m512i bytes = _mm512_set1_epi32(four);
          VITKD_UNROLL(NV, v) { dot4(acc[r][v], bytes, weights[v]); }
          VITKD_END;
        }
        VITKD_END;
      }
    }
  }
  forget(&t);
  store_tile<MR, NV, kKind>(acc, t.to);
}

template <int MR, int NV, EpilogueKind kKind>
void gemm_panel(const Packed& packed, const Packed::Panel& panel, const GemmCall& call,
                int64_t first, int64_t end) {
  GemmTile t;
  t.x = call.x;
  t.x_offset = first * call.x_pixel;
  t.x_pixel = call.x_pixel;
  t.segments = packed.segments;
  t.steps = packed.steps;
  t.skipped = int64_t{packed.stride - packed.steps} * NV * kLine;
  t.weights = packed.data + panel.weights;
  t.to = destination(packed, panel, call, first);
  // what follows is the next panel or the next layer's first; the fetching gets further ahead of
  // the arithmetic where pixels are many, and lives on it where they are few
  const int64_t bytes_of_tile = int64_t{packed.segments} * packed.steps * kLine;
  const uint8_t* const soon = t.weights + int64_t{packed.segments} * packed.stride * NV * kLine;
  t.next = call.fetched == nullptr ? soon : std::max(*call.fetched, soon);
  const auto advance = [&](int64_t pixels) __attribute__((always_inline)) {
    t.x_offset += pixels * t.x_pixel;
    t.to.advance(pixels);
    if (t.next - soon < kFar) t.next += bytes_of_tile;
    if (call.fetched != nullptr) *call.fetched = t.next;
  };
  int64_t left = end - first;
  for (; left >= MR; left -= MR) {
    gemm_tile<MR, NV, kKind>(t);
    advance(MR);
  }
  if (left > 2 && end - first >= MR) {
    advance(left - MR);  // again what lies before: the same bytes
    gemm_tile<MR, NV, kKind>(t);
    return;
  }
  for (; left > 0; --left) {
    gemm_tile<1, NV, kKind>(t);
    advance(1);
  }
}

template <EpilogueKind kKind>
void gemm_panels(const Packed& packed, const GemmCall& call) {
  // pixels that stay in L1 while the panels pass by, unless re-reading the weights would cost more
  const int64_t depth = int64_t{4} * packed.segments * packed.steps;
  int64_t chunk = std::max<int64_t>(48, (20 << 10) / depth / 48 * 48);
  if (packed.spec.out * depth > (256 << 10)) chunk = std::max<int64_t>(chunk, call.pixels);
  for (int64_t first = 0; first < call.pixels; first += chunk) {
    const int64_t end = std::min(first + chunk, call.pixels);
    for (int i = call.panel; i < call.panel_end; ++i) {
      const Packed::Panel& panel = packed.panels[i];
      switch (panel.vectors) {
        case 1:
          gemm_panel<kPixels[1], 1, kKind>(packed, panel, call, first, end);
          break;
        case 2:
          gemm_panel<kPixels[2], 2, kKind>(packed, panel, call, first, end);
          break;
        case 3:
          gemm_panel<kPixels[3], 3, kKind>(packed, panel, call, first, end);
          break;
        default:
          gemm_panel<kPixels[4], 4, kKind>(packed, panel, call, first, end);
      }
    }
  }
}

void gemm(const Packed& packed, const GemmCall& call) {
  switch (packed.spec.epilogue.kind) {
    case EpilogueKind::bytes:
      return gemm_panels<EpilogueKind::bytes>(packed, call);
    case EpilogueKind::hardswish:
      return gemm_panels<EpilogueKind::hardswish>(packed, call);
    case EpilogueKind::residual:
      return gemm_panels<EpilogueKind::residual>(packed, call);
    case EpilogueKind::logits:
      return gemm_panels<EpilogueKind::logits>(packed, call);
  }
}

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
  for (int64_t p = 0; p < pixels; ++p, x += pixel, y += pixel) {
    for (int64_t c = 0; c < pixel; c += 16) {
      store16(y + c, _mm512_mul_ps(centred(x + c, zero), _mm512_loadu_ps(factor + c)), f);
    }
  }
}

void linear(const int8_t* q, int64_t stride, const float* s, const float* x, int in, int out,
            float* h) {
  // eight vectors at once: additions to one sum wait for each other
  for (int j = 0; j < out; j += 128) {
    const int vectors = std::min(8, (out - j) / 16);
    __m512 sum[8] = {}, scale[8] = {};
    for (int v = 0; v < vectors; ++v) {
      sum[v] = _mm512_loadu_ps(h + j + v * 16);
      scale[v] = _mm512_loadu_ps(s + j + v * 16);
    }
    const int8_t* from = q + j;
    const auto rows = [&]<int kVectors>() __attribute__((always_inline)) {
      for (int c = 0; c < in; ++c, from += stride) {
        const __m512 mean = _mm512_set1_ps(x[c]);
        _mm_prefetch(from + 16 * stride, _MM_HINT_T0);
        _mm_prefetch(from + 16 * stride + 64, _MM_HINT_T0);
        VITKD_UNROLL(kVectors, v) {
          const auto* bytes = reinterpret_cast<const __m128i*>(from + v * 16);
          const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes));
          const __m512 w = _mm512_mul_ps(_mm512_cvtepi32_ps(wide), scale[v]);
          sum[v] = _mm512_add_ps(sum[v], _mm512_mul_ps(w, mean));
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
  lay_out_gemm(spec, pixel, {4, 0, 0, magic, gemm_order(spec)}, packed);
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
    Isa::avx512vnni, gemm_name, depthwise_name_vnni, pack_gemm, gemm,  pack_depthwise_vnni,
    depthwise_vnni,  add,       channel_sums,        scale,     linear};

}  // namespace vitkd::int8

#endif
