// Distances of samples, from the Gram matrix of their embeddings, and smooth-L1, for host and
// device:
//   d_ij^2 = G_ii + G_jj - 2 G_ij
//   h(x) = c (x - c / 2), h'(x) = c, c = clamp(x, -1, 1)
// Samples whose squared distance is lost in the rounding of the norms count as one.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "math/hd.h"

namespace vitkd::rkd {

// d^2 < max(kSame * (G_ii + G_jj), kTiny) is rounding
template <class A>
constexpr A kSame = 8 * std::numeric_limits<A>::epsilon();
template <class A>
constexpr A kTiny = std::numeric_limits<A>::min();

// total: G_ii + G_jj. False for NaN.
template <class A>
VITKD_HD bool counts_as_one(A squared, A total) {
  const A least = kSame<A> * total;
  return squared < (least > kTiny<A> ? least : kTiny<A>);
}

template <class A>
struct Distance {
  A length, inverse;  // 0 for samples that count as one
};

template <class A>
VITKD_HD Distance<A> distance(A gram, A norm_i, A norm_j) {
  const A total = norm_i + norm_j, squared = total - (gram + gram);
  if (counts_as_one(squared, total)) return {0, 0};
  const A length = std::sqrt(squared);
  return {length, 1 / length};
}

// NaN is preserved.
template <class A>
VITKD_HD A clamp_to_1(A x) {
  return x > 1 ? A{1} : x < -1 ? A{-1} : x;
}

// Of the distances of n samples, whose sum over ordered pairs is given; 0 where all are 0.
template <class A>
VITKD_HD A inverse_mean(A sum, int64_t n) {
  return sum == 0 ? A{0} : static_cast<A>(n) * static_cast<A>(n - 1) / sum;
}

}  // namespace vitkd::rkd
