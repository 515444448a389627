// One call of at_loss: features of both sides, checked.
#pragma once

#include "binding/features_call.h"

namespace vitkd::at {

using features::Layout, features::View;

struct Call {
  View student, teacher, grad;  // grad.data: null unless it is wanted
  int64_t batch, s_channels, t_channels, positions, p;
  bool is_map;  // the teacher is [batch, positions] in the accumulation type
  double scale;
};

// Checks the arguments, and holds the tensors that a call points into.
template <class A>
struct Setup {
  features::Student student;
  Tensor f_t;
  Call call{};
  Setup(const Tensor& s, const Tensor& t, int64_t p, Reduction reduction, bool wants_grad)
      : student(checked(s, t, p), wants_grad),
        f_t(t.dim() == 2 ? torch::stable::contiguous(t) : features::side_by_side(t)) {
    const bool map = t.dim() == 2;
    call.batch = s.size(0);
    call.s_channels = s.size(1);
    call.positions = s.size(2);
    call.p = p;
    call.scale = features::scale_of(reduction, call.batch);
    call.is_map = map;
    call.student = student.view;
    call.grad = student.grad_view;
    if (map) {
      call.teacher = {static_cast<char*>(const_cast<void*>(f_t.const_data_ptr())), kd::kDtype<A>,
                      sizeof(A), f_t.stride(0)};
    } else {
      call.t_channels = t.size(1);
      call.teacher = features::view_of(f_t, features::layout_of(f_t));
    }
  }

 private:
  static const Tensor& checked(const Tensor& s, const Tensor& t, int64_t p) {
    STD_TORCH_CHECK(s.dim() == 3, "at_loss: f_s: expected [batch, channels, positions], got ",
                    shape_of(s));
    const bool map = t.dim() == 2;
    STD_TORCH_CHECK(
        (map || t.dim() == 3) && t.size(0) == s.size(0) && t.size(t.dim() - 1) == s.size(2),
        "at_loss: f_t: expected [batch, channels, positions] or [batch, positions] of ",
        "the batch and positions of f_s ", shape_of(s), ", got ", shape_of(t));
    STD_TORCH_CHECK(map ? t.scalar_type() == kd::kDtype<A> : features::fits<A>(t),
                    "at_loss: f_t: expected float64 where f_s is float64, else ",
                    map ? "float32" : "float32, float16 or bfloat16", ", got ",
                    torch::headeronly::toString(t.scalar_type()));
    STD_TORCH_CHECK(p == 1 || p == 2, "at_loss: p: expected 1 or 2, got ", p);
    return s;
  }
};

}  // namespace vitkd::at
