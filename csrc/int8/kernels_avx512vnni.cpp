// The kernels in AVX-512 VNNI. Roof: two vpdpbusd a cycle, 128 multiply-adds; everything else that
// needs a vector port (conversion, packing, byte interleaving) takes from it.
//
// Pointwise: tiles of pixels x channels (6x64, 8x48, 12x32, 16x16), four bytes of a pixel broadcast
// to all lanes. Depthwise: four input bytes per channel lie side by side (rows of one column where
// there are that many) after eight unpacks per 64 channels; two output rows and up to three output
// columns share them. A sum becomes a byte in 2.75 to 3.25 instructions per 16: fma (kMagicBits),
// cvtps2dq, and packs with saturation; lanes are ordered so that packing puts channels in order.

#if defined(__x86_64__)

#include <chrono>
#include <cstring>

#include "int8/finish_avx512.h"

namespace vitkd::int8 {
namespace {

// narrow panels hold the same channels of 2 or 4 neighbouring pixels
int depthwise_order(int width, int vector, int lane) {
  return lane / 4 % width * 16 + vector * 4 + lane % 4;
}

}  // namespace

VITKD_TARGET_BEGIN(VITKD_VNNI)
namespace {

VITKD_INLINE void dot4(__m512i& acc, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}
VITKD_INLINE void dot4(__m512i& acc, __m512i x, const uint8_t* w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "m"(*reinterpret_cast<const __m512i*>(w)));
}

constexpr int kAhead = 8 << 10;  // bytes that a single pass over weights fetches ahead

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
template <int MR, int NV, Finish kFinish>
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
          VITKD_UNROLL(NV, v) { dot4(acc[r][v], bytes, weights[v]); }
          VITKD_END;
        }
        VITKD_END;
      }
    }
  }
  forget(&t);
  finish_tile<MR, NV, kFinish>(acc, t.to);
}

template <int MR, int NV, Finish kFinish>
void gemm_panel(const Packed& packed, const Packed::Panel& panel, const GemmCall& call,
                int64_t first, int64_t end) {
  GemmTile t;
  t.x = call.x;
  t.x_offset = first * call.x_pixel;
  t.x_pixel = call.x_pixel;
  t.segments = packed.segments;
  t.steps = packed.steps;
  t.skipped = int64_t{packed.stride - packed.steps} * NV * kLine;
  t.weights = packed.data + panel.weights;
  t.to = destination(packed, panel, call, first);
  // what follows is the next panel or the next layer's first; the fetching gets further ahead of
  // the arithmetic where pixels are many, and lives on it where they are few
  const int64_t bytes_of_tile = int64_t{packed.segments} * packed.steps * kLine;
  const uint8_t* const soon = t.weights + int64_t{packed.segments} * packed.stride * NV * kLine;
  t.next = call.fetched == nullptr ? soon : std::max(*call.fetched, soon);
  const auto advance = [&](int64_t pixels) __attribute__((always_inline)) {
    t.x_offset += pixels * t.x_pixel;
    t.to.advance(pixels);
    if (t.next - soon < kFar) t.next += bytes_of_tile;
    if (call.fetched != nullptr) *call.fetched = t.next;
  };
  int64_t left = end - first;
  for (; left >= MR; left -= MR) {
    gemm_tile<MR, NV, kFinish>(t);
    advance(MR);
  }
  if (left > 2 && end - first >= MR) {
    advance(left - MR);  // again what lies before: the same bytes
    gemm_tile<MR, NV, kFinish>(t);
    return;
  }
  for (; left > 0; --left) {
    gemm_tile<1, NV, kFinish>(t);
    advance(1);
  }
}

template <Finish kFinish>
void gemm_finish(const Packed& packed, const GemmCall& call) {
  // pixels that stay in L1 while the panels pass by, unless re-reading the weights would cost more
  const int64_t depth = int64_t{4} * packed.segments * packed.steps;
  int64_t chunk = std::max<int64_t>(48, (20 << 10) / depth / 48 * 48);
  if (packed.spec.out * depth > (256 << 10)) chunk = std::max<int64_t>(chunk, call.pixels);
  for (int64_t first = 0; first < call.pixels; first += chunk) {
    const int64_t end = std::min(first + chunk, call.pixels);
    for (int i = call.panel; i < call.panel_end; ++i) {
      const Packed::Panel& panel = packed.panels[i];
      switch (panel.vectors) {
        case 1:
          gemm_panel<16, 1, kFinish>(packed, panel, call, first, end);
          break;
        case 2:
          gemm_panel<12, 2, kFinish>(packed, panel, call, first, end);
          break;
        case 3:
          gemm_panel<8, 3, kFinish>(packed, panel, call, first, end);
          break;
        default:
          gemm_panel<6, 4, kFinish>(packed, panel, call, first, end);
      }
    }
  }
}

