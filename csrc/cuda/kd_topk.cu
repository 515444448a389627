// Distillation from a teacher's K classes per row on the GPU: math/kd_topk.h.
// A block takes a row of the student. It marks the teacher's classes in a bitmap in shared memory,
// a segment of the row at a time, and reads the row once for online sums of the others; the K have
// theirs. A second sweep, which finds the row in L1 or L2, writes the others' gradient, and the K
// are filled in: 1 read and 1 write of device memory, and O(K) beside. Everything is added up in a
// fixed order: no atomics on numbers, so results are bitwise the same every time.
#undef NDEBUG  // the assertions on classes and labels stay in release builds
#include <cassert>

#include "binding/kd_topk_call.h"
#include "cuda/rows.cuh"

namespace vitkd::kd_topk {
namespace {

using kd::Pass;

constexpr int kSegment = 65536;  // classes whose marks are in shared memory: 8 KB
constexpr int kWords = kSegment / 32;

// The parts of all threads of the block, given to each of them.
template <class A>
__device__ Part<A> merge_block(Part<A> x, A inv_t) {
  A top[1] = {x.max};
  kd::join<false, kd::Larger>(top, blockDim.x);
  x = rebase(x, top[0], inv_t);
  A sums[4] = {x.sum, x.sum_1, x.total, x.count};
  kd::join<false, kd::Plus>(sums, blockDim.x);
  return {top[0], sums[0], sums[1], sums[2], sums[3]};
}

template <class A>
__device__ A sum_block(A x) {
  A sum[1] = {x};
  kd::join<false, kd::Plus>(sum, blockDim.x);
  return sum[0];
}

// One class more; the maximum may rise.
template <class A>
__device__ void add(Part<A>& x, A s, A inv_t, bool one) {
  if (s > x.max) x = rebase(x, s, inv_t);
  const A d = s - x.max;
  x.sum += std::exp(d * inv_t);
  if (one) x.sum_1 += std::exp(d);
  x.total += d;
  x.count += 1;
}

// The teacher of a row, as each thread of its block sees it.
template <class A>
struct Teacher {
  double inv_t, base;
  A log_by;
  Masses<A> m;
};

template <class A>
__device__ Teacher<A> teacher_of(const Call<A>& c, int64_t row) {
  Teacher<A> t{c.inverse_temperature(row), 0, 0, {1, 0, 0, 0}};
  if (c.weights.kd == 0) return t;  // not looked at, not even if it is NaN
  if (c.log_sum_exp) {
    t.base = static_cast<double>(c.log_sum_exp[row]);
    if (c.renormalised()) {
      t.base = c.value(row, 0) * t.inv_t;
      for (int64_t k = 1; k < c.top; ++k) t.base = fmax(t.base, c.value(row, k) * t.inv_t);
    }
  }
  A sum = 0;
  for (int64_t k = threadIdx.x; k < c.top; k += blockDim.x) {
    sum += std::exp(c.log_p(c.value(row, k), t.inv_t, t.base));
  }
  t.m = masses(c.tail, sum_block(sum), c.others());
  if (t.m.by != 1) t.log_by = std::log(t.m.by);
  return t;
}

template <class A, class S, Pass kPass>
__global__ void __launch_bounds__(256, 1) kd_topk_kernel(const __grid_constant__ Call<A> c) {
  __shared__ unsigned marks[kWords];
  const int64_t row = blockIdx.x, classes = c.shape.classes;
  const S* const s_row = reinterpret_cast<const S*>(c.student.at(row, c.shape));
  S* const g_row =
      kPass == Pass::kForward ? nullptr : reinterpret_cast<S*>(c.grad.at(row, c.shape));
  const auto student = [&](int64_t i) { return static_cast<A>(s_row[i]); };

  // 1. an ignored row is not read, not even a NaN
  const A share = c.share_of(row);
  if (share == 0) {
    if (kPass != Pass::kBackward && threadIdx.x == 0) c.finish_ignored(row);
    if (kPass != Pass::kForward) {
      for (int64_t i = threadIdx.x; i < classes; i += blockDim.x) g_row[i] = S(0.0f);
    }
    return;
  }
  const bool ce = c.weights.ce != 0;
  const kd::Target<A> target = c.target_of(row);
  if (c.labels_a) assert(c.in_range(target) && "vitkd_fast kd_loss_topk: a label is out of range");
  A temperature = c.temperature[row];
  // one <= 0 cannot be reported from here: its row becomes NaN
  if (!(temperature > 0)) temperature = std::numeric_limits<A>::quiet_NaN();
  const A inv_t = 1 / temperature;
  const Teacher<A> t = teacher_of(c, row);
  const auto log_p = [&](int64_t k) {
    return c.log_p(c.value(row, k), t.inv_t, t.base) - t.log_by;
  };

  // 2. the teacher's classes and the others
  Part<A> own, others;
  for (int64_t k = threadIdx.x; k < c.top; k += blockDim.x) {
    const int64_t i = c.index(row, k);
    assert(i >= 0 && i < classes && "vitkd_fast kd_loss_topk: a class is out of range");
    add(own, student(i), inv_t, ce);
  }
  own = merge_block(own, inv_t);
  kd::Stats<A> stats;
  if constexpr (kPass == Pass::kBackward) {
    stats = c.load_stats(row);
  } else {
    for (int64_t from = 0; from < classes; from += kSegment) {
      const int64_t to = min(from + kSegment, classes);
      const int words = static_cast<int>((to - from + 31) / 32);
      __syncthreads();  // of the marks before
      for (int i = threadIdx.x; i < words; i += blockDim.x) marks[i] = 0;
      __syncthreads();
      for (int64_t k = threadIdx.x; k < c.top; k += blockDim.x) {
        const int64_t i = c.index(row, k) - from;
        if (i >= 0 && i < to - from) atomicOr(marks + i / 32, 1u << (i % 32));
      }
      __syncthreads();
#pragma unroll 4
      for (int64_t i = from + threadIdx.x; i < to; i += blockDim.x) {
        const A s = student(i);
        if (!(marks[(i - from) / 32] >> ((i - from) % 32) & 1)) add(others, s, inv_t, ce);
      }
    }
    others = merge_block(others, inv_t);
    const Part<A> all = merge(own, others, inv_t);
    stats = stats_of(all, others, ce);

    // 3. the loss
    A terms = 0;
    for (int64_t k = threadIdx.x; c.weights.kd != 0 && k < c.top; k += blockDim.x) {
      const A log_t = log_p(k);
      const A log_q = (student(c.index(row, k)) - stats.max_s) * inv_t - stats.log_s;
      terms += term(std::exp(log_t), log_t, log_q);
    }
    terms = sum_block(terms);
    if (threadIdx.x == 0) {
      const A logit_a = ce ? student(target.a) : A{0};
      const A logit_b = ce && target.b != target.a ? student(target.b) : logit_a;
      c.loss[row] = share * row_loss(c.tail, terms, t.m, all, others, stats, c.weights, target,
                                     logit_a, logit_b, temperature);
      c.save_stats(row, stats, share);
    }
  }

  // 4. the gradient, of all classes as others; then, the teacher's
  if constexpr (kPass != Pass::kForward) {
    const kd::GradFactors<A> row_factors =
        kd::grad_factors(share * c.grad_loss[row], c.weights, target.lam, temperature, classes);
    const Factors<A> f = factors(c.tail, row_factors, t.m, stats, own.max, inv_t);
    const auto at_target = [&](int64_t i) {
      return ce ? (i == target.a ? f.at_a : A{0}) + (i == target.b ? f.at_b : A{0}) : A{0};
    };
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < classes; i += blockDim.x) {
      const A d = student(i) - stats.max_t;
      A g = f.others * std::exp(d * inv_t) - f.shift;
      if (ce) g += f.others_1 * std::exp(d) - at_target(i);
      g_row[i] = static_cast<S>(g);
    }
    __syncthreads();  // before the same places are written again
    for (int64_t k = threadIdx.x; k < c.top; k += blockDim.x) {
      const int64_t i = c.index(row, k);
      const A d = student(i) - own.max;
      const A p = c.weights.kd == 0 ? A{0} : std::exp(log_p(k));
      g_row[i] = static_cast<S>(top_gradient(f, p, std::exp(d * inv_t), ce ? std::exp(d) : A{0}) -
                                at_target(i));
    }
  }
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

template <class A>
void run(const Call<A>& c, Pass pass, cudaStream_t stream) {
  if (c.shape.rows() == 0) return;
  visit_float(c.student.dtype, [&]<class S>() {
    if constexpr (std::is_same_v<S, double> == std::is_same_v<A, double>) {
      auto* const kernel = pass == Pass::kForward    ? kd_topk_kernel<A, S, Pass::kForward>
                           : pass == Pass::kBackward ? kd_topk_kernel<A, S, Pass::kBackward>
                                                     : kd_topk_kernel<A, S, Pass::kForwardGrad>;
      const int64_t classes = c.shape.classes;
      const unsigned threads = classes <= 256 ? 32 : classes <= 2048 ? 128 : 256;
      const auto rows = static_cast<unsigned>(c.shape.rows());
      kernel<<<rows, threads, 0, stream>>>(c);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
}

// Runs a forward pass and returns the reduced loss.
template <class A>
Tensor forward(Call<A>& c, const Options& options, const Tensor& student, Pass pass) {
  const auto reduction = static_cast<Reduction>(options.reduction);
  Tensor loss = kd::empty_loss<A>(options.of_rows(student.dim() - 1), student);
  A* const out = loss.template mutable_data_ptr<A>();
  const int64_t n = c.shape.rows();
  Tensor inv_total, rows;
  if (reduction == Reduction::kMean) inv_total = kd::take_mean<A>(c, student);
  c.loss = out;
  if (reduction != Reduction::kNone) {
    rows = torch::stable::new_empty(student, {n}, kd::kDtype<A>);
    c.loss = rows.template mutable_data_ptr<A>();
  }
  run(c, pass, current_stream(student));
  if (reduction != Reduction::kNone) sum_of(Numbers<A>{c.loss}, n, out, student);
  return loss;
}

std::tuple<Tensor, Tensor> kd_topk_fwd(const Options& options, const Tensor& student,
                                       const Tensor& indices, const Tensor& values) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
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
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
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
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  return kd::visit_accumulator(student, [&]<class A>() -> Tensor {
    const Logits logits(student);
    kd::Grad grad = logits.empty_grad(student);
    Setup<A> setup(options, logits.shape, logits.view, indices, values);
    setup.take(grad_loss, stats);
    setup.call.grad = grad.view;
    run(setup.call, Pass::kBackward, current_stream(student));
    return grad.take();
  });
}

}  // namespace
}  // namespace vitkd::kd_topk

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA, m) {
  m.impl("kd_topk_fwd", TORCH_BOX(&vitkd::Flat<&vitkd::kd_topk::kd_topk_fwd>::call));
  m.impl("kd_topk_fwd_grad", TORCH_BOX(&vitkd::Flat<&vitkd::kd_topk::kd_topk_fwd_grad>::call));
  m.impl("kd_topk_bwd", TORCH_BOX(&vitkd::Flat<&vitkd::kd_topk::kd_topk_bwd>::call));
}
