// Products in tiles of MR pixels x NV vectors of 16 channels (6x64, 8x48, 12x32, 16x16) in 512-bit
// registers. A step broadcasts four bytes of each pixel to all lanes and multiplies them by vectors
// of weights, by struct Dot of the file that includes this:
//
//   avx512vnni  vpdpbusd                        roof: 128 multiply-adds a cycle on two ports
//   avx512      vpmaddubsw, vpmaddwd, vpaddd    roof: 43
#pragma once

#include <cstring>

#include "int8/kernels/epilogue_avx512.h"

VITKD_TARGET_BEGIN(VITKD_ZMM)
namespace vitkd::int8 {
namespace {

constexpr int kPixels[] = {0, 16, 12, 8, 6};  // of a tile, by its vectors of channels
constexpr int kAhead = 8 << 10;               // bytes that a single pass over weights fetches ahead

struct GemmTile {
  const uint8_t* const* x;
  int64_t x_offset;
  int64_t x_pixel;
  int64_t segments;
  int64_t steps;
  int64_t skipped;      // bytes of weights between segments
  const uint8_t* next;  // weights that will be needed soon, fetched to L2 a line a step
  const uint8_t* weights;
  Destination to;
};

// MR pixels and NV vectors of channels
template <int MR, int NV, EpilogueKind kKind>
VITKD_INLINE void gemm_tile(const GemmTile& t) {
  __m512i acc[MR][NV];
  VITKD_UNROLL(NV, v) {
    const __m512i bias = _mm512_load_si512(t.to.constants + v * kLine);
    VITKD_UNROLL(MR, r) { acc[r][v] = bias; }
    VITKD_END;
  }
  VITKD_END;
  {
    const int64_t x_pixel = t.x_pixel;
    const uint8_t* w = t.weights;
    const uint8_t* next = t.next;
    for (int64_t segment = 0; segment < t.segments; ++segment, w += t.skipped) {
      const uint8_t* x = t.x[segment] + t.x_offset;
      for (int64_t step = t.steps; step > 0; --step, x += 4, w += NV * kLine, next += kLine) {
        if constexpr (MR == 1) {
          VITKD_UNROLL(NV, v) { _mm_prefetch(w + v * kLine + kAhead, _MM_HINT_T1); }
          VITKD_END;
        } else {
          _mm_prefetch(next, _MM_HINT_T1);
        }
        __m512i weights[NV];
        VITKD_UNROLL(NV, v) { weights[v] = _mm512_load_si512(w + v * kLine); }
        VITKD_END;
        VITKD_UNROLL(MR, r) {
          int32_t four;
          std::memcpy(&four, x + r * x_pixel, 4);
          const __m512i bytes = _mm512_set1_epi32(four);
          VITKD_UNROLL(NV, v) { Dot::add(acc[r][v], bytes, weights[v]); }
          VITKD_END;
        }
        VITKD_END;
      }
    }
  }
  forget(&t);
  store_tile<MR, NV, kKind>(acc, t.to);
}

template <int MR, int NV, EpilogueKind kKind>
void gemm_panel(const Packed& packed, const Packed::Panel& panel, const GemmCall& call,
                int64_t first, int64_t end) {
  GemmTile t;
  t.x = call.x;
  t.x_offset = first * call.x_pixel;
  t.x_pixel = call.x_pixel;
  t.segments = panel.steps == 0 ? packed.segments : 1;
  t.steps = panel.steps == 0 ? packed.steps : panel.steps;
  t.skipped = panel.steps == 0 ? int64_t{packed.stride - packed.steps} * NV * kLine : 0;
  t.weights = packed.data + panel.weights;
  t.to = destination(packed, panel, call, first);
  // what follows is the next panel or the next layer's first; the fetching gets further ahead of
  // the arithmetic where pixels are many, and lives on it where they are few
  const int64_t bytes_of_tile = t.segments * t.steps * kLine;
  const uint8_t* const soon = t.weights + bytes_of_tile * NV + t.segments * t.skipped;
  t.next = call.fetched == nullptr ? soon : std::max(*call.fetched, soon);
  const auto advance = [&](int64_t pixels) __attribute__((always_inline)) {
    t.x_offset += pixels * t.x_pixel;
    t.to.advance(pixels);
    if (t.next - soon < kFar) t.next += bytes_of_tile;
    if (call.fetched != nullptr) *call.fetched = t.next;
  };
  int64_t left = end - first;
  for (; left >= MR; left -= MR) {
    gemm_tile<MR, NV, kKind>(t);
    advance(MR);
  }
  if (left > 2 && end - first >= MR) {
    advance(left - MR);  // again what lies before: the same bytes
    gemm_tile<MR, NV, kKind>(t);
    return;
  }
  for (; left > 0; --left) {
    gemm_tile<1, NV, kKind>(t);
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
      const Packed::Panel& panel = packed.panels[i];
      if constexpr (Dot::kPairs) {
        gemm_panel<kPixels[1], 1, kKind>(packed, panel, call, first, end);
        continue;
      }
      switch (panel.vectors) {
        case 1:
          gemm_panel<kPixels[1], 1, kKind>(packed, panel, call, first, end);
          break;
        case 2:
          gemm_panel<kPixels[2], 2, kKind>(packed, panel, call, first, end);
          break;
        case 3:
          gemm_panel<kPixels[3], 3, kKind>(packed, panel, call, first, end);
          break;
        default:
          gemm_panel<kPixels[4], 4, kKind>(packed, panel, call, first, end);
      }
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
