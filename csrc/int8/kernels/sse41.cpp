// The kernels in SSE4.1, for CPUs without AVX2: Intel's Atoms up to Tremont among them. Bytes
// become words, and pmaddwd multiplies and adds pairs of them: 8 multiply-adds on three
// instructions.

#if defined(__x86_64__)

#define VITKD_SSE41 "sse4.1"

#include <smmintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "int8/kernels/kernels.h"
#include "simd/target.h"

VITKD_TARGET_BEGIN(VITKD_SSE41)
#include "int8/kernels/unroll.h"

namespace vitkd::int8 {
namespace {

// 16 channels
using Sums = __m128i[4];
using Values = __m128[4];

template <class T>
VITKD_INLINE __m128i load(const T* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

template <class T>
VITKD_INLINE void store(T* p, __m128i x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
}

// 16 bytes as integers
VITKD_INLINE void widen(const uint8_t* p, Sums& to) {
  const __m128i bytes = load(p), zero = _mm_setzero_si128();
  const __m128i low = _mm_unpacklo_epi8(bytes, zero), high = _mm_unpackhi_epi8(bytes, zero);
  to[0] = _mm_unpacklo_epi16(low, zero), to[1] = _mm_unpackhi_epi16(low, zero);
  to[2] = _mm_unpacklo_epi16(high, zero), to[3] = _mm_unpackhi_epi16(high, zero);
}

// float(q - zero_point) of 16 bytes
VITKD_INLINE void centre(const uint8_t* p, int zero_point, Values& to) {
  Sums q;
  widen(p, q);
  for (int v = 0; v < 4; ++v) {
    to[v] = _mm_cvtepi32_ps(_mm_sub_epi32(q[v], _mm_set1_epi32(zero_point)));
  }
}

VITKD_INLINE void store_bytes(const Values& v, const Requantize& r, uint8_t* y) {
  const __m128i zero_point = _mm_set1_epi16(static_cast<int16_t>(r.zero_point));
  const auto words = [&](int i) __attribute__((always_inline)) {
    const __m128i both = _mm_packs_epi32(_mm_cvtps_epi32(v[i]), _mm_cvtps_epi32(v[i + 1]));
    return _mm_adds_epi16(both, zero_point);
  };
  __m128i bytes = _mm_packus_epi16(words(0), words(2));
  bytes = _mm_max_epu8(bytes, _mm_set1_epi8(static_cast<char>(r.lo)));
  bytes = _mm_min_epu8(bytes, _mm_set1_epi8(static_cast<char>(r.hi)));
  store(y, bytes);
}

// constants: of the panel; `channels` from its first on; residual: 16 bytes
VITKD_INLINE void store_sums(const Sums& acc, const uint8_t* constants, const Epilogue& e,
                             const uint8_t* residual, int channels, uint8_t* y) {
  const auto* m = reinterpret_cast<const float*>(constants + kLine);
  Values v;
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm_mul_ps(_mm_cvtepi32_ps(acc[i]), _mm_load_ps(m + 4 * i));
    if (e.kind == EpilogueKind::hardswish) {
      __m128 u = _mm_add_ps(v[i], _mm_set1_ps(3.0f));
      u = _mm_min_ps(_mm_max_ps(u, _mm_setzero_ps()), _mm_set1_ps(6.0f));
      v[i] = _mm_mul_ps(_mm_mul_ps(v[i], u), _mm_set1_ps(e.requantize.hardswish_scale));
    }
  }
  if (e.kind == EpilogueKind::residual) {
    Values b;
    centre(residual, e.residual_zero_point, b);
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm_add_ps(v[i], _mm_mul_ps(b[i], _mm_set1_ps(e.residual_multiplier)));
    }
  }
  if (e.kind == EpilogueKind::logits) {
    std::memcpy(y, v, 4 * std::min(channels, 16));
  } else {
    store_bytes(v, e.requantize, y);
  }
}

constexpr int kMaxTaps = 31 * 31;
constexpr int kRows = 3;  // MR: 12 accumulators, a pair of inputs and products take 14 registers

// MR pixels x 16 channels; weights [segments][2 * steps][16][2] are words
template <int MR>
VITKD_INLINE void gemm_tile(const Packed& packed, const Packed::Panel& panel, const GemmCall& call,
                            int64_t first) {
  const uint8_t* constants = packed.data + panel.constants;
  Sums acc[MR];
  VITKD_UNROLL(4 * MR, i) { acc[i / 4][i % 4] = load(constants + i % 4 * 16); }
  VITKD_END;
  const uint8_t* w = packed.data + panel.weights;
  for (int segment = 0; segment < packed.segments; ++segment) {
    const uint8_t* x = call.x[segment] + first * call.x_pixel;
    for (int step = packed.steps; step > 0; --step, x += 4, w += 2 * kLine) {
      VITKD_UNROLL(MR, r) {
        int32_t four;
        std::memcpy(&four, x + r * call.x_pixel, 4);
        const __m128i words = _mm_cvtepu8_epi16(_mm_cvtsi32_si128(four));
        const __m128i pairs[2] = {_mm_shuffle_epi32(words, 0x00), _mm_shuffle_epi32(words, 0x55)};
        VITKD_UNROLL(8, i) {
          __m128i products = pairs[i / 4];
          // asm keeps gcc from loading weights once for all pixels, for which registers lack
          asm("pmaddwd %1, %0"
              : "+x"(products)
              : "m"(*reinterpret_cast<const __m128i*>(w + i * 16)));
          acc[r][i % 4] = _mm_add_epi32(acc[r][i % 4], products);
        }
        VITKD_END;
      }
      VITKD_END;
    }
  }
  const Epilogue& e = packed.spec.epilogue;
  const int channel_bytes = e.kind == EpilogueKind::logits ? 4 : 1;
  for (int r = 0; r < MR; ++r) {
    const uint8_t* residual = call.residual + (first + r) * call.residual_pixel + panel.channel;
    uint8_t* y = call.y + (first + r) * call.y_pixel + panel.channel * channel_bytes;
    store_sums(acc[r], constants, e, residual, packed.spec.out - panel.channel, y);
  }
}

void gemm(const Packed& packed, const GemmCall& call) {
  // pixels that stay in L1 while the panels pass by
  const int64_t depth = int64_t{4} * packed.segments * packed.steps;
  const int64_t chunk = std::max<int64_t>(48, (12 << 10) / depth / kRows * kRows);
  for (int64_t begin = 0; begin < call.pixels; begin += chunk) {
    const int64_t end = std::min(begin + chunk, call.pixels);
    for (int i = call.panel; i < call.panel_end; ++i) {
      const Packed::Panel& panel = packed.panels[i];
      int64_t p = begin;
      for (; p + kRows <= end; p += kRows) gemm_tile<kRows>(packed, panel, call, p);
      for (; p < end; ++p) gemm_tile<1>(packed, panel, call, p);
    }
  }
}

// Pairs of taps: their bytes side by side, widened; weights [pairs][16][2] are words.
void depthwise(const Packed& packed, const DepthwiseCall& call) {
  const ConvSpec& spec = packed.spec;
  const int taps = spec.taps();
  const uint8_t* inputs[kMaxTaps + 1];
  const __m128i zero = _mm_setzero_si128();
  for (int row = call.row; row < call.row_end; ++row) {
    for (int column = 0; column < call.y.width; ++column) {
      for (int tap = 0; tap < taps; ++tap) {
        const int r = row * spec.stride_h - call.top + tap / spec.kernel_w;
        const int c = column * spec.stride_w - call.left + tap % spec.kernel_w;
        const bool inside = c >= 0 && c < call.x.width;
        inputs[tap] = inside ? call.input_row(r) + c * call.x.pixel : call.padding_row;
      }
      inputs[taps] = inputs[0];  // whose second weight is 0
      for (int i = call.panel; i < call.panel_end; ++i) {
        const Packed::Panel& panel = packed.panels[i];
        const uint8_t* constants = packed.data + panel.constants;
        const uint8_t* w = packed.data + panel.weights;
        Sums acc;
        for (int v = 0; v < 4; ++v) acc[v] = load(constants + v * 16);
        for (int tap = 0; tap < taps; tap += 2, w += kLine) {
          const __m128i a = load(inputs[tap] + panel.channel);
          const __m128i b = load(inputs[tap + 1] + panel.channel);
          const __m128i low = _mm_unpacklo_epi8(a, b), high = _mm_unpackhi_epi8(a, b);
          const Sums pairs = {_mm_unpacklo_epi8(low, zero), _mm_unpackhi_epi8(low, zero),
                              _mm_unpacklo_epi8(high, zero), _mm_unpackhi_epi8(high, zero)};
          for (int v = 0; v < 4; ++v) {
            acc[v] = _mm_add_epi32(acc[v], _mm_madd_epi16(pairs[v], load(w + v * 16)));
          }
        }
        uint8_t* y = call.y.row(row) + column * call.y.pixel + panel.channel;
        store_sums(acc, constants, spec.epilogue, nullptr, spec.out - panel.channel, y);
      }
    }
  }
}

void add(const uint8_t* a, int z_a, float m_a, const uint8_t* b, int z_b, float m_b,
         const Requantize& requantize, int64_t n, uint8_t* y) {
  for (int64_t i = 0; i < n; i += 16) {
    Values of_a, of_b;
    centre(a + i, z_a, of_a), centre(b + i, z_b, of_b);
    for (int v = 0; v < 4; ++v) {
      of_a[v] = _mm_mul_ps(of_a[v], _mm_set1_ps(m_a));
      of_a[v] = _mm_add_ps(of_a[v], _mm_mul_ps(of_b[v], _mm_set1_ps(m_b)));
    }
    store_bytes(of_a, requantize, y + i);
  }
}

void channel_sums(const uint8_t* x, int64_t pixels, int64_t pixel, int64_t channels,
                  int32_t* sums) {
  for (int64_t c = 0; c < channels; c += 16) {
    Sums sum;
    for (int v = 0; v < 4; ++v) sum[v] = load(sums + c + 4 * v);
    for (int64_t p = 0; p < pixels; ++p) {
      Sums q;
      widen(x + p * pixel + c, q);
      for (int v = 0; v < 4; ++v) sum[v] = _mm_add_epi32(sum[v], q[v]);
    }
    for (int v = 0; v < 4; ++v) store(sums + c + 4 * v, sum[v]);
  }
}

void scale(const uint8_t* x, int z, const float* factor, const Requantize& requantize,
           int64_t pixels, int64_t pixel, uint8_t* y) {
  for (int64_t p = 0; p < pixels; ++p, x += pixel, y += pixel) {
    for (int64_t c = 0; c < pixel; c += 16) {
      Values q;
      centre(x + c, z, q);
      for (int v = 0; v < 4; ++v) q[v] = _mm_mul_ps(q[v], _mm_loadu_ps(factor + c + 4 * v));
      store_bytes(q, requantize, y + c);
    }
  }
}

void linear(const int8_t* q, int64_t stride, const float* s, const int32_t* inputs, const float* x,
            int count, int out, float* h) {
  for (int j = 0; j < out; j += 16) {
    Values sum;
    for (int v = 0; v < 4; ++v) sum[v] = _mm_loadu_ps(h + j + 4 * v);
    for (int i = 0; i < count; ++i) {
      for (int v = 0; v < 4; ++v) {
        int32_t four;
        std::memcpy(&four, q + inputs[i] * stride + j + 4 * v, 4);
        const __m128 bytes = _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four)));
        const __m128 w = _mm_mul_ps(bytes, _mm_loadu_ps(s + j + 4 * v));
        sum[v] = _mm_add_ps(sum[v], _mm_mul_ps(w, _mm_set1_ps(x[i])));
      }
    }
    for (int v = 0; v < 4; ++v) _mm_storeu_ps(h + j + 4 * v, sum[v]);
  }
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

