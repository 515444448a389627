// Distillation loss on the CPU, row by row:
//   loss = kd_weight * T^2 * KL(softmax(t/T) || softmax(s/T)) + ce_weight * CE(s, y)
// A row of student and teacher is read from memory once; its exponentials stay in L1 or L2 until
// its gradient is written (2 reads and 1 write in all). Layout: logits as [outer, classes, inner].
// Rows are spread over torch's threads; losses are added in row order, so results do not depend on
// the number of threads.
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "binding/kd_call.h"
#include "cpu/rows.h"
#include "simd/isa.h"
#include "simd/vec.h"

namespace vitkd::kd {
namespace {

using rows::kMaxKept, rows::Layout, rows::Logits, rows::empty_grad;

// The student's logits of a row, by class: for the labels.
template <class A>
auto logits_of(const Call<A>& c, int64_t row) {
  return [&c, p = c.student.at(row, c.shape)](int64_t i) {
    return visit_float(c.student.dtype, [&]<class S>() {
      return static_cast<A>(reinterpret_cast<const S*>(p)[i * c.student.class_stride]);
    });
  };
}

// Any strides, one class at a time, with the functions that the device runs: float64, and CPUs
// without AVX2.
template <class A, class S, class T>
void run_scalar(const Call<A>& c, Pass pass, int64_t begin, int64_t end) {
  const bool ce = c.weights.ce != 0;
  const int64_t classes = c.shape.classes;
  for (int64_t row = begin; row < end; ++row) {
    const S* s = reinterpret_cast<const S*>(c.student.at(row, c.shape));
    const T* t = reinterpret_cast<const T*>(c.teacher.at(row, c.shape));
    S* g = pass == Pass::kForward ? nullptr : reinterpret_cast<S*>(c.grad.at(row, c.shape));
    const auto student = [&](int64_t i) { return static_cast<A>(s[i * c.student.class_stride]); };
    const auto teacher = [&](int64_t i) { return static_cast<A>(t[i * c.teacher.class_stride]); };
    const A share = c.share_of(row);
    if (share == 0) {
      if (pass != Pass::kBackward) c.finish_ignored(row);
      for (int64_t i = 0; g && i < classes; ++i) g[i * c.grad.class_stride] = S(0.0f);
      continue;
    }
    const A temperature = c.temperature[row];
    const A inv_t = 1 / temperature;
    const Exp<A> exp{inv_t};
    const Target<A> target = c.target_of(row);
    Stats<A> stats;
    if (pass == Pass::kBackward) {
      stats = c.load_stats(row);
    } else {
      Sums<A> sums;
      for (int64_t i = 0; i < classes; ++i) {
        sums.max_s = std::max(sums.max_s, student(i));
        sums.max_t = std::max(sums.max_t, teacher(i));
      }
      // in blocks: one long chain of additions would lose digits
      for (int64_t from = 0; from < classes; from += 16) {
        Sums<A> part;
        part.max_s = sums.max_s;
        part.max_t = sums.max_t;
        for (int64_t i = from; i < std::min(from + 16, classes); ++i) {
          ce ? add_class<true>(part, student(i), teacher(i), exp)
             : add_class<false>(part, student(i), teacher(i), exp);
          part.count += 1;
        }
        sums = merge(sums, part, inv_t);
      }
      stats = stats_of(sums, ce);
      c.finish_row(row, sums, stats, target, temperature, share, student);
    }
    if (!g) continue;
    const GradFactors<A> f =
        grad_factors(share * c.grad_loss[row], c.weights, target.lam, temperature, classes);
    for (int64_t i = 0; i < classes; ++i) {
      A x = ce ? grad_class<true>(f, stats, student(i), teacher(i), exp)
               : grad_class<false>(f, stats, student(i), teacher(i), exp);
      if (ce && i == target.a) x -= f.at_a;
      if (ce && i == target.b) x -= f.at_b;
      g[i * c.grad.class_stride] = static_cast<S>(x);
    }
  }
}

template <class A>
void scalar_rows(const Call<A>& c, Pass pass, int64_t begin, int64_t end) {
  visit_float(c.student.dtype, [&]<class S>() {
    visit_float(c.teacher.dtype, [&]<class T>() {
      // functional/kd.py widens the other side where one is float64
      constexpr bool kWide = std::is_same_v<S, double> && std::is_same_v<T, double>;
      constexpr bool kNarrow = !std::is_same_v<S, double> && !std::is_same_v<T, double>;
      if constexpr (std::is_same_v<A, double> ? kWide : kNarrow) {
        run_scalar<A, S, T>(c, pass, begin, end);
      }
    });
  });
}

}  // namespace
}  // namespace vitkd::kd

