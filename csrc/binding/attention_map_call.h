// One call of attention_map_loss, as every backend sees it: pointers, strides and options, free of
// tensors; and what it returns.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "binding/common.h"
#include "binding/flat.h"
#include "math/attention_map.h"

namespace vitkd::attention_map {

// The operations' arguments behind their tensors: reference.AttentionMapOptions.
struct Options {
  using Fields = std::tuple<double, double, double, int64_t, int64_t, OptionalTensor, bool>;
  double scale_s, scale_t, temperature;
  int64_t kind, reduction;
  OptionalTensor key_mask;
  bool allow_tf32;
};

// [batch, heads, tokens, dim], strides in elements; dim is dense
struct Operand {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Undefined;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};

struct Call {
  int64_t batch = 0, heads = 0, queries = 0, keys = 0, dim_s = 0, dim_t = 0;
  Operand q_s, k_s, q_t, k_t, d_q, d_k;
  const bool* key_mask = nullptr;    // [batch, keys], true = keep
  float factor_s = 0, factor_t = 0;  // scale / T, by which q . k is multiplied
  float loss_factor = 0;             // T^2, over the rows where their mean is asked for
  float grad_factor = 0;             // the same times factor_s
  Kind kind = Kind::kKl;
  Reduction reduction = Reduction::kMean;
  bool allow_tf32 = false;
  const float* grad_loss = nullptr;  // one number, or one per row with kNone
  float* loss = nullptr;             // [batch * heads * queries], each times loss_factor
  float* stats = nullptr;            // [3, batch * heads * queries]: lse_s, lse_t, centre

  VITKD_HD int64_t rows() const { return batch * heads * queries; }
  VITKD_HD float row_grad(int64_t row) const {
    if (grad_loss == nullptr) return grad_factor;
    return grad_factor * grad_loss[reduction == Reduction::kNone ? row : 0];
  }
};

inline Operand operand(const Tensor& x) {
  return {const_cast<char*>(static_cast<const char*>(x.const_data_ptr())), x.scalar_type(),
          x.stride(0), x.stride(1), x.stride(2)};
}

inline bool dense_dim(const Tensor& x) { return x.size(3) == 1 || x.stride(3) == 1; }

// Fills a call from the operations' arguments, and holds the tensors that it points into.
struct Setup {
  Tensor q_s, k_s, q_t, k_t;
  OptionalTensor key_mask, grad_loss, stats;
  Call call;
  Setup(const Options& o, const Tensor& q_s_in, const Tensor& k_s_in, const Tensor& q_t_in,
        const Tensor& k_t_in)
      : q_s(usable("q_s", q_s_in)),
        k_s(usable("k_s", k_s_in)),
        q_t(usable("q_t", q_t_in)),
        k_t(usable("k_t", k_t_in)),
        key_mask(o.key_mask) {
    for (const int i : {0, 1, 3}) {
      same("q_s", q_s, "k_s", k_s, i);
      same("q_t", q_t, "k_t", k_t, i);
    }
    for (const int i : {0, 1, 2}) same("q_s", q_s, "q_t", q_t, i);
    same("k_s", k_s, "k_t", k_t, 2);
    same_dtype("q_s", q_s, "k_s", k_s);
    same_dtype("q_t", q_t, "k_t", k_t);
    call.batch = q_s.size(0), call.heads = q_s.size(1), call.queries = q_s.size(2);
    call.keys = k_s.size(2), call.dim_s = q_s.size(3), call.dim_t = q_t.size(3);
    call.q_s = operand(q_s), call.k_s = operand(k_s);
    call.q_t = operand(q_t), call.k_t = operand(k_t);
    if (key_mask) {
      STD_TORCH_CHECK(key_mask->scalar_type() == ScalarType::Bool && key_mask->dim() == 2 &&
                          key_mask->size(0) == call.batch && key_mask->size(1) == call.keys,
                      "attention_map_loss: key_mask: expected Bool [", call.batch, ", ", call.keys,
                      "], got ", torch::headeronly::toString(key_mask->scalar_type()), " ",
                      shape_of(*key_mask));
      if (!key_mask->is_contiguous()) key_mask = torch::stable::contiguous(*key_mask);
      call.key_mask = key_mask->const_data_ptr<bool>();
    }
    STD_TORCH_CHECK(0 <= o.kind && o.kind <= 3, "attention_map_loss: kind: expected 0 to 3, got ",
                    o.kind);
    call.kind = static_cast<Kind>(o.kind);
    call.reduction = static_cast<Reduction>(o.reduction);
    call.allow_tf32 = o.allow_tf32;
    const bool mean = call.reduction == Reduction::kMean;
    const double rows = mean ? static_cast<double>(std::max<int64_t>(call.rows(), 1)) : 1.0;
    call.factor_s = static_cast<float>(o.scale_s / o.temperature);
    call.factor_t = static_cast<float>(o.scale_t / o.temperature);
    call.loss_factor = static_cast<float>(o.temperature * o.temperature / rows);
    call.grad_factor = static_cast<float>(o.temperature * o.scale_s / rows);
  }

