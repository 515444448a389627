// The engine's two convolutions as plain functions of plain arrays, for the torch operations.
// Weights are packed inside the call. Arguments are the caller's to check.
#pragma once

#include <cstdint>

#include "math/depthwise.h"
#include "math/requantize.h"

namespace vitkd::int8 {

// x [batch, height, width, channels], weight [kernel_h, kernel_w, channels], bias and multiplier
// [channels], y [batch, out_height, out_width, channels]; all contiguous
void depthwise(const DepthwiseShape& shape, const Requantize& requantize, const uint8_t* x,
               const int8_t* weight, const int32_t* bias, const float* multiplier, uint8_t* y);

// x [pixels, in], weight [out, in], bias and multiplier [out], y [pixels, out]; all contiguous
void pointwise(int64_t pixels, int64_t in, int64_t out, const Requantize& requantize,
               const uint8_t* x, const int8_t* weight, const int32_t* bias, const float* multiplier,
               uint8_t* y);

}  // namespace vitkd::int8
