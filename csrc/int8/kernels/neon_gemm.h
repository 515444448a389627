// Products in tiles of MR pixels x 16 channels in NEON. The file that includes this defines
// multiply():
//
//   neon      smull, smlal, sadalp   16 multiply-adds in three instructions
//   neondot   sdot by element        16 in one
//   neoni8mm  usmmla                 32 in one
#pragma once

#include "int8/kernels/neon_epilogue.h"

VITKD_NEON_BEGIN
namespace vitkd::int8 {
namespace {

struct GemmTile {
  const uint8_t* const* x;
  int64_t x_offset, x_pixel;
  int64_t segments, bytes;  // bytes of a segment: a multiple of 16
  const uint8_t* weights;
  const uint8_t* constants;  // of the panel: bias, multiplier, shift
  uint8_t* y;
  int64_t y_pixel;
  const uint8_t* residual;
  int64_t residual_pixel;
  int channels;  // from the panel's first on
  int pixels;    // that are left
  EpilogueConstants epilogue;

  void advance(int64_t pixels) {
    x_offset += pixels * x_pixel;
    y += pixels * y_pixel;
    residual += pixels * residual_pixel;
  }
};

// Sums of a tile. Dot::kPairs: rows 2i and 2i + 1 hold two channels of pixel 2i and two of pixel
// 2i + 1 in every vector, and constants are laid out like that.
template <int MR>
VITKD_INLINE void multiply(const GemmTile& t, int32x4_t (&acc)[MR][4]);

// The same by pixels.
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

template <int MR, EpilogueKind kKind, Form kForm>
VITKD_INLINE void store_tile(const int32x4_t (&acc)[MR][4], const GemmTile& t) {
  const EpilogueConstants& f = t.epilogue;
  constexpr int kLanes = Dot::kPairs ? 32 : 16;
  const auto* m = reinterpret_cast<const float*>(t.constants) + kLanes;
  const float* shift = m + kLanes;
  const auto multipliers = [&](int h, float32x4_t(&to)[4]) __attribute__((always_inline)) {
    VITKD_UNROLL(4, i) { to[i] = vld1q_f32(m + (4 * h + i) * 4); }
    VITKD_END;
  };
  const auto residual = [&](int r) __attribute__((always_inline)) {
    return kKind == EpilogueKind::residual ? vld1q_u8(t.residual + r * t.residual_pixel)
                                           : vdupq_n_u8(0);
  };
  if constexpr (kKind == EpilogueKind::logits) {
    float32x4_t v[MR][4];
    VITKD_UNROLL(MR, r) {
      float32x4_t scale[4];
      multipliers(Dot::kPairs ? r % 2 : 0, scale);
      to_values<kKind, kForm, 4>(acc[r], scale, shift, vdupq_n_u8(0), f, v[r]);
    }
    VITKD_END;
    if constexpr (Dot::kPairs) split_pairs(v);
    const int bytes = 4 * std::min(16, t.channels);
    VITKD_UNROLL(MR, r) {
      if (r < t.pixels) std::memcpy(t.y + r * t.y_pixel, v[r], bytes);
    }
    VITKD_END;
  } else if constexpr (Dot::kPairs) {
    uint8x16_t y[MR];
    VITKD_UNROLL(2, h) {
      float32x4_t scale[4];
      multipliers(h, scale);
      VITKD_UNROLL(MR / 2, i) {
        const auto a = vreinterpretq_u16_u8(residual(2 * i));
        const auto b = vreinterpretq_u16_u8(residual(2 * i + 1));
        const auto q = vreinterpretq_u8_u16(h == 0 ? vzip1q_u16(a, b) : vzip2q_u16(a, b));
        y[2 * i + h] = to_bytes<kKind, kForm>(acc[2 * i + h], scale, shift + 16 * h, q, f);
      }
      VITKD_END;
    }
    VITKD_END;
    VITKD_UNROLL(MR / 2, i) {
      const auto a = vreinterpretq_u16_u8(y[2 * i]), b = vreinterpretq_u16_u8(y[2 * i + 1]);
      uint8_t* const to = t.y + 2 * i * t.y_pixel;
      vst1q_u8(to, vreinterpretq_u8_u16(vuzp1q_u16(a, b)));
      if (MR > 2 || t.pixels > 1) vst1q_u8(to + t.y_pixel, vreinterpretq_u8_u16(vuzp2q_u16(a, b)));
    }
    VITKD_END;
  } else {
    float32x4_t scale[4];
    multipliers(0, scale);
    VITKD_UNROLL(MR, r) {
      vst1q_u8(t.y + r * t.y_pixel, to_bytes<kKind, kForm>(acc[r], scale, shift, residual(r), f));
    }
    VITKD_END;
  }
}

template <int MR, EpilogueKind kKind>
VITKD_INLINE void gemm_tile(const GemmTile& t) {
  int32x4_t acc[MR][4];
  multiply<MR>(t, acc);
  forget(&t);
  if constexpr (kKind == EpilogueKind::bytes) {
    if (t.epilogue.form == Form::bits) return store_tile<MR, kKind, Form::bits>(acc, t);
  }
  if constexpr (kKind != EpilogueKind::logits) {
    if (t.epilogue.form == Form::words) return store_tile<MR, kKind, Form::words>(acc, t);
  }
  store_tile<MR, kKind, Form::any>(acc, t);
}

template <EpilogueKind kKind>
void gemm_panel(const Packed& packed, const Packed::Panel& panel, const GemmCall& call,
                int64_t first, int64_t end) {
  GemmTile t;
  t.x = call.x;
  t.x_offset = 0;
  t.x_pixel = call.x_pixel;
  t.segments = packed.segments;
  t.bytes = int64_t{4} * packed.stride;
  t.weights = packed.data + panel.weights;
  t.constants = packed.data + panel.constants;
  t.y_pixel = call.y_pixel;
  t.y = call.y + panel.channel * (kKind == EpilogueKind::logits ? 4 : 1);
  t.residual = call.residual + panel.channel;
  t.residual_pixel = call.residual_pixel;
  t.channels = packed.spec.out - panel.channel;
  t.epilogue = epilogue_constants(packed.spec.epilogue, panel);
  t.advance(first);
  constexpr int kRows = Dot::kRows, kFew = Dot::kFewRows;
  int64_t left = end - first;
  t.pixels = kRows;
  for (; left >= kRows; left -= kRows, t.advance(kRows)) gemm_tile<kRows, kKind>(t);
  if (left > 2 && end - first >= kRows) {
    t.advance(left - kRows);  // again what lies before: the same bytes
    return gemm_tile<kRows, kKind>(t);
  }
  for (; left > 0; left -= kFew, t.advance(kFew)) {
    t.pixels = static_cast<int>(left);
    gemm_tile<kFew, kKind>(t);
  }
}

template <EpilogueKind kKind>
void gemm_panels(const Packed& packed, const GemmCall& call) {
  // pixels that stay in L1 while the panels pass by, unless re-reading the weights would cost more
  const int64_t depth = int64_t{4} * packed.segments * packed.stride;
  int64_t chunk = std::max<int64_t>(48, (20 << 10) / depth / 48 * 48);
  if (packed.spec.out * depth > (256 << 10)) chunk = std::max<int64_t>(chunk, call.pixels);
  for (int64_t first = 0; first < call.pixels; first += chunk) {
    const int64_t end = std::min(first + chunk, call.pixels);
    for (int i = call.panel; i < call.panel_end; ++i) {
      gemm_panel<kKind>(packed, packed.panels[i], call, first, end);
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

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END
