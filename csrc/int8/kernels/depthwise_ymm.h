// Depthwise convolutions in 256-bit registers. Phase 1 lays kGroup neighbouring rows of a column
// side by side in each lane (bytes for vpdpbusd, words for vpmaddwd), where fewer are left two or
// four columns of them, and keeps them in scratch memory; phase 2 multiplies: two output rows share
// them where the stride is 1. Unpacking runs on one port, beside the arithmetic of the tile before
// it.
#pragma once

#include "int8/kernels/epilogue_ymm.h"

VITKD_TARGET_BEGIN(VITKD_YMM)
namespace vitkd::int8 {
namespace {

constexpr int kGroup = Dot::kWords ? 2 : 4;    // rows side by side
constexpr int kVectors = Dot::kWords ? 2 : 4;  // of a column: 16 or 32 channels
constexpr int kColumnBytes = kVectors * kYmm;

// Where a strip's columns come from and go to: column b of the scratch is input column `column +
// b`.
struct Strip {
  const uint8_t* rows[16][kGroup];  // by group: the row's first byte of this panel
  const int32_t* places;            // by group: kGroup rows and kGroup columns
  int groups;
  int64_t group_bytes;
  uint8_t* scratch;
  const uint8_t* edge;  // padding bytes
  int64_t pixel;
  int width;  // of the input
  int stride;
  int column;      // negative in the padding
  int step, used;  // of every `step` columns the first `used` are read
};

// the bytes of a column: 32 channels of a pixel or 16 of two, `stride` apart; or 16 channels as
// words
template <int kPixels, class At>
VITKD_INLINE __m256i load_column(const At& at) {
  if constexpr (Dot::kWords) return _mm256_cvtepu8_epi16(load16(at(0)));
  if constexpr (kPixels == 1) return load(at(0));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(at(0))), load16(at(1)), 1);
}

VITKD_INLINE void interleave(const __m256i (&v)[kGroup], uint8_t* to) {
  if constexpr (Dot::kWords) {
    store(to, _mm256_unpacklo_epi16(v[0], v[1]));
    store(to + kYmm, _mm256_unpackhi_epi16(v[0], v[1]));
  } else {
    const __m256i ab_lo = _mm256_unpacklo_epi8(v[0], v[1]);
    const __m256i ab_hi = _mm256_unpackhi_epi8(v[0], v[1]);
    const __m256i cd_lo = _mm256_unpacklo_epi8(v[2], v[3]);
    const __m256i cd_hi = _mm256_unpackhi_epi8(v[2], v[3]);
    store(to, _mm256_unpacklo_epi16(ab_lo, cd_lo));
    store(to + kYmm, _mm256_unpackhi_epi16(ab_lo, cd_lo));
    store(to + 2 * kYmm, _mm256_unpacklo_epi16(ab_hi, cd_hi));
    store(to + 3 * kYmm, _mm256_unpackhi_epi16(ab_hi, cd_hi));
  }
}

// Phase 1: columns [begin, end) of every group.
template <int kPixels>
VITKD_INLINE void interleave_columns(const Strip& s, int begin, int end) {
  for (int g = 0; g < s.groups; ++g) {
    const int32_t* shifts = s.places + g * 2 * kGroup + kGroup;
    // of these, no pixel is padding
    const int last = shifts[kGroup - 1] + (kPixels - 1) * s.stride;
    const int inside = std::clamp(-s.column, begin, end);
    const int outside = std::clamp(s.width - last - s.column, inside, end);
    uint8_t* to = s.scratch + g * s.group_bytes + begin * kColumnBytes;
    int phase = begin % s.step;
    const auto edges = [&](int from, int until) {
      for (int b = from; b < until; ++b, to += kColumnBytes) {
        __m256i v[kGroup];
        VITKD_UNROLL(kGroup, i) {
          v[i] = load_column<kPixels>([&](int n) __attribute__((always_inline)) {
            const int at = s.column + b + shifts[i] + n * s.stride;
            return at >= 0 && at < s.width ? s.rows[g][i] + at * s.pixel : s.edge;
          });
        }
        VITKD_END;
        interleave(v, to);
        if (++phase == s.step) phase = 0;
      }
    };
    edges(begin, inside);
    const uint8_t* from[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      from[i] = s.rows[g][i] + (s.column + inside + shifts[i]) * s.pixel;
    }
    const int64_t pixel = s.pixel, next = s.stride * s.pixel;
    for (int b = inside; b < outside; ++b, to += kColumnBytes) {
      if (phase < s.used) {
        __m256i v[kGroup];
        VITKD_UNROLL(kGroup, i) {
          v[i] = load_column<kPixels>(
              [&](int n) __attribute__((always_inline)) { return from[i] + n * next; });
        }
        VITKD_END;
        interleave(v, to);
      }
      VITKD_UNROLL(kGroup, i) { from[i] += pixel; }
      VITKD_END;
      if (++phase == s.step) phase = 0;
    }
    edges(outside, end);
  }
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
  int pixels;  // to the end of the row
  bool magic;
  EpilogueConstants epilogue;
};

