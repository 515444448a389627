// DIST on the GPU: math/dist.h. Three kernels, all without atomics on numbers, so that results are
// bitwise the same every time:
//   rows     a block per row: maxima and sums, then moments (the second sweep finds it in cache)
//   columns  a block per 32 classes and chunk of rows: sums relative to the chunk's first row;
//            chunks are added in double, in their order
//   gradient a block per row: sum q g, then q (g - sum)
#include "binding/dist_call.h"
#include "cuda/common.cuh"

namespace vitkd::dist {
namespace {

constexpr int kThreads = 256;  // of a row
constexpr int kColumns = 32;   // classes of a tile
constexpr int kLines = 8;      // rows of it at a time
constexpr int kChunk = 256;

template <class A>
__device__ A load_as(const char* p, ScalarType dtype, int64_t i) {
  switch (dtype) {
    case ScalarType::Half:
      return static_cast<A>(static_cast<float>(reinterpret_cast<const Half*>(p)[i]));
    case ScalarType::BFloat16:
      return static_cast<A>(static_cast<float>(reinterpret_cast<const BFloat16*>(p)[i]));
    case ScalarType::Double:
      return static_cast<A>(reinterpret_cast<const double*>(p)[i]);
    default:
      return static_cast<A>(reinterpret_cast<const float*>(p)[i]);
  }
}

template <class A>
__device__ A block_max(A x) {
  __shared__ A warps[kThreads / 32];
  for (int mask = 16; mask > 0; mask /= 2) x = fmax(x, __shfl_xor_sync(kFullMask, x, mask));
  __syncthreads();  // of what a maximum before left there
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
  for (int i = 1; i < kThreads / 32; ++i) x = fmax(x, warps[i]);
  return x;
}

// The maximum of a row and 1 / sum exp((x - max) / T).
template <class A>
__device__ void softmax_of(const char* p, ScalarType dtype, int64_t n, A inv_t, A& max_x, A& by) {
  A top = std::numeric_limits<A>::lowest(), sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) top = fmax(top, load_as<A>(p, dtype, i));
  max_x = block_max(top);
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    sum += std::exp((load_as<A>(p, dtype, i) - max_x) * inv_t);
  }
  by = 1 / block_sum<kThreads>(sum);
}

template <class A>
__device__ A student_at(const Call<A>& c, const Stats<A>& st, int64_t row, int64_t i) {
  return std::exp((load_as<A>(c.s_row(row), c.s_dtype, i) - st.max_s) * c.inv_t) * st.by_s;
}

template <class A>
__device__ A teacher_at(const Call<A>& c, const Stats<A>& st, int64_t row, int64_t i) {
  return std::exp((load_as<A>(c.t_row(row), c.t_dtype, i) - st.max_t) * c.inv_t) * st.by_t;
}

template <class A>
__global__ void __launch_bounds__(kThreads, std::is_same_v<A, double> ? 1 : 6)
    dist_rows_kernel(const __grid_constant__ Call<A> c) {
  const int64_t row = blockIdx.x;
  Stats<A> st{};
  softmax_of(c.s_row(row), c.s_dtype, c.classes, c.inv_t, st.max_s, st.by_s);
  softmax_of(c.t_row(row), c.t_dtype, c.classes, c.inv_t, st.max_t, st.by_t);
  const A uniform = 1 / static_cast<A>(c.classes);
  A v_q = 0, v_p = 0, cov = 0;
  for (int64_t i = threadIdx.x; i < c.classes; i += kThreads) {
    const A q = student_at(c, st, row, i) - uniform, p = teacher_at(c, st, row, i) - uniform;
    v_q += q * q;
    v_p += p * p;
    cov += q * p;
  }
  st.v_q = block_sum<kThreads>(v_q);
  st.v_p = block_sum<kThreads>(v_p);
  st.c = block_sum<kThreads>(cov);
  if (threadIdx.x == 0) c.save_stats(row, st);
}

// Block [kColumns, kLines]: parts [chunks, 5, classes].
template <class A>
__global__ void __launch_bounds__(kColumns* kLines, 1)
    dist_columns_kernel(const __grid_constant__ Call<A> c, double* parts) {
  __shared__ A sums[5][kLines][kColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * kChunk;
  const int64_t end = min(begin + kChunk, c.rows);
  const bool there = column < c.classes;
  A pivot_q = 0, pivot_p = 0;
  Sums<A> x;
  if (there) {
    const Stats<A> st = c.load_stats(begin);
    pivot_q = student_at(c, st, begin, column);
    pivot_p = teacher_at(c, st, begin, column);
    for (int64_t row = begin + threadIdx.y; row < end; row += kLines) {
      const Stats<A> of = c.load_stats(row);
      add(x, student_at(c, of, row, column) - pivot_q, teacher_at(c, of, row, column) - pivot_p);
    }
  }
  const A values[] = {x.q, x.p, x.qq, x.pp, x.qp};
#pragma unroll
  for (int j = 0; j < 5; ++j) sums[j][threadIdx.y][threadIdx.x] = values[j];
  __syncthreads();
  if (threadIdx.y != 0 || !there) return;
  Sums<A> all;
  for (int line = 0; line < kLines; ++line) {
    all.q += sums[0][line][threadIdx.x];
    all.p += sums[1][line][threadIdx.x];
    all.qq += sums[2][line][threadIdx.x];
    all.pp += sums[3][line][threadIdx.x];
    all.qp += sums[4][line][threadIdx.x];
  }
  const Sums<double> y = unshifted(all, pivot_q, pivot_p, end - begin);
  const double totals[] = {y.q, y.p, y.qq, y.pp, y.qp};
  double* const to = parts + static_cast<int64_t>(blockIdx.y) * 5 * c.classes + column;
#pragma unroll
  for (int j = 0; j < 5; ++j) to[j * c.classes] = totals[j];
}

__global__ void __launch_bounds__(kThreads)
    dist_add_kernel(const double* parts, int64_t chunks, int64_t size, double* columns) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += parts[chunk * size + i];
  columns[i] = sum;
}