void gemm(const Packed& packed, const GemmCall& call) {
  switch (packed.spec.epilogue.finish) {
    case Finish::bytes:
      return gemm_finish<Finish::bytes>(packed, call);
    case Finish::hardswish:
      return gemm_finish<Finish::hardswish>(packed, call);
    case Finish::residual:
      return gemm_finish<Finish::residual>(packed, call);
    case Finish::logits:
      return gemm_finish<Finish::logits>(packed, call);
  }
}

// ---- depthwise ----

// 64 bytes at a column: 64 channels of one pixel, 32 of two or 16 of four, `lane_step` apart
template <int kPixels>
VITKD_INLINE __m512i load_column(const uint8_t* p, int64_t lane_step) {
  if constexpr (kPixels == 1) return _mm512_loadu_si512(p);
  if constexpr (kPixels == 2) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + lane_step));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  const auto at = [&](int i) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * lane_step));
  };
  __m512i all = _mm512_castsi128_si512(at(0));
  all = _mm512_inserti32x4(all, at(1), 1);
  all = _mm512_inserti32x4(all, at(2), 2);
  return _mm512_inserti32x4(all, at(3), 3);
}

// Where a strip's interleaved columns come from and go to: column b of the scratch holds input
// column `column + b`, of each group.
struct Strip {
  const uint8_t* rows[8][4];  // by group: the row's first byte of this panel
  const int32_t* places;      // by group: four rows and four columns
  int groups;
  int64_t group_bytes;
  uint8_t* scratch;
  const uint8_t* edge;  // padding bytes
  int64_t pixel;
  int width;  // of the map
  int stride;
  int column;      // negative in the padding
  int step, used;  // of every `step` columns the first `used` are read
};

// [channels][4] in lanes of 16 channels from four vectors of bytes
VITKD_INLINE void interleave4(const __m512i* v, __m512i* to) {
  const __m512i ab_lo = _mm512_unpacklo_epi8(v[0], v[1]), ab_hi = _mm512_unpackhi_epi8(v[0], v[1]);
  const __m512i cd_lo = _mm512_unpacklo_epi8(v[2], v[3]), cd_hi = _mm512_unpackhi_epi8(v[2], v[3]);
  to[0] = _mm512_unpacklo_epi16(ab_lo, cd_lo);
  to[1] = _mm512_unpackhi_epi16(ab_lo, cd_lo);
  to[2] = _mm512_unpacklo_epi16(ab_hi, cd_hi);
  to[3] = _mm512_unpackhi_epi16(ab_hi, cd_hi);
}

// a column of a row, of which some pixels are padding
template <int kPixels>
__attribute__((noinline)) __m512i load_edge(const uint8_t* row, const uint8_t* edge, int column,
                                            int stride, int width, int64_t pixel) {
  alignas(kLine) uint8_t bytes[kLine];
  for (int p = 0; p < kPixels; ++p, column += stride) {
    const uint8_t* from = column >= 0 && column < width ? row + column * pixel : edge;
    std::memcpy(bytes + p * (kLine / kPixels), from, kLine / kPixels);
  }
  return _mm512_load_si512(bytes);
}

// `bytes` of each pixel, of at most `pixels`
template <int kPixels>
VITKD_INLINE void store_pixels(uint8_t* y, int64_t y_pixel, int64_t bytes, int pixels,
                               __m512i out) {
  if constexpr (kPixels == 1) {
    _mm512_mask_storeu_epi8(y, ~uint64_t{0} >> (64 - bytes), out);
  } else if constexpr (kPixels == 2) {
    const auto half = reinterpret_cast<__m256i*>(y + y_pixel);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_castsi512_si256(out));
    if (pixels > 1) _mm256_storeu_si256(half, _mm512_extracti64x4_epi64(out, 1));
  } else {
    VITKD_UNROLL(4, p) {
      if (pixels > p) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + p * y_pixel),
                         _mm512_extracti32x4_epi32(out, p));
      }
    }
    VITKD_END;
  }
}

