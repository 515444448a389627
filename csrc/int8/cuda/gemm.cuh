// Products of the engine on tensor cores (mma.sync m16n8k32, u8 by s8), an implicit GEMM:
//   y[p, o] = finish(bias[o] + sum over k of x[tap k of p] * w[o, k])
// A block makes a tile of 64 or 128 pixels by 16 to 64 outputs; a warp has 16 or 32 of the pixels.
// Slices of 64 bytes of the depth go to shared memory by cp.async, two in flight while one is
// multiplied. 16 bytes are of one tap, as pixels are multiples of them, so a tap outside the map is
// 16 bytes of padding. Outputs are dealt to tensor-core columns such that a thread has neighbouring
// ones: bytes, and those of a residual, move between registers and memory in whole words.
// The image's pixels, of 3 bytes, are gathered byte by byte, four of the depth for each.
#pragma once

#include "cuda/int8_product.cuh"
#include "int8/cuda/calls.h"

namespace vitkd::int8::cuda {

// The upper left tap of a pixel of y.
struct Corner {
  const uint8_t* at = nullptr;  // null: there is no such pixel
  int row = 0, column = 0;
};

template <Reads kReads>
__device__ __forceinline__ Corner corner_of(const GemmCall& c, int pixel) {
  if (pixel >= c.pixels) return {};
  if constexpr (kReads == Reads::pixels) return {c.x + static_cast<int64_t>(pixel) * c.pixel, 0, 0};
  const int out_row = pixel / c.out_width, image = out_row / c.out_height;
  const int row = (out_row - image * c.out_height) * c.stride_h - c.top;
  const int column = (pixel - out_row * c.out_width) * c.stride_w - c.left;
  const int64_t first = (static_cast<int64_t>(image) * c.height + row) * c.width + column;
  return {c.x + first * c.pixel, row, column};
}

__device__ __forceinline__ bool within(const GemmCall& c, const Corner& from, int row, int column) {
  return static_cast<unsigned>(from.row + row) < static_cast<unsigned>(c.height) &&
         static_cast<unsigned>(from.column + column) < static_cast<unsigned>(c.width);
}

// Bytes [k, k + 16) of the taps of some pixels, to rows of shared memory.
template <int kCorners, Reads kReads>
__device__ __forceinline__ void fetch_taps(const GemmCall& c, const Corner (&from)[kCorners], int k,
                                           uint8_t* to, int pitch) {
  if constexpr (kReads == Reads::image) {
    uint32_t words[kCorners][4] = {};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int tap = k / 4 + w, row = tap / c.kernel_w, column = tap - row * c.kernel_w;
      if (4 * tap >= c.taps) break;
      const int64_t offset = (static_cast<int64_t>(row) * c.width + column) * 3;
#pragma unroll
      for (int i = 0; i < kCorners; ++i) {
        words[i][w] = c.padding;
        if (!from[i].at || !within(c, from[i], row, column)) continue;
        const uint8_t* const pixel = from[i].at + offset;
        words[i][w] = __ldg(pixel) | __ldg(pixel + 1) << 8 | __ldg(pixel + 2) << 16;
      }
    }
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
      *reinterpret_cast<uint4*>(to + i * pitch) =
          make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
    }
  } else {
    // what is not fetched meets weights of 0, or is of no pixel
    if (k >= c.taps) return;
    int row = 0, column = 0, byte = k;
    if constexpr (kReads == Reads::taps) {
      const int tap = k / c.pixel;
      byte = k - tap * c.pixel, row = tap / c.kernel_w, column = tap - row * c.kernel_w;
    }
    const int64_t offset = (static_cast<int64_t>(row) * c.width + column) * c.pixel + byte;
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
      if (!from[i].at) continue;
      if (kReads == Reads::pixels || within(c, from[i], row, column)) {
        copy_async<16>(to + i * pitch, from[i].at + offset);
      } else {
        *reinterpret_cast<uint4*>(to + i * pitch) =
            make_uint4(c.padding, c.padding, c.padding, c.padding);
      }
    }
  }
}

// kCount bytes of a row, from a multiple of kCount on
template <int kCount>
__device__ __forceinline__ void store_words(uint8_t* to, const uint32_t (&words)[kCount / 4]) {
  if constexpr (kCount == 16) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) reinterpret_cast<uint32_t*>(to)[i] = words[i];
  }
}

// The values of outputs [first, first + kCount) of a pixel, with what a residual adds, and their
// bytes, fine ones too. Byte by byte where maps are fine: their second halves begin anywhere.
template <int kCount>
__device__ __forceinline__ void finish_values(const GemmCall& c, int64_t pixel, int first,
                                              float (&v)[kCount]) {
  uint8_t* const y = static_cast<uint8_t*>(c.y) + pixel * c.y_pixel + first;
  uint32_t words[kCount / 4] = {};
  if (c.residual) {
    const uint8_t* const b = c.residual + pixel * c.residual_pixel + first;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i % 4 == 0) words[0] = *reinterpret_cast<const uint32_t*>(b + i);
      const int q = static_cast<int>(words[0] >> (i % 4 * 8) & 255);
      const auto centred = static_cast<float>(q - c.residual_zero_point);
      v[i] = add(v[i], mul(centred, c.residual_multiplier));
    }
    if (c.residual_is_fine) {
      const float part = mul(c.residual_multiplier, 0.125f);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (first + i >= c.outputs) break;
        const auto lost = static_cast<float>(b[c.outputs + i] - c.residual_zero_point);
        v[i] = add(v[i], mul(lost, part));
      }
    }
  }
  if (!c.fine) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t byte = to_byte(v[i], c.requantize);
      words[i / 4] = i % 4 == 0 ? byte : words[i / 4] | byte << (i % 4 * 8);
    }
    return store_words<kCount>(y, words);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i >= c.outputs) break;
    const uint8_t byte = to_byte(v[i], c.requantize);
    const auto level = static_cast<float>(byte - c.requantize.zero_point);
    y[i] = byte;
    y[c.outputs + i] = to_byte(mul(add(v[i], -level), 8.0f), c.requantize);
  }
}

