// One call of kd_loss, as every backend sees it: pointers, strides and options, free of tensors.
#pragma once

#include "binding/common.h"
#include "binding/flat.h"
#include "binding/gradient_memory.h"
#include "math/kd.h"

namespace vitkd::kd {

enum class Pass { kForward, kForwardGrad, kBackward };

// The operations' arguments behind their tensors: reference.KDOptions.
struct Options {
  using Fields =
      std::tuple<double, double, int64_t, int64_t, OptionalTensor, OptionalTensor, OptionalTensor,
                 OptionalTensor, OptionalTensor, double, double, double, int64_t>;
  static constexpr const char* kLoss = "kd_loss";  // in errors
  double temperature, kd_weight;
  int64_t class_dim, reduction;
  OptionalTensor labels, labels_b, lam_rows, temperature_rows, row_weights;
  double lam, ce_weight, label_smoothing;
  int64_t ignore_index;
};

template <class A>
struct Call {
  RowShape shape;
  RowView student, teacher, grad;
  Weights<A> weights;
  PerRow<A> temperature, lam, row_weight, grad_loss;
  PerRow<A> inv_total;  // 1 / (sum of the row weights) where the mean is asked for, else 1
  const int64_t *labels_a = nullptr, *labels_b = nullptr;
  int64_t ignore_index = 0;
  A* loss = nullptr;         // [rows], each times its share
  A* stats = nullptr;        // [6, rows]: the five of Stats, then the row's share
  bool saved_share = false;  // read the share from stats

  VITKD_HD bool ignored(int64_t row) const {
    return (labels_a && labels_a[row] == ignore_index) ||
           (labels_b && labels_b[row] == ignore_index);
  }
  VITKD_HD A share_of(int64_t row) const {
    if (saved_share) return stats[5 * shape.rows() + row];
    return ignored(row) ? A{0} : row_weight[row] * inv_total[row];
  }
  VITKD_HD Target<A> target_of(int64_t row) const {
    if (!labels_a) return {};
    if (!labels_b) return {labels_a[row], labels_a[row], 1};
    return {labels_a[row], labels_b[row], lam[row]};
  }
  VITKD_HD bool in_range(const Target<A>& target) const {
    return target.a >= 0 && target.a < shape.classes && target.b >= 0 && target.b < shape.classes;
  }
  VITKD_HD Stats<A> load_stats(int64_t row) const {
    const A* p = stats + row;
    const int64_t n = shape.rows();
    return {p[0], p[n], p[2 * n], p[3 * n], p[4 * n]};
  }
  VITKD_HD void save_stats(int64_t row, const Stats<A>& x, A share) const {
    if (!stats) return;
    const A values[] = {x.max_s, x.max_t, x.log_s, x.log_t, x.log_1, share};
    for (int i = 0; i < 6; ++i) stats[i * shape.rows() + row] = values[i];
  }
  // what a forward leaves of a row that is ignored
  VITKD_HD void finish_ignored(int64_t row) const {
    loss[row] = 0;
    save_stats(row, {}, 0);
  }
  // what it leaves of any other; `logit(i)` is the student's logit of class i
  template <class F>
  VITKD_HD void finish_row(int64_t row, const Sums<A>& sums, const Stats<A>& st,
                           const Target<A>& target, A t, A share, F&& logit) const {
    const bool ce = weights.ce != 0;
    const A logit_a = ce ? logit(target.a) : A{0};
    const A logit_b = ce && target.b != target.a ? logit(target.b) : logit_a;
    loss[row] = share * row_loss(sums, st, weights, target, logit_a, logit_b, t);
    save_stats(row, st, share);
  }
};

// The accumulation type: float64 for float64, else float32.
template <class F>
auto visit_accumulator(const Tensor& student, F&& f) {
  if (student.scalar_type() == ScalarType::Double) return f.template operator()<double>();
  return f.template operator()<float>();
}

template <class A>
constexpr ScalarType kDtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// Fills a call from the operation's arguments, and holds the tensors that it points into. O: the
// options of this or of another loss of rows, which has these and more.
template <class A>
struct Setup {
  PerRowHolder<A> temperature, lam, row_weights, grad_loss{std::nullopt, 1};
  OptionalTensor labels_a, labels_b, stats;
  Call<A> call;
  template <class O>
  Setup(const O& o, const RowShape& shape, const RowView& student, const RowView& teacher)
      : temperature(o.temperature_rows, static_cast<A>(o.temperature)),
        lam(o.lam_rows, static_cast<A>(o.lam)),
        row_weights(o.row_weights, 1),
        labels_a(o.labels),
        labels_b(o.labels_b) {
    call.shape = shape;
    call.student = student;
    // a teacher without weight is not looked at, not even if it is NaN
    call.teacher = o.kd_weight == 0 ? student : teacher;
    call.weights = {static_cast<A>(o.kd_weight), static_cast<A>(o.ce_weight),
                    static_cast<A>(o.label_smoothing)};
    call.temperature = temperature.get;
    call.lam = lam.get;
    call.row_weight = row_weights.get;
    call.grad_loss = grad_loss.get;
    call.inv_total.value = 1;
    call.labels_a = labels_ptr(labels_a);
    call.labels_b = labels_ptr(labels_b);
    call.ignore_index = o.ignore_index;
    STD_TORCH_CHECK(o.ce_weight == 0 || o.labels, O::kLoss,
                    ": labels: expected class ids, as ce_weight is ", o.ce_weight, ", got none");
  }

