// Depthwise convolutions in AVX-512 VNNI. Four input bytes per channel lie side by side (rows of
// one column where there are that many, else two rows of two columns or one of four) after eight
// unpacks per 64 channels, and one vpdpbusd adds the four taps of 16 channels; two output rows
// share them.

#if defined(__x86_64__)

#include <cstring>

#define VITKD_ZMM VITKD_VNNI

#include "int8/kernels/epilogue_avx512.h"

namespace vitkd::int8 {
namespace {

// narrow panels hold the same channels of 2 or 4 neighbouring pixels
int depthwise_order(int width, int vector, int lane) {
  return lane / 4 % width * 16 + vector * 4 + lane % 4;
}

}  // namespace

VITKD_TARGET_BEGIN(VITKD_VNNI)
namespace {

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
  int width;  // of the input
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
template <int j, int kOutputs, EpilogueKind kKind>
VITKD_INLINE void words_of(__m512i (&acc)[kOutputs], const uint8_t* constants, bool magic,
                           const EpilogueConstants& f, __m512i (&pair)[2][kOutputs]) {
  if (!magic) {
    VITKD_UNROLL(kOutputs, i) { acc[i] = _mm512_castps_si512(_mm512_cvtepi32_ps(acc[i])); }
    VITKD_END;
  }
  const __m512 m = _mm512_load_ps(constants + (4 + j) * kLine);
  const __m512 shift = _mm512_load_ps(constants + (8 + j) * kLine);
  VITKD_UNROLL(kOutputs, i) {
    __m512 v = _mm512_fmadd_ps(_mm512_castsi512_ps(acc[i]), m, shift);
    if constexpr (kKind == EpilogueKind::hardswish) v = hardswish(v, f);
    __m512i& to = pair[j / 2][i];
    to = j % 2 == 0 ? _mm512_castps_si512(v) : pack_values(_mm512_castsi512_ps(to), v, f);
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
  EpilogueConstants epilogue;
};

// Phase 2: kRows output rows of kColumns positions of kPixels pixels, vector by vector of channels.
template <int kRows, int kColumns, int kPixels, EpilogueKind kKind>
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
    words_of<j, kOutputs, kKind>(acc, t.constants, t.magic, t.epilogue, pair);
  }
  VITKD_END;
  VITKD_UNROLL(kRows, r) {
    if (t.y[r] != nullptr) {
      VITKD_UNROLL(kColumns, c) {
        constexpr int i = r * kColumns + c;
        store_pixels<kPixels>(t.y[r] + c * kPixels * t.y_pixel, t.y_pixel, t.bytes,
                              t.pixels - c * kPixels,
                              pack_words(pair[0][i], pair[1][i], t.epilogue));
      }
      VITKD_END;
    }
  }
  VITKD_END;
}

template <int kRows, int kPixels, EpilogueKind kKind>
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
  t.epilogue = epilogue_constants(spec.epilogue, panel.bits);
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
        s.rows[i / 4][i % 4] = call.input_row(r) + panel.channel;
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
        depthwise_tile<kRows, kColumns, kPixels, kKind>(t);
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
    rows.at[i] = call.input_row(r) + channel;
  }
  return rows;
}

// one interleaved column
template <int kPixels>
VITKD_INLINE void load_interleaved(const FourRows& rows, const uint8_t* edge, int column,
                                   int stride, const Activation& input, __m512i* to) {
  __m512i v[4];
  if constexpr (kPixels == 1) {
    // padding, interleaved, is padding
    if (column < 0 || column >= input.width) {
      VITKD_UNROLL(4, j) { to[j] = _mm512_loadu_si512(edge); }
      VITKD_END;
      return;
    }
  }
  if (column >= 0 && column + (kPixels - 1) * stride < input.width) {
    VITKD_UNROLL(4, i) {
      v[i] = load_column<kPixels>(rows.at[i] + column * input.pixel, stride * input.pixel);
    }
    VITKD_END;
  } else {
    VITKD_UNROLL(4, i) {
      v[i] = load_edge<kPixels>(rows.at[i], edge, column, stride, input.width, input.pixel);
    }
    VITKD_END;
  }
  interleave4(v, to);
}

// The three columns of an output stay in registers; kNew of them are new at each position. Per 64
// outputs of a 3x3 kernel with stride 2: 16 unpacks, 12 vpdpbusd and 11 others on two ports, 20
// cycles.
template <int kNew, int kRows, int kPixels, EpilogueKind kKind>
void depthwise_three(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  const ConvSpec& spec = packed.spec;
  const uint8_t* const constants = packed.data + panel.constants;
  const uint8_t* const weights = packed.data + panel.weights;
  const auto* const m = reinterpret_cast<const float*>(constants) + 64;
  const EpilogueConstants f = epilogue_constants(spec.epilogue, panel.bits);
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
          if constexpr (kKind == EpilogueKind::hardswish) v[j] = hardswish(v[j], f);
        }
        VITKD_END;
        store_pixels<kPixels>(y[r] + at * y_pixel, y_pixel, bytes, call.y.width - at,
                              pack4(v[0], v[1], v[2], v[3], f));
      }
      VITKD_END;
    }
  }
}