namespace vitkd::int8 {
namespace {

int in_order(int, int vector, int lane) { return vector * 16 + lane; }

void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  lay_out_gemm<int16_t>(spec, pixel, {1, 0, 0, false, in_order}, packed);
}

void pack_depthwise(const ConvSpec& spec, Packed* packed) {
  lay_out(spec, {1, 0, size_t{kLine} * ((spec.taps() + 1) / 2), false, in_order}, packed);
  for (const Packed::Panel& panel : packed->panels) {
    auto* weights = reinterpret_cast<int16_t*>(packed->own.data() + panel.weights);
    for (int tap = 0; tap < spec.taps(); ++tap) {
      for (int lane = 0; lane < std::min(16, spec.out - panel.channel); ++lane) {
        weights[(tap / 2 * 16 + lane) * 2 + tap % 2] = spec.at(panel.channel + lane, tap, 0);
      }
    }
  }
}

}  // namespace

const Kernels kSse41{Isa::sse41,
                     [](const Packed&, const GemmCall& call) {
                       return call.pixels < kRows ? "gemm_u8s8_1x16_sse41" : "gemm_u8s8_3x16_sse41";
                     },
                     [](const Packed&, const DepthwiseCall&) { return "depthwise_1x1x16_sse41"; },
                     pack_gemm,
                     gemm,
                     pack_depthwise,
                     depthwise,
                     add,
                     channel_sums,
                     scale,
                     linear};

}  // namespace vitkd::int8

#endif
