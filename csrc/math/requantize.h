// From an int32 sum to a byte, the same bytes on every machine: single fp32 operations in this
// order, rounded to nearest even, never fused (shared by the scalar engine and CUDA).
//
//   v = float(acc) * m
//   hard-swish: t = v, u = min(max(t + 3, 0), 6), v = (t * u) * k
//   residual:   v = v + float(q_b - z_b) * m_b
//   y = clamp(rne(clamp(v, -32768, 32767)) + zero_point, lo, hi)
#pragma once

#include <bit>
#include <cstdint>

#include "math/hd.h"

namespace vitkd::int8 {

// Compilers fuse a multiply and an add where they may; host code is built with -ffp-contract=off.
VITKD_HD float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

VITKD_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// NaN becomes lo
VITKD_HD float clamp(float v, float lo, float hi) {
#ifdef __CUDA_ARCH__
  return fminf(fmaxf(v, lo), hi);
#else
  v = v > lo ? v : lo;  // one instruction where fmaxf is a call
  return v < hi ? v : hi;
#endif
}

struct Requantize {
  int32_t zero_point = 0;
  int32_t lo = 0;
  int32_t hi = 255;
  float hardswish_scale = 0;  // 0: no hard-swish; a stored one is positive
};

// rne is monotone and keeps integers, so v may be clamped to [lo, hi] before it is rounded; and
// adding 1.5 * 2^23, whose bits end in 22 zeros, rounds it to an integer in the lowest bits.
VITKD_HD uint8_t to_byte(float v, const Requantize& r) {
  const auto lo = static_cast<float>(r.lo - r.zero_point);
  const auto hi = static_cast<float>(r.hi - r.zero_point);
  const float rounded = add(clamp(v, lo, hi), 12582912.0f);
#ifdef __CUDA_ARCH__
  const int32_t bits = __float_as_int(rounded);
#else
  const auto bits = std::bit_cast<int32_t>(rounded);
#endif
  return static_cast<uint8_t>(bits + r.zero_point);
}

VITKD_HD float hardswish(float t, float k) {
  return mul(mul(t, clamp(add(t, 3.0f), 0.0f, 6.0f)), k);
}

template <bool kHardswish>
VITKD_HD uint8_t requantize(int32_t acc, float m, const Requantize& r) {
  const float v = mul(static_cast<float>(acc), m);
  return to_byte(kHardswish ? hardswish(v, r.hardswish_scale) : v, r);
}

VITKD_HD uint8_t requantize(int32_t acc, float m, const Requantize& r) {
  return r.hardswish_scale == 0.0f ? requantize<false>(acc, m, r) : requantize<true>(acc, m, r);
}

}  // namespace vitkd::int8