  void take(const Tensor& grad_loss_in, const char* operation) {
    const int64_t rows = call.shape.rows(), given = grad_loss_in.numel();
    STD_TORCH_CHECK(given == 1 || given == rows, operation, ": grad_loss: expected 1 or ", rows,
                    " numbers, got ", given);
    grad_loss = PerRowHolder<A>(grad_loss_in, 0);
    call.grad_loss = grad_loss.get;
  }

  // what the forward saved, the row's share among it, and the incoming gradient
  void take(const Tensor& grad_loss_in, const Tensor& stats_in) {
    take(grad_loss_in, "kd_bwd");
    const int64_t rows = call.shape.rows();
    STD_TORCH_CHECK(stats_in.numel() == 6 * rows && stats_in.scalar_type() == kDtype<A>,
                    "kd_bwd: stats: expected 6 numbers for each of ", rows,
                    " rows in the accumulation type, got ",
                    torch::headeronly::toString(stats_in.scalar_type()), " ", shape_of(stats_in));
    stats = torch::stable::contiguous(stats_in);
    call.stats = const_cast<A*>(stats->const_data_ptr<A>());
    call.saved_share = true;
  }
};

// An uninitialised loss: one number per row, or one in all.
template <class A, class O>
Tensor empty_loss(const O& o, const Tensor& student) {
  const bool rows = static_cast<Reduction>(o.reduction) == Reduction::kNone;
  return torch::stable::new_empty(
      student, rows ? rows_shape(student, o.class_dim) : std::vector<int64_t>{}, kDtype<A>);
}

template <class A>
Tensor empty_stats(const Call<A>& call, const Tensor& like) {
  return torch::stable::new_empty(like, std::vector<int64_t>{6, call.shape.rows()}, kDtype<A>);
}

inline Tensor empty_gradient(const Tensor& student) {
  // empty_like looks the operator up by name, which small calls would notice
  if (!student.is_contiguous()) return torch::stable::empty_like(student);
  const int64_t bytes = student.numel() * static_cast<int64_t>(student.element_size());
  if (student.is_cpu() && bytes >= GradientMemory::kSmallest && bytes < GradientMemory::kLargest) {
    return GradientMemory::empty({student.sizes().begin(), student.sizes().end()},
                                 student.scalar_type(), bytes);
  }
  return torch::stable::new_empty(student, student.sizes());
}

// The gradient, with the strides of empty_like(student), which is what the fake promises. A kernel
// that cannot write those (`writable`) fills a contiguous tensor first.
struct Grad {
  Tensor tensor;
  RowView view;
  OptionalTensor promised;
  template <class F>
  Grad(const Tensor& student, int64_t class_dim, F&& writable) : tensor(empty_gradient(student)) {
    auto like_student = row_view(tensor, class_dim);
    if (!like_student || !writable(*like_student)) {
      promised = std::exchange(tensor, torch::stable::new_empty(student, student.sizes()));
      like_student = row_view(tensor, class_dim);
    }
    view = *like_student;
  }
  Tensor take() {
    if (!promised) return std::move(tensor);
    torch::stable::copy_(*promised, tensor);
    return *promised;
  }
};

template <class A>
void check_factor(const Tensor& factor) {
  STD_TORCH_CHECK(factor.numel() == 1 && factor.scalar_type() == kDtype<A>,
                  "kd_scale_: factor: expected one number in the accumulation type of grad, got ",
                  torch::headeronly::toString(factor.scalar_type()), " ", shape_of(factor));
}

}  // namespace vitkd::kd