// phase 1: columns [begin, end), byte by byte side by side, into the scratch
template <int kPixels>
VITKD_INLINE void interleave(const Strip& s, int begin, int end) {
  const int64_t lane_step = s.stride * s.pixel;
  for (int g = 0; g < s.groups; ++g) {
    const int32_t* shifts = s.places + 8 * g + 4;
    const int last = shifts[3] + (kPixels - 1) * s.stride;
    const uint8_t* from[4];
    for (int i = 0; i < 4; ++i) {
      from[i] = s.rows[g][i] + (s.column + begin + shifts[i]) * s.pixel;
    }
    uint8_t* to = s.scratch + g * s.group_bytes + begin * 256;
    for (int b = begin, phase = begin % s.step; b < end; ++b, to += 256) {
      if (phase < s.used) {
        const int column = s.column + b;
        __m512i v[4];
        if (column >= 0 && column + last < s.width) {
          for (int i = 0; i < 4; ++i) v[i] = load_column<kPixels>(from[i], lane_step);
        } else {
          for (int i = 0; i < 4; ++i) {
            v[i] = load_edge<kPixels>(s.rows[g][i], s.edge, column + shifts[i], s.stride, s.width,
                                      s.pixel);
          }
        }
        interleave4(v, reinterpret_cast<__m512i*>(to));
      }
      if (++phase == s.step) phase = 0;
      for (const uint8_t*& p : from) p += s.pixel;
    }
  }
}

// vector j of the sums of some outputs, to words of two vectors
template <int j, int kOutputs, Finish kFinish>
VITKD_INLINE void words_of(__m512i (&acc)[kOutputs], const uint8_t* constants, bool magic,
                           const Finisher& f, __m512i (&pair)[2][kOutputs]) {
  if (!magic) {
    VITKD_UNROLL(kOutputs, i) { acc[i] = _mm512_castps_si512(_mm512_cvtepi32_ps(acc[i])); }
    VITKD_END;
  }
  const __m512 m = _mm512_load_ps(constants + (4 + j) * kLine);
  const __m512 shift = _mm512_load_ps(constants + (8 + j) * kLine);
  VITKD_UNROLL(kOutputs, i) {
    __m512 v = _mm512_fmadd_ps(_mm512_castsi512_ps(acc[i]), m, shift);
    if constexpr (kFinish == Finish::hardswish) v = hardswish(v, f);
    const __m512i rounded = _mm512_cvtps_epi32(v);
    pair[j / 2][i] = j % 2 == 0 ? rounded : _mm512_packs_epi32(pair[j / 2][i], rounded);
  }
  VITKD_END;
}

struct DepthwiseTile {
  const uint8_t* x;  // in the scratch
  int64_t step;      // bytes from one position to the next
  const uint8_t* constants;
  const uint8_t* weights;
  const int32_t* offsets;
  int64_t taps;
  uint8_t* y[2];  // nullptr: a row that is not wanted
  int64_t y_pixel;
  int64_t bytes;  // of a pixel
  int pixels;     // to the end of the row
  bool magic;
  Finisher finisher;
};

// Phase 2: kRows output rows of kColumns positions of kPixels pixels, vector by vector of channels.
template <int kRows, int kColumns, int kPixels, Finish kFinish>
VITKD_INLINE void depthwise_tile(const DepthwiseTile& t) {
  constexpr int kOutputs = kRows * kColumns;
  __m512i pair[2][kOutputs];  // words of two vectors
  VITKD_UNROLL(4, j) {
    __m512i acc[kOutputs];
    const __m512i bias = _mm512_load_si512(t.constants + j * kLine);
    VITKD_UNROLL(kOutputs, i) { acc[i] = bias; }
    VITKD_END;
    const uint8_t* w = t.weights + j * kLine;
    const int32_t* offset = t.offsets;
    for (int64_t tap = t.taps; tap > 0; --tap, ++offset, w += kRows * 4 * kLine) {
      const uint8_t* x = t.x + *offset + j * kLine;
      __m512i weights[kRows];
      VITKD_UNROLL(kRows, r) { weights[r] = _mm512_load_si512(w + r * 4 * kLine); }
      VITKD_END;
      VITKD_UNROLL(kColumns, c) {
        const __m512i column = _mm512_load_si512(x + c * t.step);
        VITKD_UNROLL(kRows, r) { dot4(acc[r * kColumns + c], column, weights[r]); }
        VITKD_END;
      }
      VITKD_END;
    }
    words_of<j, kOutputs, kFinish>(acc, t.constants, t.magic, t.finisher, pair);
  }
  VITKD_END;
  VITKD_UNROLL(kRows, r) {
    if (t.y[r] != nullptr) {
      VITKD_UNROLL(kColumns, c) {
        constexpr int i = r * kColumns + c;
        store_pixels<kPixels>(t.y[r] + c * kPixels * t.y_pixel, t.y_pixel, t.bytes,
                              t.pixels - c * kPixels,
                              pack_words(pair[0][i], pair[1][i], t.finisher));
      }
      VITKD_END;
    }
  }
  VITKD_END;
}