// Phase 2: MR output rows of kColumns positions of kPixels pixels, vector by vector of channels.
template <int MR, int kColumns, int kPixels, EpilogueKind kKind>
VITKD_INLINE void depthwise_tile(const DepthwiseTile& t) {
  constexpr int kOutputs = MR * kColumns;
  const EpilogueConstants& f = t.epilogue;
  __m256i words[kVectors / 2][kOutputs];
  VITKD_UNROLL(kVectors, j) {
    __m256i acc[kOutputs];
    const __m256i bias = load(t.constants + j * kYmm);
    VITKD_UNROLL(kOutputs, i) { acc[i] = bias; }
    VITKD_END;
    const uint8_t* w = t.weights + j * kYmm;
    const int32_t* offset = t.offsets;
    for (int64_t tap = t.taps; tap > 0; --tap, ++offset, w += MR * kColumnBytes) {
      const uint8_t* x = t.x + *offset + j * kYmm;
      __m256i weights[MR];
      VITKD_UNROLL(MR, r) { weights[r] = load(w + r * kColumnBytes); }
      VITKD_END;
      VITKD_UNROLL(kColumns, c) {
        const __m256i column = load(x + c * t.step);
        VITKD_UNROLL(MR, r) { Dot::add(acc[r * kColumns + c], column, weights[r]); }
        VITKD_END;
      }
      VITKD_END;
    }
    const auto* m = reinterpret_cast<const float*>(t.constants + kColumnBytes + j * kYmm);
    VITKD_UNROLL(kOutputs, i) {
      __m256 v = product(acc[i], m, m + kColumnBytes / 4, t.magic);
      if constexpr (kKind == EpilogueKind::hardswish) v = hardswish(v, f);
      __m256i& to = words[j / 2][i];
      to = j % 2 == 0 ? _mm256_castps_si256(v) : pack_values(_mm256_castsi256_ps(to), v, f);
    }
    VITKD_END;
  }
  VITKD_END;
  VITKD_UNROLL(MR, r) {
    if (t.y[r] != nullptr) {
      if constexpr (Dot::kWords) {
        VITKD_UNROLL((kColumns + 1) / 2, i) {
          constexpr int c = 2 * i, last = std::min(c + 1, kColumns - 1);
          const __m256i bytes =
              pack_pixels(words[0][r * kColumns + c], words[0][r * kColumns + last], f);
          store16(t.y[r] + c * t.y_pixel, _mm256_castsi256_si128(bytes));
          if constexpr (last != c) {
            store16(t.y[r] + last * t.y_pixel, _mm256_extracti128_si256(bytes, 1));
          }
        }
        VITKD_END;
      } else {
        VITKD_UNROLL(kColumns, c) {
          constexpr int i = r * kColumns + c;
          const __m256i bytes = pack_words(words[0][i], words[kVectors / 2 - 1][i], f);
          uint8_t* const y = t.y[r] + c * kPixels * t.y_pixel;
          if constexpr (kPixels == 1) {
            store(y, bytes);
          } else {
            store16(y, _mm256_castsi256_si128(bytes));
            if (t.pixels > c * kPixels + 1) {
              store16(y + t.y_pixel, _mm256_extracti128_si256(bytes, 1));
            }
          }
        }
        VITKD_END;
      }
    }
  }
  VITKD_END;
}

