// Distillation loss on the GPU: a group of threads takes a row, reads student and teacher once with
// 16-byte loads, keeps online sums in registers, merges them by shuffles, and forms the gradient in
// a second sweep that finds the row in L1 or L2 (2 reads and 1 write of device memory in all).
//   kVector  classes side by side: a warp or a block per row, 16-byte loads after a peeled head
//   kScalar  the same where the rows of student, teacher and gradient are aligned differently
//   kShort   few classes: 4 to 32 threads per row, which hold all of it
//   kTiled   strided classes: 32 neighbouring rows by up to 8 threads per row: loads coalesce
// Rows that are too few for the chip are split over several blocks. Everything is added up in a
// fixed order: no atomics, so results are bitwise the same every time.
#undef NDEBUG  // the assertion on labels stays in release builds
#include "cuda/rows.cuh"

namespace vitkd::kd {
namespace {

template <class A>
constexpr int kMaxThreads = std::is_same_v<A, double> ? 256 : 512;
// Three blocks of 256 threads a multiprocessor, or two where more would spill: with a gradient
// formed in the forward the next loads are held beside two sums.
template <class A, Access kAccess, Pass kPass>
constexpr int kRegisters = std::is_same_v<A, double>                                   ? 255
                           : kAccess == Access::kVector && kPass == Pass::kForwardGrad ? 96
                                                                                       : 80;

// How the work is cut: `group` threads per row, and `splits` blocks per row, each of which leaves
// its sums in `parts` for a kernel of their own (splits == 1: none).
template <class A>
struct Launch {
  int group = 32;
  int splits = 1;
  int64_t part = 0;          // classes of a block
  Sums<A>* parts = nullptr;  // [rows, splits]
};

// Loss and stats of a row whose sums are complete, by one thread.
template <class A, class S>
__device__ void finish(const Call<A>& c, int64_t row, const Sums<A>& sums, A temperature, A share,
                       const Target<A>& target) {
  const S* const logits = reinterpret_cast<const S*>(c.student.at(row, c.shape));
  c.finish_row(row, sums, stats_of(sums, c.weights.ce != 0), target, temperature, share,
               [&](int64_t i) { return static_cast<A>(logits[i * c.student.class_stride]); });
}

template <class A, class S, Access kAccess, Pass kPass>
__global__ void __maxnreg__((kRegisters<A, kAccess, kPass>))
    kd_rows_kernel(const __grid_constant__ Call<A> c, const __grid_constant__ Launch<A> launch) {
  constexpr bool kTiles = kAccess == Access::kTiled;
  // 1. this thread's row, and its place in it
  const auto [row, lane, there] = place_of<kTiles>(c.shape, launch.group);
  // whether rows share a warp or a barrier, so that one's threads have to wait for the others'
  const bool meet = kTiles ? launch.group > 1 : launch.group < 32;
  if (!there && !meet) return;
  Row<A, S, kAccess> view;
  view.lane = lane;
  view.group = launch.group;
  const bool one = view.lane == 0 && there;  // the thread that writes what a row has one of
  view.s = reinterpret_cast<const S*>(c.student.at(row, c.shape));
  view.t = c.teacher.at(row, c.shape);
  view.g = kPass == Pass::kForward ? nullptr : reinterpret_cast<S*>(c.grad.at(row, c.shape));
  view.t_dtype = c.teacher.dtype;
  view.s_stride = c.student.class_stride;
  view.t_stride = c.teacher.class_stride;
  view.g_stride = c.grad.class_stride;
  view.begin = min(blockIdx.y * launch.part, c.shape.classes);
  view.end = there ? min(view.begin + launch.part, c.shape.classes) : view.begin;

  // 2. an ignored row is not read, not even a NaN; other rows may still need its threads
  const A share = there ? c.share_of(row) : A{0};
  const bool ignored = share == 0;
  if (ignored) {
    if (kPass != Pass::kBackward && one && launch.splits == 1) c.finish_ignored(row);
    if (kPass != Pass::kForward) view.zero_gradient();
    if (!meet) return;
    view.end = view.begin;
  }
  const Target<A> target = c.target_of(row);
  if (!ignored) check_labels(c, target);
  const A temperature = checked_temperature(c.temperature[row]);
  const A inv_t = 1 / temperature;
  const bool ce = c.weights.ce != 0;

  // 3. sums, loss and stats
  view.hold();
  Stats<A> stats;
  if constexpr (kPass == Pass::kBackward) {
    stats = c.load_stats(row);
  } else {
    Sums<A> sums = view.sums(inv_t, ce);
    sums = merge_group<kTiles>(sums, launch.group, inv_t, ce, view.end - view.begin);
    if (launch.splits > 1) {
      if (one) launch.parts[row * launch.splits + blockIdx.y] = sums;
      return;
    }
    stats = stats_of(sums, ce);
    if (one && !ignored) finish<A, S>(c, row, sums, temperature, share, target);
  }

  // 4. the gradient
  if constexpr (kPass != Pass::kForward) {
    if (ignored) return;
    const GradFactors<A> f =
        grad_factors(share * c.grad_loss[row], c.weights, target.lam, temperature, c.shape.classes);
    view.gradient(f, stats, inv_t, ce, target);
  }
}

// Rows that were split: their parts are merged in order.
template <class A, class S>
__global__ void kd_merge_kernel(const __grid_constant__ Call<A> c,
                                const __grid_constant__ Launch<A> launch) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= c.shape.rows()) return;
  const A share = c.share_of(row);
  if (share == 0) return c.finish_ignored(row);
  const A temperature = checked_temperature(c.temperature[row]);
  Sums<A> sums = launch.parts[row * launch.splits];
  for (int i = 1; i < launch.splits; ++i) {
    sums = merge(sums, launch.parts[row * launch.splits + i], 1 / temperature);
  }
  finish<A, S>(c, row, sums, temperature, share, c.target_of(row));
}

