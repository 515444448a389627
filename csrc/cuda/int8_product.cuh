// A slice of a product on tensor cores, u8 by s8, as int8_pwconv.cu and the engine's gemm.cuh have
// it in shared memory: rows of pixels and rows of weights, 16 bytes longer than their content, so
// that ldmatrix has no bank conflicts.
#pragma once

#include "cuda/ptx.h"

namespace vitkd::int8 {

// acc [16 kRows pixels, 8 kColumns outputs] += rows of x times rows of w, 32 bytes in a step, of
// which there are at most kSteps
template <int kSteps, int kRows, int kColumns>
__device__ __forceinline__ void multiply_slice(int32_t (&acc)[kRows][kColumns][4], const uint8_t* x,
                                               int x_pitch, const uint8_t* w, int w_pitch,
                                               int steps) {
  const int lane = threadIdx.x % 32;
  // matrices of x: rows 0-7, 8-15, and these again 16 bytes on
  x += lane % 16 * x_pitch + lane / 16 * 16;
  // of the weights: 8 outputs, 16 bytes on, the next 8 outputs, 16 bytes on
  w += (lane / 16 * 8 + lane % 8) * w_pitch + lane / 8 % 2 * 16;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step >= steps) break;
    uint32_t a[kRows][4];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      load_matrices(a[row], x + row * 16 * x_pitch + step * 32);
    }
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      uint32_t b[4];
      load_matrices(b, w + i * 8 * w_pitch + step * 32);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        multiply(acc[row][i], a[row], b[0], b[1]);
        multiply(acc[row][i + 1], a[row], b[2], b[3]);
      }
    }
  }
}

}  // namespace vitkd::int8