template <int MR, int kPixels, EpilogueKind kKind>
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
  s.stride = spec.stride_w;
  s.step = spec.stride_w * kPixels;
  s.used = std::min(spec.kernel_w, s.step);
  DepthwiseTile t;
  t.step = int64_t{s.step} * kColumnBytes;
  t.constants = packed.data + panel.constants;
  t.weights = packed.data + panel.weights;
  t.offsets = packed.offsets.data();
  t.taps = packed.steps;
  t.y_pixel = call.y.pixel;
  t.magic = panel.magic;
  t.epilogue = epilogue_constants(spec.epilogue, panel.bits);
  // strips so short that the scratch stays in L1
  const int wanted = static_cast<int>(
      std::min<int64_t>(s.group_bytes / kColumnBytes, (20 << 10) / s.groups / kColumnBytes));
  const int at_once = std::max(1, (wanted - spec.kernel_w) / s.step + 1);
  const int positions = (call.y.width + kPixels - 1) / kPixels;
  for (int begin = 0; begin < positions; begin += at_once) {
    const int end = std::min(begin + at_once, positions);
    s.column = begin * s.step - call.left;
    for (int row = call.row; row < call.row_end; row += MR) {
      for (int i = 0; i < kGroup * s.groups; ++i) {
        const int r =
            row * spec.stride_h - call.top + s.places[i / kGroup * 2 * kGroup + i % kGroup];
        s.rows[i / kGroup][i % kGroup] = call.input_row(r) + panel.channel;
      }
      int ready = 0;
      const auto tile = [&]<int kColumns>(int at) __attribute__((always_inline)) {
        const int columns = (at - begin + kColumns - 1) * s.step + spec.kernel_w;
        interleave_columns<kPixels>(s, ready, columns);
        ready = columns;
        const int64_t to = int64_t{at} * kPixels * call.y.pixel + panel.channel;
        for (int r = 0; r < MR; ++r) {
          t.y[r] = row + r < call.row_end ? call.y.row(row + r) + to : nullptr;
        }
        t.x = call.scratch + (at - begin) * t.step;
        t.pixels = call.y.width - at * kPixels;
        depthwise_tile<MR, kColumns, kPixels, kKind>(t);
      };
      int at = begin;
      for (; at + 4 <= end; at += 4) tile.template operator()<4>(at);
      if (at + 2 <= end) tile.template operator()<2>(at), at += 2;
      if (at < end) tile.template operator()<1>(at);
    }
  }
}

template <int MR, EpilogueKind kKind>
void depthwise_rows(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  if constexpr (!Dot::kWords) {
    if (panel.width == 1) return depthwise_panel<MR, 2, kKind>(packed, call, panel);
  }
  depthwise_panel<MR, 1, kKind>(packed, call, panel);
}

// By stride, of 3x3 kernels of words: in a file of its own.
template <EpilogueKind kKind>
void slide_by_one(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel);
template <EpilogueKind kKind>
void slide_by_two(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel);

template <EpilogueKind kKind>
void depthwise_panels(const Packed& packed, const DepthwiseCall& call) {
  const bool by_one = packed.spec.stride_h == 1;
  for (int i = call.panel; i < call.panel_end; ++i) {
    const Packed::Panel& panel = packed.panels[i];
    if constexpr (Dot::kWords) {
      if (packed.slides) {
        by_one ? slide_by_one<kKind>(packed, call, panel)
               : slide_by_two<kKind>(packed, call, panel);
        continue;
      }
    }
    by_one ? depthwise_rows<2, kKind>(packed, call, panel)
           : depthwise_rows<1, kKind>(packed, call, panel);
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

// 32 channels of a pixel, or 16 of two, as unpacking bytes leaves them
inline int unpacked_order(int width, int vector, int lane) {
  return lane % 8 / 4 * (width == 1 ? 0 : 16) + vector * 8 + lane / 8 * 4 + lane % 4;
}

void pack_depthwise(const ConvSpec& spec, Packed* packed) {
  if constexpr (Dot::kWords) {
    const bool same = spec.stride_h == spec.stride_w && spec.stride_h <= 2;
    packed->slides = spec.kernel_h == 3 && spec.kernel_w == 3 && same;
    lay_out_depthwise<int16_t>(spec, {1, 1, 0, true, halves_order}, 2, packed);
  } else {
    lay_out_depthwise<int8_t>(spec, {2, 2, 0, true, unpacked_order}, 4, packed);
  }
}

}  // namespace
}  // namespace vitkd::int8
