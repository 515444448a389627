// From 16 sums to 16 bytes in AVX-512, for the kernels that make sums with VNNI or AMX: an fma
// (kMagicBits), cvtps2dq, and packs with saturation, 2.75 to 3.25 instructions in all, or 1.75
// without the conversion (kBitsGrid); lanes are ordered so that packing four vectors puts channels
// in order.
#pragma once

// gcc 12 takes its own _mm512_undefined_epi32() for a mistake
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <type_traits>
#include <utility>

#include "int8/kernels/kernels.h"
#include "simd/target.h"

namespace vitkd::int8 {
namespace {

// channel 16 i + 4 v + j in lane 4 i + j of vector v: what packing four vectors puts in order
inline int packed_order(int, int vector, int lane) { return lane / 4 * 16 + vector * 4 + lane % 4; }

inline int in_order(int, int vector, int lane) { return vector * 16 + lane; }

// lanes of a panel of pointwise weights: of four vectors as packing wants them, of fewer in order,
// to be permuted after packing
inline LaneOrder gemm_order(const ConvSpec& spec) {
  if (spec.epilogue.kind == EpilogueKind::logits) return in_order;
  return [](int width, int vector, int lane) {
    return width == 4 ? packed_order(width, vector, lane) : in_order(width, vector, lane);
  };
}

}  // namespace
}  // namespace vitkd::int8

VITKD_TARGET_BEGIN(VITKD_ZMM)
#include "int8/kernels/unroll.h"

namespace vitkd::int8 {
namespace {

// asm keeps gcc 12 from copying accumulators around
VITKD_INLINE void dot4(__m512i& acc, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}
VITKD_INLINE void dot4(__m512i& acc, __m512i x, const uint8_t* w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "m"(*reinterpret_cast<const __m512i*>(w)));
}

// the epilogue's constants, in memory: registers belong to the accumulators
struct EpilogueConstants {
  alignas(kLine) int16_t zero_point[32];
  alignas(kLine) uint8_t lo[64], hi[64];
  alignas(kLine) float hardswish_scale[16], residual_multiplier[16];
  alignas(kLine) int32_t residual_zero_point[16];
  bool bits, shifts, clamps;
};

inline EpilogueConstants epilogue_constants(const Epilogue& e, bool bits) {
  const Requantize& r = e.requantize;
  EpilogueConstants f;
  std::fill_n(f.zero_point, 32, static_cast<int16_t>(r.zero_point));
  std::fill_n(f.lo, 64, static_cast<uint8_t>(r.lo));
  std::fill_n(f.hi, 64, static_cast<uint8_t>(r.hi));
  std::fill_n(f.hardswish_scale, 16, r.hardswish_scale);
  std::fill_n(f.residual_multiplier, 16, e.residual_multiplier);
  std::fill_n(f.residual_zero_point, 16, e.residual_zero_point);
  f.bits = bits;
  f.shifts = !bits && r.zero_point != 0;
  f.clamps = r.lo != 0 || r.hi != 255;
  return f;
}

// `p` and all else in memory is loaded again after this, so that nothing of it holds a register
// across a main loop: gcc would rather spill what the loop needs
VITKD_INLINE void forget(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

VITKD_INLINE __m512 product(__m512i acc, const float* m, const float* shift, bool magic) {
  const __m512 sum = magic ? _mm512_castsi512_ps(acc) : _mm512_cvtepi32_ps(acc);
  return _mm512_fmadd_ps(sum, _mm512_load_ps(m), _mm512_load_ps(shift));
}

VITKD_INLINE __m512 hardswish(__m512 t, const EpilogueConstants& f) {
  __m512 u = _mm512_add_ps(t, _mm512_set1_ps(3.0f));
  u = _mm512_min_ps(_mm512_max_ps(u, _mm512_setzero_ps()), _mm512_set1_ps(6.0f));
  return _mm512_mul_ps(_mm512_mul_ps(t, u), _mm512_load_ps(f.hardswish_scale));
}

VITKD_INLINE __m512 plus_residual(__m512 v, __m512i q, const EpilogueConstants& f) {
  const __m512 b =
      _mm512_cvtepi32_ps(_mm512_sub_epi32(q, _mm512_load_si512(f.residual_zero_point)));
  return _mm512_add_ps(v, _mm512_mul_ps(b, _mm512_load_ps(f.residual_multiplier)));
}

// bytes from two vectors of words
VITKD_INLINE __m512i pack_words(__m512i ab, __m512i cd, const EpilogueConstants& f) {
  if (f.shifts) {
    ab = _mm512_adds_epi16(ab, _mm512_load_si512(f.zero_point));
    cd = _mm512_adds_epi16(cd, _mm512_load_si512(f.zero_point));
  }
  __m512i y = _mm512_packus_epi16(ab, cd);
  if (f.clamps) {
    y = _mm512_max_epu8(y, _mm512_load_si512(f.lo));
    y = _mm512_min_epu8(y, _mm512_load_si512(f.hi));
  }
  return y;
}

// words from two vectors of values (kBitsGrid: bytes already)
template <bool kBits = false>
VITKD_INLINE __m512i pack_values(__m512 a, __m512 b, const EpilogueConstants& f) {
  if (kBits || f.bits) return _mm512_packus_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b));
  return _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
}

