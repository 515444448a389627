// Products on AMX tiles; all else is AVX-512 VNNI's. One tdpbusd multiplies 16 pixels x 64 bytes by
// 64 bytes x 16 channels in 16 cycles, eight times what two vpdpbusd a cycle do, and the packed
// weights of VNNI are its operand as they are, 16 steps at a time. What is left is the
// epilogue: 1.75 to 2.75 instructions on two ports per 16 outputs, 56 to 88 cycles per tile of 16 x
// 64, which runs beside the product of the next tile.

#if defined(__x86_64__)

#include <cstring>

#define VITKD_ZMM VITKD_VNNI

#include "int8/kernels/epilogue_avx512.h"

namespace vitkd::int8 {

namespace {

constexpr int kRows = 16;   // pixels of a tile
constexpr int kSteps = 16;  // of four bytes
constexpr int kShort = 48;  // bytes of a product

// whether there is a whole tile of pixels, and weights are packed for tiles
bool on_tiles(const Packed& packed, const GemmCall& call) {
  return call.pixels >= kRows && packed.stride % kSteps == 0;
}

}  // namespace

VITKD_TARGET_BEGIN(VITKD_VNNI)
namespace {

// sums [kRows][NV * 16]
template <int NV, EpilogueKind kKind>
void store_rows(const int32_t* sums, Destination to) {
  constexpr int MR = 4;
  for (int p = 0; p < kRows; p += MR, sums += MR * NV * 16, to.advance(MR)) {
    __m512i acc[MR][NV];
    VITKD_UNROLL(MR * NV, i) { acc[i / NV][i % NV] = _mm512_load_si512(sums + i * 16); }
    VITKD_END;
    store_tile<MR, NV, kKind>(acc, to);
  }
}

}  // namespace
VITKD_TARGET_END

VITKD_TARGET_BEGIN(VITKD_VNNI ",amx-tile,amx-int8")
namespace {

// tiles 0 to 3: sums of up to 4 vectors; 4: pixels; 5 and 6: weights
template <int NV>
VITKD_INLINE void multiply(const Packed& packed, const uint8_t* weights, const uint8_t* constants,
                           const GemmCall& call, int64_t pixel, int32_t* sums) {
  // a stride of 0: the bias of its channel in every row
  _tile_loadd(0, constants, 0);
  if constexpr (NV > 1) _tile_loadd(1, constants + kLine, 0);
  if constexpr (NV > 2) _tile_loadd(2, constants + 2 * kLine, 0);
  if constexpr (NV > 3) _tile_loadd(3, constants + 3 * kLine, 0);
  const int64_t x_pixel = call.x_pixel;
  for (int segment = 0; segment < packed.segments; ++segment) {
    const uint8_t* x = call.x[segment] + pixel * x_pixel;
    for (int step = 0; step < packed.stride; step += kSteps) {
      _tile_loadd(4, x + 4 * step, x_pixel);
      _tile_loadd(5, weights, NV * kLine);
      _tile_dpbusd(0, 4, 5);
      if constexpr (NV > 1) {
        _tile_loadd(6, weights + kLine, NV * kLine);
        _tile_dpbusd(1, 4, 6);
      }
      if constexpr (NV > 2) {
        _tile_loadd(5, weights + 2 * kLine, NV * kLine);
        _tile_dpbusd(2, 4, 5);
      }
      if constexpr (NV > 3) {
        _tile_loadd(6, weights + 3 * kLine, NV * kLine);
        _tile_dpbusd(3, 4, 6);
      }
      weights += kSteps * NV * kLine;
    }
  }
  _tile_stored(0, sums, NV * kLine);
  if constexpr (NV > 1) _tile_stored(1, sums + 16, NV * kLine);
  if constexpr (NV > 2) _tile_stored(2, sums + 32, NV * kLine);
  if constexpr (NV > 3) _tile_stored(3, sums + 48, NV * kLine);
}

template <int NV, EpilogueKind kKind>
void gemm_panel(const Packed& packed, const Packed::Panel& panel, const GemmCall& call) {
  alignas(kLine) int32_t sums[2][kRows * NV * 16];
  const uint8_t* const weights = packed.data + panel.weights;
  const Destination start = destination(packed, panel, call, 0);
  const int64_t panel_bytes = int64_t{packed.segments} * packed.stride * NV * kLine;
  const uint8_t* const soon = weights + panel_bytes;
  const uint8_t* next = call.fetched == nullptr ? soon : std::max(*call.fetched, soon);
  int64_t before = -1;  // the tile whose sums wait
  int turn = 0;
  for (int64_t tile = 0; tile < call.pixels; tile += kRows, turn ^= 1) {
    // the last tile begins so early that it is whole
    const int64_t pixel = std::min(tile, call.pixels - kRows);
    multiply<NV>(packed, weights, start.constants, call, pixel, sums[turn]);
    if (next - soon < kFar) {
      for (int64_t i = 0; i < panel_bytes / 2; i += kLine) _mm_prefetch(next + i, _MM_HINT_T1);
      next += panel_bytes / 2;
    }
    if (before >= 0) {
      Destination to = start;
      to.advance(before);
      store_rows<NV, kKind>(sums[turn ^ 1], to);
    }
    before = pixel;
  }
  if (call.fetched != nullptr) *call.fetched = next;
  Destination to = start;
  to.advance(before);
  store_rows<NV, kKind>(sums[turn ^ 1], to);
}

template <EpilogueKind kKind>
void gemm_panels(const Packed& packed, const GemmCall& call) {
  _tile_loadconfig(&kWholeTiles);
  for (int i = call.panel; i < call.panel_end; ++i) {
    const Packed::Panel& panel = packed.panels[i];
    switch (panel.vectors) {
      case 1:
        gemm_panel<1, kKind>(packed, panel, call);
        break;
      case 2:
        gemm_panel<2, kKind>(packed, panel, call);
        break;
      case 3:
        gemm_panel<3, kKind>(packed, panel, call);
        break;
      default:
        gemm_panel<4, kKind>(packed, panel, call);
    }
  }
  _tile_release();
}

void gemm(const Packed& packed, const GemmCall& call) {
  if (!on_tiles(packed, call)) return kAvx512Vnni.gemm(packed, call);
  with_kind(packed.spec.epilogue.kind,
            [&]<EpilogueKind kKind>() { gemm_panels<kKind>(packed, call); });
}

}  // namespace
VITKD_TARGET_END

namespace {

void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  // where the product is short, sums on their way through memory cost more than tiles save
  if (spec.taps() * spec.in < kShort) return kAvx512Vnni.pack_gemm(spec, pixel, packed);
  const bool magic = spec.epilogue.kind != EpilogueKind::logits;
  lay_out_gemm<int8_t>(spec, pixel, {4, 0, 0, magic, gemm_order(spec), kSteps}, packed);
}

const char* gemm_name(const Packed& packed, const GemmCall& call) {
  static constexpr const char* kNames[] = {"gemm_u8s8_16x16_amx", "gemm_u8s8_16x32_amx",
                                           "gemm_u8s8_16x48_amx", "gemm_u8s8_16x64_amx"};
  if (!on_tiles(packed, call)) return kAvx512Vnni.gemm_name(packed, call);
  return kNames[packed.panels[call.panel].vectors - 1];  // none is wider than the first
}

Kernels with_tiles() {
  Kernels kernels = kAvx512Vnni;
  kernels.isa = Isa::amx;
  kernels.gemm_name = gemm_name;
  kernels.pack_gemm = pack_gemm;
  kernels.gemm = gemm;
  return kernels;
}

}  // namespace

const Kernels& amx_kernels() {
  static const Kernels kernels = with_tiles();
  return kernels;
}

}  // namespace vitkd::int8

#endif
