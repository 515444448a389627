// Depthwise 3x3 convolutions in NEON: columns of three or four rows slide through registers, which
// hold the weights, too.
#pragma once

#include "int8/kernels/neon_depthwise.h"

VITKD_NEON_BEGIN
namespace vitkd::int8 {
namespace {

// The rows that a row of outputs needs, at a panel's channels.
template <int kRows>
struct Window {
  const uint8_t* rows[kRows];
  const uint8_t* padding;
  int64_t pixel;
  int width, left;

  VITKD_INLINE Window(const DepthwiseCall& call, int row, int channel)
      : padding(call.padding_row + channel),
        pixel(call.x.pixel),
        width(call.x.width),
        left(call.left) {
    for (int i = 0; i < kRows; ++i) rows[i] = call.input_row(row - call.top + i) + channel;
  }
};

VITKD_INLINE int8x16_t load_bytes(const uint8_t* p) {
  return vld1q_s8(reinterpret_cast<const int8_t*>(p));
}

VITKD_INLINE int8x16_t zip_words(uint16x8_t a, uint16x8_t b, bool high) {
  return Dot::signed_bytes(vreinterpretq_u8_u16(high ? vzip2q_u16(a, b) : vzip1q_u16(a, b)));
}

// A column of four rows, 8 channels of them, and the weights that multiply it for two rows of
// outputs.
template <class D, bool kWords = D::kWords>
struct Filter;

template <class D>
struct Filter<D, false> {
  struct Column {
    int8x16_t x[2];  // [8][4]
  };
  int8x16_t w[3][2][2];  // [column][row of outputs][half]

  VITKD_INLINE explicit Filter(const uint8_t* weights) {
    VITKD_UNROLL(12, i) {
      w[i / 4][i / 2 % 2][i % 2] = load_bytes(weights + i / 2 * kColumnBytes + i % 2 * 16);
    }
    VITKD_END;
  }
  static VITKD_INLINE void join(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d,
                                Column& to) {
    const uint16x8_t ab = zip_low(a, b), cd = zip_low(c, d);
    to.x[0] = zip_words(ab, cd, false), to.x[1] = zip_words(ab, cd, true);
  }
  template <int kTap>
  VITKD_INLINE void add(int32x4_t (&acc)[2][2], const Column& column) const {
    VITKD_UNROLL(4, i) { D::add(acc[i / 2][i % 2], column.x[i % 2], w[kTap][i / 2][i % 2]); }
    VITKD_END;
  }
};

template <class D>
struct Filter<D, true> {
  struct Column {
    int16x8_t x[4];
  };
  int16x8_t w[3][3];  // [row][column]

  VITKD_INLINE explicit Filter(const uint8_t* weights) {
    VITKD_UNROLL(9, i) {
      w[i / 3][i % 3] = vreinterpretq_s16_s8(load_bytes(weights + i * kColumnBytes));
    }
    VITKD_END;
  }
  static VITKD_INLINE void join(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d,
                                Column& to) {
    const uint8x16_t rows[4] = {a, b, c, d};
    VITKD_UNROLL(4, i) { to.x[i] = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(rows[i]))); }
    VITKD_END;
  }
  template <int kTap>
  VITKD_INLINE void add(int32x4_t (&acc)[2][2], const Column& column) const {
    VITKD_UNROLL(6, i) {
      constexpr int row = i / 2, r = i % 2;
      const int16x8_t x = column.x[row + r];
      acc[r][0] = vmlal_s16(acc[r][0], vget_low_s16(x), vget_low_s16(w[row][kTap]));
      acc[r][1] = vmlal_high_s16(acc[r][1], x, w[row][kTap]);
    }
    VITKD_END;
  }
};