#define VITKD_NAMESPACE vitkd::kd
#define VITKD_KERNELS "cpu/kd.inl"
#define VITKD_REGISTERS_ONLY
#include "simd/each_isa.h"

namespace vitkd::kd {
namespace {

template <class A>
void run(const Call<A>& c, Layout layout, Pass pass) {
  rows::run(c, layout, pass, [](Layout layout) {
    const rows::Kernel<Call<A>> scalar{scalar_rows<A>};
    if constexpr (std::is_same_v<A, float>) {
      if (layout == Layout::kRows) return VITKD_BEST(kRows, scalar);
      if (layout == Layout::kColumns) return VITKD_BEST(kColumns, scalar);
    }
    return scalar;
  });
}

template <class A>
Tensor forward(Call<A>& c, Layout layout, const Options& options, const Tensor& student,
               Pass pass) {
  return rows::forward(c, options, student, [&] { run(c, layout, pass); });
}

std::tuple<Tensor, Tensor> kd_fwd(const Options& options, const Tensor& student,
                                  const Tensor& teacher) {
  return visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    const Logits logits(student, teacher, options.class_dim);
    Setup<A> setup(options, logits.shape, logits.s, logits.t);
    Tensor stats = empty_stats(setup.call, student);
    setup.call.stats = stats.mutable_data_ptr<A>();
    return {forward(setup.call, logits.layout, options, student, Pass::kForward), std::move(stats)};
  });
}

std::tuple<Tensor, Tensor> kd_fwd_grad(const Options& options, const Tensor& student,
                                       const Tensor& teacher) {
  return visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    Logits logits(student, teacher, options.class_dim);
    Grad grad = empty_grad(logits, student);
    Setup<A> setup(options, logits.shape, logits.s, logits.t);
    setup.call.grad = grad.view;
    Tensor loss = forward(setup.call, logits.layout, options, student, Pass::kForwardGrad);
    return {std::move(loss), grad.take()};
  });
}

Tensor kd_bwd(const Options& options, const Tensor& grad_loss, const Tensor& student,
              const Tensor& teacher, const Tensor& stats) {
  return visit_accumulator(student, [&]<class A>() -> Tensor {
    Logits logits(student, teacher, options.class_dim);
    Grad grad = empty_grad(logits, student);
    Setup<A> setup(options, logits.shape, logits.s, logits.t);
    setup.take(grad_loss, stats);
    setup.call.grad = grad.view;
    run(setup.call, logits.layout, Pass::kBackward);
    return grad.take();
  });
}

// grad *= factor, in place; a factor of 1, as after loss.backward(), leaves memory untouched.
void kd_scale_(const Tensor& grad, const Tensor& factor) {
  visit_accumulator(grad, [&]<class A>() {
    check_factor<A>(factor);
    const A by = *factor.const_data_ptr<A>();
    if (by == 1) return;
    in_place(grad, [&](const Tensor& x) {
      visit_float(x.scalar_type(), [&]<class T>() {
        T* const p = x.mutable_data_ptr<T>();
        torch::stable::parallel_for(0, x.numel(), 65536, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) p[i] = static_cast<T>(static_cast<A>(p[i]) * by);
        });
      });
    });
  });
}

}  // namespace
}  // namespace vitkd::kd

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU, m) {
  m.impl("kd_fwd", TORCH_BOX(&vitkd::Flat<&vitkd::kd::kd_fwd>::call));
  m.impl("kd_fwd_grad", TORCH_BOX(&vitkd::Flat<&vitkd::kd::kd_fwd_grad>::call));
  m.impl("kd_bwd", TORCH_BOX(&vitkd::Flat<&vitkd::kd::kd_bwd>::call));
  m.impl("kd_scale_", TORCH_BOX(&vitkd::kd::kd_scale_));
}
