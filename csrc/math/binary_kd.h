// Distillation of classes that are not exclusive, by logits s (student) and t (teacher):
//   loss = kd_weight * T^2 * KL(Bern(p) || Bern(q)) + bce_weight * (softplus(s) - y s)
//   dloss/ds = kd_weight * T * (q - p) + bce_weight * (sigmoid(s) - y)
// with u = s/T, v = t/T, q = sigmoid(u), p = sigmoid(v), f = e^-|u|, e = e^-|v|, which never
// overflow:
//   KL = p (min(v,0) - min(u,0)) + (1-p) (max(u,0) - max(v,0)) + log((1 + f) / (1 + e))
//   softplus(s) = max(s,0) + log(1 + e^-|s|)
// Both logarithms are log((1 + z) / (1 - z)) with |z| <= 1/3, in which nothing cancels. The terms
// of KL are those of each side's own logarithms, which are small where its probability is near 1.
// math/binary_kd.inl has it for any register.
#pragma once

#include "math/hd.h"

namespace vitkd::binary_kd {

// Which terms there are: the first, both at T = 1 (their sigmoids are one), both, the second.
enum class Kind { kKd, kBothAt1, kBoth, kBce };

// What the terms are multiplied by.
template <class V>
struct Factors {
  V inv_t;
  V most;               // logits are cut off there, so that u and v stay finite
  V kd, bce;            // of the loss: kd_weight T^2, bce_weight
  V kd_grad, bce_grad;  // of the gradient: kd_weight T and bce_weight, times what comes in
};

}  // namespace vitkd::binary_kd
