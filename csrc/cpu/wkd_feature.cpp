// Wasserstein distillation of features on the CPU, by the channels' moments over positions:
//   loss = sum over channels of w (mu_s - mu_t)^2 + (sigma_s - sigma_t)^2
//   dloss/dx = 2 w (mu_s - mu_t) / n + 2 (sigma_s - sigma_t) / sigma_s (x - mu_s) / (n - 1)
// sigma^2 = sum (x - mu)^2 / (n - 1) + 1e-5. Each side is read from memory once: what is centred
// and, of the student, what the gradient is made of comes from L1 where the positions of a channel
// lie side by side (a few channels at a time), else from L2 (a sample at a time). Samples are
// spread over torch's threads, and each is worked on by one, so results do not depend on their
// number.
#include <cmath>
#include <cstring>

#include "binding/wkd_feature_call.h"
#include "cpu/row.h"
#include "simd/isa.h"
#include "simd/vec.h"
#include "simd/vec_one.h"

namespace vitkd::wkd_feature {
namespace {

constexpr int64_t kChunk = 256;  // tokens that are summed by themselves
constexpr int64_t kGroup = 4;    // channels at a time, of planes
constexpr double kEps = 1e-5;    // of a variance, as in the authors' code

// Of channels: rows of padded(channels) numbers; part is memory to work in.
template <class A>
struct Moments {
  A *mean, *deviation, *part;
};

template <class A>
A deviation_of(double squares, int64_t n) {
  return static_cast<A>(
      std::sqrt(squares / static_cast<double>(std::max<int64_t>(n - 1, 1)) + kEps));
}

// What wkd_feature.inl holds, of one instruction set.
template <class A>
struct Kernels {
  void (*moments)(const View& v, const char* from, int64_t channels, int64_t n,
                  const Moments<A>& to);
  void (*gradient)(const View& v, const char* from, const View& g, char* to, int64_t channels,
                   int64_t n, const A* mean, const A* slope, const A* shift);
};

}  // namespace
}  // namespace vitkd::wkd_feature

#define VITKD_NAMESPACE vitkd::wkd_feature
#define VITKD_KERNELS "cpu/wkd_feature.inl"
#include "simd/each_isa.h"

namespace vitkd::wkd_feature {
namespace {

template <class A>
Kernels<A> selected_kernels() {
  if constexpr (std::is_same_v<A, double>)
    return float64::kKernels;
  else
    return VITKD_BEST(kKernels, float32::kKernels);
}

template <class A>
void run(const Call& c, A* losses, int64_t begin, int64_t end) {
  const Kernels<A> kernels = selected_kernels<A>();
  const bool planes = c.student.layout == Layout::kPlanes && c.teacher.layout == Layout::kPlanes;
  const int64_t group = planes ? kGroup : c.channels, width = padded(group);
  const auto memory = scratch_memory<A>(7 * width);
  A* const free = memory.get();
  const Moments<A> s{free, free + width, free + 2 * width};
  const Moments<A> t{free + 3 * width, free + 4 * width, s.part};
  A *const slope = free + 5 * width, *const shift = slope + width;
  const auto n = static_cast<double>(c.s_positions);
  const double by_mean = 2 * c.mean_weight * c.scale / n, by = 2 * c.scale / std::max(n - 1, 1.0);
  for (int64_t sample = begin; sample < end; ++sample) {
    double loss = 0;
    for (int64_t from = 0; from < c.channels; from += group) {
      const int64_t some = std::min(group, c.channels - from);
      const auto start = [&](const View& v) {
        return v.at(sample) + from * v.channel_stride * v.size;
      };
      kernels.moments(c.teacher, start(c.teacher), some, c.t_positions, t);
      kernels.moments(c.student, start(c.student), some, c.s_positions, s);
      for (int64_t i = 0; i < some; ++i) {
        const double apart = s.mean[i] - t.mean[i], wider = s.deviation[i] - t.deviation[i];
        loss += c.mean_weight * apart * apart + wider * wider;
        slope[i] = static_cast<A>(by * wider / s.deviation[i]);
        shift[i] = static_cast<A>(by_mean * apart);
      }
      if (!c.grad.data) continue;
      kernels.gradient(c.student, start(c.student), c.grad, start(c.grad), some, c.s_positions,
                       s.mean, slope, shift);
    }
    losses[sample] = static_cast<A>(loss);
  }
}

std::tuple<Tensor, Tensor> wkd_feature_fwd_grad(const Tensor& f_s, const Tensor& f_t,
                                                double mean_weight, int64_t reduction,
                                                bool wants_grad) {
  return kd::visit_accumulator(f_s, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    const auto reduce = static_cast<Reduction>(reduction);
    Setup<A> setup(f_s, f_t, mean_weight, reduce, wants_grad);
    const Call& c = setup.call;
    features::Losses<A> losses(f_s, reduce, c.batch);
    const int64_t numbers = c.channels * (c.s_positions + c.t_positions);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, numbers));
    torch::stable::parallel_for(
        0, c.batch, grain, [&](int64_t begin, int64_t end) { run<A>(c, losses.rows, begin, end); });
    return {losses.take(reduce, c.scale), setup.student.take()};
  });
}

}  // namespace
}  // namespace vitkd::wkd_feature

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU, m) {
  m.impl("wkd_feature_fwd_grad", TORCH_BOX(&vitkd::wkd_feature::wkd_feature_fwd_grad));
}