  // what the forward saved, and the incoming gradient
  void take(const Tensor& grad_loss_in, const Tensor& stats_in) {
    const auto expect = [](const char* name, const Tensor& x, int64_t count) {
      STD_TORCH_CHECK(x.numel() == count && x.scalar_type() == ScalarType::Float,
                      "attention_map_loss: ", name, ": expected ", count, " float32 numbers, got ",
                      torch::headeronly::toString(x.scalar_type()), " ", shape_of(x));
    };
    expect("grad_loss", grad_loss_in, call.reduction == Reduction::kNone ? call.rows() : 1);
    expect("stats", stats_in, 3 * call.rows());
    grad_loss = torch::stable::contiguous(grad_loss_in);
    stats = torch::stable::contiguous(stats_in);
    call.grad_loss = grad_loss->const_data_ptr<float>();
    call.stats = const_cast<float*>(stats->const_data_ptr<float>());
  }

 private:
  static Tensor usable(const char* name, const Tensor& x) {
    using enum ScalarType;
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(dtype == Float || dtype == Half || dtype == BFloat16,
                    "attention_map_loss: ", name, ": expected float32, float16 or bfloat16, got ",
                    torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(x.dim() == 4, "attention_map_loss: ", name,
                    ": expected [batch, heads, tokens, dim], got ", shape_of(x));
    STD_TORCH_CHECK((x.size(2) > 0 || *name == 'q') && x.size(3) > 0, "attention_map_loss: ", name,
                    ": expected 1 token and 1 dim at least, got ", shape_of(x));
    return dense_dim(x) ? x : torch::stable::contiguous(x);
  }
  static void same(const char* a, const Tensor& x, const char* b, const Tensor& y, int dim) {
    constexpr const char* kNames[] = {"batch", "heads", "tokens", "dim"};
    STD_TORCH_CHECK(x.size(dim) == y.size(dim), "attention_map_loss: ", b, ": expected the ",
                    kNames[dim], " of ", a, " ", shape_of(x), ", got ", shape_of(y));
  }
  static void same_dtype(const char* a, const Tensor& x, const char* b, const Tensor& y) {
    STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "attention_map_loss: ", b,
                    ": expected the dtype of ", a, ", ",
                    torch::headeronly::toString(x.scalar_type()), ", got ",
                    torch::headeronly::toString(y.scalar_type()));
  }
};

// A gradient with the strides of empty_like, which is what the fake promises; where these leave
// dim not dense, or where a kernel computes in another dtype, it fills a contiguous tensor first.
struct Grad {
  Tensor promised, tensor;
  bool direct;
  explicit Grad(const Tensor& x) : Grad(x, x.scalar_type()) {}
  Grad(const Tensor& x, ScalarType dtype)
      : promised(torch::stable::empty_like(x)),
        direct(dense_dim(promised) && dtype == x.scalar_type()) {
    tensor = direct ? promised : torch::stable::new_empty(x, x.sizes(), dtype);
  }
  Operand view() const { return operand(tensor); }
  Tensor take() {
    if (!direct) torch::stable::copy_(promised, tensor);
    return promised;
  }
};

// An uninitialised loss: one number per row, or one in all.
inline Tensor empty_loss(const Call& call, const Tensor& like) {
  std::vector<int64_t> shape;
  if (call.reduction == Reduction::kNone) shape = {call.batch, call.heads, call.queries};
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

inline Tensor empty_stats(const Call& call, const Tensor& like) {
  return torch::stable::new_empty(
      like, std::vector<int64_t>{3, call.batch, call.heads, call.queries}, ScalarType::Float);
}

}  // namespace vitkd::attention_map