template <class T>
constexpr int kScaled = 16 / sizeof(T);  // numbers that a thread has at a time

// grad *= factor; a factor of 1, as after loss.backward(), leaves memory untouched.
template <class A, class T>
__global__ void kd_scale_kernel(T* grad, int64_t n, const A* factor) {
  const A by = *factor;
  if (by == 1) return;
  const auto scale = [&](T& x) { x = static_cast<T>(static_cast<A>(x) * by); };
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const auto before = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(grad) % 16 / sizeof(T));
  const int64_t head = min(before, n), chunks = (n - head) / kScaled<T>;
  for (int64_t i = thread; i < chunks; i += step) {
    uint4* const at = reinterpret_cast<uint4*>(grad + head) + i;
    uint4 words = *at;
    T numbers[kScaled<T>];
    memcpy(numbers, &words, sizeof(words));
#pragma unroll
    for (T& x : numbers) scale(x);
    memcpy(&words, numbers, sizeof(words));
    *at = words;
  }
  const int64_t tail = head + chunks * kScaled<T>;
  if (thread < head) scale(grad[thread]);
  if (thread < n - tail) scale(grad[tail + thread]);
}

template <class A>
class Launcher {
 public:
  Launcher(const Call<A>& c, const Tensor& like)
      : c_(c), like_(like), stream_(current_stream(like)) {
    straighten(c_);
    access_ = access_of(c_);
    const int64_t classes = c_.shape.classes, rows = c_.shape.rows();
    const int64_t bytes = classes * (c_.student.size + c_.teacher.size);
    if (access_ == Access::kTiled) {
      launch_.group = tile_group(classes);
    } else if (classes <= 32 * kShortMany<A>) {
      // few classes: as few threads as can hold a row, which is then read once and found at once
      access_ = Access::kShort;
      launch_.group = 4;
      while (launch_.group * kShortMany<A> < classes) launch_.group *= 2;
    } else {
      // a warp has a row to itself, unless there are too few rows for the chip; of blocks with
      // longer rows, several share a multiprocessor where those fit L2
      launch_.group = classes <= 2048 && rows >= 16 * sms_ ? 32
                      : bytes <= 128 << 10                 ? 256
                                                           : kMaxThreads<A>;
    }
    // few long rows: several blocks each
    if (access_ != Access::kTiled && classes > 65536 && rows < 2 * sms_) {
      launch_.splits = static_cast<int>(std::min<int64_t>(ceil_div(classes, 32768), 64));
    }
    launch_.part = ceil_div(classes, launch_.splits);
  }