template <class A, class S>
__global__ void __launch_bounds__(kThreads, 1) dist_bwd_kernel(const __grid_constant__ Call<A> c) {
  const int64_t row = blockIdx.x, n = c.classes;
  const Stats<A> st = c.load_stats(row);
  const A row_q = c.row_factors[row], row_p = c.row_factors[c.rows + row];
  const A uniform = 1 / static_cast<A>(n);
  const A* const columns = c.column_factors;
  const auto slope_at = [&](int64_t i, A q) {
    return slope(q, teacher_at(c, st, row, i), uniform, row_p, row_q, columns[i], columns[n + i],
                 columns[2 * n + i], columns[3 * n + i]);
  };
  A sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const A q = student_at(c, st, row, i);
    sum += q * slope_at(i, q);
  }
  const A mean = block_sum<kThreads>(sum), by = *c.grad_loss * c.inv_t;
  S* const to = reinterpret_cast<S*>(c.g_row(row));
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const A q = student_at(c, st, row, i);
    to[i] = static_cast<S>(by * q * (slope_at(i, q) - mean));
  }
}

std::tuple<Tensor, Tensor> dist_moments(const Tensor& student, const Tensor& teacher,
                                        double temperature) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  return visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    Setup<A> setup(student, teacher, temperature);
    Call<A>& c = setup.call;
    Tensor stats =
        torch::stable::new_empty(student, std::vector<int64_t>{kStats, c.rows}, kDtype<A>);
    if (c.rows == 0) {
      return {std::move(stats),
              torch::stable::new_zeros(student, std::vector<int64_t>{5, c.classes},
                                       ScalarType::Double)};
    }
    Tensor columns =
        torch::stable::new_empty(student, std::vector<int64_t>{5, c.classes}, ScalarType::Double);
    c.stats = stats.mutable_data_ptr<A>();
    const int64_t chunks = ceil_div(c.rows, kChunk), size = 5 * c.classes;
    Tensor parts =
        torch::stable::new_empty(student, std::vector<int64_t>{chunks, size}, ScalarType::Double);
    double* const of_chunks = parts.mutable_data_ptr<double>();
    const cudaStream_t stream = current_stream(student);
    const auto rows = static_cast<unsigned>(c.rows);
    dist_rows_kernel<A><<<rows, kThreads, 0, stream>>>(c);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const dim3 grid(static_cast<unsigned>(ceil_div(c.classes, kColumns)),
                    static_cast<unsigned>(chunks));
    const dim3 block(kColumns, kLines);
    dist_columns_kernel<A><<<grid, block, 0, stream>>>(c, of_chunks);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const auto blocks = static_cast<unsigned>(ceil_div(size, kThreads));
    dist_add_kernel<<<blocks, kThreads, 0, stream>>>(of_chunks, chunks, size,
                                                     columns.mutable_data_ptr<double>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return {std::move(stats), std::move(columns)};
  });
}

Tensor dist_bwd(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                const Tensor& stats, const Tensor& row_factors, const Tensor& column_factors,
                double temperature) {
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  return visit_accumulator(student, [&]<class A>() -> Tensor {
    Setup<A> setup(student, teacher, temperature);
    Call<A>& c = setup.call;
    const Factors<A> factors(c, stats, row_factors, column_factors, grad_loss);
    Tensor grad = torch::stable::new_empty(student, student.sizes());
    if (c.rows == 0) return grad;
    c.grad = static_cast<char*>(grad.mutable_data_ptr());
    visit_float(c.s_dtype, [&]<class S>() {
      if constexpr (std::is_same_v<S, double> == std::is_same_v<A, double>) {
        const auto rows = static_cast<unsigned>(c.rows);
        const cudaStream_t stream = current_stream(student);
        dist_bwd_kernel<A, S><<<rows, kThreads, 0, stream>>>(c);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    });
    return grad;
  });
}

}  // namespace
}  // namespace vitkd::dist

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA, m) {
  m.impl("dist_moments", TORCH_BOX(&vitkd::dist::dist_moments));
  m.impl("dist_bwd", TORCH_BOX(&vitkd::dist::dist_bwd));
}
