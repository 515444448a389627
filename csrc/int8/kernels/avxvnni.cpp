// Products and depthwise convolutions by the VEX-encoded vpdpbusd, for CPUs with AVX-VNNI and
// without AVX-512; the rest is as in AVX2. (AVX-VNNI-INT8's signed forms would save nothing here:
// activations are u8.)

#if defined(__x86_64__)

#define VITKD_YMM "avx2,fma,avxvnni"

#include <immintrin.h>

#include "simd/target.h"

VITKD_TARGET_BEGIN(VITKD_YMM)
namespace vitkd::int8 {
namespace {

struct Dot {
  static constexpr bool kWords = false;
  // asm keeps gcc 12 from copying accumulators around
  static VITKD_INLINE void add(__m256i& acc, __m256i x, __m256i w) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
  }
  static VITKD_INLINE void add_bytes(__m256i& acc, __m256i x, __m256i w) { add(acc, x, w); }
};

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

#include "int8/kernels/depthwise_ymm.h"
#include "int8/kernels/gemm_ymm.h"

namespace vitkd::int8 {
namespace {

void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  const bool magic = spec.epilogue.kind != EpilogueKind::logits;
  lay_out_gemm<int8_t>(spec, pixel, {1, 0, 0, magic, magic ? halves_order : in_order}, packed);
}

const char* gemm_name(const Packed&, const GemmCall& call) {
  return call.pixels < kRows ? "gemm_u8s8_1x16_avxvnni" : "gemm_u8s8_6x16_avxvnni";
}

const char* depthwise_name(const Packed& packed, const DepthwiseCall& call) {
  static constexpr const char* kNames[2][2] = {
      {"depthwise_1x8x16_avxvnni", "depthwise_1x4x32_avxvnni"},
      {"depthwise_2x8x16_avxvnni", "depthwise_2x4x32_avxvnni"}};
  return kNames[packed.spec.stride_h == 1][packed.panels[call.panel].width - 1];
}

}  // namespace

const Kernels& avxvnni_kernels() {
  static const Kernels kernels = [] {
    Kernels k = kAvx2;
    k.isa = Isa::avxvnni;
    k.gemm_name = gemm_name;
    k.depthwise_name = depthwise_name;
    k.pack_gemm = pack_gemm;
    k.gemm = multiply;
    k.pack_depthwise = pack_depthwise;
    k.depthwise = depthwise;
    return k;
  }();
  return kernels;
}

}  // namespace vitkd::int8

#endif
