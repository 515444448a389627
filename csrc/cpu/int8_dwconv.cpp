// Depthwise int8 convolution on the CPU, by the engine's kernels; images are spread over torch's
// threads. The bytes do not depend on their number.
#include "binding/int8_call.h"
#include "int8/kernels/plain.h"

namespace vitkd::int8 {
namespace {

Tensor int8_dwconv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                   const Tensor& multiplier, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, int64_t x_zero_point, int64_t y_zero_point,
                   int64_t lo, int64_t hi, std::optional<double> hardswish_scale) {
  const char* const op = "int8_dwconv";
  const Operands on(op, "N, H, W, C", x, "kh, kw, C", weight, 2, bias, multiplier);
  const Requantize requantize = checked_requantize(op, y_zero_point, lo, hi, hardswish_scale);
  const DepthwiseShape shape = checked_depthwise(on, stride, padding, x_zero_point);
  Tensor y = torch::stable::new_empty(
      on.x, std::vector{shape.batch, shape.out_height(), shape.out_width(), shape.channels});
  const int64_t from = shape.height * shape.width * shape.channels;
  const int64_t to = shape.out_height() * shape.out_width() * shape.channels;
  // weights are packed once per range of images
  const int64_t grain = std::max<int64_t>(1, 65536 / to);
  torch::stable::parallel_for(0, shape.batch, grain, [&](int64_t begin, int64_t end) {
    DepthwiseShape part = shape;
    part.batch = end - begin;
    depthwise(part, requantize, on.x.const_data_ptr<uint8_t>() + begin * from,
              on.weight.const_data_ptr<int8_t>(), on.bias.const_data_ptr<int32_t>(),
              on.multiplier.const_data_ptr<float>(), y.mutable_data_ptr<uint8_t>() + begin * to);
  });
  return y;
}

}  // namespace
}  // namespace vitkd::int8

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU, m) {
  m.impl("int8_dwconv", TORCH_BOX(&vitkd::int8::int8_dwconv));
}
