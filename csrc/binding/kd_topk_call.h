// One call of kd_loss_topk, as every backend sees it: kd_loss's, with K classes for a teacher.
#pragma once

#include "binding/kd_call.h"
#include "math/kd_topk.h"

namespace vitkd::kd_topk {

// reference.KDTopKOptions
struct Options {
  using Fields =
      std::tuple<double, double, int64_t, int64_t, OptionalTensor, OptionalTensor, OptionalTensor,
                 OptionalTensor, OptionalTensor, OptionalTensor, double, double, double, int64_t>;
  double temperature, kd_weight;
  int64_t tail, reduction;
  OptionalTensor log_sum_exp, labels, labels_b, lam_rows, temperature_rows, row_weights;
  double lam, ce_weight, label_smoothing;
  int64_t ignore_index;

  kd::Options of_rows(int64_t class_dim) const {
    return {temperature, kd_weight,       class_dim,        reduction,   labels,
            labels_b,    lam_rows,        temperature_rows, row_weights, lam,
            ce_weight,   label_smoothing, ignore_index};
  }
};

template <class A>
struct Call : kd::Call<A> {
  const void *indices, *values;  // [rows, top]
  ScalarType index_dtype, value_dtype;
  const A* log_sum_exp;  // [rows]; null where values are probabilities
  int64_t top;
  Tail tail;
  double inverse;  // 1 / T in double, where T is one for all rows

  // the log-sum-exp was taken at exactly this temperature
  VITKD_HD double inverse_temperature(int64_t row) const {
    const auto& rows = this->temperature;
    if (!rows.data) return inverse;
    // one step of Newton's takes the place of a division in double
    const double t = rows[row], nearly = 1 / rows[row];
    return nearly * (2 - t * nearly);
  }

  VITKD_HD int64_t others() const { return this->shape.classes - top; }
  VITKD_HD bool renormalised() const { return tail == Tail::kRenorm || others() == 0; }
  // f(pointer to the indices)
  template <class F>
  void visit_index(F&& f) const {
    switch (index_dtype) {
      case ScalarType::Short:
        return f(static_cast<const int16_t*>(indices));
      case ScalarType::Int:
        return f(static_cast<const int32_t*>(indices));
      default:
        return f(static_cast<const int64_t*>(indices));
    }
  }
  VITKD_HD int64_t index(int64_t row, int64_t k) const {
    const int64_t i = row * top + k;
    switch (index_dtype) {
      case ScalarType::Short:
        return static_cast<const int16_t*>(indices)[i];
      case ScalarType::Int:
        return static_cast<const int32_t*>(indices)[i];
      default:
        return static_cast<const int64_t*>(indices)[i];
    }
  }
  // in double: large logits and their log-sum-exp cancel
  VITKD_HD double value(int64_t row, int64_t k) const {
    const int64_t i = row * top + k;
    switch (value_dtype) {
      case ScalarType::Half:
        return static_cast<float>(static_cast<const torch::headeronly::Half*>(values)[i]);
      case ScalarType::BFloat16:
        return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(values)[i]);
      case ScalarType::Double:
        return static_cast<const double*>(values)[i];
      default:
        return static_cast<const float*>(values)[i];
    }
  }
  // log p of a class before it is divided by anything. base: the row's log-sum-exp or, where p is
  // renormalised, its largest logit over T
  VITKD_HD A log_p(double value, double inv_t, double base) const {
    return log_sum_exp ? static_cast<A>(value * inv_t - base) : std::log(static_cast<A>(value));
  }
};

// Fills a call from the operation's arguments, and holds the tensors that it points into.
template <class A>
struct Setup {
  Tensor indices, values;
  OptionalTensor log_sum_exp;
  kd::Setup<A> row;
  Call<A> call;
  Setup(const Options& o, const RowShape& shape, const RowView& student, const Tensor& indices_in,
        const Tensor& values_in)
      : indices(torch::stable::contiguous(indices_in)),
        values(torch::stable::contiguous(values_in)),
        row(o.of_rows(0), shape, student, student),
        call{row.call,
             nullptr,
             nullptr,
             indices.scalar_type(),
             values.scalar_type(),
             nullptr,
             0,
             static_cast<Tail>(o.tail),
             1 / o.temperature} {
    using enum ScalarType;
    const auto index = call.index_dtype, value = call.value_dtype;
    STD_TORCH_CHECK(index == Short || index == Int || index == Long,
                    "kd_loss_topk: indices: expected int16, int32 or int64, got ",
                    torch::headeronly::toString(index));
    STD_TORCH_CHECK(value == Half || value == BFloat16 || value == Float || value == Double,
                    "kd_loss_topk: values: expected a floating dtype, got ",
                    torch::headeronly::toString(value));
    call.top = indices.dim() ? indices.size(indices.dim() - 1) : 0;
    STD_TORCH_CHECK(
        call.top >= 1 && call.top <= shape.classes && indices.numel() == shape.rows() * call.top &&
            values.numel() == indices.numel(),
        "kd_loss_topk: indices, values: expected [rows, K] for both, 1 <= K <= ", shape.classes,
        ", got ", shape_of(indices), ", ", shape_of(values));
    call.indices = indices.const_data_ptr();
    call.values = values.const_data_ptr();
    if (!o.log_sum_exp) return;
    log_sum_exp = torch::stable::contiguous(*o.log_sum_exp);
    STD_TORCH_CHECK(
        log_sum_exp->numel() == shape.rows() && log_sum_exp->scalar_type() == kd::kDtype<A>,
        "kd_loss_topk: log_sum_exp: expected one number per row in the accumulation "
        "type, got ",
        torch::headeronly::toString(log_sum_exp->scalar_type()), " ", shape_of(*log_sum_exp));
    call.log_sum_exp = log_sum_exp->const_data_ptr<A>();
  }
  void take(const Tensor& grad_loss, const Tensor& stats) {
    row.take(grad_loss, stats);
    static_cast<kd::Call<A>&>(call) = row.call;
  }
};

}  // namespace vitkd::kd_topk
