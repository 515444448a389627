// Weights for vpmaddubsw, which adds two products of bytes to 16 bits and saturates. Whether a pair
// of weights can get there is known when they are packed, and of 16 inputs' orders there is nearly
// always one in which none of the pairs of 16 channels can: each panel has orders of its own, made
// by a shuffle of every pixel's 16 bytes. Where a pair is left, its weights are halved, and their
// halves multiplied one after the other.

#if defined(__x86_64__)

#include "int8/kernels/pairs.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "simd/target.h"

namespace vitkd::int8 {
namespace {

constexpr int64_t kChunkBytes = 12 << 10;  // of pixels in a panel's order, which stay in L1

int64_t row_bytes(const Packed& packed) {
  int most = 0;
  for (const Packed::Panel& panel : packed.panels) most = std::max(most, panel.steps);
  return round_up(int64_t{4} * most, 16) + 32;  // a store may begin at the last step
}

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

}  // namespace

void pack_pairs(const ConvSpec& spec, int64_t pixel, LaneOrder lanes, int rows, Packed* packed) {
  const bool magic = spec.epilogue.kind != EpilogueKind::logits;
  lay_out_gemm<int8_t>(spec, pixel, {1, 0, 0, magic, lanes}, packed);
  const Buffer bytes_in_order = std::move(packed->own);
  const int segment_bytes = 4 * packed->steps;
  std::vector<uint8_t> all;
  all.reserve(bytes_in_order.size() / 8 * 9);  // with the masks
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
  const int64_t tiles = std::max<int64_t>(1, kChunkBytes / packed->row_bytes / rows);
  packed->chunk = tiles * rows;
  packed->scratch = packed->chunk * packed->row_bytes + kSlack;
}

VITKD_TARGET_BEGIN(VITKD_AVX2)
namespace {

VITKD_INLINE __m256i load32(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// kBytes of each pixel: not one more is read, as the last pixel's are the last of the image
template <int kBytes>
VITKD_INLINE void shuffle(const uint8_t* x, int64_t x_pixel, const uint8_t* masks, int64_t pixels,
                          uint8_t* to, int64_t row) {
  const __m256i mask = load32(masks);
#pragma GCC unroll 4
  for (int64_t p = 0; p < pixels; ++p, x += x_pixel, to += row) {
    if constexpr (kBytes == 32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_shuffle_epi8(load32(x), mask));
    } else {
      __m128i bytes;
      if constexpr (kBytes == 16) {
        bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
      } else {
        int32_t words[4] = {};
        std::memcpy(words, x, kBytes);
        bytes = _mm_setr_epi32(words[0], words[1], words[2], words[3]);
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                       _mm_shuffle_epi8(bytes, _mm256_castsi256_si128(mask)));
    }
  }
}

}  // namespace

void multiply_in_order(const Packed& packed, const GemmCall& call, Multiply multiply) {
  const int64_t row = packed.row_bytes, chunk = packed.chunk;
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
VITKD_TARGET_END

}  // namespace vitkd::int8

#endif