// Stride 1: 8 channels of two rows of outputs.
template <EpilogueKind kKind, Form kForm>
VITKD_INLINE void slide_by_one(const DepthwiseCall& call, int row, int channel,
                               const Filter<Dot>& filter, const uint8_t* constants,
                               const EpilogueConstants& f) {
  using Column = Filter<Dot>::Column;
  const Window<4> window(call, row, channel);
  const uint8_t *const a = window.rows[0], *const b = window.rows[1], *const c = window.rows[2],
                       *const d = window.rows[3];
  const int64_t pixel = window.pixel, y_pixel = call.y.pixel;
  uint8_t* y = call.y.row(row) + channel;
  // a second row that is not wanted is written to the first, before it
  uint8_t* below = row + 1 < call.row_end ? call.y.row(row + 1) + channel : y;
  Column x[3];
  const auto load = [&](int64_t o, Column& to) __attribute__((always_inline)) {
    filter.join(vld1q_u8(a + o), vld1q_u8(b + o), vld1q_u8(c + o), vld1q_u8(d + o), to);
  };
  const auto load_column = [&](int i, Column& to) __attribute__((always_inline)) {
    const int at = i - window.left;
    if (at >= 0 && at < window.width) {
      load(at * pixel, to);
    } else {
      const uint8x16_t edge = vld1q_u8(window.padding);
      filter.join(edge, edge, edge, edge, to);
    }
  };
  const auto output = [&]<int kPhase>() __attribute__((always_inline)) {
    int32x4_t acc[2][2];
    load_pair<0>(constants, acc[0][0], acc[0][1]);
    load_pair<0>(constants, acc[1][0], acc[1][1]);
    VITKD_UNROLL(3, tap) { filter.template add<tap>(acc, x[(kPhase + tap) % 3]); }
    VITKD_END;
    store_outputs<kKind, kForm>(acc[0], acc[1], constants, f, y, below);
    y += y_pixel, below += y_pixel;
  };
  load_column(0, x[0]);
  load_column(1, x[1]);
  int i = 0;
  // three outputs at a time, as long as no column is padding
  const int end = std::min(call.y.width, window.width + window.left - 2);
  if (window.left <= 2) {
    int64_t o = (2 - window.left) * pixel;
    for (; i + 3 <= end; i += 3) {
      VITKD_UNROLL(3, phase) {
        load(o, x[(phase + 2) % 3]);
        o += pixel;
        output.template operator()<phase>();
      }
      VITKD_END;
    }
  }
  for (; i < call.y.width; i += 3) {
    VITKD_UNROLL(3, phase) {
      if (i + phase < call.y.width) {
        load_column(i + phase + 2, x[(phase + 2) % 3]);
        output.template operator()<phase>();
      }
    }
    VITKD_END;
  }
}

// 16 channels of a column of three rows, the third again: its second weight is 0
VITKD_INLINE void join_rows(uint8x16_t a, uint8x16_t b, uint8x16_t c, int8x16_t (&to)[4]) {
  const uint16x8_t ab[2] = {zip_low(a, b), zip_high(a, b)};
  const uint16x8_t cc[2] = {zip_low(c, c), zip_high(c, c)};
  VITKD_UNROLL(4, q) { to[q] = zip_words(ab[q / 2], cc[q / 2], q % 2 == 1); }
  VITKD_END;
}

