// The engine's kernels under names that a driver finds; the build compiles them (fatbin.py), and
// driver.cpp holds the result.
#include "cuda/int8_dwconv.cuh"
#include "int8/cuda/gemm.cuh"
#include "int8/cuda/maps.cuh"

namespace vitkd::int8::cuda {

#define X(rows, outputs)                                                       \
  extern "C" __global__ void __launch_bounds__(kGemmThreads, 3)                \
      vitkd_int8_gemm_##rows##_##outputs(const __grid_constant__ GemmCall c) { \
    multiply_tile<rows, outputs, Reads::pixels>(c);                            \
  }                                                                            \
  extern "C" __global__ void __launch_bounds__(kGemmThreads, 3)                \
      vitkd_int8_conv_##rows##_##outputs(const __grid_constant__ GemmCall c) { \
    multiply_tile<rows, outputs, Reads::taps>(c);                              \
  }
VITKD_INT8_GEMMS(X)
#undef X

extern "C" __global__ void __launch_bounds__(kGemmThreads, 3)
    vitkd_int8_conv_image(const __grid_constant__ GemmCall c) {
  multiply_tile<2, 32, Reads::image>(c);
}

#define X(kernel, stride)                                                                \
  extern "C" __global__ void __launch_bounds__(dwconv::kThreads, 2)                      \
      vitkd_int8_depthwise_##kernel##_##stride(const __grid_constant__ dwconv::Call c) { \
    dwconv::convolve<kernel, stride, false>(c);                                          \
  }                                                                                      \
  extern "C" __global__ void __launch_bounds__(dwconv::kThreads, 2)                      \
      vitkd_int8_depthwise_##kernel##_##stride##_hardswish(                              \
          const __grid_constant__ dwconv::Call c) {                                      \
    dwconv::convolve<kernel, stride, true>(c);                                           \
  }
VITKD_INT8_DEPTHWISE(X)
#undef X

extern "C" __global__ void __launch_bounds__(dwconv::kThreads)
    vitkd_int8_depthwise_any(const __grid_constant__ dwconv::PlainCall c) {
  dwconv::convolve_plainly(c);
}

extern "C" __global__ void __launch_bounds__(kMapThreads)
    vitkd_int8_add(const __grid_constant__ AddCall c) {
  add_maps(c);
}

extern "C" __global__ void __launch_bounds__(kMapThreads)
    vitkd_int8_sums(const __grid_constant__ SumsCall c) {
  sum_pixels(c);
}

extern "C" __global__ void __launch_bounds__(kMapThreads)
    vitkd_int8_linear(const __grid_constant__ LinearCall c) {
  layer(c);
}

extern "C" __global__ void __launch_bounds__(kMapThreads)
    vitkd_int8_scale(const __grid_constant__ ScaleCall c) {
  scale_map(c);
}

}  // namespace vitkd::int8::cuda
