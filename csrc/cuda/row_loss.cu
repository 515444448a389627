// Losses of rows of logits on the GPU: divergences of softmaxes, and the cross-entropy.
//   loss = kd_weight * T^2 * divergence(softmax(t/T), softmax(s/T)) + ce_weight * CE(s, y)
// A group of threads takes a row through the sweeps of math/row_loss.h: maxima and sums of
// exponentials by online softmax, terms, and the gradient; standardised logits take two before, for
// mean and variance. Only the first reads device memory: the others find the row in L1 or L2 (2
// reads and 1 write in all). Nothing is saved for the backward, which forms all anew.
// Layout: a group is 8 threads, a warp or a block, by the classes; the ways to lie in memory are
// those of kd.cu. Sums have a fixed order, and there are no atomics.
#undef NDEBUG  // the assertion on labels stays in release builds
#include "binding/row_loss_call.h"
#include "cuda/rows.cuh"

namespace vitkd::row_loss {
namespace {

using kd::Access, kd::join, kd::Larger, kd::Pass, kd::Plus;

constexpr int kThreads = 256;

// Of student or teacher: softmax(x) = exp((x - top) * inv_t - log_sum)
template <class A>
struct Side {
  A top, inv_t, log_sum, inv_sum;
};

// A class: its logit relative to the maximum, over T; its probability, and that one's logarithm.
template <class A>
struct Class {
  A u, of, log;
};

template <class A>
__device__ Class<A> class_of(const Side<A>& side, A x) {
  const A u = unfused_product(x - side.top, side.inv_t);
  return {u, unfused_product(exp(u), side.inv_sum), u - side.log_sum};
}

// f(divergence) with its type in math/row_loss.inl; dkd's other classes are kl's.
template <class F>
__device__ void with_terms(Divergence divergence, F&& f) {
  switch (divergence) {
    case Divergence::kReverseKl:
      return f(ReverseKl{});
    case Divergence::kJs:
      return f(Js{});
    case Divergence::kTv:
      return f(Tv{});
    case Divergence::kOfa:
      return f(Ofa{});
    default:
      return f(Kl{});
  }
}

template <class A, class S, Access kAccess>
__global__ void __launch_bounds__(kThreads, std::is_same_v<A, double> ? 1 : 2)
    row_loss_kernel(const __grid_constant__ Call<A> c, const Pass pass, const int group) {
  constexpr bool kTiles = kAccess == Access::kTiled;
  using View = kd::Row<A, S, kAccess>;
  constexpr int kMany = View::kMany;
  const int64_t classes = c.shape.classes;
  const bool kd = c.weights.kd != 0, ce = c.weights.ce != 0, backward = pass != Pass::kForward;
  const bool dkd = kd && c.divergence == Divergence::kDkd;
  const bool ofa = kd && c.divergence == Divergence::kOfa;
  const bool standardized = kd && c.standardize;

  // 1. this thread's row, and its place in it; threads beyond the last row meet the others, too
  const auto [row, lane, there] = kd::place_of<kTiles>(c.shape, group);
  View view;
  view.lane = lane;
  view.group = group;
  const bool one = view.lane == 0 && there;  // the thread that writes what a row has one of
  view.s = reinterpret_cast<const S*>(c.student.at(row, c.shape));
  view.t = c.teacher.at(row, c.shape);
  view.g = backward ? reinterpret_cast<S*>(c.grad.at(row, c.shape)) : nullptr;
  view.t_dtype = c.teacher.dtype;
  view.s_stride = c.student.class_stride;
  view.t_stride = c.teacher.class_stride;
  view.g_stride = c.grad.class_stride;
  view.begin = 0;
  view.end = there ? classes : 0;

  // 2. an ignored row is not read, not even a NaN
  const A share = c.share_of(row);
  if (share == 0) {
    if (one) {
      if (pass != Pass::kBackward) c.loss[row] = 0;
      if (backward && c.d_temperature) c.d_temperature[row] = 0;
    }
    if (backward) view.zero_gradient();
    view.end = 0;
  }
  const bool live = view.end != 0;
  const kd::Target<A> target = live ? c.target_of(row) : kd::Target<A>{};
  if (live) kd::check_labels(c, target);
  const A temperature = kd::checked_temperature(c.temperature[row]);
  const A inv_t = 1 / temperature;
  const Parameters<A> k{c.alpha, c.beta, c.linear};
  const A infinity = std::numeric_limits<A>::infinity();
  const auto is_label = [&](int64_t i) { return i == target.a; };

  // 3. what the logits are divided by
  Side<A> s{std::numeric_limits<A>::lowest(), inv_t, 0, 0}, t = s;
  A mean = 0, std = 1;
  if (standardized) {
    A sums[2] = {0, 0}, squares[2] = {0, 0};
    view.sweep([&](const A(&x)[kMany], const A(&y)[kMany], int n, int64_t, int) {
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        if (j >= n) continue;
        sums[0] += x[j];
        sums[1] += y[j];
      }
    });
    join<kTiles, Plus>(sums, group);
    mean = sums[0] / static_cast<A>(classes);
    const A mean_t = sums[1] / static_cast<A>(classes);
    view.sweep([&](const A(&x)[kMany], const A(&y)[kMany], int n, int64_t, int) {
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        if (j >= n) continue;
        squares[0] += (x[j] - mean) * (x[j] - mean);
        squares[1] += (y[j] - mean_t) * (y[j] - mean_t);
      }
    });
    join<kTiles, Plus>(squares, group);
    std = std::sqrt(squares[0] / static_cast<A>(classes - 1));
    const A std_t = std::sqrt(squares[1] / static_cast<A>(classes - 1));
    s.inv_t = 1 / (temperature * (std + kStandardizeEps));
    t.inv_t = 1 / (temperature * (std_t + kStandardizeEps));
  }

