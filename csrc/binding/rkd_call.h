// The arguments of rkd_fwd_grad, checked.
#pragma once

#include "binding/common.h"

namespace vitkd::rkd {

// Calls f<A>(gram_s, gram_t) with contiguous [batch, batch] matrices of the C++ type A.
template <class F>
std::tuple<Tensor, Tensor> visit_grams(const Tensor& gram_s, const Tensor& gram_t, F&& f) {
  const ScalarType s = gram_s.scalar_type(), t = gram_t.scalar_type();
  STD_TORCH_CHECK(s == t && (s == ScalarType::Float || s == ScalarType::Double),
                  "rkd_loss: gram_s, gram_t: expected float32 or float64 for both, got ",
                  torch::headeronly::toString(s), ", ", torch::headeronly::toString(t));
  STD_TORCH_CHECK(gram_s.dim() == 2 && gram_t.dim() == 2 && gram_s.size(0) == gram_s.size(1) &&
                      gram_t.size(0) == gram_s.size(0) && gram_t.size(1) == gram_s.size(0),
                  "rkd_loss: gram_s, gram_t: expected [batch, batch] for both, got ",
                  shape_of(gram_s), ", ", shape_of(gram_t));
  const Tensor x = torch::stable::contiguous(gram_s), y = torch::stable::contiguous(gram_t);
  return s == ScalarType::Double ? f.template operator()<double>(x, y)
                                 : f.template operator()<float>(x, y);
}

}  // namespace vitkd::rkd