template <int kRows, int kPixels, Finish kFinish>
void depthwise_panel(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  const ConvSpec& spec = packed.spec;
  Strip s;
  s.places = packed.groups.data();
  s.groups = static_cast<int>(packed.groups.size()) / 8;
  s.group_bytes = kDepthwiseScratch / s.groups / 256 * 256;
  s.scratch = call.scratch;
  s.edge = call.padding_row + panel.channel;
  s.pixel = call.x.pixel;
  s.width = call.x.width;
  s.stride = spec.stride_w;
  s.step = spec.stride_w * kPixels;
  s.used = std::min(spec.kernel_w, s.step);
  DepthwiseTile t;
  t.step = int64_t{s.step} * 256;
  t.constants = packed.data + panel.constants;
  t.weights = packed.data + panel.weights;
  t.offsets = packed.offsets.data();
  t.taps = packed.steps;
  t.y_pixel = call.y.pixel;
  t.bytes = std::min<int64_t>(64 / kPixels, call.y.pixel - panel.channel);
  t.magic = panel.magic;
  t.finisher = finisher(spec.epilogue);
  // strips so short that the scratch stays in L1
  const int wanted = std::min<int64_t>(s.group_bytes / 256, (24 << 10) / s.groups / 256);
  const int at_once = std::max(1, (wanted - spec.kernel_w) / s.step + 1);
  const int positions = (call.y.width + kPixels - 1) / kPixels;
  for (int begin = 0; begin < positions; begin += at_once) {
    const int end = std::min(begin + at_once, positions);
    s.column = begin * s.step - call.left;
    for (int row = call.row; row < call.row_end; row += kRows) {
      for (int i = 0; i < 4 * s.groups; ++i) {
        const int r = row * spec.stride_h - call.top + s.places[i / 4 * 8 + i % 4];
        const bool inside = r >= 0 && r < call.x.height;
        s.rows[i / 4][i % 4] = (inside ? call.x.row(r) : call.padding_row) + panel.channel;
      }
      int ready = 0;
      // the interleaving of a tile's columns runs beside the arithmetic of the tile before it
      const auto tile = [&]<int kColumns>(int at) __attribute__((always_inline)) {
        const int columns = (at - begin + kColumns - 1) * s.step + spec.kernel_w;
        interleave<kPixels>(s, ready, columns);
        ready = columns;
        const int64_t to = int64_t{at} * kPixels * call.y.pixel + panel.channel;
        for (int r = 0; r < kRows; ++r) {
          t.y[r] = row + r < call.row_end ? call.y.row(row + r) + to : nullptr;
        }
        t.x = call.scratch + (at - begin) * t.step;
        t.pixels = call.y.width - at * kPixels;
        depthwise_tile<kRows, kColumns, kPixels, kFinish>(t);
      };
      int at = begin;
      for (; at + 4 <= end; at += 4) tile.template operator()<4>(at);
      if (at + 2 <= end) tile.template operator()<2>(at), at += 2;
      if (at < end) tile.template operator()<1>(at);
    }
  }
}

// ---- kernels three columns wide and at most four rows high in all ----

// the first bytes of four rows of a panel
struct FourRows {
  const uint8_t* at[4];
};

VITKD_INLINE FourRows four_rows(const Packed& packed, const DepthwiseCall& call, int channel,
                                int row) {
  FourRows rows;
  for (int i = 0; i < 4; ++i) {
    const int r = row * packed.spec.stride_h - call.top + packed.groups[i];
    rows.at[i] = (r >= 0 && r < call.x.height ? call.x.row(r) : call.padding_row) + channel;
  }
  return rows;
}

// one interleaved column
template <int kPixels>
VITKD_INLINE void load_interleaved(const FourRows& rows, const uint8_t* edge, int column,
                                   int stride, const Map& map, __m512i* to) {
  __m512i v[4];
  if constexpr (kPixels == 1) {
    // padding, interleaved, is padding
    if (column < 0 || column >= map.width) {
      VITKD_UNROLL(4, j) { to[j] = _mm512_loadu_si512(edge); }
      VITKD_END;
      return;
    }
  }
  if (column >= 0 && column + (kPixels - 1) * stride < map.width) {
    VITKD_UNROLL(4, i) {
      v[i] = load_column<kPixels>(rows.at[i] + column * map.pixel, stride * map.pixel);
    }
    VITKD_END;
  } else {
    VITKD_UNROLL(4, i) {
      v[i] = load_edge<kPixels>(rows.at[i], edge, column, stride, map.width, map.pixel);
    }
    VITKD_END;
  }
  interleave4(v, to);
}