// Stride 2: 16 channels of a row of outputs. The last column of one output is the first of the
// next. `w` are weights by column and quarter.
template <class D, EpilogueKind kKind, Form kForm>
VITKD_INLINE void slide_by_two(const DepthwiseCall& call, int row, int channel,
                               const int8x16_t (&w)[3][4], const uint8_t* constants,
                               const EpilogueConstants& f) {
  const Window<3> window(call, 2 * row, channel);
  const uint8_t *const a = window.rows[0], *const b = window.rows[1], *const c = window.rows[2];
  const int64_t pixel = window.pixel, y_pixel = call.y.pixel;
  uint8_t* y = call.y.row(row) + channel;
  const auto load_column = [&](int i, int8x16_t(&to)[4]) __attribute__((always_inline)) {
    const int at = i - window.left;
    if (at >= 0 && at < window.width) {
      const int64_t o = at * pixel;
      join_rows(vld1q_u8(a + o), vld1q_u8(b + o), vld1q_u8(c + o), to);
    } else {
      const uint8x16_t edge = vld1q_u8(window.padding);
      join_rows(edge, edge, edge, to);
    }
  };
  const auto add_column = [&]<int kColumn>(const int8x16_t(&x)[4], int32x4_t(&acc)[4])
                              __attribute__((always_inline)) {
                                VITKD_UNROLL(4, q) { D::add(acc[q], x[q], w[kColumn][q]); }
                                VITKD_END;
                              };
  const auto start = [&](const int8x16_t(&x)[4], int32x4_t(&acc)[4])
                         __attribute__((always_inline)) {
                           load_pair<0>(constants, acc[0], acc[1]);
                           load_pair<32>(constants, acc[2], acc[3]);
                           add_column.template operator()<0>(x, acc);
                         };
  const auto output = [&](int32x4_t(&acc)[4]) __attribute__((always_inline)) {
    float32x4_t scale[4];
    load_four(constants + kLine, scale);
    const uint8x16_t bytes =
        to_bytes<kKind, kForm>(acc, scale, constants + 2 * kLine, vdupq_n_u8(0), f);
    vst1q_u8(y, bytes);
    y += y_pixel;
  };
  int8x16_t x[4];
  int32x4_t acc[4], next[4];
  load_column(0, x);
  start(x, acc);
  int i = 0;
  const int end = std::min(call.y.width, (window.width + window.left - 1) / 2);
  if (window.left <= 1) {
    int64_t o = (1 - window.left) * pixel;
    for (; i < end; ++i) {
      join_rows(vld1q_u8(a + o), vld1q_u8(b + o), vld1q_u8(c + o), x);
      add_column.template operator()<1>(x, acc);
      o += pixel;
      join_rows(vld1q_u8(a + o), vld1q_u8(b + o), vld1q_u8(c + o), x);
      add_column.template operator()<2>(x, acc);
      o += pixel;
      output(acc);
      start(x, acc);
    }
  }
  for (; i < call.y.width; ++i) {
    load_column(2 * i + 1, x);
    add_column.template operator()<1>(x, acc);
    load_column(2 * i + 2, x);
    add_column.template operator()<2>(x, acc);
    start(x, next);
    output(acc);
    VITKD_UNROLL(4, q) { acc[q] = next[q]; }
    VITKD_END;
  }
}

template <EpilogueKind kKind, Form kForm>
void slide(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  const EpilogueConstants f = epilogue_constants(packed.spec.epilogue, panel.magic);
  const uint8_t* const constants = packed.data + panel.constants;
  const uint8_t* const weights = packed.data + panel.weights;
  if constexpr (!Dot::kWords) {
    if (packed.spec.stride_h == 2) {
      int8x16_t w[3][4];
      VITKD_UNROLL(12, i) { w[i / 4][i % 4] = load_bytes(weights + 16 * i); }
      VITKD_END;
      for (int row = call.row; row < call.row_end; ++row) {
        slide_by_two<Dot, kKind, kForm>(call, row, panel.channel, w, constants, f);
      }
      return;
    }
  }
  for (int h = 0; h < (packed.spec.out - panel.channel > 8 ? 2 : 1); ++h) {
    const Filter<Dot> filter(weights + h * kHalf);
    for (int row = call.row; row < call.row_end; row += 2) {
      slide_by_one<kKind, kForm>(call, row, panel.channel + 8 * h, filter, constants + 32 * h, f);
    }
  }
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

namespace vitkd::int8 {
namespace {

// kNeon, with products and depthwise convolutions by Dot
[[maybe_unused]] Kernels kernels_here(Isa isa) {
  Kernels k = kNeon;
  k.isa = isa;
  k.gemm_name = gemm_name;
  k.depthwise_name = depthwise_name;
  k.pack_gemm = pack_gemm;
  k.gemm = gemm;
  k.pack_depthwise = pack_depthwise;
  k.depthwise = depthwise;
  return k;
}

}  // namespace
}  // namespace vitkd::int8
