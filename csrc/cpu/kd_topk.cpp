// Distillation from a teacher's K classes per row on the CPU: math/kd_topk.h.
// A row of the student is read from memory once, into L1, where the K are taken out: what is left
// has its own maximum and sums, which fill the row with exponentials. The gradient scales those
// into memory (1 read and 1 write in all) and the K are put in, O(K) per row: no dense teacher.
// Rows are spread over torch's threads; losses are added in row order, so results do not depend on
// the number of threads.
#include "math/kd_topk.h"

#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>

#include "binding/kd_topk_call.h"
#include "cpu/row.h"
#include "simd/isa.h"
#include "simd/vec.h"

namespace vitkd::kd_topk {
namespace {

using kd::Pass;

// What comes next in memory: the next row, and where this one's gradient goes.
struct Ahead {
  const char *next, *grad;
  int64_t size;  // bytes of a class
};

// What kd_topk.inl holds, of one instruction set. Rows have padded(n) numbers.
template <class A>
struct Kernels {
  // widens a row; whether a class of it is -inf
  bool (*load)(const void* from, ScalarType dtype, int64_t n, A* to);
  A (*largest)(const A* x, int64_t n);
  void (*exp_all)(A* x, int64_t n);
  // x becomes exp((x - to.max) / T), e_1, unless null, exp(x - to.max); the sums are put into `to`
  void (*exponentials)(A* x, A* e_1, int64_t n, A inv_t, bool with_total, const Ahead& ahead,
                       Part<A>& to);
  // sum p (log p - log q)
  A (*terms)(const A* p, const A* log_p, const A* s, int64_t n, const kd::Stats<A>& st, A inv_t);
  // to = by * e + by_1 * e_1 - shift; e_1 may be null
  void (*gradient)(const A* e, const A* e_1, A* to, int64_t n, A by, A by_1, A shift);
  void (*store)(const A* from, void* to, ScalarType dtype, int64_t n);
};

}  // namespace
}  // namespace vitkd::kd_topk

#define VITKD_NAMESPACE vitkd::kd_topk
#define VITKD_KERNELS "cpu/kd_topk.inl"
#define VITKD_REGISTERS_ONLY
#include "simd/each_isa.h"

namespace vitkd::kd_topk {
namespace {

// One class at a time: float64, and CPUs without AVX2.
template <class A>
struct Scalar : ScalarRow<A> {
  static void exp_all(A* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = std::exp(x[i]);
  }
  static void exponentials(A* x, A* e_1, int64_t n, A inv_t, bool with_total, const Ahead&,
                           Part<A>& to) {
    double sum = 0, sum_1 = 0, total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const A d = x[i] - to.max;
      // what was taken out counts for nothing
      if (with_total && x[i] != -std::numeric_limits<A>::infinity()) total += d;
      sum += x[i] = std::exp(d * inv_t);
      if (e_1) sum_1 += e_1[i] = std::exp(d);
    }
    to.sum = static_cast<A>(sum);
    to.sum_1 = static_cast<A>(sum_1);
    to.total = static_cast<A>(total);
  }
  static A terms(const A* p, const A* log_p, const A* s, int64_t n, const kd::Stats<A>& st,
                 A inv_t) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum += term(p[i], log_p[i], (s[i] - st.max_s) * inv_t - st.log_s);
    }
    return static_cast<A>(sum);
  }
  static void gradient(const A* e, const A* e_1, A* to, int64_t n, A by, A by_1, A shift) {
    for (int64_t i = 0; i < n; ++i) to[i] = by * e[i] + (e_1 ? by_1 * e_1[i] : A{0}) - shift;
  }
  static constexpr Kernels<A> kKernels{Scalar::load, Scalar::largest, exp_all,      exponentials,
                                       terms,        gradient,        Scalar::store};
};

template <class A>
Kernels<A> selected_kernels() {
  if constexpr (std::is_same_v<A, double>)
    return Scalar<A>::kKernels;
  else
    return VITKD_BEST(kKernels, Scalar<A>::kKernels);
}

