// What the int8 convolutions check of their arguments before a kernel sees pointers: the same
// words as in reference/int8.py.
#pragma once

#include <cmath>
#include <sstream>
#include <string>

#include "binding/common.h"
#include "math/depthwise.h"
#include "math/requantize.h"

namespace vitkd::int8 {

template <class Values>
std::string list_of(const Values& values) {
  std::ostringstream out;
  for (const int64_t value : values) out << (out.tellp() ? ", " : "") << value;
  return "[" + out.str() + "]";
}

template <class Values>
void expect_within(const char* op, const char* what, const Values& values, int64_t low,
                   int64_t high) {
  for (const int64_t value : values) {
    STD_TORCH_CHECK(low <= value && value <= high, op, ": ", what, ": expected ", low, " to ", high,
                    ", got ", list_of(values));
  }
}

// The tensors of a call, checked and contiguous.
struct Operands {
  Tensor x, weight, bias, multiplier;

  // x [..., in], weight with `in` innermost and its outputs along out_dim
  Operands(const char* op, const char* x_form, const Tensor& x_in, const char* weight_form,
           const Tensor& weight_in, int64_t out_dim, const Tensor& bias_in,
           const Tensor& multiplier_in)
      : x(x_in), weight(weight_in), bias(bias_in), multiplier(multiplier_in) {
    expect(op, "x", x, ScalarType::Byte, x_form);
    expect(op, "weight", weight, ScalarType::Char, weight_form);
    expect(op, "bias", bias, ScalarType::Int, "C");
    expect(op, "multiplier", multiplier, ScalarType::Float, "C");
    STD_TORCH_CHECK(x.size(x.dim() - 1) == weight.size(weight.dim() - 1), op,
                    ": weight: expected the channels of x ", shape_of(x), ", got ",
                    shape_of(weight));
    STD_TORCH_CHECK(weight.numel() > 0, op, ": weight: expected no empty dimension, got ",
                    shape_of(weight));
    for (const auto& [name, per_channel] :
         {std::pair{"bias", &bias}, {"multiplier", &multiplier}}) {
      STD_TORCH_CHECK(per_channel->size(0) == weight.size(out_dim), op, ": ", name,
                      ": expected the channels of weight ", shape_of(weight), ", got ",
                      shape_of(*per_channel));
    }
    for (const auto& [name, other] :
         {std::pair{"weight", &weight}, {"bias", &bias}, {"multiplier", &multiplier}}) {
      STD_TORCH_CHECK(other->is_cuda() == x.is_cuda() && other->get_device() == x.get_device(), op,
                      ": ", name, ": expected the device of x, got another");
    }
    for (Tensor* each : {&x, &weight, &bias, &multiplier}) *each = torch::stable::contiguous(*each);
  }

 private:
  static void expect(const char* op, const char* name, const Tensor& x, ScalarType dtype,
                     const std::string& form) {
    const int64_t rank = std::count(form.begin(), form.end(), ',') + 1;
    const bool ranks = form[0] == '.' ? x.dim() > 0 : x.dim() == rank;
    STD_TORCH_CHECK(x.scalar_type() == dtype && ranks, op, ": ", name, ": expected ",
                    torch::headeronly::toString(dtype), " [", form, "], got ",
                    torch::headeronly::toString(x.scalar_type()), " ", shape_of(x));
  }
};

inline Requantize checked_requantize(const char* op, int64_t zero_point, int64_t lo, int64_t hi,
                                     std::optional<double> hardswish_scale) {
  expect_within(op, "y_zero_point", std::initializer_list{zero_point}, 0, 255);
  STD_TORCH_CHECK(0 <= lo && lo <= hi && hi <= 255, op,
                  ": lo, hi: expected 0 <= lo <= hi <= 255, got ", lo, ", ", hi);
  const auto k = static_cast<float>(hardswish_scale.value_or(0));
  STD_TORCH_CHECK(!hardswish_scale || (std::isnormal(k) && k > 0), op,
                  ": hardswish_scale: expected none or a normal positive float32 number, got ",
                  hardswish_scale.value_or(0));
  return {static_cast<int32_t>(zero_point), static_cast<int32_t>(lo), static_cast<int32_t>(hi), k};
}

inline DepthwiseShape checked_depthwise(const Operands& on, const std::vector<int64_t>& stride,
                                        const std::vector<int64_t>& padding, int64_t zero_point) {
  const char* const op = "int8_dwconv";
  const Tensor &x = on.x, &weight = on.weight;
  expect_within(op, "x_zero_point", std::initializer_list{zero_point}, 0, 255);
  expect_within(op, "map of x", std::initializer_list{x.size(1), x.size(2)}, 1, 1 << 30);
  expect_within(op, "kernel of weight", std::initializer_list{weight.size(0), weight.size(1)}, 1,
                31);
  expect_within(op, "stride", stride, 1, 65535);
  expect_within(op, "padding", padding, 0, 65535);
  const auto at = [](const std::vector<int64_t>& v, int i) { return static_cast<int>(v[i]); };
  DepthwiseShape s{};
  s.batch = x.size(0), s.height = x.size(1), s.width = x.size(2), s.channels = x.size(3);
  s.kernel_h = static_cast<int>(weight.size(0)), s.kernel_w = static_cast<int>(weight.size(1));
  s.stride_h = at(stride, 0), s.stride_w = at(stride, 1);
  s.top = at(padding, 0), s.bottom = at(padding, 1);
  s.left = at(padding, 2), s.right = at(padding, 3);
  s.padding_byte = static_cast<uint8_t>(zero_point);
  STD_TORCH_CHECK(
      s.height + s.top + s.bottom >= s.kernel_h && s.width + s.left + s.right >= s.kernel_w, op,
      ": x: expected at least the kernel of weight ", shape_of(weight), ", got ", shape_of(x),
      " with padding ", list_of(padding));
  return s;
}

}  // namespace vitkd::int8