// lane i of the result: four bytes of lane i of each vector
VITKD_INLINE __m512i pack4(__m512 a, __m512 b, __m512 c, __m512 d, const EpilogueConstants& f) {
  return pack_words(pack_values(a, b, f), pack_values(c, d, f), f);
}

// bytes 4 v to 4 v + 3 of each lane, as integers: the residual in packed_order
template <int V>
VITKD_INLINE __m512i spread(__m512i bytes) {
  constexpr int z = -128;
  const __m128i pick =
      _mm_setr_epi8(4 * V, z, z, z, 4 * V + 1, z, z, z, 4 * V + 2, z, z, z, 4 * V + 3, z, z, z);
  return _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(pick));
}

// Where a tile of sums goes.
struct Destination {
  const uint8_t* constants;  // of the panel: bias, multiplier, shift
  uint8_t* y;
  int64_t y_pixel;
  const uint8_t* residual;
  int64_t residual_pixel;
  int channels;  // from the panel's first on
  bool magic;
  EpilogueConstants epilogue;

  void advance(int64_t pixels) {
    y += pixels * y_pixel;
    residual += pixels * residual_pixel;
  }
};

inline Destination destination(const Packed& packed, const Packed::Panel& panel,
                               const GemmCall& call, int64_t first) {
  const int bytes = packed.spec.epilogue.kind == EpilogueKind::logits ? 4 : 1;
  return {packed.data + panel.constants,
          call.y + first * call.y_pixel + panel.channel * bytes,
          call.y_pixel,
          call.residual + first * call.residual_pixel + panel.channel,
          call.residual_pixel,
          packed.spec.out - panel.channel,
          panel.magic,
          epilogue_constants(packed.spec.epilogue, panel.bits)};
}

// MR pixels and NV vectors of sums, the bias in them, to bytes or logits
template <int MR, int NV, EpilogueKind kKind>
VITKD_INLINE void store_tile(const __m512i (&acc)[MR][NV], const Destination& t) {
  const EpilogueConstants& f = t.epilogue;
  const bool magic = t.magic;
  const auto* m = reinterpret_cast<const float*>(t.constants) + NV * 16;
  const float* shift = m + NV * 16;
  uint8_t* y = t.y;
  const int64_t y_pixel = t.y_pixel;
  __m512 value[MR][NV];
  VITKD_UNROLL(NV, v) {
    VITKD_UNROLL(MR, r) {
      value[r][v] = product(acc[r][v], m + v * 16, shift + v * 16, magic);
      if constexpr (kKind == EpilogueKind::hardswish) {
        value[r][v] = hardswish(value[r][v], f);
      }
    }
    VITKD_END;
  }
  VITKD_END;

  if constexpr (kKind == EpilogueKind::logits) {
    VITKD_UNROLL(MR, r) {
      VITKD_UNROLL(NV, v) {
        const int left = t.channels - v * 16;
        const __mmask16 mask = left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1 << left) - 1;
        _mm512_mask_storeu_ps(y + r * y_pixel + v * kLine, mask, value[r][v]);
      }
      VITKD_END;
    }
    VITKD_END;
    return;
  }
  if constexpr (kKind == EpilogueKind::residual) {
    VITKD_UNROLL(MR, r) {
      const uint8_t* b = t.residual + r * t.residual_pixel;
      if constexpr (NV == 4) {
        const __m512i bytes = _mm512_loadu_si512(b);
        VITKD_UNROLL(4, v) { value[r][v] = plus_residual(value[r][v], spread<v>(bytes), f); }
        VITKD_END;
      } else {
        VITKD_UNROLL(NV, v) {
          const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + v * 16));
          value[r][v] = plus_residual(value[r][v], _mm512_cvtepu8_epi32(bytes), f);
        }
        VITKD_END;
      }
    }
    VITKD_END;
  }

  if constexpr (NV == 4) {
    VITKD_UNROLL(MR, r) {
      _mm512_storeu_si512(y + r * y_pixel,
                          pack4(value[r][0], value[r][1], value[r][2], value[r][3], f));
    }
    VITKD_END;
  } else {
    // lanes are in order: transpose the packed 4x4 groups of four bytes
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    constexpr int kAtOnce = NV == 3 || MR == 1 ? 1 : 4 / NV;  // pixels in one pack
    const __m512 none = _mm512_setzero_ps();
    VITKD_UNROLL(MR / kAtOnce, i) {
      __m512 four[4] = {none, none, none, none};
      VITKD_UNROLL(kAtOnce, p) {
        VITKD_UNROLL(NV, v) { four[p * NV + v] = value[i * kAtOnce + p][v]; }
        VITKD_END;
      }
      VITKD_END;
      const __m512i bytes =
          _mm512_permutexvar_epi32(order, pack4(four[0], four[1], four[2], four[3], f));
      uint8_t* at = y + i * kAtOnce * y_pixel;
      if constexpr (NV == 3) {
        _mm512_mask_storeu_epi8(at, 0xFFFFFFFFFFFF, bytes);
      } else if constexpr (NV == 2) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(bytes));
        if constexpr (kAtOnce == 2) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + y_pixel),
                              _mm512_extracti64x4_epi64(bytes, 1));
        }
      } else {
        VITKD_UNROLL(kAtOnce, p) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(at + p * y_pixel),
                           _mm512_extracti32x4_epi32(bytes, p));
        }
        VITKD_END;
      }
    }
    VITKD_END;
  }
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END
