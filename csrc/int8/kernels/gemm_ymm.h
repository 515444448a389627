// Products in tiles of MR pixels x 16 channels in 256-bit registers. A step broadcasts four bytes
// of each pixel to all lanes and multiplies them by 64 bytes of weights, by struct Dot of the file
// that includes this:
//
//   avx2     vpmaddubsw, vpmaddwd, vpaddd    roof: 32 multiply-adds a cycle on three ports
//   avxvnni  vpdpbusd                        roof: 64 on two
#pragma once

#include "int8/kernels/epilogue_ymm.h"

VITKD_TARGET_BEGIN(VITKD_YMM)
namespace vitkd::int8 {
namespace {

constexpr int kAhead = 4 << 10;  // bytes that a single pass over weights fetches ahead

struct GemmTile {
  const uint8_t* const* x;
  int64_t x_offset, x_pixel;
  int64_t segments, steps;
  const uint8_t* weights;
  const uint8_t* next;       // weights that will be needed soon, fetched to L2
  const uint8_t* constants;  // of the panel: bias, multiplier, shift
  uint8_t* y;
  int64_t y_pixel;
  const uint8_t* residual;
  int64_t residual_pixel;
  int channels;  // from the panel's first on
  bool magic;
  EpilogueConstants epilogue;

  void advance(int64_t pixels) {
    x_offset += pixels * x_pixel;
    y += pixels * y_pixel;
    residual += pixels * residual_pixel;
  }
};

template <int MR, EpilogueKind kKind>
VITKD_INLINE void store_tile(const __m256i (&acc)[MR][2], const GemmTile& t) {
  const EpilogueConstants& f = t.epilogue;
  const bool magic = t.magic;
  const auto* m = reinterpret_cast<const float*>(t.constants) + 16;
  uint8_t* const y = t.y;
  const int64_t y_pixel = t.y_pixel;
  const auto values = [&](int r, __m256(&v)[2]) __attribute__((always_inline)) {
    VITKD_UNROLL(2, h) {
      v[h] = product(acc[r][h], m + h * 8, m + 16 + h * 8, magic);
      if constexpr (kKind == EpilogueKind::hardswish) v[h] = hardswish(v[h], f);
    }
    VITKD_END;
    if constexpr (kKind == EpilogueKind::residual) {
      __m256i q[2];
      widen(t.residual + r * t.residual_pixel, q);
      VITKD_UNROLL(2, h) { v[h] = plus_residual(v[h], q[h], f); }
      VITKD_END;
    }
  };
  if constexpr (kKind == EpilogueKind::logits) {
    VITKD_UNROLL(MR, r) {
      __m256 v[2];
      values(r, v);
      if (t.channels >= 16) {
        _mm256_storeu_ps(reinterpret_cast<float*>(y + r * y_pixel), v[0]);
        _mm256_storeu_ps(reinterpret_cast<float*>(y + r * y_pixel) + 8, v[1]);
      } else {
        std::memcpy(y + r * y_pixel, v, 4 * t.channels);
      }
    }
    VITKD_END;
  } else {
    VITKD_UNROLL((MR + 1) / 2, i) {
      constexpr int r = 2 * i, last = std::min(2 * i + 1, MR - 1);
      __m256 a[2], b[2];
      values(r, a);
      const __m256i first = pack_values(a[0], a[1], f);
      __m256i second = first;
      if constexpr (last != r) {
        values(last, b);
        second = pack_values(b[0], b[1], f);
      }
      const __m256i bytes = pack_pixels(first, second, f);
      store16(y + r * y_pixel, _mm256_castsi256_si128(bytes));
      if constexpr (last != r) {
        store16(y + last * y_pixel, _mm256_extracti128_si256(bytes, 1));
      }
    }
    VITKD_END;
  }
}

template <int MR, EpilogueKind kKind>
VITKD_INLINE void gemm_tile(const GemmTile& t) {
  __m256i acc[MR][2];
  const __m256i low = load(t.constants), high = load(t.constants + kYmm);
  VITKD_UNROLL(MR, r) { acc[r][0] = low, acc[r][1] = high; }
  VITKD_END;
  const uint8_t* w = t.weights;
  const uint8_t* next = t.next;
  for (int64_t segment = 0; segment < t.segments; ++segment) {
    const uint8_t* rows[MR];
    VITKD_UNROLL(MR, r) {
      rows[r] = t.x[segment] + t.x_offset + r * t.x_pixel;
      asm("" : "+r"(rows[r]));  // in a register of its own
    }
    VITKD_END;
    for (int64_t k = 0; k < 4 * t.steps; k += 4, w += kLine, next += kLine) {
      _mm_prefetch(reinterpret_cast<const char*>(MR == 1 ? w + kAhead : next), _MM_HINT_T1);
      const __m256i weights[2] = {load(w), load(w + kYmm)};
      VITKD_UNROLL(MR, r) {
        int32_t four;
        std::memcpy(&four, rows[r] + k, 4);
        const __m256i bytes = _mm256_set1_epi32(four);
        Dot::add_bytes(acc[r][0], bytes, weights[0]);
        Dot::add_bytes(acc[r][1], bytes, weights[1]);
      }
      VITKD_END;
    }
  }
  forget(&t);
  store_tile<MR, kKind>(acc, t);
}

constexpr int kRows = 6;  // MR

template <EpilogueKind kKind>
void gemm_panel(const Packed& packed, const Packed::Panel& panel, const GemmCall& call,
                int64_t first, int64_t end) {
  GemmTile t;
  t.x = call.x;
  t.x_offset = 0;
  t.x_pixel = call.x_pixel;
  t.segments = panel.steps == 0 ? packed.segments : 1;
  t.steps = panel.steps == 0 ? packed.steps : panel.steps;
  t.weights = packed.data + panel.weights;
  t.constants = packed.data + panel.constants;
  t.y_pixel = call.y_pixel;
  t.y = call.y + panel.channel * (kKind == EpilogueKind::logits ? 4 : 1);
  t.residual = call.residual + panel.channel;
  t.residual_pixel = call.residual_pixel;
  t.channels = packed.spec.out - panel.channel;
  t.magic = panel.magic;
  t.epilogue = epilogue_constants(packed.spec.epilogue, panel.bits);
  t.advance(first);
  // the next panel, or the next layer's first: further ahead where pixels are many
  const int64_t panel_bytes = t.segments * t.steps * kLine;
  const uint8_t* const soon = t.weights + panel_bytes;
  t.next = call.fetched == nullptr ? soon : std::max(*call.fetched, soon);
  const auto advance = [&](int64_t pixels) __attribute__((always_inline)) {
    t.advance(pixels);
    if (t.next - soon < kFar) t.next += panel_bytes;
    if (call.fetched != nullptr) *call.fetched = t.next;
  };
  int64_t left = end - first;
  for (; left >= kRows; left -= kRows) {
    gemm_tile<kRows, kKind>(t);
    advance(kRows);
  }
  if (left > 2 && end - first >= kRows) {
    advance(left - kRows);  // again what lies before: the same bytes
    gemm_tile<kRows, kKind>(t);
    return;
  }
  for (; left > 0; --left) {
    gemm_tile<1, kKind>(t);
    advance(1);
  }
}

template <EpilogueKind kKind>
void gemm_panels(const Packed& packed, const GemmCall& call) {
  // pixels that stay in L1 while the panels pass by, unless re-reading the weights would cost more
  const int64_t depth = int64_t{4} * packed.segments * packed.steps;
  int64_t chunk = std::max<int64_t>(48, (20 << 10) / depth / 48 * 48);
  if (packed.spec.out * depth > (256 << 10)) chunk = std::max<int64_t>(chunk, call.pixels);
  for (int64_t first = 0; first < call.pixels; first += chunk) {
    const int64_t end = std::min(first + chunk, call.pixels);
    for (int i = call.panel; i < call.panel_end; ++i) {
      gemm_panel<kKind>(packed, packed.panels[i], call, first, end);
    }
  }
}

void multiply(const Packed& packed, const GemmCall& call) {
  with_kind(packed.spec.epilogue.kind,
            [&]<EpilogueKind kKind>() { gemm_panels<kKind>(packed, call); });
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END