  // 4. maxima and sums of exponentials: of each thread, then of the row; of the student at T = 1,
  // too
  A top_1 = s.top, sum_s = 0, sum_t = 0, sum_1 = 0;
  const auto moved = [](A& top, A now, A inv) {  // what an earlier sum is worth from now on
    const A by = exp((top - now) * inv);
    top = now;
    return by;
  };
  view.sweep([&](const A(&x)[kMany], const A(&y)[kMany], int n, int64_t first, int step) {
    A now_s = s.top, now_t = t.top, now_1 = top_1;
#pragma unroll
    for (int j = 0; j < kMany; ++j) {
      if (j >= n) continue;
      now_1 = fmax(now_1, x[j]);
      if (dkd && is_label(first + j * step)) continue;
      now_s = fmax(now_s, x[j]);
      now_t = fmax(now_t, y[j]);
    }
    sum_s *= moved(s.top, now_s, s.inv_t);
    sum_t *= moved(t.top, now_t, t.inv_t);
    if (ce) sum_1 *= moved(top_1, now_1, A{1});
#pragma unroll
    for (int j = 0; j < kMany; ++j) {
      if (j >= n) continue;
      if (ce) sum_1 += exp(x[j] - now_1);
      if (dkd && is_label(first + j * step)) continue;
      sum_s += exp((x[j] - now_s) * s.inv_t);
      sum_t += exp((y[j] - now_t) * t.inv_t);
    }
  });
  {
    A tops[3] = {s.top, t.top, top_1};
    join<kTiles, Larger>(tops, group);
    A sums[3] = {sum_s * moved(s.top, tops[0], s.inv_t), sum_t * moved(t.top, tops[1], t.inv_t),
                 sum_1 * moved(top_1, tops[2], A{1})};
    join<kTiles, Plus>(sums, group);
    s.log_sum = log(sums[0]);
    s.inv_sum = 1 / sums[0];
    t.log_sum = log(sums[1]);
    t.inv_sum = 1 / sums[1];
    sum_1 = sums[2];
  }

