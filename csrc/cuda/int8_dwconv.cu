// The launches of int8_dwconv.cuh for torch.
#include "binding/int8_call.h"
#include "cuda/common.cuh"
#include "cuda/int8_dwconv.cuh"

namespace vitkd::int8 {
namespace {

using namespace dwconv;

template <int kKernel, int kStride, bool kHardswish>
__global__ void __launch_bounds__(kThreads, 2) int8_dwconv_kernel(const __grid_constant__ Call c) {
  convolve<kKernel, kStride, kHardswish>(c);
}

__global__ void __launch_bounds__(kThreads)
    int8_dwconv_any_kernel(const __grid_constant__ PlainCall c) {
  convolve_plainly(c);
}

template <int kKernel, int kStride, bool kHardswish>
void launch(Call c, cudaStream_t stream) {
  auto* const kernel = int8_dwconv_kernel<kKernel, kStride, kHardswish>;
  const Grid grid = grid_of<kKernel, kStride>(c, [&](int shared) {
    int at_once = 0;
    STD_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, kernel, kThreads, shared));
    return int64_t{at_once} * device_attribute(cudaDevAttrMultiProcessorCount);
  });
  kernel<<<dim3(grid.groups, grid.rows), kThreads, grid.shared, stream>>>(c);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor int8_dwconv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                   const Tensor& multiplier, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, int64_t x_zero_point, int64_t y_zero_point,
                   int64_t lo, int64_t hi, std::optional<double> hardswish_scale) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const char* const op = "int8_dwconv";
  const Operands on(op, "N, H, W, C", x, "kh, kw, C", weight, 2, bias, multiplier);
  const Requantize requantize = checked_requantize(op, y_zero_point, lo, hi, hardswish_scale);
  const DepthwiseShape s = checked_depthwise(on, stride, padding, x_zero_point);
  Tensor y = torch::stable::new_empty(
      on.x, std::vector{s.batch, s.out_height(), s.out_width(), s.channels});
  if (y.numel() == 0) return y;
  const cudaStream_t stream = current_stream(on.x);
  const auto aligned = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 4 == 0;
  };
  const bool square = s.kernel_h == s.kernel_w && s.stride_h == s.stride_w;
  const bool small = s.batch < 1 << 30 && (s.width + s.left + s.right) * s.channels < 1 << 30;
  if (!square || (s.kernel_h != 3 && s.kernel_h != 5) || s.stride_h > 2 || s.channels % 4 != 0 ||
      !small || !aligned(on.x) || !aligned(on.weight)) {
    const int64_t blocks = std::min<int64_t>(ceil_div(y.numel(), kThreads), 1 << 16);
    const PlainCall c{s,
                      requantize,
                      on.x.const_data_ptr<uint8_t>(),
                      on.weight.const_data_ptr<int8_t>(),
                      on.bias.const_data_ptr<int32_t>(),
                      on.multiplier.const_data_ptr<float>(),
                      y.mutable_data_ptr<uint8_t>()};
    int8_dwconv_any_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(c);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return y;
  }
  Call c{};
  c.x = static_cast<const char*>(on.x.const_data_ptr());
  c.weight = static_cast<const uint32_t*>(on.weight.const_data_ptr());
  c.bias = on.bias.const_data_ptr<int32_t>();
  c.multiplier = on.multiplier.const_data_ptr<float>();
  c.y = static_cast<char*>(y.mutable_data_ptr());
  c.batch = static_cast<int>(s.batch);
  c.height = static_cast<int>(s.height), c.width = static_cast<int>(s.width);
  c.out_height = static_cast<int>(s.out_height()), c.out_width = static_cast<int>(s.out_width());
  c.top = s.top, c.left = s.left;
  c.pixel = static_cast<int>(s.channels), c.words = c.pixel / 4;
  c.row = c.width * c.pixel, c.out_row = c.out_width * c.pixel;
  c.padding = s.padding_byte * 0x01010101u;
  c.requantize = requantize;
  const auto run = [&]<int kKernel, int kStride>() {
    requantize.hardswish_scale == 0 ? launch<kKernel, kStride, false>(c, stream)
                                    : launch<kKernel, kStride, true>(c, stream);
  };
  if (s.kernel_h == 3) {
    s.stride_h == 1 ? run.template operator()<3, 1>() : run.template operator()<3, 2>();
  } else {
    s.stride_h == 1 ? run.template operator()<5, 1>() : run.template operator()<5, 2>();
  }
  return y;
}

}  // namespace
}  // namespace vitkd::int8

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA, m) {
  m.impl("int8_dwconv", TORCH_BOX(&vitkd::int8::int8_dwconv));
}
