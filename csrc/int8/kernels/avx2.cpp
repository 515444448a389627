// The kernels in AVX2, 16 channels at a time. vpmaddubsw adds two products to 16 bits and
// saturates; packing finds out which steps cannot (positive and negative weights of each pair
// within +-128), and the others multiply even and odd bytes apart: the same bytes, twice the
// instructions.

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "int8/kernels/kernels.h"
#include "simd/target.h"

namespace vitkd::int8 {
namespace {

// two halves of 8 lanes that vpackssdw puts in order
int halves_order(int, int, int lane) { return lane % 8 / 4 * 8 + lane / 8 * 4 + lane % 4; }

int in_order(int, int, int lane) { return lane; }

}  // namespace

VITKD_TARGET_BEGIN(VITKD_AVX2)
namespace {

struct Sum {  // 16 lanes
  __m256i half[2];
};

struct Value {
  __m256 half[2];
};

VITKD_INLINE __m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

VITKD_INLINE Sum load_sum(const uint8_t* p) { return {{load(p), load(p + 32)}}; }

// halves in halves_order from 16 bytes in order
VITKD_INLINE Sum widen(const uint8_t* p) {
  const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i zero = _mm256_setzero_si256();
  return {{_mm256_unpacklo_epi16(words, zero), _mm256_unpackhi_epi16(words, zero)}};
}

VITKD_INLINE __m256 centred(__m256i q, __m256i zero_point) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(q, zero_point));
}

VITKD_INLINE void store16(uint8_t* y, Value v, const Requantize& r) {
  __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.half[0]), _mm256_cvtps_epi32(v.half[1]));
  words = _mm256_adds_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(r.zero_point)));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x08);
  __m128i bytes = _mm256_castsi256_si128(packed);
  bytes = _mm_max_epu8(bytes, _mm_set1_epi8(static_cast<char>(r.lo)));
  bytes = _mm_min_epu8(bytes, _mm_set1_epi8(static_cast<char>(r.hi)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), bytes);
}

VITKD_INLINE __m256 hardswish(__m256 t, float k) {
  __m256 u = _mm256_add_ps(t, _mm256_set1_ps(3.0f));
  u = _mm256_min_ps(_mm256_max_ps(u, _mm256_setzero_ps()), _mm256_set1_ps(6.0f));
  return _mm256_mul_ps(_mm256_mul_ps(t, u), _mm256_set1_ps(k));
}

VITKD_INLINE void store_sums(Sum acc, const float* m, const Epilogue& e, const uint8_t* residual,
                             uint8_t* y, int lanes) {
  Value v;
  for (int h = 0; h < 2; ++h) {
    v.half[h] = _mm256_mul_ps(_mm256_cvtepi32_ps(acc.half[h]), _mm256_load_ps(m + 8 * h));
  }
  if (e.kind == EpilogueKind::logits) {
    float out[16];
    _mm256_storeu_ps(out, v.half[0]);
    _mm256_storeu_ps(out + 8, v.half[1]);
    std::memcpy(y, out, 4 * lanes);
    return;
  }
  if (e.kind == EpilogueKind::hardswish) {
    for (__m256& half : v.half) half = hardswish(half, e.requantize.hardswish_scale);
  } else if (e.kind == EpilogueKind::residual) {
    const Sum q = widen(residual);
    for (int h = 0; h < 2; ++h) {
      const __m256 b = centred(q.half[h], _mm256_set1_epi32(e.residual_zero_point));
      v.half[h] = _mm256_add_ps(v.half[h], _mm256_mul_ps(b, _mm256_set1_ps(e.residual_multiplier)));
    }
  }
  store16(y, v, e.requantize);
}

