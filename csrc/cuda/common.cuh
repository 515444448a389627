// What CUDA files share: masks, sums over a warp and a block, and attributes of the device.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "binding/common.h"
#include "cuda/ptx.h"

namespace vitkd {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr unsigned kFullMask = 0xffffffffu;

// Not to be fused with a sum: of equal inputs, differences are 0.
__device__ inline float unfused_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double unfused_product(double a, double b) { return __dmul_rn(a, b); }

// The sum of a warp's numbers, in every lane.
template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kFullMask, x, mask);
  return x;
}

// The sum over a block of kThreads, in every thread; in a fixed order.
template <int kThreads, class A>
__device__ A block_sum(A x) {
  constexpr int kWarps = kThreads / 32;
  __shared__ A warps[kWarps];
  x = warp_sum(x);
  __syncthreads();  // of what a sum before left there
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  if constexpr (kWarps == 32) {
    return warp_sum(warps[threadIdx.x % 32]);
  } else {
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += warps[i];
    return sum;
  }
}

inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Bytes of dynamic shared memory that a block of a kernel may have on the current device, where
// `used` are static. The first call asks for all of them, once and for all: were it for what a
// launch needs, another thread could lower it between that and the launch.
template <class Kernel>
int allowed_shared_memory(Kernel* kernel, int used = 0) {
  static std::mutex one_at_a_time;
  static std::map<std::pair<int, const void*>, int> allowed;
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard lock(one_at_a_time);
  const std::pair key{device, reinterpret_cast<const void*>(kernel)};
  const auto known = allowed.find(key);
  if (known != allowed.end()) return known->second;
  const int bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - used;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  return allowed[key] = bytes;
}

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace vitkd
