// One call of at_loss: features of both sides as pointers and strides, checked.
#pragma once

#include "binding/kd_call.h"

namespace vitkd::at {

// What lies side by side: the positions of a channel, or the channels of a position.
enum class Layout { kPlanes, kTokens };

// Features as [batch, channels, positions], strides in elements of `size` bytes.
struct View {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Undefined;
  int64_t size = 0, batch_stride = 0, channel_stride = 0, position_stride = 0;
  Layout layout = Layout::kPlanes;
  char* at(int64_t sample) const { return data + sample * batch_stride * size; }
};

inline bool can_be(Layout layout, const Tensor& x) {
  const int64_t dim = layout == Layout::kPlanes ? 2 : 1;
  return x.size(dim) == 1 || x.stride(dim) == 1;
}

inline Layout layout_of(const Tensor& x) {
  if (x.size(2) == 1 && can_be(Layout::kTokens, x)) return Layout::kTokens;
  return can_be(Layout::kPlanes, x) ? Layout::kPlanes : Layout::kTokens;
}

inline View view_of(const Tensor& x, Layout layout) {
  char* data = const_cast<char*>(static_cast<const char*>(x.const_data_ptr()));
  return {data,        x.scalar_type(), static_cast<int64_t>(x.element_size()),
          x.stride(0), x.stride(1),     x.stride(2),
          layout};
}

// A copy where neither dimension lies side by side.
inline Tensor side_by_side(const Tensor& x) {
  return can_be(Layout::kPlanes, x) || can_be(Layout::kTokens, x) ? x
                                                                  : torch::stable::contiguous(x);
}

inline Tensor empty_contiguous(const Tensor& x, ScalarType dtype) {
  if (dtype == x.scalar_type()) return kd::empty_gradient(x);
  return torch::stable::new_empty(x, x.sizes(), dtype);
}

// An uninitialised gradient with the strides of empty_like(x), which is what the fake promises:
// float32 for float16, which may not hold it until the loss scale is applied.
inline Tensor empty_gradient(const Tensor& x) {
  const bool half = x.scalar_type() == ScalarType::Half;
  const ScalarType dtype = half ? ScalarType::Float : x.scalar_type();
  if (x.is_contiguous()) return empty_contiguous(x, dtype);
  const Tensor tokens = torch::stable::transpose(x, 1, 2);
  if (tokens.is_contiguous()) {
    return torch::stable::transpose(empty_contiguous(tokens, dtype), 1, 2);
  }
  return torch::stable::empty_like(half ? torch::stable::to(x, dtype) : x);
}

struct Call {
  View student, teacher, grad;  // grad.data: null unless it is wanted
  int64_t batch, s_channels, t_channels, positions, p;
  bool is_map;  // the teacher is [batch, positions] in the accumulation type
  double scale;
};

// Checks the arguments, and holds the tensors that a call points into.
template <class A>
struct Setup {
  Tensor f_s, f_t, grad;
  OptionalTensor promised;  // has the strides that are promised, where no kernel can write those
  Call call{};
  Setup(const Tensor& s, const Tensor& t, int64_t p, bool mean, bool wants_grad)
      : f_s(s), f_t(t), grad(torch::stable::new_empty(s, {0})) {
    STD_TORCH_CHECK(s.dim() == 3, "at_loss: f_s: expected [batch, channels, positions], got ",
                    shape_of(s));
    const bool map = t.dim() == 2;
    STD_TORCH_CHECK(
        (map || t.dim() == 3) && t.size(0) == s.size(0) && t.size(t.dim() - 1) == s.size(2),
        "at_loss: f_t: expected [batch, channels, positions] or [batch, positions] of ",
        "the batch and positions of f_s ", shape_of(s), ", got ", shape_of(t));
    const ScalarType dtype = t.scalar_type();
    const bool same = (dtype == ScalarType::Double) == (kd::kDtype<A> == ScalarType::Double);
    STD_TORCH_CHECK(map ? dtype == kd::kDtype<A> : same,
                    "at_loss: f_t: expected float64 where f_s is float64, else ",
                    map ? "float32" : "float32, float16 or bfloat16", ", got ",
                    torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(p == 1 || p == 2, "at_loss: p: expected 1 or 2, got ", p);
    call.batch = s.size(0);
    call.s_channels = s.size(1);
    call.positions = s.size(2);
    call.p = p;
    call.scale = mean ? 1.0 / static_cast<double>(std::max<int64_t>(1, call.batch)) : 1.0;
    call.is_map = map;
    if (map) {
      f_t = torch::stable::contiguous(t);
      call.teacher = {static_cast<char*>(const_cast<void*>(f_t.const_data_ptr())), dtype, sizeof(A),
                      f_t.stride(0)};
    } else {
      f_t = side_by_side(t);
      call.t_channels = t.size(1);
      call.teacher = view_of(f_t, layout_of(f_t));
    }
    f_s = side_by_side(s);
    Layout layout = layout_of(f_s);
    if (wants_grad) {
      grad = empty_gradient(s);
      if (!can_be(layout, grad)) {
        promised = std::exchange(grad, torch::stable::new_empty(s, s.sizes(), grad.scalar_type()));
        f_s = torch::stable::contiguous(s);
        layout = Layout::kPlanes;
      }
      call.grad = view_of(grad, layout);
    }
    call.student = view_of(f_s, layout);
  }

  Tensor take() {
    if (!promised) return std::move(grad);
    torch::stable::copy_(*promised, grad);
    return std::move(*promised);
  }
};

}  // namespace vitkd::at
