// One call of wkd_feature_loss: features of both sides, checked.
#pragma once

#include "binding/features_call.h"

namespace vitkd::wkd_feature {

using features::Layout, features::View;

struct Call {
  View student, teacher, grad;  // grad.data: null unless it is wanted
  int64_t batch, channels, s_positions, t_positions;
  double mean_weight, scale;
};

// Checks the arguments, and holds the tensors that a call points into.
template <class A>
struct Setup {
  features::Student student;
  Tensor f_t;
  Call call{};
  Setup(const Tensor& s, const Tensor& t, double mean_weight, Reduction reduction, bool wants_grad)
      : student(checked(s, t), wants_grad), f_t(features::side_by_side(t)) {
    call = {student.view,
            features::view_of(f_t, features::layout_of(f_t)),
            student.grad_view,
            s.size(0),
            s.size(1),
            s.size(2),
            t.size(2),
            mean_weight,
            features::scale_of(reduction, s.size(0))};
  }

 private:
  static const Tensor& checked(const Tensor& s, const Tensor& t) {
    STD_TORCH_CHECK(
        s.dim() == 3 && t.dim() == 3 && s.size(0) == t.size(0) && s.size(1) == t.size(1),
        "wkd_feature_loss: f_s, f_t: expected [batch, channels, positions] for both, got ",
        shape_of(s), ", ", shape_of(t));
    STD_TORCH_CHECK(features::fits<A>(t),
                    "wkd_feature_loss: f_t: expected float64 where f_s is float64, got ",
                    torch::headeronly::toString(t.scalar_type()));
    return s;
  }
};

}  // namespace vitkd::wkd_feature
