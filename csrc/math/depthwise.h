// The shape of a depthwise convolution, for the operations on every device.
#pragma once

#include <cstdint>

namespace vitkd::int8 {

struct DepthwiseShape {
  int64_t batch, height, width, channels;
  int kernel_h, kernel_w, stride_h, stride_w;
  int top, bottom, left, right;  // padding
  uint8_t padding_byte;

  int64_t out_height() const { return (height + top + bottom - kernel_h) / stride_h + 1; }
  int64_t out_width() const { return (width + left + right - kernel_w) / stride_w + 1; }
};

}  // namespace vitkd::int8
