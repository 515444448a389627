// The only glue to torch's stable ABI: dtypes, shapes and layouts of tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "math/hd.h"

namespace vitkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Calls f<T>() with the C++ type of a floating dtype.
template <class F>
decltype(auto) visit_float(ScalarType dtype, F&& f) {
  using enum ScalarType;
  switch (dtype) {
    case Float:
      return f.template operator()<float>();
    case Double:
      return f.template operator()<double>();
    case Half:
      return f.template operator()<torch::headeronly::Half>();
    case BFloat16:
      return f.template operator()<torch::headeronly::BFloat16>();
    default:
      STD_TORCH_CHECK(false, "vitkd_fast: expected float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(dtype));
  }
}

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

inline std::string shape_of(const Tensor& x) {
  std::string text = "[";
  for (const int64_t size : x.sizes()) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

enum class Reduction : int64_t { kNone, kMean, kSum };

struct RowShape {
  int64_t outer = 1;
  int64_t classes = 1;
  int64_t inner = 1;
  VITKD_HD int64_t rows() const { return outer * inner; }
};

// A tensor seen as [outer, classes, inner], strides in elements of `size` bytes.
struct RowView {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Undefined;
  int64_t size = 0;
  int64_t outer_stride = 0;
  int64_t class_stride = 0;
  int64_t inner_stride = 0;
  // the first class of a row
  VITKD_HD char* at(int64_t row, const RowShape& shape) const {
    const int64_t outer = shape.inner == 1 ? row : row / shape.inner;
    return data + (outer * outer_stride + (row - outer * shape.inner) * inner_stride) * size;
  }
};

inline RowShape row_shape(const Tensor& x, int64_t class_dim) {
  RowShape shape;
  for (int64_t i = 0; i < x.dim(); ++i) {
    (i < class_dim ? shape.outer : i == class_dim ? shape.classes : shape.inner) *= x.size(i);
  }
  return shape;
}

// The stride of dims [begin, end) taken as one, or nullopt where they do not collapse.
inline std::optional<int64_t> collapsed_stride(const Tensor& x, int64_t begin, int64_t end) {
  int64_t stride = 0, next = -1;  // next: the stride that the next outer dim must have
  for (int64_t i = end - 1; i >= begin; --i) {
    if (x.size(i) == 1) continue;
    if (next < 0) {
      stride = x.stride(i);
    } else if (x.stride(i) != next) {
      return std::nullopt;
    }
    next = x.stride(i) * x.size(i);
  }
  return stride;
}

inline std::optional<RowView> row_view(const Tensor& x, int64_t class_dim) {
  const auto outer = collapsed_stride(x, 0, class_dim);
  const auto inner = collapsed_stride(x, class_dim + 1, x.dim());
  if (!outer || !inner) return std::nullopt;
  char* data = const_cast<char*>(static_cast<const char*>(x.const_data_ptr()));
  return RowView{data,   x.scalar_type(),     static_cast<int64_t>(x.element_size()),
                 *outer, x.stride(class_dim), *inner};
}

// Whether x's elements lie one after another, in any order of its dimensions.
inline bool without_gaps(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) != 1) dims.emplace_back(x.stride(i), x.size(i));
  }
  std::sort(dims.begin(), dims.end());
  int64_t next = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != next) return false;
    next *= size;
  }
  return true;
}

// Calls f with a tensor like x whose elements lie one after another, for work in place: x itself,
// or a copy that is copied back.
template <class F>
void in_place(const Tensor& x, F&& f) {
  if (without_gaps(x)) return f(x);
  const Tensor copy = torch::stable::contiguous(x);
  f(copy);
  Tensor to = x;
  torch::stable::copy_(to, copy);
}

// x's shape without the class dimension: one number per row.
inline std::vector<int64_t> rows_shape(const Tensor& x, int64_t class_dim) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.erase(shape.begin() + class_dim);
  return shape;
}

// An optional number per row: one for all (step 0) or one each (step 1).
template <class A>
struct PerRow {
  const A* data = nullptr;
  int64_t step = 0;
  A value = 0;
  VITKD_HD A operator[](int64_t row) const { return data ? data[row * step] : value; }
};

// Holds the contiguous tensor for as long as the pointer is used.
template <class A>
struct PerRowHolder {
  OptionalTensor held;
  PerRow<A> get;
  PerRowHolder(const OptionalTensor& x, A value) {
    get.value = value;
    if (!x) return;
    held = torch::stable::contiguous(*x);
    get.data = held->template const_data_ptr<A>();
    get.step = held->numel() == 1 ? 0 : 1;
  }
};

inline const int64_t* labels_ptr(OptionalTensor& x) {
  if (!x) return nullptr;
  if (!x->is_contiguous()) x = torch::stable::contiguous(*x);
  return x->const_data_ptr<int64_t>();
}

}  // namespace vitkd
