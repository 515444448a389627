// Losses of rows of logits on the CPU: divergences of softmaxes, and the cross-entropy.
//   loss = kd_weight * T^2 * divergence(softmax(t/T), softmax(s/T)) + ce_weight * CE(s, y)
// A row of student and teacher is read from memory once, and its gradient written: what the sweeps
// of math/row_loss.h leave for one another stays in L1 or L2. The backward forms all anew, so that
// nothing is saved for it. Layout, threads and the order of sums: cpu/rows.h.
#include "math/row_loss.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "binding/row_loss_call.h"
#include "cpu/rows.h"
#include "simd/isa.h"
#include "simd/vec.h"
#include "simd/vec_one.h"

namespace vitkd::row_loss {
using rows::Pass;
}

#define VITKD_NAMESPACE vitkd::row_loss
#define VITKD_KERNELS "cpu/row_loss.inl"
#include "simd/each_isa.h"

namespace vitkd::row_loss {
namespace {

using rows::Layout, rows::Logits;

template <class A>
void run(const Call<A>& c, Layout layout, Pass pass) {
  rows::run(c, layout, pass, [](Layout layout) -> rows::Kernel<Call<A>> {
    if constexpr (std::is_same_v<A, double>)
      return float64::kRows;
    else
      return layout == Layout::kRows ? VITKD_BEST(kRows, float32::kRows)
                                     : VITKD_BEST(kColumns, float32::kRows);
  });
}

Tensor row_loss_fwd(const Options& options, const Tensor& student, const Tensor& teacher) {
  return kd::visit_accumulator(student, [&]<class A>() {
    const Logits logits(student, teacher, options.class_dim);
    Setup<A> setup(options, logits.shape, logits.s, logits.t);
    Call<A>& c = setup.call;
    return rows::forward(c, options, student, [&] { run(c, logits.layout, Pass::kForward); });
  });
}

std::tuple<Tensor, Tensor, Tensor> row_loss_fwd_grad(const Options& options, const Tensor& student,
                                                     const Tensor& teacher) {
  return kd::visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor, Tensor> {
    Logits logits(student, teacher, options.class_dim);
    kd::Grad grad = rows::empty_grad(logits, student);
    Tensor d_temperature = empty_d_temperature<A>(options, student);
    Setup<A> setup(options, logits.shape, logits.s, logits.t);
    Call<A>& c = setup.call;
    c.grad = grad.view;
    if (options.wants_temperature) c.d_temperature = d_temperature.mutable_data_ptr<A>();
    Tensor loss =
        rows::forward(c, options, student, [&] { run(c, logits.layout, Pass::kForwardGrad); });
    return {std::move(loss), grad.take(), std::move(d_temperature)};
  });
}

std::tuple<Tensor, Tensor> row_loss_bwd(const Options& options, const Tensor& grad_loss,
                                        const Tensor& student, const Tensor& teacher) {
  return kd::visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    Logits logits(student, teacher, options.class_dim);
    kd::Grad grad = rows::empty_grad(logits, student);
    Tensor d_temperature = empty_d_temperature<A>(options, student);
    Setup<A> setup(options, logits.shape, logits.s, logits.t);
    setup.take(grad_loss);
    Call<A>& c = setup.call;
    c.grad = grad.view;
    if (options.wants_temperature) c.d_temperature = d_temperature.mutable_data_ptr<A>();
    rows::take_total(c, options);
    run(c, logits.layout, Pass::kBackward);
    return {grad.take(), std::move(d_temperature)};
  });
}

}  // namespace
}  // namespace vitkd::row_loss

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU, m) {
  m.impl("row_loss_fwd", TORCH_BOX(&vitkd::Flat<&vitkd::row_loss::row_loss_fwd>::call));
  m.impl("row_loss_fwd_grad", TORCH_BOX(&vitkd::Flat<&vitkd::row_loss::row_loss_fwd_grad>::call));
  m.impl("row_loss_bwd", TORCH_BOX(&vitkd::Flat<&vitkd::row_loss::row_loss_bwd>::call));
}