enum class Kind { general, three, sliding };

// which kernel computes a panel
Kind kind_of(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  const ConvSpec& spec = packed.spec;
  if (spec.kernel_w != 3 || packed.groups.size() > 8 || packed.groups[7] > 0) return Kind::general;
  const bool slides = spec.stride_h == 1 && spec.stride_w == 1 && panel.width > 2 &&
                      call.left == 1 && call.x.width == call.y.width && panel.magic &&
                      call.y.width <= kDepthwiseScratch / kLine / 2;
  return slides ? Kind::sliding : Kind::three;
}

template <int kRows, int kPixels, EpilogueKind kKind>
void depthwise_pixels(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  const int step = packed.spec.stride_w * kPixels;
  switch (kind_of(packed, call, panel)) {
    case Kind::general:
      return depthwise_panel<kRows, kPixels, kKind>(packed, call, panel);
    case Kind::three:
      if (step > 2) return depthwise_three<3, kRows, kPixels, kKind>(packed, call, panel);
      if (step == 2) return depthwise_three<2, kRows, kPixels, kKind>(packed, call, panel);
      return depthwise_three<1, kRows, kPixels, kKind>(packed, call, panel);
    case Kind::sliding:
      return depthwise_sliding_vnni(packed, call, panel);
  }
}

template <int kRows, EpilogueKind kKind>
void depthwise_rows(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  switch (panel.width) {
    case 1:
      return depthwise_pixels<kRows, 4, kKind>(packed, call, panel);
    case 2:
      return depthwise_pixels<kRows, 2, kKind>(packed, call, panel);
    default:
      return depthwise_pixels<kRows, 1, kKind>(packed, call, panel);
  }
}

template <EpilogueKind kKind>
void depthwise_panels(const Packed& packed, const DepthwiseCall& call) {
  for (int i = call.panel; i < call.panel_end; ++i) {
    packed.spec.stride_h == 1 ? depthwise_rows<2, kKind>(packed, call, packed.panels[i])
                              : depthwise_rows<1, kKind>(packed, call, packed.panels[i]);
  }
}

// rows x pixels x channels of a tile; three: of a kernel three columns wide
const char* name_of(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel) {
  static constexpr const char* kNames[2][2][3] = {
      {{"depthwise_1x16x16_avx512vnni", "depthwise_1x8x32_avx512vnni",
        "depthwise_1x4x64_avx512vnni"},
       {"depthwise_2x16x16_avx512vnni", "depthwise_2x8x32_avx512vnni",
        "depthwise_2x4x64_avx512vnni"}},
      {{"depthwise_w3_1x4x16_avx512vnni", "depthwise_w3_1x2x32_avx512vnni",
        "depthwise_w3_1x1x64_avx512vnni"},
       {"depthwise_w3_2x4x16_avx512vnni", "depthwise_w3_2x2x32_avx512vnni",
        "depthwise_w3_2x1x64_avx512vnni"}}};
  const Kind kind = kind_of(packed, call, panel);
  if (kind == Kind::sliding) return "depthwise_w3_sliding_2x3x32_avx512vnni";
  const int two_rows = packed.spec.stride_h == 1;
  return kNames[kind == Kind::three][two_rows][std::min(panel.width, 3) - 1];
}

}  // namespace

void depthwise_vnni(const Packed& packed, const DepthwiseCall& call) {
  packed.spec.epilogue.kind == EpilogueKind::hardswish
      ? depthwise_panels<EpilogueKind::hardswish>(packed, call)
      : depthwise_panels<EpilogueKind::bytes>(packed, call);
}

const char* depthwise_name_vnni(const Packed& packed, const DepthwiseCall& call) {
  const char* most = "";
  int most_channels = 0;
  for (int i = call.panel; i < call.panel_end; ++i) {
    const char* const name = name_of(packed, call, packed.panels[i]);
    int channels = 0;
    for (int j = call.panel; j < call.panel_end; ++j) {
      if (name_of(packed, call, packed.panels[j]) == name) channels += packed.panels[j].width;
    }
    if (channels > most_channels) most = name, most_channels = channels;
  }
  return most;
}

VITKD_TARGET_END

void pack_depthwise_vnni(const ConvSpec& spec, Packed* packed) {
  // a panel of 48 channels is as one of 64
  const auto order = [](int width, int vector, int lane) {
    return depthwise_order(width == 3 ? 4 : width, vector, lane);
  };
  lay_out_depthwise<int8_t>(spec, {4, 4, 0, true, order}, 4, packed);
}

}  // namespace vitkd::int8

#endif
