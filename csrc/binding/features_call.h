// Features of student and teacher as pointers and strides, whatever their layout, and the gradient.
#pragma once

#include <numeric>

#include "binding/kd_call.h"

namespace vitkd::features {

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

// The student's features and, where it is wanted, their gradient, in one layout.
struct Student {
  Tensor f_s, grad;
  OptionalTensor promised;  // has the strides that are promised, where no kernel can write those
  View view, grad_view;     // grad_view.data: null unless a gradient is wanted
  Student(const Tensor& x, bool wants_grad)
      : f_s(side_by_side(x)), grad(torch::stable::new_empty(x, {0})) {
    Layout layout = layout_of(f_s);
    if (wants_grad) {
      grad = empty_gradient(x);
      if (!can_be(layout, grad)) {
        promised = std::exchange(grad, torch::stable::new_empty(x, x.sizes(), grad.scalar_type()));
        f_s = torch::stable::contiguous(x);
        layout = Layout::kPlanes;
      }
      grad_view = view_of(grad, layout);
    }
    view = view_of(f_s, layout);
  }
  Tensor take() {
    if (!promised) return std::move(grad);
    torch::stable::copy_(*promised, grad);
    return std::move(*promised);
  }
};

// float64 on both sides, or on neither.
template <class A>
bool fits(const Tensor& f_t) {
  return (f_t.scalar_type() == ScalarType::Double) == std::is_same_v<A, double>;
}

// Of a reduction, by which each sample's loss is multiplied.
inline double scale_of(Reduction reduction, int64_t batch) {
  return reduction == Reduction::kMean ? 1.0 / static_cast<double>(std::max<int64_t>(1, batch)) : 1;
}

// An uninitialised loss, and the samples' in it or beside it.
template <class A>
struct Losses {
  Tensor loss;
  std::vector<A> kept;
  A* rows;
  Losses(const Tensor& like, Reduction reduction, int64_t batch)
      : loss(torch::stable::new_empty(
            like,
            reduction == Reduction::kNone ? std::vector<int64_t>{batch} : std::vector<int64_t>{},
            kd::kDtype<A>)),
        kept(reduction == Reduction::kNone ? 0 : batch),
        rows(reduction == Reduction::kNone ? loss.template mutable_data_ptr<A>() : kept.data()) {}
  Tensor take(Reduction reduction, double scale) {
    if (reduction != Reduction::kNone) {
      const double sum = std::accumulate(kept.begin(), kept.end(), 0.0);
      *loss.template mutable_data_ptr<A>() = static_cast<A>(scale * sum);
    }
    return std::move(loss);
  }
};

}  // namespace vitkd::features
