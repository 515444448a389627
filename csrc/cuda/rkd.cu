// Relational distillation on the GPU, from the Gram matrices of student and teacher; the maths is
// that of cpu/rkd.cpp. A block owns a tile of pairs (a, b), a thread one pair, and every sample m
// passes through shared memory: the gradient of a pair needs the three angles of the triangles (a,
// b, m). Each angle is formed for its three pairs, which costs arithmetic but no atomics: sums have
// a fixed order, and memory holds the Grams and the gradient.
#include "binding/rkd_call.h"
#include "cuda/common.cuh"
#include "math/rkd.h"

namespace vitkd::rkd {
namespace {

constexpr int kSide = 16;     // samples on a side of a tile
constexpr int kPassing = 16;  // samples m in shared memory at a time
constexpr int kThreads = kSide * kSide;

// Everything of a call; weights are over n^2 and n^3.
template <class A>
struct Call {
  const A *gram_s, *gram_t;  // [n, n]
  int64_t n;
  A distance_weight, angle_weight;
  A* sums;   // [4, n]: of a row's distances of student and teacher, of h, and of h' psi_s
  A* parts;  // [tiles, tiles]: of h over the angles
  A* grad;   // [n, n]
  A* loss;   // []
};

template <class A>
__device__ A row_sum(const A* row, int64_t n) {
  A sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += row[i];
  return block_sum<kThreads>(sum);
}

template <class A>
__device__ Distance<A> distance_of(const A* gram, int64_t i, int64_t j, int64_t n) {
  return distance(gram[i * n + j], gram[i * (n + 1)], gram[j * (n + 1)]);
}

template <class A>
__global__ void __launch_bounds__(kThreads) rkd_mean_kernel(Call<A> c) {
  const int64_t i = blockIdx.x;
  A sum_s = 0, sum_t = 0;
  for (int64_t j = threadIdx.x; j < c.n; j += kThreads) {
    if (j == i) continue;
    sum_s += distance_of(c.gram_s, i, j, c.n).length;
    sum_t += distance_of(c.gram_t, i, j, c.n).length;
  }
  sum_s = block_sum<kThreads>(sum_s);
  sum_t = block_sum<kThreads>(sum_t);
  if (threadIdx.x != 0) return;
  c.sums[i] = sum_s;
  c.sums[c.n + i] = sum_t;
}

template <class A>
__global__ void __launch_bounds__(kThreads) rkd_distance_kernel(Call<A> c) {
  const int64_t i = blockIdx.x;
  const A by_s = inverse_mean(row_sum(c.sums, c.n), c.n);
  const A by_t = inverse_mean(row_sum(c.sums + c.n, c.n), c.n);
  A loss = 0, slope = 0;
  for (int64_t j = threadIdx.x; j < c.n; j += kThreads) {
    if (j == i) continue;
    const A psi = unfused_product(distance_of(c.gram_s, i, j, c.n).length, by_s);
    const A x = psi - unfused_product(distance_of(c.gram_t, i, j, c.n).length, by_t);
    const A h = clamp_to_1(x);
    loss += h * (x - h / 2);
    slope += h * psi;
  }
  loss = block_sum<kThreads>(loss);
  slope = block_sum<kThreads>(slope);
  if (threadIdx.x != 0) return;
  c.sums[2 * c.n + i] = loss;
  c.sums[3 * c.n + i] = slope;
}

// Of one model: the pair (a, b), and samples m beside those of the tile, in shared memory.
template <class A>
struct Pair {
  A gram, norm_a, norm_b, length, inverse;
};

template <class A>
struct Passing {
  A gram[2][kSide][kPassing + 1];  // of the tile's samples a, and b, with m
  A inverse[2][kSide][kPassing + 1];
  A norm[kPassing];
};

template <class A>
struct Cosines {
  A at_m, at_a, at_b;
};

template <class A>
__device__ Pair<A> load_pair(const A* gram, int64_t a, int64_t b, int64_t n) {
  if (a >= n || b >= n) return {};
  const A at = gram[a * n + b], norm_a = gram[a * (n + 1)], norm_b = gram[b * (n + 1)];
  const Distance<A> d = distance(at, norm_a, norm_b);
  return {at, norm_a, norm_b, a == b ? A{0} : d.length, d.inverse};
}

// Behind the end, inverse distances are 0, and so are cosines.
template <class A>
__device__ void load_passing(Passing<A>& to, const A* gram, int64_t first_a, int64_t first_b,
                             int64_t first_m, int64_t n) {
  const int sample = threadIdx.x / kPassing, at = threadIdx.x % kPassing;
  static_assert(kThreads == kSide * kPassing);
  const int64_t m = first_m + at;
  const A norm_m = m < n ? gram[m * (n + 1)] : A{0};
  if (sample == 0) to.norm[at] = norm_m;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int64_t i = (side == 0 ? first_a : first_b) + sample;
    A value = 0, inverse = 0;
    if (i < n && m < n) {
      value = gram[i * n + m];
      inverse = distance(value, gram[i * (n + 1)], norm_m).inverse;
    }
    to.gram[side][sample][at] = value;
    to.inverse[side][sample][at] = inverse;
  }
}

template <class A>
__device__ Cosines<A> cosines(const Pair<A>& pair, const Passing<A>& passing, int a, int b, int m,
                              A& r_a, A& r_b) {
  const A g_a = passing.gram[0][a][m], g_b = passing.gram[1][b][m];
  r_a = passing.inverse[0][a][m];
  r_b = passing.inverse[1][b][m];
  return {unfused_product(r_a * r_b, pair.gram - g_a - g_b + passing.norm[m]),
          unfused_product(pair.inverse * r_a, g_b - pair.gram - g_a + pair.norm_a),
          unfused_product(pair.inverse * r_b, g_a - pair.gram - g_b + pair.norm_b)};
}

template <class A>
__global__ void __launch_bounds__(kThreads, 1) rkd_pairs_kernel(Call<A> c) {
  __shared__ Passing<A> near_s, near_t;
  const bool diagonal = blockIdx.x == blockIdx.y;
  A* const part = c.parts + static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  if (blockIdx.x < blockIdx.y) {
    if (threadIdx.x == 0) *part = 0;
    return;
  }

  // 1. the pair
  const int64_t n = c.n;
  const int64_t first_a = static_cast<int64_t>(blockIdx.y) * kSide;
  const int64_t first_b = static_cast<int64_t>(blockIdx.x) * kSide;
  const int in_a = threadIdx.x / kSide, in_b = threadIdx.x % kSide;
  const int64_t a = first_a + in_a, b = first_b + in_b;
  const Pair<A> s = load_pair(c.gram_s, a, b, n), t = load_pair(c.gram_t, a, b, n);
  const bool live = a < n && b < n;
  A pull = 0, loss = 0;  // pull: dloss / d(squared distance)

  // 2. the angles of its triangle with each m
  for (int64_t m0 = 0; c.angle_weight != 0 && m0 < n; m0 += kPassing) {
    __syncthreads();
    load_passing(near_s, c.gram_s, first_a, first_b, m0, n);
    load_passing(near_t, c.gram_t, first_a, first_b, m0, n);
    __syncthreads();
#pragma unroll 2
    for (int m = 0; m < kPassing; ++m) {
      A r_a, r_b, q_a, q_b;
      const Cosines<A> x = cosines(s, near_s, in_a, in_b, m, r_a, r_b);
      const Cosines<A> y = cosines(t, near_t, in_a, in_b, m, q_a, q_b);
      const A difference = x.at_m - y.at_m, h = clamp_to_1(difference);
      loss += h * (difference - h / 2);
      const A turn = clamp_to_1(x.at_a - y.at_a) * (r_a - s.inverse * x.at_a) +
                     clamp_to_1(x.at_b - y.at_b) * (r_b - s.inverse * x.at_b);
      pull += s.inverse * turn - r_a * r_b * h;
    }
  }
  pull *= c.angle_weight;

  // 3. the distance
  if (c.distance_weight != 0) {
    const A by_s = inverse_mean(row_sum(c.sums, n), n);
    const A by_t = inverse_mean(row_sum(c.sums + n, n), n);
    const A pairs = max(static_cast<A>(n) * static_cast<A>(n - 1), A{1});
    const A mean_slope = row_sum(c.sums + 3 * n, n) / pairs;
    const A slope =
        clamp_to_1(unfused_product(s.length, by_s) - unfused_product(t.length, by_t)) - mean_slope;
    pull += c.distance_weight * by_s * slope * s.inverse;
  }

  // 4. both halves
  loss = block_sum<kThreads>(live ? loss : A{0});
  if (threadIdx.x == 0) *part = diagonal ? loss : 2 * loss;
  if (!live) return;
  pull = a == b ? A{0} : -pull;
  c.grad[a * n + b] = pull;
  // a tile on the diagonal holds both halves, one of which is enough
  if (!diagonal) c.grad[b * n + a] = pull;
}

// The diagonal, with which rows sum to 0; and the loss.
template <class A>
__global__ void __launch_bounds__(kThreads) rkd_finish_kernel(Call<A> c, int64_t parts) {
  const int64_t i = blockIdx.x;
  const A sum = row_sum(c.grad + i * c.n, c.n);
  if (threadIdx.x == 0) c.grad[i * (c.n + 1)] = -sum;
  if (i != 0) return;
  A loss = 0;
  if (c.distance_weight != 0) loss += row_sum(c.sums + 2 * c.n, c.n) * c.distance_weight;
  if (c.angle_weight != 0) loss += row_sum(c.parts, parts) * c.angle_weight;
  if (threadIdx.x == 0) *c.loss = loss;
}

template <class A>
std::tuple<Tensor, Tensor> run(const Tensor& gram_s, const Tensor& gram_t, double distance_weight,
                               double angle_weight) {
  const int64_t n = gram_s.size(0), tiles = ceil_div(n, kSide);
  if (n == 0) {
    return {torch::stable::new_zeros(gram_s, {}), torch::stable::new_empty(gram_s, {0, 0})};
  }
  Tensor loss = torch::stable::new_empty(gram_s, {});
  Tensor grad = torch::stable::new_empty(gram_s, {n, n});
  Tensor sums = torch::stable::new_empty(gram_s, {4, n});
  Tensor parts = torch::stable::new_empty(gram_s, {tiles, tiles});
  const double pairs = static_cast<double>(n) * n;
  const Call<A> c{gram_s.const_data_ptr<A>(),
                  gram_t.const_data_ptr<A>(),
                  n,
                  static_cast<A>(distance_weight / pairs),
                  static_cast<A>(angle_weight / (pairs * n)),
                  sums.mutable_data_ptr<A>(),
                  parts.mutable_data_ptr<A>(),
                  grad.mutable_data_ptr<A>(),
                  loss.mutable_data_ptr<A>()};
  const cudaStream_t stream = current_stream(gram_s);
  const auto rows = static_cast<unsigned>(n), side = static_cast<unsigned>(tiles);
  if (c.distance_weight != 0) {
    rkd_mean_kernel<A><<<rows, kThreads, 0, stream>>>(c);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    rkd_distance_kernel<A><<<rows, kThreads, 0, stream>>>(c);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  rkd_pairs_kernel<A><<<dim3(side, side), kThreads, 0, stream>>>(c);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  rkd_finish_kernel<A><<<rows, kThreads, 0, stream>>>(c, tiles * tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {std::move(loss), std::move(grad)};
}

std::tuple<Tensor, Tensor> rkd_fwd_grad(const Tensor& gram_s, const Tensor& gram_t,
                                        double distance_weight, double angle_weight) {
  const torch::stable::accelerator::DeviceGuard guard(gram_s.get_device_index());
  return visit_grams(gram_s, gram_t, [&]<class A>(const Tensor& s, const Tensor& t) {
    return run<A>(s, t, distance_weight, angle_weight);
  });
}

}  // namespace
}  // namespace vitkd::rkd

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA, m) {
  m.impl("rkd_fwd_grad", TORCH_BOX(&vitkd::rkd::rkd_fwd_grad));
}