// The three columns of an output stay in registers; kNew of them are new at each position. Per 64
// outputs of a 3x3 kernel with stride 2: 16 unpacks, 12 vpdpbusd and 11 others on two ports, 20
// cycles.
template <int kNew, int kRows, int kPixels, Finish kFinish>
void depthwise_three(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  const ConvSpec& spec = packed.spec;
  const uint8_t* const constants = packed.data + panel.constants;
  const uint8_t* const weights = packed.data + panel.weights;
  const auto* const m = reinterpret_cast<const float*>(constants) + 64;
  const Finisher f = finisher(spec.epilogue);
  const uint8_t* const edge = call.padding_row + panel.channel;
  const int64_t y_pixel = call.y.pixel;
  const int64_t bytes = std::min<int64_t>(64 / kPixels, y_pixel - panel.channel);
  for (int row = call.row; row < call.row_end; row += kRows) {
    const FourRows rows = four_rows(packed, call, panel.channel, row);
    uint8_t* y[kRows];
    for (int r = 0; r < kRows; ++r) {
      // a second row that is not wanted is written to the first, before it
      y[r] = call.y.row(row + r < call.row_end ? row + r : row) + panel.channel;
    }
    const auto load = [&](int column, __m512i* to) __attribute__((always_inline)) {
      load_interleaved<kPixels>(rows, edge, column, spec.stride_w, call.x, to);
    };
    __m512i columns[3][4];
    int column = -call.left;
    VITKD_UNROLL(3 - kNew, i) { load(column + i, columns[kNew + i]); }
    VITKD_END;
    for (int at = 0; at < call.y.width; at += kPixels, column += spec.stride_w * kPixels) {
      VITKD_UNROLL(3 - kNew, i) {
        VITKD_UNROLL(4, j) { columns[i][j] = columns[kNew + i][j]; }
        VITKD_END;
      }
      VITKD_END;
      VITKD_UNROLL(kNew, i) { load(column + 3 - kNew + i, columns[3 - kNew + i]); }
      VITKD_END;
      __m512i acc[kRows][4];
      VITKD_UNROLL(4, j) {
        VITKD_UNROLL(kRows, r) { acc[r][j] = _mm512_load_si512(constants + j * kLine); }
        VITKD_END;
        VITKD_UNROLL(3, c) {
          VITKD_UNROLL(kRows, r) {
            dot4(acc[r][j], columns[c][j], weights + ((c * kRows + r) * 4 + j) * kLine);
          }
          VITKD_END;
        }
        VITKD_END;
      }
      VITKD_END;
      VITKD_UNROLL(kRows, i) {
        constexpr int r = kRows - 1 - i;
        __m512 v[4];
        VITKD_UNROLL(4, j) {
          v[j] = product(acc[r][j], m + j * 16, m + 64 + j * 16, panel.magic);
          if constexpr (kFinish == Finish::hardswish) v[j] = hardswish(v[j], f);
        }
        VITKD_END;
        store_pixels<kPixels>(y[r] + at * y_pixel, y_pixel, bytes, call.y.width - at,
                              pack4(v[0], v[1], v[2], v[3], f));
      }
      VITKD_END;
    }
  }
}

struct SlidingTile {
  const uint8_t* x;  // interleaved columns
  FourRows next;     // the pixel of the next pair of rows that is interleaved meanwhile
  int64_t x_pixel;
  uint8_t* to;  // where to
  const uint8_t* constants;
  const uint8_t* weights;
  uint8_t* y[2];
  int64_t y_pixel;
  int64_t bytes;
  bool magic;
  Finisher finisher;
};

// Two output rows of kColumns pixels. Per column 8 unpacks (of the next two rows: they need one
// port, and vpdpbusd leaves room on it), 24 vpdpbusd and 22 others on two ports: 27 cycles per 128
// outputs of a 3x3 kernel, 33% of the vpdpbusd peak.
template <int kColumns, bool kNext, Finish kFinish>
VITKD_INLINE void sliding_tile(const SlidingTile& t) {
  constexpr int kOutputs = 2 * kColumns;
  __m512i pair[2][kOutputs];
  VITKD_UNROLL(4, j) {
    __m512i acc[kOutputs], weights[6];
    const __m512i bias = _mm512_load_si512(t.constants + j * kLine);
    VITKD_UNROLL(kOutputs, i) { acc[i] = bias; }
    VITKD_END;
    VITKD_UNROLL(6, i) { weights[i] = _mm512_load_si512(t.weights + (i * 4 + j) * kLine); }
    VITKD_END;
    VITKD_UNROLL(kColumns + 2, c) {
      const __m512i column = _mm512_load_si512(t.x + c * 256 + j * kLine);
      VITKD_UNROLL(3, tap) {
        if constexpr (c - tap >= 0 && c - tap < kColumns) {
          dot4(acc[c - tap], column, weights[2 * tap]);
          dot4(acc[kColumns + c - tap], column, weights[2 * tap + 1]);
        }
      }
      VITKD_END;
    }
    VITKD_END;
    if constexpr (kNext && j < kColumns) {
      __m512i v[4];
      VITKD_UNROLL(4, i) { v[i] = _mm512_loadu_si512(t.next.at[i] + j * t.x_pixel); }
      VITKD_END;
      interleave4(v, reinterpret_cast<__m512i*>(t.to + j * 256));
    }
    words_of<j, kOutputs, kFinish>(acc, t.constants, t.magic, t.finisher, pair);
  }
  VITKD_END;
  VITKD_UNROLL(kOutputs, i) {
    // the second row first: where it is not wanted, it lies where the first will
    constexpr int o = kOutputs - 1 - i;
    store_pixels<1>(t.y[o / kColumns] + o % kColumns * t.y_pixel, t.y_pixel, t.bytes, 1,
                    pack_words(pair[0][o], pair[1][o], t.finisher));
  }
  VITKD_END;
}

