// From 32-bit sums to bytes in NEON: an fma and two steps of narrowing (kBitsGrid); an fma
// (kMagicBits), an addition that rounds, and narrowing; or by conversions. The files that include
// this name their instruction set: VITKD_NEON.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "int8/kernels/kernels.h"
#include "simd/target.h"

// GCC 12's scheduling before the allocation of registers spills tiles that fill them.
#if defined(__clang__)
#define VITKD_NEON_BEGIN VITKD_TARGET_BEGIN(VITKD_NEON)
#else
#define VITKD_NEON_BEGIN \
  VITKD_TARGET_BEGIN(VITKD_NEON) VITKD_PRAGMA(GCC optimize "no-schedule-insns")
#endif

VITKD_NEON_BEGIN
#include "int8/kernels/unroll.h"

namespace vitkd::int8 {
namespace {

// How sums become bytes.
enum class Form {
  bits,   // an fma leaves them in the low words
  words,  // an fma multiplies; as no value leaves 16 bits, adding kMagicFloat leaves words
  any,    // by conversions
};

// in memory, also what does not depend on the layer: registers belong to the sums
struct EpilogueConstants {
  float magic[4], three[4], six[4];
  uint32_t magic_bits[4];
  float hardswish_scale[4], residual_multiplier[4];
  float residual_zero_point[4];  // and kMagicFloat
  int32_t sums_from[4];          // kMagicBits or 0
  int16_t zero_point[8];
  uint8_t lo[16], hi[16];
};

inline Form form_of(const Packed::Panel& panel) {
  return panel.bits ? Form::bits : panel.magic && panel.words ? Form::words : Form::any;
}

inline EpilogueConstants epilogue_constants(const Epilogue& e, bool magic) {
  const Requantize& r = e.requantize;
  EpilogueConstants f;
  vst1q_f32(f.magic, vdupq_n_f32(kMagicFloat));
  vst1q_f32(f.three, vdupq_n_f32(3)), vst1q_f32(f.six, vdupq_n_f32(6));
  vst1q_u32(f.magic_bits, vdupq_n_u32(kMagicBits));
  vst1q_f32(f.hardswish_scale, vdupq_n_f32(r.hardswish_scale));
  vst1q_f32(f.residual_multiplier, vdupq_n_f32(e.residual_multiplier));
  const float zero_point = kMagicFloat + static_cast<float>(e.residual_zero_point);
  vst1q_f32(f.residual_zero_point, vdupq_n_f32(zero_point));
  vst1q_s32(f.sums_from, vdupq_n_s32(magic ? kMagicBits : 0));
  vst1q_s16(f.zero_point, vdupq_n_s16(static_cast<int16_t>(r.zero_point)));
  vst1q_u8(f.lo, vdupq_n_u8(static_cast<uint8_t>(r.lo)));
  vst1q_u8(f.hi, vdupq_n_u8(static_cast<uint8_t>(r.hi)));
  return f;
}

// `p` and all else in memory is loaded again after this: nothing of it holds a register across a
// main loop
VITKD_INLINE void forget(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// Before this, `v` is in a register even if it is spilled afterwards.
VITKD_INLINE void divide_range(int32x4_t& v) { asm("" : "+w"(v)); }

// Two vectors from `p` + kOffset, in one instruction. gcc would load them once and copy them.
template <int kOffset, class V>
VITKD_INLINE void load_pair(const uint8_t* p, V& a, V& b) {
  asm volatile("ldp %q0, %q1, [%2, %3]"
               : "=w"(a), "=w"(b)
               : "r"(p), "i"(kOffset), "m"(*reinterpret_cast<const char (*)[kOffset + 32]>(p)));
}

VITKD_INLINE void load_four(const uint8_t* p, float32x4_t (&to)[4]) {
  VITKD_UNROLL(4, i) { to[i] = vld1q_f32(reinterpret_cast<const float*>(p) + 4 * i); }
  VITKD_END;
}

// v = sums * m + shift, which has two or four vectors: to load them is cheaper than to copy what
// fmla overwrites.
template <int kShifts>
VITKD_INLINE void multiply_add(const int32x4_t (&sums)[4], const float32x4_t (&m)[4],
                               const uint8_t* shift, float32x4_t (&v)[4]) {
  asm("ldp %q0, %q1, [%12]\n\t"
      "ldp %q2, %q3, [%12, %13]\n\t"
      "fmla %0.4s, %4.4s, %8.4s\n\t"
      "fmla %1.4s, %5.4s, %9.4s\n\t"
      "fmla %2.4s, %6.4s, %10.4s\n\t"
      "fmla %3.4s, %7.4s, %11.4s"
      : "=&w"(v[0]), "=&w"(v[1]), "=&w"(v[2]), "=&w"(v[3])
      : "w"(sums[0]), "w"(sums[1]), "w"(sums[2]), "w"(sums[3]), "w"(m[0]), "w"(m[1]), "w"(m[2]),
        "w"(m[3]), "r"(shift), "i"(kShifts == 4 ? 32 : 0),
        "m"(*reinterpret_cast<const float (*)[4 * kShifts]>(shift)));
}

// 16 bytes as floats, 1.5 * 2^23 too large
VITKD_INLINE void widen(uint8x16_t q, uint32x4_t magic, float32x4_t (&to)[4]) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(q)), high = vmovl_high_u8(q);
  to[0] = vreinterpretq_f32_u32(vaddw_u16(magic, vget_low_u16(low)));
  to[1] = vreinterpretq_f32_u32(vaddw_high_u16(magic, low));
  to[2] = vreinterpretq_f32_u32(vaddw_u16(magic, vget_low_u16(high)));
  to[3] = vreinterpretq_f32_u32(vaddw_high_u16(magic, high));
}

// step by step for all: what waits for a result stands apart from it
VITKD_INLINE void hardswish(float32x4_t (&v)[4], const EpilogueConstants& f) {
  float32x4_t u[4];
  VITKD_UNROLL(4, i) { u[i] = vaddq_f32(v[i], vld1q_f32(f.three)); }
  VITKD_END;
  VITKD_UNROLL(4, i) { u[i] = vmaxq_f32(u[i], vdupq_n_f32(0)); }
  VITKD_END;
  VITKD_UNROLL(4, i) { u[i] = vminq_f32(u[i], vld1q_f32(f.six)); }
  VITKD_END;
  VITKD_UNROLL(4, i) { v[i] = vmulq_f32(v[i], u[i]); }
  VITKD_END;
  VITKD_UNROLL(4, i) { v[i] = vmulq_f32(v[i], vld1q_f32(f.hardswish_scale)); }
  VITKD_END;
}

// Sums times multipliers, hard-swish, and the residual's share.
template <EpilogueKind kKind, Form kForm, int kShifts>
VITKD_INLINE void to_values(const int32x4_t (&sums)[4], const float32x4_t (&m)[4],
                            const uint8_t* shift, uint8x16_t residual, const EpilogueConstants& f,
                            float32x4_t (&v)[4]) {
  if constexpr (kForm == Form::any) {
    VITKD_UNROLL(4, i) {
      v[i] = vmulq_f32(vcvtq_f32_s32(vsubq_s32(sums[i], vld1q_s32(f.sums_from))), m[i]);
    }
    VITKD_END;
  } else {
    multiply_add<kShifts>(sums, m, shift, v);
  }
  if constexpr (kKind == EpilogueKind::hardswish) hardswish(v, f);
  if constexpr (kKind == EpilogueKind::residual) {
    float32x4_t b[4];
    widen(residual, vld1q_u32(f.magic_bits), b);
    VITKD_UNROLL(4, i) {
      const float32x4_t q = vsubq_f32(b[i], vld1q_f32(f.residual_zero_point));
      v[i] = vaddq_f32(v[i], vmulq_f32(q, vld1q_f32(f.residual_multiplier)));
    }
    VITKD_END;
  }
}

VITKD_INLINE int16x8_t low_words(float32x4_t a, float32x4_t b) {
  return vuzp1q_s16(vreinterpretq_s16_f32(a), vreinterpretq_s16_f32(b));
}

template <Form kForm>
VITKD_INLINE int16x8_t to_words(float32x4_t a, float32x4_t b, const EpilogueConstants& f) {
  if constexpr (kForm == Form::bits) return low_words(a, b);
  const int16x8_t zero_point = vld1q_s16(f.zero_point);
  if constexpr (kForm == Form::words) {
    const float32x4_t magic = vld1q_f32(f.magic);
    return vaddq_s16(low_words(vaddq_f32(a, magic), vaddq_f32(b, magic)), zero_point);
  }
  const int16x4_t low = vqmovn_s32(vcvtnq_s32_f32(a));
  return vqaddq_s16(vqmovn_high_s32(low, vcvtnq_s32_f32(b)), zero_point);
}

template <Form kForm>
VITKD_INLINE uint8x16_t round_values(const float32x4_t (&v)[4], const EpilogueConstants& f) {
  const uint8x8_t low = vqmovun_s16(to_words<kForm>(v[0], v[1], f));
  uint8x16_t y = vqmovun_high_s16(low, to_words<kForm>(v[2], v[3], f));
  if constexpr (kForm == Form::any) y = vminq_u8(vmaxq_u8(y, vld1q_u8(f.lo)), vld1q_u8(f.hi));
  return y;
}

// 16 bytes, in the order of their sums
template <EpilogueKind kKind, Form kForm, int kShifts = 4>
VITKD_INLINE uint8x16_t to_bytes(const int32x4_t (&sums)[4], const float32x4_t (&m)[4],
                                 const uint8_t* shift, uint8x16_t residual,
                                 const EpilogueConstants& f) {
  float32x4_t v[4];
  to_values<kKind, kForm, kShifts>(sums, m, shift, residual, f, v);
  return round_values<kForm>(v, f);
}

}  // namespace
}  // namespace vitkd::int8
VITKD_TARGET_END

namespace vitkd::int8 {
namespace {

inline int in_order(int, int, int lane) { return lane; }

// Bytes that end before 0 or 255 are left to Form::any: quantize() makes none.
inline bool whole_range(const Requantize& r) { return r.lo == 0 && r.hi == 255; }

// Sums of activations less 128, which are signed bytes, start from 128 times their weights.
inline void add_to_biases(const ConvSpec& spec, Packed* packed) {
  for (const Packed::Panel& panel : packed->panels) {
    auto* bias = reinterpret_cast<int32_t*>(packed->own.data() + panel.constants);
    for (int i = 0; i < std::min(16, spec.out - panel.channel); ++i) {
      for (int tap = 0; tap < spec.taps(); ++tap) {
        for (int c = 0; c < (spec.depthwise ? 1 : spec.in); ++c) {
          bias[i] += 128 * spec.at(panel.channel + i, tap, c);
        }
      }
    }
  }
}

}  // namespace
}  // namespace vitkd::int8