// The sums of outputs [first, first + kCount) of a pixel to what `finish` says.
template <int kCount>
__device__ __forceinline__ void finish(const GemmCall& c, int64_t pixel, int first,
                                       const int32_t (&acc)[kCount], const float (&m)[kCount]) {
  if (c.finish == Finish::bytes || c.finish == Finish::hardswish) {
    uint32_t words[kCount / 4] = {};
    const auto all = [&]<bool kHardswish>() {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const uint32_t byte = requantize<kHardswish>(acc[i], m[i], c.requantize);
        words[i / 4] |= byte << (i % 4 * 8);
      }
    };
    c.finish == Finish::bytes ? all.template operator()<false>() : all.template operator()<true>();
    store_words<kCount>(static_cast<uint8_t*>(c.y) + pixel * c.y_pixel + first, words);
    return;
  }
  float v[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = mul(static_cast<float>(acc[i]), m[i]);
  if (c.finish == Finish::values) return finish_values<kCount>(c, pixel, first, v);
  float* const logits = static_cast<float*>(c.y) + pixel * c.outputs + first;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i < c.outputs) logits[i] = v[i];
  }
}

// grid: tiles of pixels x groups of kOutputs; those of a tile side by side, for the cache
template <int kRows, int kOutputs, Reads kReads>
__device__ __forceinline__ void multiply_tile(const GemmCall& c) {
  constexpr int kPixels = gemm_pixels(kRows), kStage = (kPixels + kOutputs) * kPitch;
  constexpr int kColumns = kOutputs / 8;         // tensor-core tiles of 8 outputs
  constexpr int kNeighbours = kOutputs / 4;      // outputs of a thread
  constexpr int kChunks = kSlice / 16;           // of a row of a slice
  constexpr int kStep = kGemmThreads / kChunks;  // rows from one of a thread's copies to the next
  constexpr int kCorners = kPixels / kStep;
  extern __shared__ __align__(16) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunk = threadIdx.x % kChunks, row_of_copy = threadIdx.x / kChunks;
  const int tile = static_cast<int>(blockIdx.x / c.groups);
  const int first_pixel = tile * kPixels;
  const int first_output = static_cast<int>(blockIdx.x - tile * c.groups) * kOutputs;
  const int slices = (c.depth + kSlice - 1) / kSlice;

  // 1. what this thread fetches. The thread with tensor-core columns 2 t and 2 t + 1 of every tile
  // shall own outputs kNeighbours t .. + kNeighbours - 1, two from each tile
  Corner corners[kCorners];
#pragma unroll
  for (int i = 0; i < kCorners; ++i) {
    corners[i] = corner_of<kReads>(c, first_pixel + row_of_copy + i * kStep);
  }
  int fetched = 0;
  const auto fetch = [&] {
    const int k = fetched * kSlice + chunk * 16;
    if (fetched < slices && k < c.depth) {
      uint8_t* const stage = shared + fetched % kStages * kStage + chunk * 16;
      fetch_taps<kCorners, kReads>(c, corners, k, stage + row_of_copy * kPitch, kStep * kPitch);
      for (int output = row_of_copy; output < kOutputs; output += kStep) {
        const int t = output / kNeighbours, i = output % kNeighbours;
        const int column = i / 2 * 8 + t * 2 + i % 2;
        copy_async<16>(stage + (kPixels + column) * kPitch,
                       c.weight + static_cast<int64_t>(first_output + output) * c.depth + k);
      }
    }
    ++fetched;
    commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch();

  // 2. the sums
  const int own = first_output + lane % 4 * kNeighbours;  // the first of a thread's outputs
  int32_t acc[kRows][kColumns][4];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int2 b = __ldg(reinterpret_cast<const int2*>(c.bias + own) + i);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      acc[row][i][0] = acc[row][i][2] = b.x;
      acc[row][i][1] = acc[row][i][3] = b.y;
    }
  }
  for (int slice = 0; slice < slices; ++slice) {
    wait_for_all_but<kStages - 2>();
    __syncthreads();  // the slice is there for all, and the one before it is free again
    fetch();
    const uint8_t* const stage = shared + slice % kStages * kStage;
    const int steps = min(kSlice, c.depth - slice * kSlice) / 32;
    multiply_slice<kSlice / 32>(acc, stage + warp * 16 * kRows * kPitch, kPitch,
                                stage + kPixels * kPitch, kPitch, steps);
  }
  wait_for_all_but<0>();

  // 3. the bytes: a thread has rows lane / 4 and lane / 4 + 8 of each 16
  const bool logits = c.finish == Finish::logits;
  if (own >= (logits || c.fine ? c.outputs : c.y_pixel)) return;
  float m[kNeighbours];
#pragma unroll
  for (int i = 0; i < kNeighbours; ++i) m[i] = __ldg(c.multiplier + own + i);
#pragma unroll
  for (int row = 0; row < 2 * kRows; ++row) {
    const int64_t pixel = first_pixel + warp * 16 * kRows + row * 8 + lane / 4;
    if (pixel >= c.pixels) break;
    int32_t sums[kNeighbours];
#pragma unroll
    for (int i = 0; i < kNeighbours; ++i) sums[i] = acc[row / 2][i / 2][row % 2 * 2 + i % 2];
    finish<kNeighbours>(c, pixel, own, sums, m);
  }
}

}  // namespace vitkd::int8::cuda
