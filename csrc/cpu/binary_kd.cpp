// Distillation of classes that are not exclusive, on the CPU: math/binary_kd.h.
// Student, teacher, labels, mask and weights are read once and the gradient is written once, block
// by block: no row has to be seen before its gradient. 3 exponentials and 5 divisions per number.
// Layout: [rows, classes], one after another, cut into parts: rows where there are weights of
// classes or a loss of each row, else of 4096 numbers. Losses are added in registers over a block,
// then in double, part after part in their order: results do not depend on the number of threads.
#include "math/binary_kd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "binding/binary_kd_call.h"
#include "simd/isa.h"
#include "simd/vec.h"
#include "simd/vec_one.h"

namespace vitkd::binary_kd {
namespace {

constexpr int64_t kBlock = 512;  // numbers of an input in L1

template <class A>
struct Kernels {
  void (*run_parts)(const Call<A>&, Pass, int64_t begin, int64_t end);
  void (*sum_weights)(const Call<A>&, int64_t begin, int64_t end);
};

}  // namespace
}  // namespace vitkd::binary_kd

#define VITKD_NAMESPACE vitkd::binary_kd
#define VITKD_KERNELS "cpu/binary_kd.inl"
#include "simd/each_isa.h"

namespace vitkd::binary_kd {
namespace {

template <class A>
Kernels<A> selected_kernels() {
  if constexpr (std::is_same_v<A, double>)
    return float64::kKernels;
  else
    return VITKD_BEST(kKernels, float32::kKernels);
}

template <class A, class F>
void for_parts(const Call<A>& c, F&& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / c.length);
  torch::stable::parallel_for(0, c.count_parts(), grain, f);
}

template <class A>
double sum_of(const Call<A>& c) {
  return std::accumulate(c.parts, c.parts + c.count_parts(), 0.0);
}

// A mean's divisor: the sum of the weights of what is not masked, or 1 where that is 0.
template <class A>
double total_of(const Call<A>& c, const Kernels<A>& kernels) {
  double total = static_cast<double>(c.count);
  if (c.mask) {
    for_parts(c, [&](int64_t begin, int64_t end) { kernels.sum_weights(c, begin, end); });
    total = sum_of(c);
  } else if (c.class_weights) {
    total = std::accumulate(c.class_weights, c.class_weights + c.length, 0.0) *
            static_cast<double>(c.count_parts());
  }
  return total > 0 ? total : 1;
}

// Leaves the loss of each part.
template <class A>
void run(Call<A>& c, const Options& o, Pass pass, std::vector<double>& parts) {
  const Kernels<A> kernels = selected_kernels<A>();
  parts.resize(c.count_parts());
  c.parts = parts.data();
  if (static_cast<Reduction>(o.reduction) == Reduction::kMean) {
    c.scale = static_cast<A>(1 / total_of(c, kernels));
  }
  for_parts(c, [&](int64_t begin, int64_t end) { kernels.run_parts(c, pass, begin, end); });
}

template <class A>
Tensor forward(Call<A>& c, const Options& o, const Tensor& student, Pass pass) {
  std::vector<double> parts;
  run(c, o, pass, parts);
  const bool rows = static_cast<Reduction>(o.reduction) == Reduction::kNone;
  const std::vector<int64_t> shape(rows ? 1 : 0, student.size(0));
  Tensor loss = torch::stable::new_empty(student, shape, kDtype<A>);
  A* const out = loss.template mutable_data_ptr<A>();
  if (rows) {
    std::copy(parts.begin(), parts.end(), out);
  } else {
    *out = static_cast<A>(sum_of(c) * c.scale);
  }
  return loss;
}

template <class A>
Tensor empty_grad(Setup<A>& setup) {
  Tensor grad = kd::empty_gradient(setup.student);
  setup.call.grad = {static_cast<char*>(grad.mutable_data_ptr()), grad.scalar_type(),
                     static_cast<int64_t>(grad.element_size())};
  return grad;
}

Tensor binary_kd_fwd(const Options& options, const Tensor& student, const Tensor& teacher) {
  return visit_accumulator(student, [&]<class A>() {
    Setup<A> setup(options, student, teacher);
    return forward(setup.call, options, student, Pass::kForward);
  });
}

std::tuple<Tensor, Tensor> binary_kd_fwd_grad(const Options& options, const Tensor& student,
                                              const Tensor& teacher) {
  return visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    Setup<A> setup(options, student, teacher);
    Tensor grad = empty_grad(setup);
    Tensor loss = forward(setup.call, options, student, Pass::kForwardGrad);
    return {std::move(loss), std::move(grad)};
  });
}

Tensor binary_kd_bwd(const Options& options, const Tensor& grad_loss, const Tensor& student,
                     const Tensor& teacher) {
  return visit_accumulator(student, [&]<class A>() {
    Setup<A> setup(options, student, teacher);
    setup.take(options, grad_loss);
    Tensor grad = empty_grad(setup);
    std::vector<double> parts;
    run(setup.call, options, Pass::kBackward, parts);
    return grad;
  });
}

}  // namespace
}  // namespace vitkd::binary_kd

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU, m) {
  m.impl("binary_kd_fwd", TORCH_BOX(&vitkd::Flat<&vitkd::binary_kd::binary_kd_fwd>::call));
  m.impl("binary_kd_fwd_grad",
         TORCH_BOX(&vitkd::Flat<&vitkd::binary_kd::binary_kd_fwd_grad>::call));
  m.impl("binary_kd_bwd", TORCH_BOX(&vitkd::Flat<&vitkd::binary_kd::binary_kd_bwd>::call));
}
