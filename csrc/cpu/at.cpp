// Attention transfer on the CPU, sample by sample:
//   q = sum over channels of |F|^p;  loss = || q_s/||q_s|| - q_t/||q_t|| ||^2
//   dloss/dF = p |F|^(p-1) sign(F) dloss/dq,  dloss/dq = 2/||q_s|| (a - u (u . a)), a = u - v
// u and v being the maps of length 1. The teacher's sample is read once; the student's too, and is
// in L2 when its gradient is written: 2 reads and 1 write in all. Layout: features as [batch,
// channels, positions], either of the last two side by side. Samples are spread over torch's
// threads, and each is worked on by one, so results do not depend on the number of threads.
#include <cmath>
#include <cstring>

#include "binding/at_call.h"
#include "cpu/row.h"
#include "simd/isa.h"
#include "simd/vec.h"
#include "simd/vec_one.h"

namespace vitkd::at {
namespace {

constexpr int64_t kBlock = 1024;  // positions whose sums stay in registers

inline double length_of(double squares) { return std::max(std::sqrt(squares), 1e-12); }

// What at.inl holds, of one instruction set. Maps have padded(n) numbers, zeros behind n.
template <class A>
struct Kernels {
  void (*energy)(const View& v, const char* sample, int64_t channels, int64_t n, int64_t p, A* q);
  // the loss; q_s becomes its derivative times by, unless that is 0, and q_t is used up
  A (*distance)(A* q_s, A* q_t, int64_t n, A by);
  void (*gradient)(const View& v, const char* sample, const View& g, char* to, int64_t channels,
                   int64_t n, int64_t p, const A* w);
};

}  // namespace
}  // namespace vitkd::at

#define VITKD_NAMESPACE vitkd::at
#define VITKD_KERNELS "cpu/at.inl"
#include "simd/each_isa.h"

namespace vitkd::at {
namespace {

template <class A>
Kernels<A> selected_kernels() {
  if constexpr (std::is_same_v<A, double>)
    return float64::kKernels;
  else
    return VITKD_BEST(kKernels, float32::kKernels);
}

template <class A>
void run(const Call& c, A* loss, int64_t begin, int64_t end) {
  const Kernels<A> kernels = selected_kernels<A>();
  const int64_t n = c.positions, width = padded(n);
  const auto memory = scratch_memory<A>(2 * width);
  A *const q_s = memory.get(), *const q_t = q_s + width;
  const A by = c.grad.data ? static_cast<A>(c.p * c.scale) : A{0};
  for (int64_t i = begin; i < end; ++i) {
    if (c.is_map) {
      const A* const map = reinterpret_cast<const A*>(c.teacher.at(i));
      std::fill(std::copy_n(map, n, q_t), q_t + width, A{0});
    } else {
      kernels.energy(c.teacher, c.teacher.at(i), c.t_channels, n, c.p, q_t);
    }
    const char* const student = c.student.at(i);
    kernels.energy(c.student, student, c.s_channels, n, c.p, q_s);
    loss[i] = kernels.distance(q_s, q_t, n, by);
    if (!c.grad.data) continue;
    kernels.gradient(c.student, student, c.grad, c.grad.at(i), c.s_channels, n, c.p, q_s);
  }
}

std::tuple<Tensor, Tensor> at_fwd_grad(const Tensor& f_s, const Tensor& f_t, int64_t p,
                                       int64_t reduction, bool wants_grad) {
  return kd::visit_accumulator(f_s, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    const auto reduce = static_cast<Reduction>(reduction);
    Setup<A> setup(f_s, f_t, p, reduce, wants_grad);
    const Call& c = setup.call;
    features::Losses<A> losses(f_s, reduce, c.batch);
    const int64_t numbers = c.positions * (c.s_channels + c.t_channels);
    const int64_t grain = std::max<int64_t>(1, 32768 / numbers);
    torch::stable::parallel_for(
        0, c.batch, grain, [&](int64_t begin, int64_t end) { run<A>(c, losses.rows, begin, end); });
    return {losses.take(reduce, c.scale), setup.student.take()};
  });
}

}  // namespace
}  // namespace vitkd::at

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU, m) {
  m.impl("at_fwd_grad", TORCH_BOX(&vitkd::at::at_fwd_grad));
}
