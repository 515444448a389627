// Depthwise 3x3 convolutions in AVX2 by words, 16 channels at a time: columns slide through
// registers, without scratch memory. Per output of stride 1: 12 vpmaddwd, 12 vpaddd and 14 others
// on three ports.
#pragma once

#include "int8/kernels/depthwise_ymm.h"

VITKD_TARGET_BEGIN(VITKD_YMM)
namespace vitkd::int8 {
namespace {

// 16 channels of two rows at a column, interleaved in halves_order
VITKD_INLINE void load_rows(const uint8_t* const* rows, int64_t at, __m256i (&to)[2]) {
  const __m256i a = _mm256_cvtepu8_epi16(load16(rows[0] + at));
  const __m256i b = _mm256_cvtepu8_epi16(load16(rows[1] + at));
  to[0] = _mm256_unpacklo_epi16(a, b), to[1] = _mm256_unpackhi_epi16(a, b);
}

// words of 16 channels
template <EpilogueKind kKind>
VITKD_INLINE __m256i to_words(const __m256i (&acc)[2], const uint8_t* constants, bool magic,
                              const EpilogueConstants& f) {
  const auto* m = reinterpret_cast<const float*>(constants + kLine);
  __m256 v[2];
  VITKD_UNROLL(2, h) {
    v[h] = product(acc[h], m + h * 8, m + 16 + h * 8, magic);
    if constexpr (kKind == EpilogueKind::hardswish) v[h] = hardswish(v[h], f);
  }
  VITKD_END;
  return pack_values(v[0], v[1], f);
}

// Stride 1: a column is the last of one output, the second of the next and the first of a third, in
// two rows; their sums take turns.
template <EpilogueKind kKind>
void slide_by_one(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  const uint8_t* const constants = packed.data + panel.constants;
  const uint8_t* const weights = packed.data + panel.weights;
  const EpilogueConstants f = epilogue_constants(packed.spec.epilogue, panel.bits);
  const uint8_t* const edge = call.padding_row + panel.channel;
  const uint8_t* const padding[4] = {edge, edge, edge, edge};
  for (int row = call.row; row < call.row_end; row += 2) {
    const uint8_t* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = call.input_row(row - call.top + i) + panel.channel;
    uint8_t* y[2];
    for (int r = 0; r < 2; ++r) {
      // a second row that is not wanted is written to the first, before it
      y[r] = call.y.row(row + r < call.row_end ? row + r : row) + panel.channel;
    }
    __m256i acc[3][2][2];  // by output, row and half of the channels
    const auto column = [&]<int kPhase>(int i) __attribute__((always_inline)) {
      forget(constants);
      const int at = i - call.left;
      const bool inside = at >= 0 && at < call.x.width;
      const uint8_t* const* from = inside ? rows : padding;
      const int64_t offset = inside ? at * call.x.pixel : 0;
      VITKD_UNROLL(2, h) {
        const __m256i bias = load(constants + h * kYmm);
        VITKD_UNROLL(2, r) { acc[kPhase][r][h] = bias; }
        VITKD_END;
      }
      VITKD_END;
      VITKD_UNROLL(2, g) {
        __m256i x[2];
        load_rows(from + g * 2, offset, x);
        VITKD_UNROLL(2, h) {
          VITKD_UNROLL(3, tap) {
            VITKD_UNROLL(2, r) {
              Dot::add(acc[(kPhase + 3 - tap) % 3][r][h], x[h],
                       load(weights + ((g * 3 + tap) * 2 + r) * kLine + h * kYmm));
            }
            VITKD_END;
          }
          VITKD_END;
        }
        VITKD_END;
      }
      VITKD_END;
      if (i < 2) return;
      forget(constants);
      constexpr int kDone = (kPhase + 1) % 3;
      const __m256i bytes =
          pack_pixels(to_words<kKind>(acc[kDone][0], constants, panel.magic, f),
                      to_words<kKind>(acc[kDone][1], constants, panel.magic, f), f);
      const int64_t to = (i - 2) * call.y.pixel;
      store16(y[1] + to, _mm256_extracti128_si256(bytes, 1));
      store16(y[0] + to, _mm256_castsi256_si128(bytes));
    };
    for (auto& of_output : acc) {
      for (auto& of_row : of_output) of_row[0] = of_row[1] = _mm256_setzero_si256();
    }
    const int end = call.y.width + 2;
    int i = 0;
    for (; i + 3 <= end; i += 3) {
      column.template operator()<0>(i);
      column.template operator()<1>(i + 1);
      column.template operator()<2>(i + 2);
    }
    if (i < end) column.template operator()<0>(i);
    if (i + 1 < end) column.template operator()<1>(i + 1);
  }
}

// Stride 2: the last column of one output is the first of the next.
template <EpilogueKind kKind>
void slide_by_two(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  const uint8_t* const constants = packed.data + panel.constants;
  const uint8_t* const weights = packed.data + panel.weights;
  const EpilogueConstants f = epilogue_constants(packed.spec.epilogue, panel.bits);
  const uint8_t* const edge = call.padding_row + panel.channel;
  const uint8_t* const padding[4] = {edge, edge, edge, edge};
  for (int row = call.row; row < call.row_end; ++row) {
    const uint8_t* rows[3];
    for (int i = 0; i < 3; ++i) rows[i] = call.input_row(row * 2 - call.top + i) + panel.channel;
    uint8_t* const y = call.y.row(row) + panel.channel;
    struct Column {
      __m256i x[2];
      __m256i third;  // words of the third row
    };
    const auto load_at = [&](int at) __attribute__((always_inline)) {
      const bool inside = at >= 0 && at < call.x.width;
      const uint8_t* const* from = inside ? rows : padding;
      const int64_t offset = inside ? at * call.x.pixel : 0;
      Column column;
      load_rows(from, offset, column.x);
      column.third = _mm256_cvtepu8_epi16(load16(from[2] + offset));
      return column;
    };
    Column first = load_at(-call.left);
    for (int o = 0; o < call.y.width; ++o) {
      const Column second = load_at(2 * o - call.left + 1);
      const Column last = load_at(2 * o - call.left + 2);
      __m256i acc[2];
      VITKD_UNROLL(2, h) {
        acc[h] = load(constants + h * kYmm);
        const uint8_t* w = weights + h * kYmm;
        Dot::add(acc[h], first.x[h], load(w));
        Dot::add(acc[h], second.x[h], load(w + kLine));
        Dot::add(acc[h], last.x[h], load(w + 2 * kLine));
        const auto pair = [&](const Column& a, const Column& b) __attribute__((always_inline)) {
          return h == 0 ? _mm256_unpacklo_epi16(a.third, b.third)
                        : _mm256_unpackhi_epi16(a.third, b.third);
        };
        Dot::add(acc[h], pair(first, second), load(w + 3 * kLine));
        Dot::add(acc[h], pair(last, last), load(w + 4 * kLine));  // whose second weight is 0
      }
      VITKD_END;
      const __m256i words = to_words<kKind>(acc, constants, panel.magic, f);
      store16(y + o * call.y.pixel, _mm256_castsi256_si128(pack_pixels(words, words, f)));
      first = last;
    }
  }
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END