template <int kPixels>
VITKD_INLINE void gemm_tile(const Packed& packed, const Packed::Panel& panel, const int32_t* unsafe,
                            const GemmCall& call, int64_t p) {
  const uint8_t* constants = packed.data + panel.constants;
  const uint8_t* w = packed.data + panel.weights;
  Sum acc[kPixels];
  for (Sum& sum : acc) sum = load_sum(constants);
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi16(0xFF);
  for (int segment = 0; segment < packed.segments; ++segment, unsafe += packed.steps) {
    const uint8_t* x = call.x[segment] + p * call.x_pixel;
    for (int step = 0; step < packed.steps; ++step, w += 64) {
      const Sum weights = load_sum(w);
      for (int i = 0; i < kPixels; ++i) {
        int32_t four;
        std::memcpy(&four, x + i * call.x_pixel + 4 * step, 4);
        const __m256i bytes = _mm256_set1_epi32(four);
        for (int h = 0; h < 2; ++h) {
          __m256i pairs = _mm256_maddubs_epi16(bytes, weights.half[h]);
          if (unsafe[step]) {
            const __m256i even = _mm256_and_si256(bytes, low);
            const __m256i odd = _mm256_andnot_si256(low, bytes);
            pairs = _mm256_maddubs_epi16(even, weights.half[h]);
            const __m256i others = _mm256_maddubs_epi16(odd, weights.half[h]);
            acc[i].half[h] = _mm256_add_epi32(acc[i].half[h], _mm256_madd_epi16(others, ones));
          }
          acc[i].half[h] = _mm256_add_epi32(acc[i].half[h], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
  }
  const Epilogue& e = packed.spec.epilogue;
  const auto* m = reinterpret_cast<const float*>(constants + 64);
  const int64_t at = panel.channel * (e.kind == EpilogueKind::logits ? 4 : 1);
  for (int i = 0; i < kPixels; ++i) {
    store_sums(acc[i], m, e, call.residual + (p + i) * call.residual_pixel + panel.channel,
               call.y + (p + i) * call.y_pixel + at, std::min(16, packed.spec.out - panel.channel));
  }
}

void gemm(const Packed& packed, const GemmCall& call) {
  for (int i = call.panel; i < call.panel_end; ++i) {
    const int32_t* unsafe = packed.offsets.data() + int64_t{i} * packed.segments * packed.stride;
    int64_t p = 0;
    for (; p + 4 <= call.pixels; p += 4) gemm_tile<4>(packed, packed.panels[i], unsafe, call, p);
    for (; p < call.pixels; ++p) gemm_tile<1>(packed, packed.panels[i], unsafe, call, p);
  }
}

void depthwise(const Packed& packed, const DepthwiseCall& call) {
  const ConvSpec& spec = packed.spec;
  for (int i = call.panel; i < call.panel_end; ++i) {
    const Packed::Panel& panel = packed.panels[i];
    const uint8_t* constants = packed.data + panel.constants;
    const auto* m = reinterpret_cast<const float*>(constants + 64);
    for (int row = call.row; row < call.row_end; ++row) {
      for (int column = 0; column < call.y.width; ++column) {
        const auto at = [&](int tap) __attribute__((always_inline)) {
          const int r = row * spec.stride_h - call.top + tap / spec.kernel_w;
          const int c = column * spec.stride_w - call.left + tap % spec.kernel_w;
          const bool inside = r >= 0 && r < call.x.height && c >= 0 && c < call.x.width;
          const uint8_t* p = inside ? call.x.row(r) + c * call.x.pixel : call.padding_row;
          return _mm256_cvtepu8_epi16(
              _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + panel.channel)));
        };
        const uint8_t* w = packed.data + panel.weights;
        Sum acc = load_sum(constants);
        for (int tap = 0; tap < spec.taps(); tap += 2, w += 64) {
          const __m256i a = at(tap);
          const __m256i b = tap + 1 < spec.taps() ? at(tap + 1) : a;  // whose weights are 0
          const __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), load(w));
          const __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), load(w + 32));
          acc.half[0] = _mm256_add_epi32(acc.half[0], low);
          acc.half[1] = _mm256_add_epi32(acc.half[1], high);
        }
        uint8_t* y = call.y.row(row) + column * call.y.pixel + panel.channel;
        store_sums(acc, m, spec.epilogue, nullptr, y, 16);
      }
    }
  }
}

void add(const uint8_t* a, int z_a, float m_a, const uint8_t* b, int z_b, float m_b,
         const Requantize& requantize, int64_t n, uint8_t* y) {
  for (int64_t i = 0; i < n; i += 16) {
    const Sum q_a = widen(a + i), q_b = widen(b + i);
    Value v;
    for (int h = 0; h < 2; ++h) {
      v.half[h] = _mm256_add_ps(
          _mm256_mul_ps(centred(q_a.half[h], _mm256_set1_epi32(z_a)), _mm256_set1_ps(m_a)),
          _mm256_mul_ps(centred(q_b.half[h], _mm256_set1_epi32(z_b)), _mm256_set1_ps(m_b)));
    }
    store16(y + i, v, requantize);
  }
}