// Stride 1, one column of padding on each side: pairs of rows, interleaved one pair ahead.
template <Finish kFinish>
void depthwise_sliding(const Packed& packed, const DepthwiseCall& call,
                       const Packed::Panel& panel) {
  constexpr int kStrip = 28;  // columns: two interleaved pairs of rows stay in L1
  const uint8_t* const edge = call.padding_row + panel.channel;
  SlidingTile t;
  t.x_pixel = call.x.pixel;
  t.constants = packed.data + panel.constants;
  t.weights = packed.data + panel.weights;
  t.y_pixel = call.y.pixel;
  t.bytes = std::min<int64_t>(64, call.y.pixel - panel.channel);
  t.magic = panel.magic;
  t.finisher = finisher(packed.spec.epilogue);
  for (int begin = 0; begin < call.y.width; begin += kStrip) {
    const int columns = std::min(kStrip, call.y.width - begin);
    uint8_t* now = call.scratch;
    uint8_t* later = call.scratch + (kStrip + 2) * 256;
    FourRows rows = four_rows(packed, call, panel.channel, call.row);
    const auto interleave_at = [&](int b, uint8_t* to) __attribute__((always_inline)) {
      load_interleaved<1>(rows, edge, begin - 1 + b, 1, call.x,
                          reinterpret_cast<__m512i*>(to + b * 256));
    };
    for (int b = 0; b < columns + 2; ++b) interleave_at(b, now);
    for (int row = call.row; row < call.row_end; row += 2) {
      const bool more = row + 2 < call.row_end;
      if (more) {
        rows = four_rows(packed, call, panel.channel, row + 2);
        interleave_at(0, later);
        interleave_at(columns + 1, later);
      }
      t.x = now;
      t.to = later + 256;
      for (int i = 0; i < 4; ++i) t.next.at[i] = rows.at[i] + begin * t.x_pixel;
      for (int r = 0; r < 2; ++r) {
        t.y[r] =
            call.y.row(std::min(row + r, call.row_end - 1)) + panel.channel + begin * t.y_pixel;
      }
      const auto tile = [&]<int kColumns>() __attribute__((always_inline)) {
        more ? sliding_tile<kColumns, true, kFinish>(t) : sliding_tile<kColumns, false, kFinish>(t);
        t.x += kColumns * 256;
        t.to += kColumns * 256;
        for (const uint8_t*& p : t.next.at) p += kColumns * t.x_pixel;
        for (uint8_t*& p : t.y) p += kColumns * t.y_pixel;
      };
      int left = columns;
      for (; left >= 3 && left != 4; left -= 3) tile.template operator()<3>();
      for (; left >= 2; left -= 2) tile.template operator()<2>();
      if (left > 0) tile.template operator()<1>();
      std::swap(now, later);
    }
  }
}

template <int kRows, int kPixels, Finish kFinish>
void depthwise_pixels(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  const int step = packed.spec.stride_w * kPixels;
  if (packed.spec.kernel_w != 3 || packed.groups.size() > 8 || packed.groups[7] > 0) {
    depthwise_panel<kRows, kPixels, kFinish>(packed, call, panel);
  } else if (step > 2) {
    depthwise_three<3, kRows, kPixels, kFinish>(packed, call, panel);
  } else if (step == 2) {
    depthwise_three<2, kRows, kPixels, kFinish>(packed, call, panel);
  } else if (kRows == 1 || call.left != 1 || call.x.width != call.y.width) {
    depthwise_three<1, kRows, kPixels, kFinish>(packed, call, panel);
  } else {
    depthwise_sliding<kFinish>(packed, call, panel);
  }
}

template <int kRows, Finish kFinish>
void depthwise_rows(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  switch (panel.width) {
    case 1:
      return depthwise_pixels<kRows, 4, kFinish>(packed, call, panel);
    case 2:
      return depthwise_pixels<kRows, 2, kFinish>(packed, call, panel);
    default:
      return depthwise_pixels<kRows, 1, kFinish>(packed, call, panel);
  }
}