// A row in the accumulation type, its exponentials at T = 1, and five numbers for each of the K.
template <class A>
struct Scratch {
  Scratch(int64_t classes, int64_t top, bool one)
      : memory(scratch_memory<A>(padded(classes) * (one ? 2 : 1) + 5 * padded(top))),
        x(memory.get()),
        e_1(one ? x + padded(classes) : nullptr),
        s(x + padded(classes) * (one ? 2 : 1)),
        log_p(s + padded(top)),
        p(log_p + padded(top)),
        q(p + padded(top)),
        q_1(q + padded(top)),
        index(top),
        value(top) {
    std::fill(s, s + 5 * padded(top), -std::numeric_limits<A>::infinity());
  }
  std::unique_ptr<A, Free> memory;
  A *x, *e_1, *s, *log_p, *p, *q, *q_1;
  std::vector<int64_t> index;
  std::vector<double> value;
};

// log p and p of the teacher's classes.
template <class A>
Masses<A> teacher(const Call<A>& c, const Kernels<A>& kernels, int64_t row, Scratch<A>& to) {
  if (c.weights.kd == 0) {  // not looked at, not even if it is NaN
    std::fill(to.p, to.p + c.top, A{0});
    std::fill(to.log_p, to.log_p + c.top, -std::numeric_limits<A>::infinity());
    return {1, 0, 0, 0};
  }
  const double inv_t = c.inverse_temperature(row);
  std::vector<double>& value = to.value;
  visit_float(c.value_dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, double>) {
      std::copy_n(static_cast<const T*>(c.values) + row * c.top, c.top, value.data());
    } else {
      kernels.load(static_cast<const T*>(c.values) + row * c.top, c.value_dtype, c.top, to.p);
      std::copy_n(to.p, c.top, value.data());
    }
  });
  double base = c.log_sum_exp ? c.log_sum_exp[row] : 0.0;
  if (c.renormalised()) base = *std::max_element(value.begin(), value.end()) * inv_t;
  for (int64_t k = 0; k < c.top; ++k) {
    to.p[k] = to.log_p[k] = c.log_p(value[k], inv_t, base);
  }
  kernels.exp_all(to.p, c.top);
  const A sum = static_cast<A>(std::accumulate(to.p, to.p + c.top, 0.0));
  const Masses<A> m = masses(c.tail, sum, c.others());
  if (m.by != 1) {
    const A log_by = std::log(m.by);
    for (int64_t k = 0; k < c.top; ++k) {
      to.log_p[k] -= log_by;
      to.p[k] /= m.by;
    }
  }
  return m;
}

