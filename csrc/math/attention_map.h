// One key's term of the divergence between a row p of the teacher's attention and q of the
// student's, from their logarithms:
//   kind        loss                                             w
//   kl          p (log p - log q)                                q - p
//   reverse_kl  q (log q - log p)                                q (log q - log p)
//   js          p/2 log(p/m) + q/2 log(q/m), m = (p + q)/2       q/2 log(q/m)
//   mse         (p - q)^2                                        2 q (q - p)
// Its gradient in the student's score is w - q * sum(w); sum(w), `centre`, is 0 for kl and saved
// for each row otherwise.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/hd.h"

namespace vitkd::attention_map {

enum class Kind : int64_t { kKl, kReverseKl, kJs, kMse };

constexpr float kMasked = -1e30f;  // the score of a masked key; finite, so that 0 * it is 0

struct Term {
  float loss, w;
};

// p = exp(log_p) and q = exp(log_q); every caller has them
template <Kind kKind>
VITKD_HD Term term(float p, float log_p, float q, float log_q) {
  if constexpr (kKind == Kind::kKl) {
    return {p * (log_p - log_q), q - p};
  } else if constexpr (kKind == Kind::kReverseKl) {
    const float x = q * (log_q - log_p);
    return {x, x};
  } else if constexpr (kKind == Kind::kJs) {
    if (p == q) return {0, 0};  // both may have underflown
    const float log_m = std::log(p + q) - 0.693147180559945f;
    const float w = 0.5f * q * (log_q - log_m);
    return {0.5f * p * (log_p - log_m) + w, w};
  } else {
    return {(p - q) * (p - q), 2 * q * (q - p)};
  }
}

}  // namespace vitkd::attention_map