void channel_sums(const uint8_t* x, int64_t pixels, int64_t pixel, int64_t channels,
                  int32_t* sums) {
  for (int64_t p = 0; p < pixels; ++p, x += pixel) {
    for (int64_t c = 0; c < channels; c += 8) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + c));
      const __m256i sum = _mm256_add_epi32(load(sums + c), _mm256_cvtepu8_epi32(eight));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + c), sum);
    }
  }
}

void scale(const uint8_t* x, int z, const float* factor, const Requantize& requantize,
           int64_t pixels, int64_t pixel, uint8_t* y) {
  for (int64_t p = 0; p < pixels; ++p, x += pixel, y += pixel) {
    for (int64_t c = 0; c < pixel; c += 16) {
      const Sum q = widen(x + c);
      // the factors of halves_order
      const __m256 first = _mm256_loadu_ps(factor + c), second = _mm256_loadu_ps(factor + c + 8);
      const __m256 factors[2] = {_mm256_permute2f128_ps(first, second, 0x20),
                                 _mm256_permute2f128_ps(first, second, 0x31)};
      Value v;
      for (int h = 0; h < 2; ++h) {
        v.half[h] = _mm256_mul_ps(centred(q.half[h], _mm256_set1_epi32(z)), factors[h]);
      }
      store16(y + c, v, requantize);
    }
  }
}

void linear(const int8_t* q, int64_t stride, const float* s, const float* x, int in, int out,
            float* h) {
  for (int j = 0; j < out; j += 8) {
    const __m256 scale = _mm256_loadu_ps(s + j);
    __m256 sum = _mm256_loadu_ps(h + j);
    const int8_t* from = q + j;
    for (int c = 0; c < in; ++c, from += stride) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      const __m256 w = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), scale);
      sum = _mm256_add_ps(sum, _mm256_mul_ps(w, _mm256_set1_ps(x[c])));
    }
    _mm256_storeu_ps(h + j, sum);
  }
}

}  // namespace
VITKD_TARGET_END

namespace {

// weights [segments][steps][16 lanes][4]; offsets [panels][segments][steps]: whether a pair's sum
// may saturate
void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  const LaneOrder lanes = spec.epilogue.kind == EpilogueKind::logits ? in_order : halves_order;
  lay_out_gemm(spec, pixel, {1, 0, 0, false, lanes}, packed);
  for (const Packed::Panel& panel : packed->panels) {
    auto* weights = reinterpret_cast<int8_t*>(packed->own.data() + panel.weights);
    for (int step = 0; step < packed->segments * packed->stride; ++step) {
      bool unsafe = false;
      for (int pair = 0; pair < 32; ++pair) {
        const int a = weights[step * 64 + pair * 2], b = weights[step * 64 + pair * 2 + 1];
        unsafe |= std::max(a, 0) + std::max(b, 0) > 128 || std::min(a, 0) + std::min(b, 0) < -128;
      }
      packed->offsets.push_back(unsafe);
    }
  }
}

// weights of two taps side by side as words, [pairs of taps][16 lanes][2]
void pack_depthwise(const ConvSpec& spec, Packed* packed) {
  lay_out(spec, {1, 0, size_t{64} * ((spec.taps() + 1) / 2), false, halves_order}, packed);
  for (const Packed::Panel& panel : packed->panels) {
    auto* weights = reinterpret_cast<int16_t*>(packed->own.data() + panel.weights);
    for (int tap = 0; tap < spec.taps(); ++tap) {
      for (int lane = 0; lane < 16; ++lane) {
        const int channel = panel.channel + halves_order(1, 0, lane);
        if (channel < spec.out) {
          weights[(tap / 2 * 16 + lane) * 2 + tap % 2] = spec.at(channel, tap, 0);
        }
      }
    }
  }
}

}  // namespace

const Kernels kAvx2{Isa::avx2,
                    "gemm_u8s8_4x16_avx2",
                    "depthwise_1x16_avx2",
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
