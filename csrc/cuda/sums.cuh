// Sums over all rows on the GPU, in double and in a fixed order: blocks add up parts, which a last
// block adds up, so that enough loads are under way at once.
#pragma once

#include <algorithm>

#include "cuda/common.cuh"

namespace vitkd {
namespace {

constexpr int kSumThreads = 256;
constexpr int kSumParts = 256;  // at most, so that the last block has one per thread
constexpr int kSumRows = 8;     // of a thread, where parts are enough

// out[blockIdx.x] = finish(of(i) + ..) over this block's share of 0 .. n - 1
template <class F, class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const F of, int64_t n, T* out, bool last) {
  double sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSumThreads;
#pragma unroll 4
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; i < n; i += step) {
    sum += of(i);
  }
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<T>(last ? of.finish(sum) : sum);
}

template <class F>
struct OfParts {
  const double* parts;
  F of;
  __device__ double operator()(int64_t i) const { return parts[i]; }
  __device__ double finish(double sum) const { return of.finish(sum); }
};

// Of numbers in memory.
template <class A>
struct Numbers {
  const A* at;
  __device__ double operator()(int64_t i) const { return at[i]; }
  __device__ double finish(double sum) const { return sum; }
};

// *out = of.finish(of(0) + .. + of(n - 1)); `like`: for memory on its device.
template <class F, class T>
void sum_of(const F& of, int64_t n, T* out, const Tensor& like) {
  const cudaStream_t stream = current_stream(like);
  const int64_t blocks = std::clamp<int64_t>(ceil_div(n, kSumThreads * kSumRows), 1, kSumParts);
  if (blocks == 1) {
    auto* const kernel = sum_kernel<F, T>;
    kernel<<<1, kSumThreads, 0, stream>>>(of, n, out, true);
  } else {
    const Tensor parts = torch::stable::new_empty(like, {blocks}, ScalarType::Double);
    double* const at = parts.mutable_data_ptr<double>();
    auto* const kernel = sum_kernel<F, double>;
    kernel<<<blocks, kSumThreads, 0, stream>>>(of, n, at, false);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    auto* const last = sum_kernel<OfParts<F>, T>;
    last<<<1, kSumThreads, 0, stream>>>(OfParts<F>{at, of}, blocks, out, true);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace vitkd
