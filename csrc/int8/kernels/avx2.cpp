// The kernels in AVX2. vpmaddubsw adds two products of bytes to 16 bits and saturates. Whether a
// pair of weights can get there is known when they are packed, and of 16 inputs' orders there is
// nearly always one in which none of the pairs of 16 channels can: each panel has orders of its
// own, made by a shuffle of every pixel's 16 bytes. Where a pair is left, its weights are halved,
// and their halves multiplied one after the other.

#if defined(__x86_64__)

#define VITKD_YMM VITKD_AVX2

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <vector>

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

VITKD_TARGET_BEGIN(VITKD_YMM)
namespace vitkd::int8 {
namespace {

constexpr int64_t kChunkBytes = 12 << 10;  // of pixels in a panel's order, which stay in L1

int64_t row_bytes(const Packed& packed) {
  int most = 0;
  for (const Packed::Panel& panel : packed.panels) most = std::max(most, panel.steps);
  return round_up(int64_t{4} * most, 16) + kYmm;  // a store may begin at the last step
}

int64_t pixels_at_once(int64_t row) {
  return std::max<int64_t>(1, kChunkBytes / row / kRows) * kRows;
}

// kBytes of each pixel: not one more is read, as the last pixel's are the last of the image
template <int kBytes>
VITKD_INLINE void shuffle(const uint8_t* x, int64_t x_pixel, const uint8_t* masks, int64_t pixels,
                          uint8_t* to, int64_t row) {
  const __m256i mask = load(masks);
#pragma GCC unroll 4
  for (int64_t p = 0; p < pixels; ++p, x += x_pixel, to += row) {
    if constexpr (kBytes == 32) {
      store(to, _mm256_shuffle_epi8(load(x), mask));
    } else {
      __m128i bytes;
      if constexpr (kBytes == 16) {
        bytes = load16(x);
      } else {
        int32_t words[4] = {};
        std::memcpy(words, x, kBytes);
        bytes = _mm_setr_epi32(words[0], words[1], words[2], words[3]);
      }
      store16(to, _mm_shuffle_epi8(bytes, _mm256_castsi256_si128(mask)));
    }
  }
}

void gemm(const Packed& packed, const GemmCall& call) {
  const int64_t row = packed.row_bytes, chunk = pixels_at_once(row);
  const uint8_t* x = call.scratch;
  GemmCall part = call;
  part.x = &x;
  part.x_pixel = row;
  for (int64_t first = 0; first < call.pixels; first += chunk) {
    part.pixels = std::min(chunk, call.pixels - first);
    for (part.panel = call.panel; part.panel < call.panel_end; ++part.panel) {
      part.panel_end = part.panel + 1;
      const Packed::Panel& panel = packed.panels[part.panel];
      for (int i = panel.gathers; i < panel.gathers_end; ++i) {
        const Packed::Gather& gather = packed.gathers[i];
        const uint8_t* from = call.x[gather.segment] + first * call.x_pixel + gather.from;
        uint8_t* to = call.scratch + gather.to;
        const uint8_t* mask = packed.data + gather.mask;
        switch (gather.bytes) {
          case 4:
            shuffle<4>(from, call.x_pixel, mask, part.pixels, to, row);
            break;
          case 8:
            shuffle<8>(from, call.x_pixel, mask, part.pixels, to, row);
            break;
          case 12:
            shuffle<12>(from, call.x_pixel, mask, part.pixels, to, row);
            break;
          case 16:
            shuffle<16>(from, call.x_pixel, mask, part.pixels, to, row);
            break;
          default:
            shuffle<32>(from, call.x_pixel, mask, part.pixels, to, row);
            ++i;
        }
      }
      multiply(packed, part);
    }
    part.y += part.pixels * call.y_pixel;
    part.residual += part.pixels * call.residual_pixel;
  }
}

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

// The weights of up to 16 inputs for 16 channels.
struct Block {
  int count;                // of inputs, 4 to 16
  int16_t weights[16][16];  // [input][lane]

  // 255 * 128 fits into 16 bits; of 16 bits, too, so that a compiler makes vectors of it
  bool fits(int a, int b) const {
    int16_t most = 0;
    for (int lane = 0; lane < 16; ++lane) {
      const int16_t p = weights[a][lane], q = weights[b][lane], zero = 0;
      const int16_t up = std::max(p, zero) + std::max(q, zero);
      const int16_t down = -(std::min(p, zero) + std::min(q, zero));
      most = std::max(most, std::max(up, down));
    }
    return most <= 128;
  }