  // 5. terms
  const auto term_of = [&](auto divergence, const Class<A>& q, const Class<A>& p, int64_t i) {
    if (ofa && is_label(i)) return ofa_label(k, p.of, q.log);
    return decltype(divergence)::term(k, q.of, p.of, q.log, p.log);
  };
  const auto visible = [&](A x, int64_t i) { return dkd && is_label(i) ? -infinity : x; };
  Sums<A> sums{};
  A total = 0;  // sum (s - top_1), for label smoothing
  view.sweep([&](const A(&x)[kMany], const A(&y)[kMany], int n, int64_t first, int step) {
    if (ce) {
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        if (j < n) total += x[j] - top_1;
      }
    }
    if (!kd) return;
    with_terms(c.divergence, [&](auto divergence) {
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        if (j >= n) continue;
        const int64_t i = first + j * step;
        const Class<A> q = class_of(s, visible(x[j], i)), p = class_of(t, visible(y[j], i));
        add<true>(sums, term_of(divergence, q, p, i), q.of, p.of, q.u, p.u);
      }
    });
  });
  {
    A x[8] = {sums.loss, sums.w, sums.w_u, sums.q_u, sums.w_p, sums.w_p_v, sums.p_v, total};
    join<kTiles, Plus>(x, group);
    sums = {x[0], x[1], x[2], x[3], x[4], x[5], x[6]};
    total = x[7];
  }

  // 6. the row's loss, and its gradient in the temperature
  const auto student = [&](int64_t i) { return live ? view.student(i) : A{0}; };
  Row<A> of = row_of(sums);
  if (dkd) {
    const A u_y = (student(target.a) - s.top) * s.inv_t;
    const A v_y = ((live ? view.teacher(target.a) : A{0}) - t.top) * t.inv_t;
    of = dkd_row(k, of, sums.q_u, sums.p_v, u_y, v_y, s.log_sum, t.log_sum);
  }
  if (one && live && pass != Pass::kBackward) {
    A loss = kd ? c.weights.kd * temperature * temperature * of.loss : A{0};
    if (ce) {
      A expected = 0;
      if (c.weights.smoothing != 1) {
        const A hard = kd::hard_logit(target, student(target.a), student(target.b));
        expected = (1 - c.weights.smoothing) * (hard - top_1);
      }
      if (c.weights.smoothing != 0) {
        expected += c.weights.smoothing * (total / static_cast<A>(classes));
      }
      loss += c.weights.ce * (log(sum_1) - expected);
    }
    c.loss[row] = share * loss;
  }
  if (!backward) return;
  const A scale = share * c.grad_loss[row];
  const A by_kd = scale * c.weights.kd * temperature;
  if (one && live && c.d_temperature) {
    c.d_temperature[row] = kd ? by_kd * (of.loss + of.loss - of.moved) : A{0};
  }

  // 7. the gradient
  const A by_w = standardized ? by_kd / (std + kStandardizeEps) : by_kd;
  const A slope =
      standardized ? by_w * of.along * temperature / (static_cast<A>(classes - 1) * std) : A{0};
  const kd::GradFactors<A> f = kd::grad_factors(scale, c.weights, target.lam, temperature, classes);
  const A by_1 = f.ce / sum_1;
  view.sweep([&](const A(&x)[kMany], const A(&y)[kMany], int n, int64_t first, int step) {
    A d[kMany] = {};
    if (kd) {
      with_terms(c.divergence, [&](auto divergence) {
#pragma unroll
        for (int j = 0; j < kMany; ++j) {
          if (j >= n) continue;
          const int64_t i = first + j * step;
          const Class<A> q = class_of(s, visible(x[j], i)), p = class_of(t, visible(y[j], i));
          const A w = term_of(divergence, q, p, i).w;
          const A in_u =
              dkd && is_label(i) ? of.label : of.scale * w - of.total * q.of - of.label * q.of;
          d[j] = by_w * in_u;
          if (standardized) d[j] -= product(x[j] - mean, slope);
        }
      });
    }
    if (ce) {
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        if (j >= n) continue;
        const int64_t i = first + j * step;
        d[j] += by_1 * exp(x[j] - top_1) - f.uniform;
        if (i == target.a) d[j] -= f.at_a;
        if (i == target.b) d[j] -= f.at_b;
      }
    }
    view.write(d, n, first, step);
  });
}

