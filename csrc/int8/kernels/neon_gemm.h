// Products in tiles of MR pixels x 16 channels in NEON, 8 inputs a step. Pixels are first packed in
// the order of their use, once for all panels. The file that includes this defines multiply():
//
//   neon      smull, smlal, sadalp   16 multiply-adds in three instructions
//   neondot   sdot by element        16 in one
//   neoni8mm  usmmla                 32 in one
#pragma once

#include "int8/kernels/neon_epilogue.h"

VITKD_NEON_BEGIN
namespace vitkd::int8 {
namespace {

constexpr int kRows = Dot::kRows;  // MR, but for the last pixels, of which two at a time
constexpr int kLanes = Dot::kPairs ? 32 : 16;  // of a panel's constants
constexpr int64_t kStepBytes = 8 * kRows;      // of packed pixels

struct GemmTile {
  const uint8_t* x;  // packed: [steps][kRows][8]
  int64_t steps;
  const uint8_t* weights;    // [steps][128]
  const uint8_t* constants;  // of the panel: bias, multiplier, shift
  uint8_t* y;
  int64_t y_pixel;
  const uint8_t* residual;
  int64_t residual_pixel;
  int channels;  // from the panel's first on
  bool alone;    // the second of two pixels is not wanted
  Form form;
  EpilogueConstants epilogue;
};

// Sums of a tile. Dot::kPairs: rows 2i and 2i + 1 hold two channels of pixel 2i and two of pixel
// 2i + 1 in every vector, and constants are laid out like that.
template <int MR>
VITKD_INLINE void multiply(const GemmTile& t, int32x4_t (&acc)[MR][4]);

template <int MR>
VITKD_INLINE void load_biases(const uint8_t* constants, int32x4_t (&acc)[MR][4]) {
  VITKD_UNROLL(MR * 2, i) {
    constexpr int at = (Dot::kPairs ? i % 4 : i % 2) * 32;
    load_pair<at>(constants, acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]);
  }
  VITKD_END;
}

// The sums, by add(j, 8 bytes of pairs of pixels, weights, sums) for each quarter j of a step.
// Weights are loaded ahead of their use: an in-order CPU would wait for them.
template <int MR, class F>
VITKD_INLINE void multiply_steps(const GemmTile& t, int32x4_t (&acc)[MR][4], F&& add) {
  load_biases<MR>(t.constants, acc);
  const auto* x = reinterpret_cast<const int8_t*>(t.x);
  const uint8_t* w = t.weights;
  int8x16_t weights[2][2];
  load_pair<0>(w, weights[0][0], weights[0][1]);
  const auto step = [&](auto i) __attribute__((always_inline)) {
    int8x16_t a[MR / 2];
    VITKD_UNROLL(MR / 2, pair) { a[pair] = vld1q_s8(x + i * kStepBytes + 16 * pair); }
    VITKD_END;
    VITKD_UNROLL(4, j) {
      auto& next = weights[(j + 1) % 2];
      load_pair<i * 128 + 32 * (j + 1)>(w, next[0], next[1]);
      add(j, a, weights[j % 2], acc);
    }
    VITKD_END;
  };
  int64_t left = t.steps;
  while (left >= 2) {
    unroll<2>(step);
    left -= 2, x += 2 * kStepBytes, w += 256;
    asm("" : "+r"(left), "+r"(x), "+r"(w));  // not computed again after the loop
  }
  if (left > 0) unroll<1>(step);
}

// Values in pairs, by pixels.
template <int MR>
VITKD_INLINE void split_pairs(float32x4_t (&v)[MR][4]) {
  VITKD_UNROLL(MR / 2, i) {
    float64x2_t rows[2][4];
    VITKD_UNROLL(4, j) {
      const float64x2_t a = vreinterpretq_f64_f32(v[2 * i + j / 2][j % 2 * 2]);
      const float64x2_t b = vreinterpretq_f64_f32(v[2 * i + j / 2][j % 2 * 2 + 1]);
      rows[0][j] = vzip1q_f64(a, b), rows[1][j] = vzip2q_f64(a, b);
    }
    VITKD_END;
    VITKD_UNROLL(4, j) {
      v[2 * i][j] = vreinterpretq_f32_f64(rows[0][j]);
      v[2 * i + 1][j] = vreinterpretq_f32_f64(rows[1][j]);
    }
    VITKD_END;
  }
  VITKD_END;
}

template <int MR, Form kForm>
VITKD_INLINE void store_logits(const int32x4_t (&acc)[MR][4], const GemmTile& t) {
  const uint8_t* const m = t.constants + 4 * kLanes;
  float32x4_t v[MR][4];
  VITKD_UNROLL(MR, r) {
    float32x4_t scale[4];
    load_four(m + (Dot::kPairs ? r % 2 * 64 : 0), scale);
    to_values<EpilogueKind::logits, kForm, 4>(acc[r], scale, m, vdupq_n_u8(0), t.epilogue, v[r]);
  }
  VITKD_END;
  if constexpr (Dot::kPairs) split_pairs(v);
  const int bytes = 4 * std::min(16, t.channels);
  std::memcpy(t.y, v[0], bytes);
  VITKD_UNROLL(MR - 1, r) {
    if (MR > 2 || !t.alone) std::memcpy(t.y + (r + 1) * t.y_pixel, v[r + 1], bytes);
  }
  VITKD_END;
}

template <int MR, EpilogueKind kKind, Form kForm>
VITKD_INLINE void store_tile(const int32x4_t (&acc)[MR][4], const GemmTile& t) {
  const EpilogueConstants& f = t.epilogue;
  const uint8_t* const m = t.constants + 4 * kLanes;
  const uint8_t* const shift = m + 4 * kLanes;
  const bool alone = MR == 2 && t.alone;
  const int64_t residual_pixel = alone ? 0 : t.residual_pixel;
  uint8_t* const y = t.y;
  const int64_t y_pixel = t.y_pixel;
  uint8x16_t bytes[MR];
  VITKD_UNROLL(Dot::kPairs ? 2 : 1, h) {
    float32x4_t scale[4];
    load_four(m + 64 * h, scale);
    VITKD_UNROLL(MR / 2, i) {
      uint8x16_t q[2] = {};
      if constexpr (kKind == EpilogueKind::residual) {
        q[0] = vld1q_u8(t.residual + 2 * i * residual_pixel);
        q[1] = vld1q_u8(t.residual + (2 * i + 1) * residual_pixel);
      }
      if constexpr (Dot::kPairs) {
        const auto a = vreinterpretq_u16_u8(q[0]), b = vreinterpretq_u16_u8(q[1]);
        q[h] = vreinterpretq_u8_u16(h == 0 ? vzip1q_u16(a, b) : vzip2q_u16(a, b));
        bytes[2 * i + h] = to_bytes<kKind, kForm>(acc[2 * i + h], scale, shift + 64 * h, q[h], f);
      } else {
        bytes[2 * i] = to_bytes<kKind, kForm>(acc[2 * i], scale, shift, q[0], f);
        bytes[2 * i + 1] = to_bytes<kKind, kForm>(acc[2 * i + 1], scale, shift, q[1], f);
      }
      if constexpr (!Dot::kPairs || h == 1) {
        uint8x16_t &first = bytes[2 * i], &second = bytes[2 * i + 1];
        if constexpr (Dot::kPairs) {
          const auto a = vreinterpretq_u16_u8(first), b = vreinterpretq_u16_u8(second);
          first = vreinterpretq_u8_u16(vuzp1q_u16(a, b));
          second = vreinterpretq_u8_u16(vuzp2q_u16(a, b));
        }
        vst1q_u8(y + 2 * i * y_pixel, first);
        if (!alone) vst1q_u8(y + (2 * i + 1) * y_pixel, second);
      }
    }
    VITKD_END;
  }
  VITKD_END;
}

template <int MR, EpilogueKind kKind>
VITKD_INLINE void gemm_tile(const GemmTile& t) {
  int32x4_t acc[MR][4];
  multiply<MR>(t, acc);
  VITKD_UNROLL(MR * 4, i) { divide_range(acc[i / 4][i % 4]); }
  VITKD_END;
  forget(&t);
  if constexpr (kKind == EpilogueKind::logits) return store_logits<MR, Form::any>(acc, t);
  if constexpr (kKind == EpilogueKind::bytes) {
    if (t.form == Form::bits) return store_tile<MR, kKind, Form::bits>(acc, t);
  }
  if (t.form == Form::words) return store_tile<MR, kKind, Form::words>(acc, t);
  store_tile<MR, kKind, Form::any>(acc, t);
}

// Tiles of `pixels` pixels. Where they are not a multiple, the last one begins earlier: what it
// computes again are the same bytes.
template <EpilogueKind kKind>
void gemm_panel(const Packed& packed, const Packed::Panel& panel, const GemmCall& call,
                int64_t first, int64_t pixels) {
  GemmTile t;
  t.x = call.scratch;
  t.steps = packed.row_bytes / 8;
  t.weights = packed.data + panel.weights;
  t.constants = packed.data + panel.constants;
  t.y_pixel = call.y_pixel;
  t.y = call.y + panel.channel * (kKind == EpilogueKind::logits ? 4 : 1) + first * call.y_pixel;
  t.residual = call.residual + panel.channel + first * call.residual_pixel;
  t.residual_pixel = call.residual_pixel;
  t.channels = packed.spec.out - panel.channel;
  t.alone = false;
  t.form = form_of(panel);
  t.epilogue = epilogue_constants(packed.spec.epilogue, panel.magic);
  const auto advance = [&](int64_t by) __attribute__((always_inline)) {
    t.y += by * t.y_pixel;
    t.residual += by * t.residual_pixel;
  };
  const int64_t tile_bytes = t.steps * kStepBytes;
  int64_t left = pixels;
  for (; left >= kRows; left -= kRows, t.x += tile_bytes, advance(kRows)) {
    gemm_tile<kRows, kKind>(t);
  }
  if (left == 0) return;
  if (left > 2 && pixels >= kRows) {
    advance(left - kRows);
    return gemm_tile<kRows, kKind>(t);
  }
  for (; left > 0; left -= 2, t.x += 16, advance(2)) {
    t.alone = left == 1;
    gemm_tile<2, kKind>(t);
  }
}

using Rows = const uint8_t* [kRows];

// The pixels of a tile, as [steps][kRows][8]; returns where the next step's lie. An odd step is
// followed by bytes that do not matter.
VITKD_INLINE uint8_t* pack_tile(const Rows& rows, int64_t steps, uint8_t* to) {
  uint8_t* const end = to + steps * kStepBytes;
  for (int64_t k = 0; to < end; k += 16, to += 2 * kStepBytes) {
    VITKD_UNROLL(kRows / 2, i) {
      const auto a = vreinterpretq_u64_s8(Dot::signed_bytes(vld1q_u8(rows[2 * i] + k)));
      const auto b = vreinterpretq_u64_s8(Dot::signed_bytes(vld1q_u8(rows[2 * i + 1] + k)));
      vst1q_u8(to + 16 * i, vreinterpretq_u8_u64(vzip1q_u64(a, b)));
      vst1q_u8(to + kStepBytes + 16 * i, vreinterpretq_u8_u64(vzip2q_u64(a, b)));
    }
    VITKD_END;
  }
  return end;
}

// Where a tile's pixels begin in a segment; those past the last one, there.
VITKD_INLINE void tile_rows(const uint8_t* x, int64_t pixel, int64_t pixels, Rows& rows) {
  VITKD_UNROLL(kRows, r) {
    rows[r] = x;
    if (r + 1 < pixels) x += pixel;
  }
  VITKD_END;
}

// Segments of a few bytes, as the image's, one after the other.
inline void join_segments(const Packed& packed, const GemmCall& call, int64_t at, int64_t pixels,
                          uint8_t* to, Rows& rows) {
  const int64_t row_bytes = packed.row_bytes + kSlack;
  for (int segment = 0; segment < packed.segments; ++segment, to += packed.segment) {
    tile_rows(call.x[segment] + at, call.x_pixel, pixels, rows);
    for (int k = 0; k < packed.segment; k += 16) {
      VITKD_UNROLL(kRows, r) { vst1q_u8(to + r * row_bytes + k, vld1q_u8(rows[r] + k)); }
      VITKD_END;
    }
  }
  to -= packed.segments * packed.segment;
  VITKD_UNROLL(kRows, r) { rows[r] = to + r * row_bytes; }
  VITKD_END;
}

// Pixels from `first` on, a tile's at a time, as gemm_panel wants them.
void pack_pixels(const Packed& packed, const GemmCall& call, int64_t first, int64_t pixels) {
  const bool joins = packed.segments > 1 && packed.segment % 8 != 0;
  uint8_t* to = call.scratch;
  uint8_t* const joined = to + packed.scratch - kRows * (packed.row_bytes + kSlack);
  for (int64_t p = 0; p < pixels; p += kRows) {
    const int64_t left = pixels - p;
    const int64_t begin = left > 2 && left < kRows && pixels >= kRows ? pixels - kRows : p;
    const int64_t at = (first + begin) * call.x_pixel;
    Rows rows;
    if (joins) {
      join_segments(packed, call, at, pixels - begin, joined, rows);
      to = pack_tile(rows, packed.row_bytes / 8, to);
      continue;
    }
    const int64_t steps = packed.row_bytes / 8 / packed.segments;
    for (int segment = 0; segment < packed.segments; ++segment) {
      tile_rows(call.x[segment] + at, call.x_pixel, pixels - begin, rows);
      to = pack_tile(rows, steps, to);
    }
  }
}

// As many as stay in L1 while the panels pass by; more where all weights are read again for each
// chunk of them.
int64_t pixels_at_once(const Packed& packed) {
  const int64_t least = packed.spec.out * packed.row_bytes > (256 << 10) ? 96 : 48;
  return std::max(least, (20 << 10) / packed.row_bytes / 48 * 48);
}

template <EpilogueKind kKind>
void gemm_panels(const Packed& packed, const GemmCall& call) {
  const int64_t chunk = pixels_at_once(packed);
  for (int64_t first = 0; first < call.pixels; first += chunk) {
    const int64_t pixels = std::min(chunk, call.pixels - first);
    pack_pixels(packed, call, first, pixels);
    for (int i = call.panel; i < call.panel_end; ++i) {
      gemm_panel<kKind>(packed, packed.panels[i], call, first, pixels);
    }
  }
}

void gemm(const Packed& packed, const GemmCall& call) {
  with_kind(packed.spec.epilogue.kind,
            [&]<EpilogueKind kKind>() { gemm_panels<kKind>(packed, call); });
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

namespace vitkd::int8 {
namespace {

// constants of two channels, and again, for two pixels
inline int pairs_order(int, int vector, int lane) {
  return (16 * vector + lane) / 4 * 2 + lane % 2;
}

// weights as Dot::place says, the segments' inputs one after the other
inline void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  packed->segments = spec.kernel_h;
  packed->segment = static_cast<int>((spec.kernel_w - 1) * pixel + spec.in);
  packed->stride = static_cast<int>(round_up(packed->segment, 16) / 4);  // as it is read
  packed->row_bytes = round_up(int64_t{packed->segments} * packed->segment, 8);
  const size_t bytes = 16 * packed->row_bytes;
  const bool magic = whole_range(spec.epilogue.requantize);
  Dot::kPairs ? lay_out(spec, {1, 2, bytes / 2, magic, pairs_order}, packed)
              : lay_out(spec, {1, 1, bytes, magic, in_order}, packed);
  for (const Packed::Panel& panel : packed->panels) {
    auto* weights = reinterpret_cast<int8_t*>(packed->own.data() + panel.weights);
    for (int i = 0; i < std::min(16, spec.out - panel.channel); ++i) {
      for (int tap = 0; tap < spec.taps(); ++tap) {
        for (int c = 0; c < spec.in; ++c) {
          const int64_t k = tap / spec.kernel_w * packed->segment + tap % spec.kernel_w * pixel + c;
          weights[Dot::place(i, k)] = spec.at(panel.channel + i, tap, c);
        }
      }
    }
  }
  if constexpr (Dot::kSigned) add_to_biases(spec, packed);
  const int64_t tiles = round_up(pixels_at_once(*packed), kRows);
  packed->scratch = tiles * packed->row_bytes + kSlack + kRows * (packed->row_bytes + kSlack);
}

inline const char* gemm_name(const Packed&, const GemmCall& call) {
  return kRows == 2 || call.pixels < kRows ? "gemm_u8s8_2x16_" VITKD_NEON_NAME
                                           : "gemm_u8s8_6x16_" VITKD_NEON_NAME;
}

}  // namespace
}  // namespace vitkd::int8