  void run(Pass pass) {
    visit_float(c_.student.dtype, [&]<class S>() {
      if constexpr (std::is_same_v<S, double> == std::is_same_v<A, double>) {
        if (pass == Pass::kBackward) return rows<S, Pass::kBackward>();
        if (launch_.splits == 1) {
          return pass == Pass::kForward ? rows<S, Pass::kForward>() : rows<S, Pass::kForwardGrad>();
        }
        split<S>(pass);
      }
    });
  }

 private:
  template <class S, Pass kPass>
  void rows() {
    if (access_ == Access::kVector) {
      if constexpr (!std::is_same_v<A, double>) return start<S, Access::kVector, kPass>();
    }
    if (access_ == Access::kTiled) return start<S, Access::kTiled, kPass>();
    if (access_ == Access::kShort) return start<S, Access::kShort, kPass>();
    start<S, Access::kScalar, kPass>();
  }

  template <class S, Access kAccess, Pass kPass>
  void start() {
    dim3 block, grid;
    if (kAccess == Access::kTiled) {
      block = dim3(kTileRows, kTileThreads);
      grid.x = tile_blocks(c_.shape, launch_.group);
    } else {
      block.x = std::max(launch_.group, 256);
      const int64_t groups = block.x / launch_.group;
      grid = dim3(ceil_div(c_.shape.rows(), groups), launch_.splits);
    }
    auto* const kernel = kd_rows_kernel<A, S, kAccess, kPass>;
    // the second sweep wants its row in L2: long rows get one block per multiprocessor
    int shared = 0;
    if (kPass == Pass::kForwardGrad && c_.shape.classes * c_.student.size > 65536) {
      constexpr int kStatic = kMergeBytes<A, kAccess == Access::kTiled>;
      shared = std::min(120 << 10, allowed_shared_memory(kernel, kStatic));
    }
    kernel<<<grid, block, shared, stream_>>>(c_, launch_);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Sums by parts, a merge, and the gradient from the merged stats.
  template <class S>
  void split(Pass pass) {
    const int64_t rows_n = c_.shape.rows();
    const Tensor parts = torch::stable::new_empty(
        like_, {rows_n * launch_.splits * static_cast<int64_t>(sizeof(Sums<A>) / sizeof(A))},
        kDtype<A>);
    launch_.parts = reinterpret_cast<Sums<A>*>(parts.mutable_data_ptr());
    Tensor stats;
    if (!c_.stats) {
      stats = torch::stable::new_empty(like_, {6 * rows_n}, kDtype<A>);
      c_.stats = stats.template mutable_data_ptr<A>();
    }
    rows<S, Pass::kForward>();
    kd_merge_kernel<A, S><<<ceil_div(rows_n, 128), 128, 0, stream_>>>(c_, launch_);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (pass == Pass::kForwardGrad) {
      c_.saved_share = true;
      rows<S, Pass::kBackward>();
    }
  }

  Call<A> c_;
  const Tensor& like_;
  cudaStream_t stream_;
  const int sms_ = device_attribute(cudaDevAttrMultiProcessorCount);
  Access access_;
  Launch<A> launch_;
};

// Runs a forward pass and returns the reduced loss.
template <class A>
Tensor forward(Call<A>& c, const Options& options, const Tensor& student, Pass pass) {
  const auto kind = static_cast<Reduction>(options.reduction);
  Tensor loss = empty_loss<A>(options, student);
  A* const out = loss.template mutable_data_ptr<A>();
  const int64_t n = c.shape.rows();
  Tensor inv_total, rows;
  if (kind == Reduction::kMean) inv_total = take_mean<A>(c, student);
  c.loss = out;
  if (kind != Reduction::kNone) {
    rows = torch::stable::new_empty(student, {n}, kDtype<A>);
    c.loss = rows.template mutable_data_ptr<A>();
  }
  if (n > 0) Launcher<A>(c, student).run(pass);
  if (kind != Reduction::kNone) sum_of(Numbers<A>{c.loss}, n, out, student);
  return loss;
}

std::tuple<Tensor, Tensor> kd_fwd(const Options& options, const Tensor& student,
                                  const Tensor& teacher) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  return visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    const Logits logits(student, teacher, options.class_dim);
    Setup<A> setup(options, logits.shape, logits.s, logits.t);
    Tensor stats = empty_stats(setup.call, student);
    setup.call.stats = stats.mutable_data_ptr<A>();
    Tensor loss = forward(setup.call, options, student, Pass::kForward);
    return {std::move(loss), std::move(stats)};
  });
}