template <class A>
void run_rows(const Call<A>& c, const Kernels<A>& kernels, Pass pass, int64_t begin, int64_t end) {
  constexpr A kMasked = -std::numeric_limits<A>::infinity();
  const int64_t classes = c.shape.classes, top = c.top;
  const bool ce = c.weights.ce != 0;
  const bool one = ce && (c.temperature.data || c.temperature.value != 1);
  const bool with_total = c.tail == Tail::kSmooth || (ce && c.weights.smoothing != 0);
  const bool direct = c.student.dtype == kd::kDtype<A>;
  Scratch<A> scratch(classes, top, one);

  for (int64_t row = begin; row < end; ++row) {
    const A share = c.share_of(row);
    const char* const s_row = c.student.at(row, c.shape);
    char* const g_row = pass == Pass::kForward ? nullptr : c.grad.at(row, c.shape);
    if (share == 0) {  // ignored: nothing is read, not even a NaN
      if (pass != Pass::kBackward) c.finish_ignored(row);
      if (g_row) std::memset(g_row, 0, classes * c.student.size);
      continue;
    }
    const A temperature = c.temperature[row];
    const A inv_t = 1 / temperature;
    const kd::Target<A> target = c.target_of(row);

    // 1. the row, of which the teacher's classes are taken out
    const bool masked = kernels.load(s_row, c.student.dtype, classes, scratch.x);
    const auto logit = [&](int64_t i) {
      return visit_float(c.student.dtype, [&]<class S>() {
        return static_cast<A>(reinterpret_cast<const S*>(s_row)[i]);
      });
    };
    c.visit_index(
        [&](auto* indices) { std::copy_n(indices + row * top, top, scratch.index.data()); });
    for (int64_t k = 0; k < top; ++k) {
      scratch.s[k] = std::exchange(scratch.x[scratch.index[k]], kMasked);
    }
    const Masses<A> m = teacher(c, kernels, row, scratch);

    // 2. the others' exponentials, relative to their own maximum
    kd::Stats<A> stats;
    Part<A> others;
    others.count = static_cast<A>(c.others());
    if (pass == Pass::kBackward) {
      stats = c.load_stats(row);
      others.max = stats.max_t;
    } else {
      others.max = kernels.largest(scratch.x, classes);
    }
    const bool infinite =
        masked && with_total && std::count(scratch.x, scratch.x + classes, kMasked) > top;
    const char* const next = row + 1 < end ? c.student.at(row + 1, c.shape) : s_row;
    kernels.exponentials(scratch.x, scratch.e_1, classes, inv_t, with_total,
                         {next, g_row ? g_row : s_row, c.student.size}, others);
    if (infinite) others.total = kMasked;

    // 3. the same of the teacher's classes
    Part<A> own;
    own.count = static_cast<A>(top);
    own.max = kernels.largest(scratch.s, top);
    std::copy_n(scratch.s, padded(top), scratch.q);
    kernels.exponentials(scratch.q, one ? scratch.q_1 : nullptr, top, inv_t, with_total,
                         {s_row, s_row, 0}, own);
    if (masked && std::count(scratch.s, scratch.s + top, kMasked) > 0) own.total = kMasked;

    // 4. the loss
    if (pass != Pass::kBackward) {
      Part<A> all = merge(own, others, inv_t);
      if (!one) all.sum_1 = all.sum;
      stats = stats_of(all, others, ce);
      const A terms = kernels.terms(scratch.p, scratch.log_p, scratch.s, top, stats, inv_t);
      const A logit_a = ce ? logit(target.a) : A{0};
      const A logit_b = ce && target.b != target.a ? logit(target.b) : logit_a;
      c.loss[row] = share * row_loss(c.tail, terms, m, all, others, stats, c.weights, target,
                                     logit_a, logit_b, temperature);
      c.save_stats(row, stats, share);
    }
    if (pass == Pass::kForward) continue;

    // 5. the gradient, the teacher's and the target's classes last
    const kd::GradFactors<A> row_factors =
        kd::grad_factors(share * c.grad_loss[row], c.weights, target.lam, temperature, classes);
    const Factors<A> f = factors(c.tail, row_factors, m, stats, own.max, inv_t);
    A* const g = direct ? reinterpret_cast<A*>(g_row) : scratch.x;
    kernels.gradient(scratch.x, scratch.e_1, g, classes, one ? f.others : f.others + f.others_1,
                     f.others_1, f.shift);
    for (int64_t k = 0; k < top; ++k) {
      const A e_1 = one ? scratch.q_1[k] : scratch.q[k];
      g[scratch.index[k]] = top_gradient(f, scratch.p[k], scratch.q[k], e_1);
    }
    if (ce) {
      g[target.a] -= f.at_a;
      g[target.b] -= f.at_b;
    }
    if (!direct) kernels.store(g, g_row, c.student.dtype, classes);
  }
}

template <class A>
void run(const Call<A>& c, Pass pass) {
  const Kernels<A> kernels = selected_kernels<A>();
  const int64_t grain = std::max<int64_t>(1, 32768 / c.shape.classes);
  torch::stable::parallel_for(0, c.shape.rows(), grain, [&](int64_t begin, int64_t end) {
    run_rows(c, kernels, pass, begin, end);
  });
}

// Bad indices, values, labels and temperatures are found here, before any thread starts. Returns
// the rows' weights, added up.
template <class A>
A checked_total(const Call<A>& c) {
  const int64_t classes = c.shape.classes;
  std::vector<int64_t> seen(classes, -1);  // by which row last
  double total = 0;
  for (int64_t row = 0; row < c.shape.rows(); ++row) {
    if (c.temperature.data) {
      STD_TORCH_CHECK(c.temperature[row] > 0,
                      "kd_loss_topk: temperature: expected a number > 0, got ", c.temperature[row],
                      " for row ", row);
    }
    if (c.ignored(row)) continue;
    for (const int64_t* labels : {c.labels_a, c.labels_b}) {
      STD_TORCH_CHECK(!labels || (labels[row] >= 0 && labels[row] < classes),
                      "kd_loss_topk: labels: expected 0 to ", classes - 1, " or ignore_index ",
                      c.ignore_index, ", got ", labels ? labels[row] : 0, " for row ", row);
    }
    for (int64_t k = 0; k < c.top; ++k) {
      const int64_t i = c.index(row, k);
      STD_TORCH_CHECK(i >= 0 && i < classes, "kd_loss_topk: indices: expected 0 to ", classes - 1,
                      ", got ", i, " for row ", row);
      STD_TORCH_CHECK(std::exchange(seen[i], row) != row,
                      "kd_loss_topk: indices: expected each class once in a row, got ", i,
                      " twice for row ", row);
      if (c.log_sum_exp) continue;
      const double p = c.value(row, k);
      STD_TORCH_CHECK(!(p < 0 || p > 1),
                      "kd_loss_topk: values: expected probabilities, as there is no log_sum_exp, "
                      "got ",
                      p, " for row ", row);
    }
    total += c.row_weight[row];
  }
  return static_cast<A>(total);
}

