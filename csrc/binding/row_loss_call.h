// One call of a row loss, as every backend sees it: kd_loss's, and which divergence it is.
#pragma once

#include "binding/kd_call.h"
#include "math/row_loss.h"

namespace vitkd::row_loss {

// The operations' arguments behind their tensors: reference.RowLossOptions.
struct Options {
  using Fields = std::tuple<int64_t, double, double, int64_t, int64_t, OptionalTensor,
                            OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, double,
                            double, double, int64_t, double, double, bool, bool>;
  static constexpr const char* kLoss = "row_loss";
  int64_t divergence;
  double temperature, kd_weight;
  int64_t class_dim, reduction;
  OptionalTensor labels, labels_b, lam_rows, temperature_rows, row_weights;
  double lam, ce_weight, label_smoothing;
  int64_t ignore_index;
  double alpha, beta;
  bool standardize, wants_temperature;
};

// stats, the call's part that saves a forward's sums, is not used: the backward forms them anew.
template <class A>
struct Call : kd::Call<A> {
  Divergence divergence = Divergence::kKl;
  A alpha = 1, beta = 1;
  bool linear = true;  // beta is 1
  bool standardize = false;
  A* d_temperature = nullptr;  // [rows], where it is asked for
  // the sums that are asked for, see row_loss::add
  VITKD_HD bool moments() const { return standardize || d_temperature; }
  VITKD_HD bool has_label() const {
    return divergence == Divergence::kDkd || divergence == Divergence::kOfa;
  }
};

template <class A>
struct Setup {
  kd::Setup<A> rows;
  Call<A> call;
  Setup(const Options& o, const RowShape& shape, const RowView& student, const RowView& teacher)
      : rows(o, shape, student, teacher) {
    static_cast<kd::Call<A>&>(call) = rows.call;
    call.divergence = static_cast<Divergence>(o.divergence);
    call.alpha = static_cast<A>(o.alpha);
    call.beta = static_cast<A>(o.beta);
    call.linear = o.beta == 1;
    call.standardize = o.standardize;
    STD_TORCH_CHECK(o.divergence >= 0 && o.divergence <= static_cast<int64_t>(Divergence::kOfa),
                    "row_loss: divergence: expected 0 to ", static_cast<int64_t>(Divergence::kOfa),
                    ", got ", o.divergence);
    STD_TORCH_CHECK(!call.has_label() || o.labels,
                    "row_loss: labels: expected class ids, as this divergence has a target class, "
                    "got none");
  }

  // the incoming gradient
  void take(const Tensor& grad_loss) {
    rows.take(grad_loss, "row_loss_bwd");
    call.grad_loss = rows.call.grad_loss;
  }
};

// An uninitialised gradient of the rows' temperatures: one number per row where it is asked for,
// else none.
template <class A>
Tensor empty_d_temperature(const Options& o, const Tensor& student) {
  return torch::stable::new_empty(
      student, o.wants_temperature ? rows_shape(student, o.class_dim) : std::vector<int64_t>{0},
      kd::kDtype<A>);
}

}  // namespace vitkd::row_loss