template <class A, class S, Access kAccess>
void start(const Call<A>& c, Pass pass, cudaStream_t stream) {
  auto* const kernel = row_loss_kernel<A, S, kAccess>;
  if constexpr (kAccess == Access::kTiled) {
    const int group = kd::tile_group(c.shape.classes);
    kernel<<<kd::tile_blocks(c.shape, group), dim3(kd::kTileRows, kd::kTileThreads), 0, stream>>>(
        c, pass, group);
  } else {
    const int64_t classes = c.shape.classes, rows = c.shape.rows();
    // a warp has a row to itself, unless there are too few rows for the chip; 4 share one where
    // classes are few, but for 16-byte loads, which take half a warp for a row's ends
    const int sms = device_attribute(cudaDevAttrMultiProcessorCount);
    const int group = classes <= 64 && kAccess == Access::kScalar               ? 8
                      : classes <= 256 || (classes <= 2048 && rows >= 16 * sms) ? 32
                                                                                : kThreads;
    const int64_t blocks = ceil_div(rows, kThreads / group);
    kernel<<<blocks, kThreads, 0, stream>>>(c, pass, group);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class A>
void run(Call<A> c, Pass pass, cudaStream_t stream) {
  if (c.shape.rows() == 0) return;
  kd::straighten(c);
  Access access = kd::access_of(c);
  if (access == Access::kVector && c.shape.classes <= 64) access = Access::kScalar;
  visit_float(c.student.dtype, [&]<class S>() {
    if constexpr (std::is_same_v<A, double> && std::is_same_v<S, double>) {
      start<A, S, Access::kScalar>(c, pass, stream);
    } else if constexpr (!std::is_same_v<A, double> && !std::is_same_v<S, double>) {
      if (access == Access::kVector) return start<A, S, Access::kVector>(c, pass, stream);
      if (access == Access::kTiled) return start<A, S, Access::kTiled>(c, pass, stream);
      start<A, S, Access::kScalar>(c, pass, stream);
    }
  });
}

// The kernel's call, with what a mean is divided by, and where the gradients go.
template <class A>
struct Prepared {
  kd::Logits logits;
  Setup<A> setup;
  Tensor inv_total, d_temperature;
  std::optional<kd::Grad> grad;
  Call<A>& call() { return setup.call; }
  Prepared(const Options& o, const Tensor& student, const Tensor& teacher, bool backward)
      : logits(student, teacher, o.class_dim), setup(o, logits.shape, logits.s, logits.t) {
    Call<A>& c = setup.call;
    if (static_cast<Reduction>(o.reduction) == Reduction::kMean) {
      inv_total = kd::take_mean<A>(c, student);
    }
    if (!backward) return;
    grad.emplace(kd::empty_grad(student, o.class_dim));
    c.grad = grad->view;
    d_temperature = empty_d_temperature<A>(o, student);
    if (o.wants_temperature) c.d_temperature = d_temperature.template mutable_data_ptr<A>();
  }
};

// Runs a forward pass and returns the reduced loss.
template <class A>
Tensor forward(Call<A>& c, const Options& o, const Tensor& student, Pass pass) {
  Tensor loss = kd::empty_loss<A>(o, student);
  A* const out = loss.template mutable_data_ptr<A>();
  c.loss = out;
  Tensor rows;
  const bool reduced = static_cast<Reduction>(o.reduction) != Reduction::kNone;
  if (reduced) {
    rows = torch::stable::new_empty(student, {c.shape.rows()}, kd::kDtype<A>);
    c.loss = rows.template mutable_data_ptr<A>();
  }
  run(c, pass, current_stream(student));
  if (reduced) sum_of(Numbers<A>{c.loss}, c.shape.rows(), out, student);
  return loss;
}

Tensor row_loss_fwd(const Options& o, const Tensor& student, const Tensor& teacher) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  return kd::visit_accumulator(student, [&]<class A>() {
    Prepared<A> prepared(o, student, teacher, false);
    return forward(prepared.call(), o, student, Pass::kForward);
  });
}

std::tuple<Tensor, Tensor, Tensor> row_loss_fwd_grad(const Options& o, const Tensor& student,
                                                     const Tensor& teacher) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  return kd::visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor, Tensor> {
    Prepared<A> prepared(o, student, teacher, true);
    Tensor loss = forward(prepared.call(), o, student, Pass::kForwardGrad);
    return {std::move(loss), prepared.grad->take(), std::move(prepared.d_temperature)};
  });
}

std::tuple<Tensor, Tensor> row_loss_bwd(const Options& o, const Tensor& grad_loss,
                                        const Tensor& student, const Tensor& teacher) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  return kd::visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    Prepared<A> prepared(o, student, teacher, true);
    prepared.setup.take(grad_loss);
    run(prepared.call(), Pass::kBackward, current_stream(student));
    return {prepared.grad->take(), std::move(prepared.d_temperature)};
  });
}

}  // namespace
}  // namespace vitkd::row_loss

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA, m) {
  m.impl("row_loss_fwd", TORCH_BOX(&vitkd::Flat<&vitkd::row_loss::row_loss_fwd>::call));
  m.impl("row_loss_fwd_grad", TORCH_BOX(&vitkd::Flat<&vitkd::row_loss::row_loss_fwd_grad>::call));
  m.impl("row_loss_bwd", TORCH_BOX(&vitkd::Flat<&vitkd::row_loss::row_loss_bwd>::call));
}
