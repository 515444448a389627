// What the engine does to whole maps on a GPU beside convolutions: sums over pixels (pool and
// squeeze-excite), the two layers of a squeeze-excite, its scaling, and additions. All but the
// layers read and write 16 bytes at a time and are bound by memory; the layers are a chain of
// C_in dependent additions, in the order that the file format demands: 8 cycles each.
#pragma once

#include "cuda/ptx.h"
#include "int8/cuda/calls.h"

namespace vitkd::int8::cuda {

// bytes of a word, in order, to f(index, byte)
template <class F>
__device__ __forceinline__ void each_byte(const uint4& word, F&& f) {
  const uint32_t parts[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 16; ++i) f(i, static_cast<int>(parts[i / 4] >> (i % 4 * 8) & 255));
}

__device__ __forceinline__ uint4 load_word(const uint8_t* from, int64_t word) {
  return __ldg(reinterpret_cast<const uint4*>(from) + word);
}

__device__ __forceinline__ void store_word(uint8_t* to, int64_t word, const uint32_t (&parts)[4]) {
  reinterpret_cast<uint4*>(to)[word] = make_uint4(parts[0], parts[1], parts[2], parts[3]);
}

// a thread per word of 16 bytes
__device__ __forceinline__ int64_t own_word() {
  return static_cast<int64_t>(blockIdx.x) * kMapThreads + threadIdx.x;
}

__device__ __forceinline__ void add_maps(const AddCall& c) {
  const int64_t word = own_word();
  if (word >= c.words) return;
  float v[16];
  each_byte(load_word(c.a, word),
            [&](int i, int q) { v[i] = mul(static_cast<float>(q - c.zero_a), c.multiplier_a); });
  uint32_t parts[4] = {};
  each_byte(load_word(c.b, word), [&](int i, int q) {
    const float sum = add(v[i], mul(static_cast<float>(q - c.zero_b), c.multiplier_b));
    parts[i / 4] |= static_cast<uint32_t>(to_byte(sum, c.requantize)) << (i % 4 * 8);
  });
  store_word(c.y, word, parts);
}

__device__ __forceinline__ void scale_map(const ScaleCall& c) {
  const int64_t word = own_word();
  if (word >= c.words) return;
  const int per_pixel = c.pixel / 16;
  const int64_t pixel = word / per_pixel;
  const int channel = static_cast<int>(word - pixel * per_pixel) * 16;
  const float* const factors = c.factors + pixel / c.pixels * c.channels + channel;
  uint32_t parts[4] = {};
  each_byte(load_word(c.x, word), [&](int i, int q) {
    const float factor = channel + i < c.channels ? __ldg(factors + i) : 0.0f;
    const float v = mul(static_cast<float>(q - c.zero_point), factor);
    parts[i / 4] |= static_cast<uint32_t>(to_byte(v, c.requantize)) << (i % 4 * 8);
  });
  store_word(c.y, word, parts);
}

// A block: 64 channels of an image, four words of 16 bytes; 64 of its pixels at a time.
// grid: (channels / 64, images)
__device__ __forceinline__ void sum_pixels(const SumsCall& c) {
  constexpr int kWords = kSumChannels / 16, kPixels = kMapThreads / kWords;
  constexpr int kWarps = kMapThreads / 32;
  __shared__ int32_t of_warps[kWarps * kSumChannels];
  const int word = threadIdx.x % kWords, first = blockIdx.x * kSumChannels;
  const int channel = first + word * 16, image = blockIdx.y;
  int32_t sums[16] = {};
  if (channel < c.pixel) {
    const uint8_t* const x = c.x + static_cast<int64_t>(image) * c.pixels * c.pixel + channel;
#pragma unroll 4
    for (int p = threadIdx.x / kWords; p < c.pixels; p += kPixels) {
      const uint4 four = load_word(x + static_cast<int64_t>(p) * c.pixel, 0);
      const uint32_t parts[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 16; ++i) sums[i] = dot4(parts[i / 4], 1u << (i % 4 * 8), sums[i]);
    }
  }
  // lanes 4 apart have the same channels
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) {
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], mask);
  }
  if (threadIdx.x % 32 < kWords) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      of_warps[threadIdx.x / 32 * kSumChannels + word * 16 + i] = sums[i];
    }
  }
  __syncthreads();
  const int own = first + threadIdx.x;
  if (threadIdx.x >= kSumChannels || own >= c.pixel) return;
  int32_t sum = -c.pixels * c.zero_point;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += of_warps[i * kSumChannels + threadIdx.x];
  if (c.means == nullptr) {
    c.y[static_cast<int64_t>(image) * c.pixel + own] = requantize(sum, c.multiplier, c.requantize);
  } else if (own < c.channels) {
    c.means[static_cast<int64_t>(image) * c.channels + own] =
        mul(static_cast<float>(sum), c.multiplier);
  }
}

// grid: (out / 256, images)
__device__ __forceinline__ void layer(const LinearCall& c) {
  const int j = blockIdx.x * kMapThreads + threadIdx.x;
  if (j >= c.out) return;
  const float* const x = c.x + static_cast<int64_t>(blockIdx.y) * c.in;
  const float s = c.s[j];
  float h = c.b[j];
#pragma unroll 8
  for (int i = 0; i < c.in; ++i) {
    const float w = mul(static_cast<float>(c.q[static_cast<int64_t>(i) * c.out + j]), s);
    h = add(h, mul(w, __ldg(x + i)));
  }
  if (c.gate == Gate::relu) h = fmaxf(h, 0.0f);
  if (c.gate == Gate::hardswish) h = hardswish(h, 1.0f / 6.0f);
  if (c.gate == Gate::factor) {
    h = mul(mul(clamp(add(h, 3.0f), 0.0f, 6.0f), 1.0f / 6.0f), c.ratio);
  }
  c.y[static_cast<int64_t>(blockIdx.y) * c.out + j] = h;
}

}  // namespace vitkd::int8::cuda
