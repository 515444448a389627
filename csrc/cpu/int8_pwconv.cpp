// Pointwise int8 convolution on the CPU, by the engine's kernels; pixels are spread over torch's
// threads. The bytes do not depend on their number.
#include "binding/int8_call.h"
#include "int8/kernels/plain.h"

namespace vitkd::int8 {
namespace {

Tensor int8_pwconv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                   const Tensor& multiplier, int64_t y_zero_point, int64_t lo, int64_t hi,
                   std::optional<double> hardswish_scale) {
  const char* const op = "int8_pwconv";
  const Operands on(op, "..., C_in", x, "C_out, C_in", weight, 0, bias, multiplier);
  const Requantize requantize = checked_requantize(op, y_zero_point, lo, hi, hardswish_scale);
  const int64_t in = on.weight.size(1), out = on.weight.size(0);
  std::vector<int64_t> shape(on.x.sizes().begin(), on.x.sizes().end());
  shape.back() = out;
  Tensor y = torch::stable::new_empty(on.x, shape);
  // each range packs the weights, which takes as long as some hundred pixels
  torch::stable::parallel_for(0, on.x.numel() / in, 2048, [&](int64_t begin, int64_t end) {
    pointwise(end - begin, in, out, requantize, on.x.const_data_ptr<uint8_t>() + begin * in,
              on.weight.const_data_ptr<int8_t>(), on.bias.const_data_ptr<int32_t>(),
              on.multiplier.const_data_ptr<float>(), y.mutable_data_ptr<uint8_t>() + begin * out);
  });
  return y;
}

}  // namespace
}  // namespace vitkd::int8

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU, m) {
  m.impl("int8_pwconv", TORCH_BOX(&vitkd::int8::int8_pwconv));
}