  // Pairs of inputs, those that fit first: each finds the partner with the fewest others, and one
  // that finds none takes one from another pair.
  std::vector<std::array<int, 2>> pairs() const {
    std::array<std::array<bool, 16>, 16> fit = {};
    std::array<int, 16> degree = {}, partner, order;
    for (int a = 0; a < count; ++a) {
      for (int b = 0; b < a; ++b) fit[a][b] = fit[b][a] = fits(a, b);
    }
    for (int a = 0; a < count; ++a) degree[a] = std::count(fit[a].begin(), fit[a].end(), true);
    partner.fill(-1);
    for (int i = 0; i < 16; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.begin() + count,
                     [&](int a, int b) { return degree[a] < degree[b]; });
    const auto join = [&](int a, int b) { partner[a] = b, partner[b] = a; };
    for (int i = 0; i < count; ++i) {
      const int a = order[i];
      for (int j = i + 1; j < count && partner[a] < 0; ++j) {
        if (partner[order[j]] < 0 && fit[a][order[j]]) join(a, order[j]);
      }
    }
    std::vector<int> alone;
    for (int a = 0; a < count; ++a) {
      if (partner[a] < 0) alone.push_back(a);
    }
    std::vector<std::array<int, 2>> result, left;
    for (size_t i = 0; i + 1 < alone.size(); i += 2) {
      const int a = alone[i], b = alone[i + 1];
      bool found = false;
      for (int c = 0; c < count && !found; ++c) {
        const int d = partner[c];
        if (d >= 0 && fit[a][c] && fit[b][d]) join(a, c), join(b, d), found = true;
      }
      if (!found) left.push_back({a, b});
    }
    for (int a = 0; a < count; ++a) {
      if (partner[a] > a) result.push_back({a, partner[a]});
    }
    result.insert(result.end(), left.begin(), left.end());
    return result;
  }
};

// weights [steps][16 lanes][4] of each panel in its own order, behind its constants and shuffles
void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  const bool magic = spec.epilogue.kind != EpilogueKind::logits;
  lay_out_gemm<int8_t>(spec, pixel, {1, 0, 0, magic, magic ? halves_order : in_order}, packed);
  const Buffer bytes_in_order = std::move(packed->own);
  const int segment_bytes = 4 * packed->steps;
  std::vector<uint8_t> all;
  for (Packed::Panel& panel : packed->panels) {
    const auto* in_order = reinterpret_cast<const int8_t*>(bytes_in_order.data() + panel.weights);
    const uint8_t* constants = bytes_in_order.data() + panel.constants;
    panel.constants = all.size();
    all.insert(all.end(), constants, constants + 3 * kLine);
    panel.gathers = static_cast<int>(packed->gathers.size());
    std::vector<int8_t> weights;
    weights.reserve(2 * kLine * packed->segments * packed->steps);
    std::vector<std::array<uint8_t, 16>> masks;
    for (int segment = 0; segment < packed->segments; ++segment) {
      for (int k = 0; k < segment_bytes; k += 16) {
        Block block = {std::min(16, segment_bytes - k), {}};
        for (int i = 0; i < block.count; ++i) {
          const int8_t* step = in_order + (segment * packed->steps + (k + i) / 4) * kLine;
          for (int lane = 0; lane < 16; ++lane) block.weights[i][lane] = step[lane * 4 + i % 4];
        }
        // the last block begins where it still ends within the segment
        const int from = std::max(0, std::min(k, segment_bytes - 16));
        // two pairs a step; where one does not fit, two steps with half of the weights each
        const auto pairs = block.pairs();
        std::array<uint8_t, 16> mask = {};
        int bytes = 0;
        const auto flush = [&] {
          if (bytes == 0) return;
          const int to = static_cast<int>(weights.size() / 16) - bytes;
          if (masks.size() % 2 == 1) {
            Packed::Gather& last = packed->gathers.back();
            const bool on = last.segment == segment && last.from + 16 == from && last.to + 16 == to;
            if (on && last.bytes == 16) last.bytes = 32;
          }
          packed->gathers.push_back({segment, from, to, std::min(16, segment_bytes), 0});
          masks.push_back(mask);
          bytes = 0;
        };
        for (size_t i = 0; i < pairs.size(); i += 2) {
          const std::array<int, 4> inputs = {pairs[i][0], pairs[i][1], pairs[i + 1][0],
                                             pairs[i + 1][1]};
          const bool halved =
              !block.fits(inputs[0], inputs[1]) || !block.fits(inputs[2], inputs[3]);
          for (int half = 0; half <= halved; ++half) {
            if (bytes == 16) flush();
            for (int lane = 0; lane < 16; ++lane) {
              for (const int input : inputs) {
                const int w = block.weights[input][lane];
                weights.push_back(static_cast<int8_t>(!halved ? w : half ? w - w / 2 : w / 2));
              }
            }
            for (const int input : inputs) mask[bytes++] = static_cast<uint8_t>(k - from + input);
          }
        }
        flush();
      }
    }
    panel.gathers_end = static_cast<int>(packed->gathers.size());
    panel.steps = static_cast<int>(weights.size() / kLine);
    for (size_t i = 0; i < masks.size(); ++i) {
      packed->gathers[panel.gathers + i].mask = all.size();
      all.insert(all.end(), masks[i].begin(), masks[i].end());
    }
    all.resize(round_up(all.size() + 16, kLine));  // 32 bytes of masks are read at a time
    panel.weights = all.size();
    all.insert(all.end(), weights.begin(), weights.end());
  }
  packed->own = Buffer(all.size());
  std::memcpy(packed->own.data(), all.data(), all.size());
  packed->data = packed->own.data();
  packed->row_bytes = row_bytes(*packed);
  packed->scratch = pixels_at_once(packed->row_bytes) * packed->row_bytes + kSlack;
}

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
