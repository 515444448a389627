// From a product's values to bytes where its output is fine, or the residual is: the last step of
// graph.py's Conv, for a row of pixels that has just been computed and lies near.
#pragma once

#include <cstdint>

#include "int8/kernels/kernels.h"
#include "simd/isa.h"

namespace vitkd::int8 {

constexpr int kFine = 8;  // parts of a level that the second half of a fine activation counts

struct FineCall {
  const float* values = nullptr;  // [pixels, values_pixel]
  int64_t values_pixel = 0;
  const uint8_t* residual = nullptr;  // where there is one
  int64_t residual_pixel = 0;
  bool residual_is_fine = false;
  uint8_t* y = nullptr;
  int64_t y_pixel = 0;
  bool fine = false;  // what y lacks follows it, `channels` further
  int64_t pixels = 0;
  int channels = 0;
};

void finish_fine(Isa isa, const FineCall& call, const Epilogue& epilogue);

}  // namespace vitkd::int8
