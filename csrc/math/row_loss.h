// Divergences of q = softmax(u) and p = softmax(v), u = s/T and v = t/T or standardised, for host
// and device; the formulas are in row_loss.inl, written for any type of number V (float, double, a
// register of them), and included here for plain numbers. A row takes four sweeps:
//   0  maxima; standardised, mean and std, too
//   1  sums of exponentials: log_s = log sum exp(u - max u), log_t alike
//   2  terms: sums of each class's loss, of w and, where asked for, of what moves with T; for KL
//      (and DKD) in sweep 1
//   3  gradient in u: w - q * (sum w), in the logits: times T^2 / T (T^2 / (T (std + eps)) and
//      less a part along s - mean where they are standardised)
// DKD leaves the label's class out of sweeps 1 to 3: `decoupled` adds what it has to say.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "math/hd.h"

namespace vitkd::row_loss {

enum class Divergence : int64_t { kKl, kReverseKl, kJs, kTv, kDkd, kOfa };

// Logits are divided by T * (std + kStandardizeEps) where they are standardised.
constexpr float kStandardizeEps = 1e-7f;

// Plain numbers by the names that registers have in simd/vec.h.
template <class A>
VITKD_HD_INLINE bool less(A a, A b) {
  return a < b;
}
template <class A>
VITKD_HD_INLINE bool not_equal(A a, A b) {
  return a != b;
}
// the second argument where either is NaN
template <class A>
VITKD_HD_INLINE A max(A a, A b) {
  return a > b ? a : b;
}
template <class A>
VITKD_HD_INLINE A min(A a, A b) {
  return a < b ? a : b;
}
template <class A>
VITKD_HD_INLINE A select(bool condition, A a, A b) {
  return condition ? a : b;
}
VITKD_HD_INLINE float exp(float x) { return std::exp(x); }
VITKD_HD_INLINE double exp(double x) { return std::exp(x); }
VITKD_HD_INLINE float log(float x) { return std::log(x); }
VITKD_HD_INLINE double log(double x) { return std::log(x); }
template <class A>
VITKD_HD_INLINE A log_normal(A x) {
  return std::log(x);
}
template <class A>
VITKD_HD_INLINE A expm1_negative(A x) {
  return std::expm1(x);
}

#include "math/row_loss.inl"

}  // namespace vitkd::row_loss