std::tuple<Tensor, Tensor> kd_fwd_grad(const Options& options, const Tensor& student,
                                       const Tensor& teacher) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  return visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    const Logits logits(student, teacher, options.class_dim);
    Setup<A> setup(options, logits.shape, logits.s, logits.t);
    Grad grad = empty_grad(student, options.class_dim);
    setup.call.grad = grad.view;
    Tensor loss = forward(setup.call, options, student, Pass::kForwardGrad);
    return {std::move(loss), grad.take()};
  });
}

Tensor kd_bwd(const Options& options, const Tensor& grad_loss, const Tensor& student,
              const Tensor& teacher, const Tensor& stats) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  return visit_accumulator(student, [&]<class A>() -> Tensor {
    const Logits logits(student, teacher, options.class_dim);
    Setup<A> setup(options, logits.shape, logits.s, logits.t);
    setup.take(grad_loss, stats);
    Grad grad = empty_grad(student, options.class_dim);
    setup.call.grad = grad.view;
    if (logits.shape.rows() > 0) Launcher<A>(setup.call, student).run(Pass::kBackward);
    return grad.take();
  });
}

void kd_scale_(const Tensor& grad, const Tensor& factor) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  if (grad.numel() == 0) return;
  visit_accumulator(grad, [&]<class A>() {
    check_factor<A>(factor);
    in_place(grad, [&](const Tensor& x) {
      visit_float(x.scalar_type(), [&]<class T>() {
        if constexpr (std::is_same_v<T, double> == std::is_same_v<A, double>) {
          const int64_t blocks = std::min<int64_t>(ceil_div(x.numel(), 256 * kScaled<T>), 4096);
          kd_scale_kernel<A, T><<<blocks, 256, 0, current_stream(x)>>>(
              x.mutable_data_ptr<T>(), x.numel(), factor.const_data_ptr<A>());
          STD_CUDA_KERNEL_LAUNCH_CHECK();
        }
      });
    });
  });
}

}  // namespace
}  // namespace vitkd::kd

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA, m) {
  m.impl("kd_fwd", TORCH_BOX(&vitkd::Flat<&vitkd::kd::kd_fwd>::call));
  m.impl("kd_fwd_grad", TORCH_BOX(&vitkd::Flat<&vitkd::kd::kd_fwd_grad>::call));
  m.impl("kd_bwd", TORCH_BOX(&vitkd::Flat<&vitkd::kd::kd_bwd>::call));
  m.impl("kd_scale_", TORCH_BOX(&vitkd::kd::kd_scale_));
}