template <Finish kFinish>
void depthwise_finish(const Packed& packed, const DepthwiseCall& call) {
  for (int i = call.panel; i < call.panel_end; ++i) {
    packed.spec.stride_h == 1 ? depthwise_rows<2, kFinish>(packed, call, packed.panels[i])
                              : depthwise_rows<1, kFinish>(packed, call, packed.panels[i]);
  }
}

void depthwise(const Packed& packed, const DepthwiseCall& call) {
  packed.spec.epilogue.finish == Finish::hardswish
      ? depthwise_finish<Finish::hardswish>(packed, call)
      : depthwise_finish<Finish::bytes>(packed, call);
}

// ---- elementwise ----

VITKD_INLINE __m512 centred(const uint8_t* x, __m512i zero_point) {
  const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(q, zero_point));
}

VITKD_INLINE void store16(uint8_t* y, __m512 v, const Finisher& f) {
  const __m512i dword = _mm512_cvtps_epi32(v);
  __m256i word = _mm512_cvtsepi32_epi16(dword);
  word = _mm256_adds_epi16(word, *reinterpret_cast<const __m256i*>(f.zero_point));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(word, word), 0x08);
  __m128i byte = _mm256_castsi256_si128(packed);
  byte = _mm_max_epu8(byte, *reinterpret_cast<const __m128i*>(f.lo));
  byte = _mm_min_epu8(byte, *reinterpret_cast<const __m128i*>(f.hi));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), byte);
}

void add(const uint8_t* a, int z_a, float m_a, const uint8_t* b, int z_b, float m_b,
         const Requantize& requantize, int64_t n, uint8_t* y) {
  const Finisher f = finisher({requantize, Finish::bytes, 0, 0});
  const __m512i zero_a = _mm512_set1_epi32(z_a), zero_b = _mm512_set1_epi32(z_b);
  const __m512 scale_a = _mm512_set1_ps(m_a), scale_b = _mm512_set1_ps(m_b);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 v = _mm512_mul_ps(centred(a + i, zero_a), scale_a);
    store16(y + i, _mm512_add_ps(v, _mm512_mul_ps(centred(b + i, zero_b), scale_b)), f);
  }
}

void channel_sums(const uint8_t* x, int64_t pixels, int64_t pixel, int64_t channels,
                  int32_t* sums) {
  for (int64_t c = 0; c < channels; c += 16) {
    const uint8_t* p = x + c;
    __m512i sum = _mm512_loadu_si512(sums + c);
    for (int64_t left = pixels; left > 0; left -= 256) {
      __m256i part = _mm256_setzero_si256();
      for (int64_t i = std::min<int64_t>(left, 256); i > 0; --i, p += pixel) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        part = _mm256_add_epi16(part, _mm256_cvtepu8_epi16(bytes));
      }
      sum = _mm512_add_epi32(sum, _mm512_cvtepu16_epi32(part));
    }
    _mm512_storeu_si512(sums + c, sum);
  }
}

void scale(const uint8_t* x, int z, const float* factor, const Requantize& requantize,
           int64_t pixels, int64_t pixel, uint8_t* y) {
  const Finisher f = finisher({requantize, Finish::bytes, 0, 0});
  const __m512i zero = _mm512_set1_epi32(z);
  for (int64_t p = 0; p < pixels; ++p, x += pixel, y += pixel) {
    for (int64_t c = 0; c < pixel; c += 16) {
      store16(y + c, _mm512_mul_ps(centred(x + c, zero), _mm512_loadu_ps(factor + c)), f);
    }
  }
}

void linear(const int8_t* q, int64_t stride, const float* s, const float* x, int in, int out,
            float* h) {
  // eight vectors at once: additions to one sum wait for each other
  for (int j = 0; j < out; j += 128) {
    const int vectors = std::min(8, (out - j) / 16);
    __m512 sum[8] = {}, scale[8] = {};
    for (int v = 0; v < vectors; ++v) {
      sum[v] = _mm512_loadu_ps(h + j + v * 16);
      scale[v] = _mm512_loadu_ps(s + j + v * 16);
    }
    const int8_t* from = q + j;
    const auto rows = [&]<int kVectors>() __attribute__((always_inline)) {
      for (int c = 0; c < in; ++c, from += stride) {
        const __m512 mean = _mm512_set1_ps(x[c]);
        _mm_prefetch(from + 16 * stride, _MM_HINT_T0);
        _mm_prefetch(from + 16 * stride + 64, _MM_HINT_T0);
        VITKD_UNROLL(kVectors, v) {
          const auto* bytes = reinterpret_cast<const __m128i*>(from + v * 16);
          const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes));
          const __m512 w = _mm512_mul_ps(_mm512_cvtepi32_ps(wide), scale[v]);
          sum[v] = _mm512_add_ps(sum[v], _mm512_mul_ps(w, mean));
        }
        VITKD_END;
      }
    };
    // what lies past `out` is computed and thrown away: rows have slack
    vectors > 4   ? rows.template operator()<8>()
    : vectors > 2 ? rows.template operator()<4>()
                  : rows.template operator()<2>();
    for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(h + j + v * 16, sum[v]);
  }
}

