// Depthwise convolutions in NEON, 16 channels at a time. Phase 1 lays kGroup neighbouring rows of a
// column side by side in each lane (bytes for sdot and usdot; without them kGroup is 1, words for
// smlal), where fewer are left two or four columns of them, and keeps them in scratch memory; phase
// 2 multiplies: two output rows share them where the stride is 1.
#pragma once

#include <type_traits>

#include "int8/kernels/neon_epilogue.h"

VITKD_NEON_BEGIN
namespace vitkd::int8 {
namespace {

constexpr int kGroup = Dot::kWords ? 1 : 4;               // rows side by side
constexpr int kColumnBytes = 16 * (Dot::kWords ? 2 : 4);  // of a column: 16 channels
constexpr int kHalf = kColumnBytes / 2;                   // 8 channels

// Where a strip's columns come from and go to: column b of the scratch is input column `column +
// b`.
struct Strip {
  const uint8_t* rows[32][kGroup];  // by group: the row's first byte of this panel
  const int32_t* places;            // by group: kGroup rows and kGroup columns
  int groups;
  int64_t group_bytes;
  uint8_t* scratch;
  const uint8_t* edge;  // padding bytes
  int64_t pixel;
  int width;   // of the input
  int column;  // negative in the padding
};

VITKD_INLINE uint16x8_t zip_low(uint8x16_t a, uint8x16_t b) {
  return vreinterpretq_u16_u8(vzip1q_u8(a, b));
}
VITKD_INLINE uint16x8_t zip_high(uint8x16_t a, uint8x16_t b) {
  return vreinterpretq_u16_u8(vzip2q_u8(a, b));
}

template <class D>
VITKD_INLINE void interleave(const uint8x16_t (&v)[1], uint8_t* to) {
  auto* words = reinterpret_cast<uint16_t*>(to);
  vst1q_u16(words, vmovl_u8(vget_low_u8(v[0])));
  vst1q_u16(words + 8, vmovl_high_u8(v[0]));
}
template <class D>
VITKD_INLINE void interleave(const uint8x16_t (&v)[4], uint8_t* to) {
  const uint16x8_t ab[2] = {zip_low(v[0], v[1]), zip_high(v[0], v[1])};
  const uint16x8_t cd[2] = {zip_low(v[2], v[3]), zip_high(v[2], v[3])};
  auto* bytes = reinterpret_cast<int8_t*>(to);
  VITKD_UNROLL(2, h) {
    vst1q_s8(bytes + 32 * h, D::signed_bytes(vreinterpretq_u8_u16(vzip1q_u16(ab[h], cd[h]))));
    vst1q_s8(bytes + 32 * h + 16, D::signed_bytes(vreinterpretq_u8_u16(vzip2q_u16(ab[h], cd[h]))));
  }
  VITKD_END;
}

// Phase 1: `columns` columns of every group.
inline void interleave_columns(const Strip& s, int columns) {
  for (int g = 0; g < s.groups; ++g) {
    const int32_t* shifts = s.places + g * 2 * kGroup + kGroup;
    // of these, no pixel is padding
    const int inside = std::clamp(-s.column, 0, columns);
    const int outside = std::clamp(s.width - shifts[kGroup - 1] - s.column, inside, columns);
    uint8_t* to = s.scratch + g * s.group_bytes;
    const auto edges = [&](int from, int until) {
      for (int b = from; b < until; ++b, to += kColumnBytes) {
        uint8x16_t v[kGroup];
        VITKD_UNROLL(kGroup, i) {
          const int c = s.column + b + shifts[i];
          v[i] = vld1q_u8(c >= 0 && c < s.width ? s.rows[g][i] + c * s.pixel : s.edge);
        }
        VITKD_END;
        interleave<Dot>(v, to);
      }
    };
    edges(0, inside);
    const uint8_t* from[kGroup];
    VITKD_UNROLL(kGroup, i) { from[i] = s.rows[g][i] + shifts[i] * s.pixel; }
    VITKD_END;
    int64_t at = (s.column + inside) * s.pixel;
    const int64_t pixel = s.pixel;
    for (int b = inside; b < outside; ++b, at += pixel, to += kColumnBytes) {
      uint8x16_t v[kGroup];
      VITKD_UNROLL(kGroup, i) { v[i] = vld1q_u8(from[i] + at); }
      VITKD_END;
      interleave<Dot>(v, to);
    }
    edges(outside, columns);
  }
}

struct DepthwiseTile {
  const uint8_t* x;  // in the scratch
  const uint8_t* constants;
  const uint8_t* weights;
  const int32_t* offsets;
  int64_t taps;
  int halves;
  uint8_t* y[2];  // a second row that is not wanted is written to the first, before it
  int64_t y_pixel;
  EpilogueConstants epilogue;
};

// 8 channels of a column
using Half = std::conditional_t<Dot::kWords, int16x8_t[1], int8x16_t[2]>;

VITKD_INLINE void load_half(const uint8_t* p, int16x8_t (&to)[1]) {
  to[0] = vld1q_s16(reinterpret_cast<const int16_t*>(p));
}
VITKD_INLINE void load_half(const uint8_t* p, int8x16_t (&to)[2]) { load_pair<0>(p, to[0], to[1]); }

VITKD_INLINE void add_products(int32x4_t (&acc)[2], const int16x8_t (&x)[1],
                               const int16x8_t (&w)[1]) {
  acc[0] = vmlal_s16(acc[0], vget_low_s16(x[0]), vget_low_s16(w[0]));
  acc[1] = vmlal_high_s16(acc[1], x[0], w[0]);
}
template <class D = Dot>
VITKD_INLINE void add_products(int32x4_t (&acc)[2], const int8x16_t (&x)[2],
                               const int8x16_t (&w)[2]) {
  D::add(acc[0], x[0], w[0]), D::add(acc[1], x[1], w[1]);
}

// 8 channels of two outputs
template <EpilogueKind kKind, Form kForm>
VITKD_INLINE void store_outputs(const int32x4_t (&a)[2], const int32x4_t (&b)[2],
                                const uint8_t* constants, const EpilogueConstants& f, uint8_t* y_a,
                                uint8_t* y_b) {
  const auto* m = reinterpret_cast<const float*>(constants + kLine);
  const float32x4_t low = vld1q_f32(m), high = vld1q_f32(m + 4);
  const uint8x16_t y = to_bytes<kKind, kForm, 2>({a[0], a[1], b[0], b[1]}, {low, high, low, high},
                                                 constants + 2 * kLine, vdupq_n_u8(0), f);
  vst1q_lane_u64(reinterpret_cast<uint64_t*>(y_b), vreinterpretq_u64_u8(y), 1);
  vst1_u8(y_a, vget_low_u8(y));
}

// Phase 2: MR output rows of kColumns outputs, 8 channels at a time.
template <int MR, int kColumns, int kStride, EpilogueKind kKind, Form kForm>
VITKD_INLINE void depthwise_tile(const DepthwiseTile& t) {
  for (int h = 0; h < t.halves; ++h) {
    const uint8_t* const constants = t.constants + 32 * h;
    int32x4_t acc[kColumns][MR][2];
    VITKD_UNROLL(kColumns * MR, i) {
      load_pair<0>(constants, acc[i / MR][i % MR][0], acc[i / MR][i % MR][1]);
    }
    VITKD_END;
    const uint8_t* w = t.weights + h * kHalf;
    const int32_t* offset = t.offsets;
    for (int64_t tap = t.taps; tap > 0; --tap, ++offset, w += MR * kColumnBytes) {
      const uint8_t* x = t.x + *offset + h * kHalf;
      Half weights[MR];
      VITKD_UNROLL(MR, r) { load_half(w + r * kColumnBytes, weights[r]); }
      VITKD_END;
      VITKD_UNROLL(kColumns, c) {
        Half column;
        load_half(x + c * kStride * kColumnBytes, column);
        VITKD_UNROLL(MR, r) { add_products(acc[c][r], column, weights[r]); }
        VITKD_END;
      }
      VITKD_END;
    }
    forget(&t);
    if constexpr (MR == 2) {
      VITKD_UNROLL(kColumns, c) {
        const int64_t to = c * t.y_pixel + 8 * h;
        store_outputs<kKind, kForm>(acc[c][0], acc[c][1], constants, t.epilogue, t.y[0] + to,
                                    t.y[1] + to);
      }
      VITKD_END;
    } else {
      VITKD_UNROLL((kColumns + 1) / 2, i) {
        constexpr int a = 2 * i, b = std::min(a + 1, kColumns - 1);
        uint8_t* const y = t.y[0] + 8 * h;
        store_outputs<kKind, kForm>(acc[a][0], acc[b][0], constants, t.epilogue, y + a * t.y_pixel,
                                    y + b * t.y_pixel);
      }
      VITKD_END;
    }
  }
}

template <int MR, int kStride, EpilogueKind kKind, Form kForm>
void depthwise_panel(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  const ConvSpec& spec = packed.spec;
  Strip s;
  s.places = packed.groups.data();
  s.groups = static_cast<int>(packed.groups.size()) / (2 * kGroup);
  s.group_bytes = kDepthwiseScratch / s.groups / kColumnBytes * kColumnBytes;
  s.scratch = call.scratch;
  s.edge = call.padding_row + panel.channel;
  s.pixel = call.x.pixel;
  s.width = call.x.width;
  DepthwiseTile t;
  t.constants = packed.data + panel.constants;
  t.weights = packed.data + panel.weights;
  t.offsets = packed.offsets.data();
  t.taps = packed.steps;
  t.halves = spec.out - panel.channel > 8 ? 2 : 1;
  t.y_pixel = call.y.pixel;
  t.epilogue = epilogue_constants(spec.epilogue, panel.magic);
  // strips so short that the scratch stays in L1
  const int wanted = static_cast<int>(
      std::min<int64_t>(s.group_bytes / kColumnBytes, (20 << 10) / s.groups / kColumnBytes));
  const int at_once = std::max(1, (wanted - spec.kernel_w) / spec.stride_w + 1);
  for (int begin = 0; begin < call.y.width; begin += at_once) {
    const int end = std::min(begin + at_once, call.y.width);
    s.column = begin * spec.stride_w - call.left;
    for (int row = call.row; row < call.row_end; row += MR) {
      for (int i = 0; i < kGroup * s.groups; ++i) {
        const int r =
            row * spec.stride_h - call.top + s.places[i / kGroup * 2 * kGroup + i % kGroup];
        s.rows[i / kGroup][i % kGroup] = call.input_row(r) + panel.channel;
      }
      interleave_columns(s, (end - begin - 1) * spec.stride_w + spec.kernel_w);
      const auto tile = [&]<int kColumns>(int at) __attribute__((always_inline)) {
        const int64_t to = int64_t{at} * call.y.pixel + panel.channel;
        t.y[0] = call.y.row(row) + to;
        t.y[1] = row + 1 < call.row_end ? call.y.row(row + 1) + to : t.y[0];
        t.x = call.scratch + (at - begin) * spec.stride_w * kColumnBytes;
        depthwise_tile<MR, kColumns, kStride, kKind, kForm>(t);
      };
      int at = begin;
      if (spec.stride_w == kStride) {
        for (; at + 4 <= end; at += 4) tile.template operator()<4>(at);
        if (at + 2 <= end) tile.template operator()<2>(at), at += 2;
      }
      for (; at < end; ++at) tile.template operator()<1>(at);
    }
  }
}

// 3x3 kernels: in a file of its own.
template <EpilogueKind kKind, Form kForm>
void slide(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel);

template <EpilogueKind kKind, Form kForm>
void depthwise_rows(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  if (packed.slides) return slide<kKind, kForm>(packed, call, panel);
  packed.spec.stride_h == 1
      ? depthwise_panel<Dot::kWords ? 1 : 2, 1, kKind, kForm>(packed, call, panel)
      : depthwise_panel<1, 2, kKind, kForm>(packed, call, panel);
}

template <EpilogueKind kKind>
void depthwise_panels(const Packed& packed, const DepthwiseCall& call) {
  for (int i = call.panel; i < call.panel_end; ++i) {
    const Packed::Panel& panel = packed.panels[i];
    const Form form = form_of(panel);
    if constexpr (kKind == EpilogueKind::bytes) {
      if (form == Form::bits) {
        depthwise_rows<kKind, Form::bits>(packed, call, panel);
        continue;
      }
    }
    form == Form::words ? depthwise_rows<kKind, Form::words>(packed, call, panel)
                        : depthwise_rows<kKind, Form::any>(packed, call, panel);
  }
}

void depthwise(const Packed& packed, const DepthwiseCall& call) {
  packed.spec.epilogue.kind == EpilogueKind::hardswish
      ? depthwise_panels<EpilogueKind::hardswish>(packed, call)
      : depthwise_panels<EpilogueKind::bytes>(packed, call);
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

namespace vitkd::int8 {
namespace {

inline void pack_depthwise(const ConvSpec& spec, Packed* packed) {
  const bool same = spec.stride_h == spec.stride_w && spec.stride_h <= (Dot::kWords ? 1 : 2);
  packed->slides = spec.kernel_h == 3 && spec.kernel_w == 3 && same;
  const bool magic = whole_range(spec.epilogue.requantize);
  if constexpr (Dot::kWords) {
    lay_out_depthwise<int16_t>(spec, {1, 1, 0, magic, in_order}, 1, packed);
  } else {
    lay_out_depthwise<int8_t>(spec, {1, 1, 0, magic, in_order}, 4, packed);
    if constexpr (Dot::kSigned) add_to_biases(spec, packed);
  }
}

inline const char* depthwise_name(const Packed& packed, const DepthwiseCall&) {
  const bool by_one = packed.spec.stride_h == 1;
  if (packed.slides) {
    return by_one ? "depthwise_3x3_sliding_2x1x8_" VITKD_NEON_NAME
                  : "depthwise_3x3_sliding_1x1x16_" VITKD_NEON_NAME;
  }
  return by_one && !Dot::kWords ? "depthwise_2x4x8_" VITKD_NEON_NAME
                                : "depthwise_1x4x8_" VITKD_NEON_NAME;
}

}  // namespace
}  // namespace vitkd::int8
