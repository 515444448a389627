// Depthwise convolutions three columns wide and at most three rows high in AVX-512 VNNI, with
// stride 1, one column of padding on each side, panels of 64 channels and sums that are floats
// already (kMagicBits): columns slide through registers, half a panel along a row.

#if defined(__x86_64__)

#define VITKD_ZMM VITKD_VNNI

#include "int8/kernels/epilogue_avx512.h"

namespace vitkd::int8 {

VITKD_TARGET_BEGIN(VITKD_VNNI)
namespace {

constexpr int kWords = 8 << 10;        // bytes that stay in L1 beside the rows of the input
constexpr int kKept = kWords / kLine;  // pixels

// Some pairs of output rows of a panel.
struct RowPairs {
  const uint8_t* x[kKept + 2];  // rows of input, from the first tap on
  uint8_t* y[kKept];
  int rows;
  int width;
  int64_t pixel;
  const uint8_t* edge;  // padding
  const uint8_t* constants;
  const uint8_t* weights;
  uint8_t* words;  // of half a panel, kept until the other half is done
  uint64_t bytes;  // of a pixel, as a mask
  EpilogueConstants epilogue;
};

// Half a panel: two vectors of channels, whose weights and constants stay in registers, since loads
// of 64 bytes cost power, and that clock. The sums of three columns are in flight; a column of
// input adds a tap to each. Per column of both halves 8 unpacks, 24 vpdpbusd, 8 fmas and 6 packs on
// two ports: 23 cycles per 128 outputs of a 3x3 kernel, 39% of the vpdpbusd peak. kPlain: bytes are
// kBitsGrid's, and not clamped.
template <int kHalf, EpilogueKind kKind, bool kPlain>
VITKD_INLINE void sliding_half(const RowPairs& t) {
  __m512i weights[3][2][2], bias[2], acc[3][2][2], column[2];
  __m512 m[2], shift[2];
  VITKD_UNROLL(12, i) {
    weights[i / 4][i / 2 % 2][i % 2] =
        _mm512_load_si512(t.weights + (i / 2 * 4 + 2 * kHalf + i % 2) * kLine);
  }
  VITKD_END;
  VITKD_UNROLL(2, v) {
    const uint8_t* const constants = t.constants + (2 * kHalf + v) * kLine;
    bias[v] = _mm512_load_si512(constants);
    m[v] = _mm512_load_ps(constants + 4 * kLine);
    shift[v] = _mm512_load_ps(constants + 8 * kLine);
  }
  VITKD_END;
  uint8_t* words = t.words;
  for (int row = 0; row < t.rows; row += 2) {
    const uint8_t* const* const x = t.x + row;
    // two columns before the first
    uint8_t* const y[2] = {t.y[row] - 2 * t.pixel, t.y[row + 1] - 2 * t.pixel};
    int64_t at = 0;  // bytes from the first column

    const auto load = [&] __attribute__((always_inline)) {
      __m512i v[4], ab, cd;
      VITKD_UNROLL(4, i) { v[i] = _mm512_loadu_si512(x[i] + at); }
      VITKD_END;
      if constexpr (kHalf == 0) {
        ab = _mm512_unpacklo_epi8(v[0], v[1]), cd = _mm512_unpacklo_epi8(v[2], v[3]);
      } else {
        ab = _mm512_unpackhi_epi8(v[0], v[1]), cd = _mm512_unpackhi_epi8(v[2], v[3]);
      }
      column[0] = _mm512_unpacklo_epi16(ab, cd);
      column[1] = _mm512_unpackhi_epi16(ab, cd);
      at += t.pixel;
      asm("" : "+r"(at));  // one register, not one per phase
    };
    const auto load_edge = [&] __attribute__((always_inline)) {
      // padding, interleaved, is padding
      column[0] = column[1] = _mm512_loadu_si512(t.edge);
    };
    const auto add = [&]<int kTap>(__m512i(&sums)[2][2]) __attribute__((always_inline)) {
      VITKD_UNROLL(4, i) {
        constexpr int r = i / 2, v = i % 2;
        if constexpr (kTap == 0) sums[r][v] = bias[v];
        dot4(sums[r][v], column[v], weights[kTap][r][v]);
      }
      VITKD_END;
    };
    // adds a column, and is done with the output before it
    const auto step = [&]<int kPhase, bool kLast = false>() __attribute__((always_inline)) {
      kLast ? load_edge() : load();
      if (kLast) at += t.pixel;
      add.template operator()<2>(acc[kPhase]);
      VITKD_UNROLL(2, i) {
        constexpr int r = 1 - i;
        __m512 v[2];
        VITKD_UNROLL(2, j) {
          v[j] = _mm512_fmadd_ps(_mm512_castsi512_ps(acc[kPhase][r][j]), m[j], shift[j]);
          if constexpr (kKind == EpilogueKind::hardswish) v[j] = hardswish(v[j], t.epilogue);
        }
        VITKD_END;
        const __m512i half = pack_values<kPlain>(v[0], v[1], t.epilogue);
        uint8_t* const kept = words + r * kLine;
        if constexpr (kHalf == 0) {
          _mm512_store_si512(kept, half);
        } else {
          const __m512i a = _mm512_load_si512(kept);
          const __m512i out =
              kPlain ? _mm512_packus_epi16(a, half) : pack_words(a, half, t.epilogue);
          _mm512_mask_storeu_epi8(y[r] + at, t.bytes, out);
        }
      }
      VITKD_END;
      words += 2 * kLine;
      if constexpr (!kLast) {
        add.template operator()<1>(acc[(kPhase + 1) % 3]);
        add.template operator()<0>(acc[(kPhase + 2) % 3]);
      }
    };
    load_edge();
    add.template operator()<0>(acc[0]);
    load();
    add.template operator()<1>(acc[0]);
    add.template operator()<0>(acc[1]);
    int left = t.width;
    for (; left > 3; left -= 3) {
      step.template operator()<0>();
      step.template operator()<1>();
      step.template operator()<2>();
    }
    if (left == 1) {
      step.template operator()<0, true>();
    } else {
      step.template operator()<0>();
      if (left == 2) {
        step.template operator()<1, true>();
      } else {
        step.template operator()<1>();
        step.template operator()<2, true>();
      }
    }
  }
}

template <EpilogueKind kKind, bool kPlain>
void depthwise_sliding(const Packed& packed, const DepthwiseCall& call, const Packed::Panel& panel,
                       const EpilogueConstants& epilogue) {
  const Activation& y = call.y;
  RowPairs t;
  t.width = y.width;
  t.pixel = call.x.pixel;
  t.edge = call.padding_row + panel.channel;
  t.constants = packed.data + panel.constants;
  t.weights = packed.data + panel.weights;
  t.words = call.scratch;
  t.bytes = ~uint64_t{0} >> (64 - std::min<int64_t>(64, y.pixel - panel.channel));
  t.epilogue = epilogue;
  const int most = std::max(2, kKept / y.width / 2 * 2);
  for (int row = call.row; row < call.row_end; row += most) {
    const int rows = std::min(most, call.row_end - row);
    t.rows = (rows + 1) / 2 * 2;
    for (int i = 0; i < t.rows + 2; ++i) {
      t.x[i] = call.input_row(row - call.top + i) + panel.channel;
    }
    // a second row that is not wanted is written to the first, before it
    for (int i = 0; i < t.rows; ++i) t.y[i] = y.row(row + std::min(i, rows - 1)) + panel.channel;
    sliding_half<0, kKind, kPlain>(t);
    sliding_half<1, kKind, kPlain>(t);
  }
}

}  // namespace

void depthwise_sliding_vnni(const Packed& packed, const DepthwiseCall& call,
                            const Packed::Panel& panel) {
  const EpilogueConstants f = epilogue_constants(packed.spec.epilogue, panel.bits);
  if (packed.spec.epilogue.kind == EpilogueKind::hardswish) {
    depthwise_sliding<EpilogueKind::hardswish, false>(packed, call, panel, f);
  } else if (f.bits && !f.clamps) {
    depthwise_sliding<EpilogueKind::bytes, true>(packed, call, panel, f);
  } else {
    depthwise_sliding<EpilogueKind::bytes, false>(packed, call, panel, f);
  }
}

VITKD_TARGET_END

}  // namespace vitkd::int8

#endif
