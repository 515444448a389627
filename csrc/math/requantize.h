// From an int32 sum to a byte, the same bytes on every machine: single fp32 operations in this
// order, rounded to nearest even, never fused (shared by the scalar engine and CUDA).
//
//   v = float(acc) * m
//   hard-swish: t = v, u = min(max(t + 3, 0), 6), v = (t * u) * k
//   residual:   v = v + float(q_b - z_b) * m_b
//   y = clamp(rne(clamp(v, -32768, 32767)) + zero_point, lo, hi)
#pragma once

#include <cmath>
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

VITKD_HD float clamp(float v, float lo, float hi) { return fminf(fmaxf(v, lo), hi); }

struct Requantize {
  int32_t zero_point = 0;
  int32_t lo = 0;
  int32_t hi = 255;
  float hardswish_scale = 0;  // 0: no hard-swish; a stored one is positive
};

VITKD_HD uint8_t to_byte(float v, const Requantize& r) {
  v = clamp(v, -32768.0f, 32767.0f);
#ifdef __CUDA_ARCH__
  const int32_t rounded = __float2int_rn(v);
#else
  const int32_t rounded = static_cast<int32_t>(std::nearbyintf(v));
#endif
  const int32_t y = rounded + r.zero_point;
  return static_cast<uint8_t>(y < r.lo ? r.lo : y > r.hi ? r.hi : y);
}

VITKD_HD float hardswish(float t, float k) {
  return mul(mul(t, clamp(add(t, 3.0f), 0.0f, 6.0f)), k);
}

VITKD_HD uint8_t requantize(int32_t acc, float m, const Requantize& r) {
  const float v = mul(static_cast<float>(acc), m);
  return to_byte(r.hardswish_scale == 0.0f ? v : hardswish(v, r.hardswish_scale), r);
}

}  // namespace vitkd::int8