// The student with classes side by side, copied only where they are not.
struct Logits {
  Tensor student;
  int64_t class_dim;
  RowShape shape;
  RowView view;
  explicit Logits(const Tensor& x)
      : student(x), class_dim(x.dim() - 1), shape(row_shape(x, class_dim)) {
    auto of_x = row_view(student, class_dim);
    if (!of_x || !writable(*of_x)) {
      student = torch::stable::contiguous(student);
      of_x = row_view(student, class_dim);
    }
    view = *of_x;
  }
  static bool writable(const RowView& x) { return x.class_stride == 1; }
  kd::Grad empty_grad(const Tensor& like) const { return {like, class_dim, writable}; }
};

// Runs a forward pass and returns the reduced loss.
template <class A>
Tensor forward(Call<A>& c, const Options& options, const Tensor& student, Pass pass) {
  const A total = checked_total(c);
  const auto reduction = static_cast<Reduction>(options.reduction);
  if (reduction == Reduction::kMean) c.inv_total.value = total == 0 ? 0 : 1 / total;
  Tensor loss = kd::empty_loss<A>(options.of_rows(student.dim() - 1), student);
  A* const out = loss.template mutable_data_ptr<A>();
  if (reduction == Reduction::kNone) {
    c.loss = out;
    run(c, pass);
    return loss;
  }
  std::vector<A> rows(c.shape.rows());
  c.loss = rows.data();
  run(c, pass);
  *out = static_cast<A>(std::accumulate(rows.begin(), rows.end(), 0.0));
  return loss;
}

std::tuple<Tensor, Tensor> kd_topk_fwd(const Options& options, const Tensor& student,
                                       const Tensor& indices, const Tensor& values) {
  return kd::visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    const Logits logits(student);
    Setup<A> setup(options, logits.shape, logits.view, indices, values);
    Tensor stats = kd::empty_stats(setup.call, student);
    setup.call.stats = stats.mutable_data_ptr<A>();
    return {forward(setup.call, options, student, Pass::kForward), std::move(stats)};
  });
}

std::tuple<Tensor, Tensor> kd_topk_fwd_grad(const Options& options, const Tensor& student,
                                            const Tensor& indices, const Tensor& values) {
  return kd::visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    const Logits logits(student);
    kd::Grad grad = logits.empty_grad(student);
    Setup<A> setup(options, logits.shape, logits.view, indices, values);
    setup.call.grad = grad.view;
    Tensor loss = forward(setup.call, options, student, Pass::kForwardGrad);
    return {std::move(loss), grad.take()};
  });
}

Tensor kd_topk_bwd(const Options& options, const Tensor& grad_loss, const Tensor& student,
                   const Tensor& indices, const Tensor& values, const Tensor& stats) {
  return kd::visit_accumulator(student, [&]<class A>() -> Tensor {
    const Logits logits(student);
    kd::Grad grad = logits.empty_grad(student);
    Setup<A> setup(options, logits.shape, logits.view, indices, values);
    setup.take(grad_loss, stats);
    setup.call.grad = grad.view;
    checked_total(setup.call);
    run(setup.call, Pass::kBackward);
    return grad.take();
  });
}

}  // namespace
}  // namespace vitkd::kd_topk

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU, m) {
  m.impl("kd_topk_fwd", TORCH_BOX(&vitkd::Flat<&vitkd::kd_topk::kd_topk_fwd>::call));
  m.impl("kd_topk_fwd_grad", TORCH_BOX(&vitkd::Flat<&vitkd::kd_topk::kd_topk_fwd_grad>::call));
  m.impl("kd_topk_bwd", TORCH_BOX(&vitkd::Flat<&vitkd::kd_topk::kd_topk_bwd>::call));
}