// independent vpdpbusd on registers
void dot_loop(int64_t rounds) {
  __m512i acc[12] = {};
  const __m512i x = _mm512_set1_epi8(3), w = _mm512_set1_epi8(-5);
  for (int64_t i = 0; i < rounds; ++i) {
    VITKD_UNROLL(12, r) { dot4(acc[r], x, w); }
    VITKD_END;
  }
  VITKD_UNROLL(12, r) { asm volatile("" : : "v"(acc[r])); }
  VITKD_END;
}

}  // namespace
VITKD_TARGET_END

namespace {

void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  const bool magic = spec.epilogue.finish != Finish::logits;
  lay_out_gemm(spec, pixel, {4, 0, 0, magic, gemm_order(spec)}, packed);
}

// Groups of four (row, column) whose bytes lie side by side, and taps, each a group at a column
// with weights for one or two output rows; [taps][rows][4 vectors][16 lanes][4 bytes].
void pack_depthwise(const ConvSpec& spec, Packed* packed) {
  const int variants = spec.stride_h == 1 ? 2 : 1;
  const int rows = spec.kernel_h + variants - 1;
  struct Tap {
    int group, column;
  };
  std::vector<Tap> taps;
  const auto group = [&](int row, int row_step, int columns) {
    // four rows of one column, two rows of two columns or one row of four
    const int per_column = 4 / columns, index = static_cast<int>(packed->groups.size()) / 8;
    for (int i = 0; i < 4; ++i) {
      packed->groups.push_back(std::min(row + i % per_column * row_step, rows - 1));
    }
    for (int i = 0; i < 4; ++i) packed->groups.push_back(i / per_column);
    for (int c = 0; c < spec.kernel_w; c += columns) taps.push_back({index, c});
  };
  for (int row = 0; row < rows;) {
    const int left = rows - row;
    group(row, 1, left >= 3 ? 1 : left == 2 ? 2 : 4);
    row += left >= 3 ? 4 : left;
  }
  packed->steps = static_cast<int>(taps.size());
  const int64_t group_bytes = kDepthwiseScratch / (packed->groups.size() / 8) / 256 * 256;
  for (const Tap& tap : taps) {
    packed->offsets.push_back(static_cast<int32_t>(tap.group * group_bytes + tap.column * 256));
  }
  // a panel of 48 channels is as one of 64
  const auto order = [](int width, int vector, int lane) {
    return depthwise_order(width == 3 ? 4 : width, vector, lane);
  };
  lay_out(spec, {4, 4, size_t{kLine} * taps.size() * variants, true, order}, packed);
  for (const Packed::Panel& panel : packed->panels) {
    auto* w = reinterpret_cast<int8_t*>(packed->own.data() + panel.weights);
    for (const Tap& tap : taps) {
      const int32_t* place = &packed->groups[8 * tap.group];
      for (int variant = 0; variant < variants; ++variant) {
        for (int i = 0; i < 64; ++i) {
          const int channel = panel.channel + order(panel.width, i / 16, i % 16);
          for (int k = 0; k < 4; ++k, ++w) {
            const int y = place[k] - variant, x = tap.column + place[4 + k];
            // of rows that fill a group up, only the first counts
            const bool again = place[4 + k] == 0 && k > 0 && place[k] == place[k - 1];
            if (channel < spec.out && !again && y >= 0 && y < spec.kernel_h && x < spec.kernel_w) {
              *w = spec.at(channel, y * spec.kernel_w + x, 0);
            }
          }
        }
      }
    }
  }
}

}  // namespace

double vnni_peak(double seconds) {
  constexpr int64_t kRounds = 20000;
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch());
  };
  double best = 0;
  for (const auto start = now(); (now() - start).count() < seconds;) {
    const auto begin = now();
    dot_loop(kRounds);
    best = std::max(best, 12 * 64 * kRounds / (now() - begin).count());
  }
  return best;
}

const Kernels kAvx512Vnni{Isa::avx512vnni,
                          "gemm_u8s8_6x64_avx512vnni",
                          "depthwise_2x3x64_avx512vnni",
                          pack_gemm,
                          gemm,
                          pack_depthwise,
                          depthwise,
                          add,
                          channel_sums,
                          scale,
                          linear};

}  // namespace vitkd::int8

#endif
