// Depthwise 3x3 convolutions in NEON by dot products of three or four rows: columns slide through
// registers, which hold the weights, too.
#pragma once

#include "int8/kernels/neon_depthwise.h"

VITKD_NEON_BEGIN
namespace vitkd::int8 {
namespace {

VITKD_INLINE int8x16_t load_weights(const uint8_t* w) {
  return vld1q_s8(reinterpret_cast<const int8_t*>(w));
}

VITKD_INLINE int8x16_t zip_words(uint16x8_t a, uint16x8_t b, bool high) {
  return Dot::signed_bytes(vreinterpretq_u8_u16(high ? vzip2q_u16(a, b) : vzip1q_u16(a, b)));
}

// The rows that a row of outputs needs, at this panel's channels, and the padding.
template <int kRows>
struct Window {
  const uint8_t* rows[kRows];
  const uint8_t* padding[kRows];
  int64_t pixel;
  int width, left;

  Window(const DepthwiseCall& call, int row, int channel)
      : pixel(call.x.pixel), width(call.x.width), left(call.left) {
    for (int i = 0; i < kRows; ++i) {
      rows[i] = call.input_row(row - call.top + i) + channel;
      padding[i] = call.padding_row + channel;
    }
  }
  bool inside(int column) const { return column >= left && column - left < width; }
};

// Stride 1: 8 channels of two rows of outputs. `w` are weights by column, row of outputs and half.
template <EpilogueKind kKind, Form kForm>
VITKD_INLINE void slide_by_one(const DepthwiseCall& call, int row, int channel,
                               const int8x16_t (&w)[3][2][2], const uint8_t* constants,
                               const EpilogueConstants& f) {
  const Window<4> window(call, row, channel);
  uint8_t* const y = call.y.row(row) + channel;
  // a second row that is not wanted is written to the first, before it
  const int64_t below = row + 1 < call.row_end ? call.y.row(row + 1) + channel - y : 0;
  int8x16_t x[3][2];
  const auto load = [&](const uint8_t* const(&rows)[4], int64_t at,
                        int8x16_t(&to)[2]) __attribute__((always_inline)) {
    const uint16x8_t ab = zip_low(vld1q_u8(rows[0] + at), vld1q_u8(rows[1] + at));
    const uint16x8_t cd = zip_low(vld1q_u8(rows[2] + at), vld1q_u8(rows[3] + at));
    to[0] = zip_words(ab, cd, false), to[1] = zip_words(ab, cd, true);
  };
  const auto load_column = [&](int i, int8x16_t(&to)[2]) __attribute__((always_inline)) {
    const bool inside = window.inside(i);
    load(inside ? window.rows : window.padding, inside ? (i - window.left) * window.pixel : 0, to);
  };
  const auto output = [&]<int kPhase>(uint8_t* to) __attribute__((always_inline)) {
    const auto* bias = reinterpret_cast<const int32_t*>(constants);
    int32x4_t acc[2][2];
    VITKD_UNROLL(2, r) { acc[r][0] = vld1q_s32(bias), acc[r][1] = vld1q_s32(bias + 4); }
    VITKD_END;
    VITKD_UNROLL(3, tap) {
      VITKD_UNROLL(4, i) {
        int32x4_t& sum = acc[i / 2][i % 2];
        sum = Dot::add(sum, x[(kPhase + tap) % 3][i % 2], w[tap][i / 2][i % 2]);
      }
      VITKD_END;
    }
    VITKD_END;
    store_outputs<kKind, kForm>(acc[0], acc[1], constants, f, to, to + below);
  };
  load_column(0, x[0]);
  load_column(1, x[1]);
  int i = 0;
  uint8_t* to = y;
  const int64_t step = call.y.pixel;
  // three outputs at a time, as long as no column is padding
  const int end = std::min(call.y.width, window.width + window.left - 2);
  if (window.left <= 2) {
    int64_t at = (2 - window.left) * window.pixel;
    for (; i + 3 <= end; i += 3, to += 3 * step) {
      VITKD_UNROLL(3, phase) {
        load(window.rows, at, x[(phase + 2) % 3]);
        at += window.pixel;
        output.template operator()<phase>(to + phase * step);
      }
      VITKD_END;
    }
  }
  for (; i < call.y.width; i += 3) {
    VITKD_UNROLL(3, phase) {
      if (i + phase < call.y.width) {
        load_column(i + phase + 2, x[(phase + 2) % 3]);
        output.template operator()<phase>(to);
        to += step;
      }
    }
    VITKD_END;
  }
}

// Stride 2: 16 channels of a row of outputs. The last column of one output is the first of the
// next. `w` are weights by column and quarter.
template <EpilogueKind kKind, Form kForm>
VITKD_INLINE void slide_by_two(const DepthwiseCall& call, int row, int channel,
                               const int8x16_t (&w)[3][4], const uint8_t* constants,
                               const EpilogueConstants& f) {
  Window<3> window(call, 2 * row, channel);
  const auto* bias = reinterpret_cast<const int32_t*>(constants);
  const auto* m = reinterpret_cast<const float*>(bias + 16);
  const auto load = [&](int i, int8x16_t(&to)[4]) __attribute__((always_inline)) {
    const bool inside = window.inside(i);
    const auto& rows = inside ? window.rows : window.padding;
    const int64_t at = inside ? (i - window.left) * window.pixel : 0;
    const uint8x16_t a = vld1q_u8(rows[0] + at), b = vld1q_u8(rows[1] + at);
    const uint8x16_t c = vld1q_u8(rows[2] + at);
    const uint16x8_t ab[2] = {zip_low(a, b), zip_high(a, b)};
    const uint16x8_t cc[2] = {zip_low(c, c), zip_high(c, c)};  // twice: its second weight is 0
    VITKD_UNROLL(4, q) { to[q] = zip_words(ab[q / 2], cc[q / 2], q % 2 == 1); }
    VITKD_END;
  };
  const auto start = [&](const int8x16_t(&x)[4], int32x4_t(&acc)[4])
                         __attribute__((always_inline)) {
                           VITKD_UNROLL(4, q) {
                             acc[q] = Dot::add(vld1q_s32(bias + 4 * q), x[q], w[0][q]);
                           }
                           VITKD_END;
                         };
  const auto output = [&](int o, int32x4_t(&acc)[4], int32x4_t(&next)[4])
                          __attribute__((always_inline)) {
                            int8x16_t x[4];
                            load(2 * o + 1, x);
                            VITKD_UNROLL(4, q) { acc[q] = Dot::add(acc[q], x[q], w[1][q]); }
                            VITKD_END;
                            load(2 * o + 2, x);
                            VITKD_UNROLL(4, q) { acc[q] = Dot::add(acc[q], x[q], w[2][q]); }
                            VITKD_END;
                            start(x, next);
                            float32x4_t scale[4];
                            VITKD_UNROLL(4, q) { scale[q] = vld1q_f32(m + 4 * q); }
                            VITKD_END;
                            vst1q_u8(call.y.row(row) + o * call.y.pixel + channel,
                                     to_bytes<kKind, kForm>(acc, scale, m + 16, vdupq_n_u8(0), f));
                          };
  int32x4_t acc[2][4];
  int8x16_t first[4];
  load(0, first);
  start(first, acc[0]);
  int o = 0;
  for (; o + 2 <= call.y.width; o += 2) {
    output(o, acc[0], acc[1]);
    output(o + 1, acc[1], acc[0]);
  }
  if (o < call.y.width) output(o, acc[0], acc[1]);
}

template <EpilogueKind kKind, Form kForm>
void slide(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  const EpilogueConstants f = epilogue_constants(packed.spec.epilogue, panel);
  const uint8_t* const constants = packed.data + panel.constants;
  const uint8_t* const weights = packed.data + panel.weights;
  if (packed.spec.stride_h == 2) {
    int8x16_t w[3][4];
    VITKD_UNROLL(12, i) { w[i / 4][i % 4] = load_weights(weights + 16 * i); }
    VITKD_END;
    for (int row = call.row; row < call.row_end; ++row) {
      slide_by_two<kKind, kForm>(call, row, panel.channel, w, constants, f);
    }
    return;
  }
  for (int h = 0; h < (packed.spec.out - panel.channel > 8 ? 2 : 1); ++h) {
    int8x16_t w[3][2][2];
    VITKD_UNROLL(12, i) {
      w[i / 4][i / 2 % 2][i % 2] =
          load_weights(weights + i / 2 * kColumnBytes + h * kHalf + i % 2 * 16);
    }
    VITKD_END;
    for (int row = call.row; row < call.row_end; row += 2) {
      slide_by_one<kKind, kForm>(call, row, panel.channel + 8 * h, w, constants + 32 * h, f);
    }
  }
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END
