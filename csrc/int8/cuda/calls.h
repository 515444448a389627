// What the engine's CUDA kernels are called with, one structure each, and their names.
//
// An activation is u8 [images, height, width, pixel], pixel = channels rounded up to 16 bytes, so
// that every load and store is whole. Bytes past the channels are anything and meet weights of 0.
// The image alone has pixels of 3 bytes.
#pragma once

#include <cstdint>

#include "math/depthwise.h"
#include "math/requantize.h"

namespace vitkd::int8::cuda {

constexpr int kWarps = 4, kGemmThreads = 32 * kWarps;
constexpr int kSlice = 64;           // bytes of a product's depth that are in flight together
constexpr int kPitch = kSlice + 16;  // from row to row in shared memory: no bank conflicts
constexpr int kStages = 3;           // slices in shared memory
constexpr int kPadOutputs = 64;      // to a multiple of which weights and constants are padded
constexpr int kMapThreads = 256;     // of all other kernels
constexpr int kSumChannels = 64;     // of a block that sums over pixels

// where a product's pixels come from: pixel p of x for pixel p of y; taps; the image's taps
enum class Reads : int { pixels, taps, image };
enum class Finish : int { bytes, hardswish, values, logits };

// y[p, o] = finish(bias[o] + sum over k of taps of pixel p [k] * weight[o, k]): dense, pointwise
// and linear. k runs over the kernel's rows, its columns and the bytes of a pixel of x, four of the
// image's.
struct GemmCall {
  const uint8_t* x;
  const int8_t* weight;      // [outputs padded, depth]; zeros past what there is
  const int32_t* bias;       // [outputs padded]
  const float* multiplier;   // [outputs padded]
  const uint8_t* residual;   // of y's pixels; null: none
  void* y;                   // u8, or float [pixels, outputs] of logits
  int pixels;                // of y, all images together
  int width, height, pixel;  // of x; pixel in bytes
  int out_width, out_height;
  int kernel_w, stride_h, stride_w, top, left;
  int taps;   // bytes of all taps of a pixel
  int depth;  // the same rounded up to 32
  int outputs, y_pixel, residual_pixel;
  unsigned groups;   // of the outputs that a block makes
  uint32_t padding;  // a byte for each channel of the image, else four times the zero point
  Finish finish;
  Requantize requantize;
  // values: with or without a residual, with fine maps or not
  bool fine, residual_is_fine;
  int residual_zero_point;
  float residual_multiplier;
};

// y[i] = to_byte(float(a - z_a) * m_a + float(b - z_b) * m_b)
struct AddCall {
  const uint8_t *a, *b;
  uint8_t* y;
  int64_t words;  // of 16 bytes
  int zero_a, zero_b;
  float multiplier_a, multiplier_b;
  Requantize requantize;
};

// Sums of q - zero_point over each image's pixels, times multiplier: bytes [images, pixel], or
// float [images, channels].
struct SumsCall {
  const uint8_t* x;
  uint8_t* y;
  float* means;  // null: bytes
  int images, pixels, pixel, channels, zero_point;
  float multiplier;
  Requantize requantize;
};

// h[j] = b[j], then for c ascending h[j] = h[j] + float(q[c][j]) * s[j] * x[c]; then what follows
// it in a squeeze-excite.
enum class Gate : int { relu, hardswish, factor };
struct LinearCall {
  const float* x;   // [images, in]
  const int8_t* q;  // [in, out]
  const float *s, *b;
  float* y;  // [images, out]
  int images, in, out;
  Gate gate;
  float ratio;
};

// y = to_byte(float(q - zero_point) * factors[c])
struct ScaleCall {
  const uint8_t* x;
  const float* factors;  // [images, channels]
  uint8_t* y;
  int64_t words;  // of 16 bytes
  int pixels, pixel, channels, zero_point;
  Requantize requantize;
};

// the names of the kernels, the structures that they are called with, and their threads
#define VITKD_INT8_GEMMS(X) X(2, 64) X(2, 32) X(2, 16) X(1, 32) X(1, 16)
#define VITKD_INT8_DEPTHWISE(X) X(3, 1) X(3, 2) X(5, 1) X(5, 2)
#define VITKD_INT8_KERNELS(X)              \
  X(gemm_2_64, GemmCall)                   \
  X(gemm_2_32, GemmCall)                   \
  X(gemm_2_16, GemmCall)                   \
  X(gemm_1_32, GemmCall)                   \
  X(gemm_1_16, GemmCall)                   \
  X(conv_2_64, GemmCall)                   \
  X(conv_2_32, GemmCall)                   \
  X(conv_2_16, GemmCall)                   \
  X(conv_1_32, GemmCall)                   \
  X(conv_1_16, GemmCall)                   \
  X(conv_image, GemmCall)                  \
  X(depthwise_3_1, dwconv::Call)           \
  X(depthwise_3_2, dwconv::Call)           \
  X(depthwise_5_1, dwconv::Call)           \
  X(depthwise_5_2, dwconv::Call)           \
  X(depthwise_3_1_hardswish, dwconv::Call) \
  X(depthwise_3_2_hardswish, dwconv::Call) \
  X(depthwise_5_1_hardswish, dwconv::Call) \
  X(depthwise_5_2_hardswish, dwconv::Call) \
  X(depthwise_any, dwconv::PlainCall)      \
  X(add, AddCall)                          \
  X(sums, SumsCall)                        \
  X(linear, LinearCall)                    \
  X(scale, ScaleCall)

enum class Kernel : int {
#define X(name, call) name,
  VITKD_INT8_KERNELS(X)
#undef X
};
inline constexpr const char* kKernelNames[] = {
#define X(name, call) "vitkd_int8_" #name,
    VITKD_INT8_KERNELS(X)
#undef X
};
constexpr int kKernels = sizeof(kKernelNames) / sizeof(*kKernelNames);

// pixels of a tile whose warps have so many times 16, and its shared memory
VITKD_HD constexpr int gemm_pixels(int rows) { return 16 * kWarps * rows; }
constexpr int gemm_shared(int rows, int outputs) {
  return kStages * (gemm_pixels(rows) + outputs) * kPitch;
}

}  // namespace vitkd::int8::cuda
