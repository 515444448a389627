// Depthwise int8 convolution on the GPU:
//   y[n, i, j, c] = requantise(bias[c] + sum over taps of weight[tap, c] * x[n, i', j', c])
// Layout: NHWC. A thread owns 4 channels (a word) of 2 or 1 output rows by 4 columns: it loads the
// words under its outputs once, transposes four rows of a column into one word per channel (8 byte
// permutes for both rows) and adds four taps per dp4a. Tap words, shifted for each row, lie in
// shared memory. Lanes run over channels: from 128 channels on, a warp's 4-byte loads are one
// 128-byte line. Counted for a 3x3 of stride 1, per output: 2 bytes of memory, 17 instructions (3
// dp4a, 1.5 permutes, 2.3 for loads and addresses, 7.5 to requantise and store; 21 at borders). An
// H200 copies 16.4 bytes and issues 128 lanes per multiprocessor and clock: 8.2 outputs by
// memory, 7.5 by issue. Stride 2 is bound by memory (5 bytes an output), 5x5 by arithmetic (10
// dp4a). Other kernels, and channels that are no multiple of 4: a plain loop, one byte per thread.
#pragma once

#include "cuda/ptx.h"
#include "math/depthwise.h"

namespace vitkd::int8::dwconv {

__device__ __forceinline__ bool inside(int at, int size) {
  return static_cast<unsigned>(at) < static_cast<unsigned>(size);
}

// Which columns lie inside is kept as bits of a register where ptxas would put predicates on the
// stack; on older architectures it would put the bits there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kKeepBits = true;
#else
constexpr bool kKeepBits = false;
#endif

// Bit i: at + i is inside, for i < n.
__device__ __forceinline__ unsigned bits_inside(int at, int n, int size) {
  const unsigned low = (1u << min(max(size - at, 0), n)) - 1;
  return low & ~0u << min(max(-at, 0), n);
}

// Where a group of so many rows leaves the byte of (channel, row) in the channel's word.
__host__ __device__ constexpr int byte_of(int rows, int channel, int row) {
  return rows >= 3 ? row : rows == 2 ? channel % 2 * 2 + row : channel;
}

// v[row], bytes are channels -> v[channel], bytes as byte_of says; the others are anything.
template <int kRows>
__device__ __forceinline__ void transpose(uint32_t (&v)[4]) {
  if constexpr (kRows == 1) {
    v[1] = v[2] = v[3] = v[0];
  } else {
    const uint32_t low = __byte_perm(v[0], v[1], 0x5140), high = __byte_perm(v[0], v[1], 0x7362);
    if constexpr (kRows == 2) {
      v[0] = v[1] = low;
      v[2] = v[3] = high;
    } else if constexpr (kRows == 3) {
      const uint32_t c = v[2];
      v[0] = __byte_perm(low, c, 0x4410);
      v[1] = __byte_perm(low, c, 0x5532);
      v[2] = __byte_perm(high, c, 0x6610);
      v[3] = __byte_perm(high, c, 0x7732);
    } else {
      const uint32_t c = __byte_perm(v[2], v[3], 0x5140), d = __byte_perm(v[2], v[3], 0x7362);
      v[0] = __byte_perm(low, c, 0x5410);
      v[1] = __byte_perm(low, c, 0x7632);
      v[2] = __byte_perm(high, d, 0x5410);
      v[3] = __byte_perm(high, d, 0x7632);
    }
  }
}

// taps[column of the kernel][output row][group][word of channels], a component per channel; behind
// them biases and multipliers, which would otherwise keep 8 registers of those that 5x5 needs
template <int kKernel, int kStride>
__device__ void build_taps(const Call& c, int first_word, uint4* taps) {
  using T = Tile<kKernel, kStride>;
  for (int i = threadIdx.x; i < T::kTaps * c.block_words; i += blockDim.x) {
    const int word = i % c.block_words, at = i / c.block_words;
    const int group = at % T::kGroups, row = at / T::kGroups % T::kRows;
    const int column = at / (T::kGroups * T::kRows);
    uint32_t of_channel[4] = {};
    for (int r = 0; r < T::rows_of(group) && first_word + word < c.words; ++r) {
      const int tap = 4 * group + r - row * kStride;
      if (tap < 0 || tap >= kKernel) continue;
      const uint32_t w = c.weight[(tap * kKernel + column) * c.words + first_word + word];
#pragma unroll
      for (int channel = 0; channel < 4; ++channel) {
        const int to = byte_of(T::rows_of(group), channel, r);
        of_channel[channel] |= (w >> (8 * channel) & 255) << (8 * to);
      }
    }
    taps[i] = make_uint4(of_channel[0], of_channel[1], of_channel[2], of_channel[3]);
  }
  uint4* const biases = taps + T::kTaps * c.block_words;
  for (int i = threadIdx.x; i < min(c.block_words, c.words - first_word); i += blockDim.x) {
    const int32_t* const b = c.bias + 4 * (first_word + i);
    const float* const m = c.multiplier + 4 * (first_word + i);
    biases[i] = make_uint4(b[0], b[1], b[2], b[3]);
    biases[c.block_words + i] = make_uint4(__float_as_uint(m[0]), __float_as_uint(m[1]),
                                           __float_as_uint(m[2]), __float_as_uint(m[3]));
  }
}

// grid: (channels / block_words, tiles)
template <int kKernel, int kStride, bool kHardswish>
__device__ __forceinline__ void convolve(const Call& c) {
  using T = Tile<kKernel, kStride>;
  extern __shared__ uint4 taps[];
  const int first_word = blockIdx.x * c.block_words;
  build_taps<kKernel, kStride>(c, first_word, taps);
  __syncthreads();

  // 1. this thread's channels, and its first tile
  const int per_block = kThreads / c.block_words;
  const int lane = threadIdx.x % c.block_words, word = first_word + lane;
  if (word >= c.words || static_cast<int>(threadIdx.x) >= per_block * c.block_words) return;
  const uint4* const biases = taps + T::kTaps * c.block_words + lane;
  Place at = c.place(blockIdx.y * per_block + threadIdx.x / c.block_words);
  for (; at.image < c.batch; c.advance(at)) {
    const int out_row = at.row_tile * T::kRows, out_column = at.column_tile * kColumns;

    // 2. the words under its outputs, transposed
    const int row = out_row * kStride - c.top, column = out_column * kStride - c.left;
    const int64_t first = (static_cast<int64_t>(at.image) * c.height + row) * c.width + column;
    const char* const x = c.x + first * c.pixel + 4 * word;
    uint32_t v[T::kInColumns][T::kGroups][4];
    const auto load = [&]<bool kInside>() {
      const unsigned bits = kInside ? ~0u : bits_inside(column, T::kInColumns, c.width);
      const auto has = [&](int i) {
        return kInside || (kKeepBits ? (bits >> i & 1) != 0 : inside(column + i, c.width));
      };
#pragma unroll
      for (int r = 0; r < T::kInRows; ++r) {
        const char* const from = x + static_cast<int64_t>(r) * c.row;
        const bool there = kInside || inside(row + r, c.height);
#pragma unroll
        for (int i = 0; i < T::kInColumns; ++i) {
          v[i][r / 4][r % 4] = c.padding;
          if (there && has(i)) {
            const char* const p = from + static_cast<int64_t>(i) * c.pixel;
            v[i][r / 4][r % 4] = __ldg(reinterpret_cast<const uint32_t*>(p));
          }
        }
      }
    };
    const bool all_inside = row >= 0 && row + T::kInRows <= c.height && column >= 0 &&
                            column + T::kInColumns <= c.width;
    all_inside ? load.template operator()<true>() : load.template operator()<false>();
#pragma unroll
    for (int i = 0; i < T::kInColumns; ++i) {
#pragma unroll
      for (int group = 0; group < T::kGroups - 1; ++group) transpose<4>(v[i][group]);
      transpose<T::rows_of(T::kGroups - 1)>(v[i][T::kGroups - 1]);
    }

    // 3. the sums
    int32_t acc[T::kRows][kColumns][4];
    const uint4 b = biases[0];
    const uint32_t bias[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < T::kRows * kColumns * 4; ++i) {
      acc[i / 4 / kColumns][i / 4 % kColumns][i % 4] = static_cast<int32_t>(bias[i % 4]);
    }
#pragma unroll
    for (int i = 0; i < T::kTaps; ++i) {
      const int group = i % T::kGroups, r = i / T::kGroups % T::kRows;
      const int of_kernel = i / (T::kGroups * T::kRows);
      const uint4 w = taps[i * c.block_words + lane];
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
        const uint32_t (&u)[4] = v[q * kStride + of_kernel][group];
        acc[r][q][0] = dot4(u[0], w.x, acc[r][q][0]);
        acc[r][q][1] = dot4(u[1], w.y, acc[r][q][1]);
        acc[r][q][2] = dot4(u[2], w.z, acc[r][q][2]);
        acc[r][q][3] = dot4(u[3], w.w, acc[r][q][3]);
      }
    }

    // 4. the bytes
    const int64_t out = static_cast<int64_t>(at.image) * c.out_height + out_row;
    char* const y = c.y + (out * c.out_width + out_column) * c.pixel + 4 * word;
    const uint4 m = biases[c.block_words];
    const float multiplier[4] = {__uint_as_float(m.x), __uint_as_float(m.y), __uint_as_float(m.z),
                                 __uint_as_float(m.w)};
#pragma unroll
    for (int r = 0; r < T::kRows; ++r) {
      if (out_row + r >= c.out_height) continue;
      char* const to = y + static_cast<int64_t>(r) * c.out_row;
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
        uint32_t bytes = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t byte = requantize<kHardswish>(acc[r][q][i], multiplier[i], c.requantize);
          bytes |= byte << (8 * i);
        }
        char* const p = to + static_cast<int64_t>(q) * c.pixel;
        if (out_column + q < c.out_width) *reinterpret_cast<uint32_t*>(p) = bytes;
      }
    }
  }
}

// One byte of y per thread and step.
__device__ __forceinline__ void convolve_plainly(const PlainCall& c) {
  const DepthwiseShape& s = c.shape;
  const int64_t out_height = s.out_height(), out_width = s.out_width();
  const int64_t n = s.batch * out_height * out_width * s.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    const int64_t channel = i % s.channels, pixel = i / s.channels, out_row = pixel / out_width;
    const int64_t column = pixel % out_width * s.stride_w - s.left;
    const int64_t row = out_row % out_height * s.stride_h - s.top;
    const uint8_t* const map =
        c.x + out_row / out_height * s.height * s.width * s.channels + channel;
    const int8_t* w = c.weight + channel;
    int32_t acc = c.bias[channel];
    for (int64_t r = row; r < row + s.kernel_h; ++r) {
      for (int64_t q = column; q < column + s.kernel_w; ++q, w += s.channels) {
        const bool inside = r >= 0 && r < s.height && q >= 0 && q < s.width;
        acc += *w * (inside ? map[(r * s.width + q) * s.channels] : s.padding_byte);
      }
    }
    c.y[i] = requantize(acc, c.multiplier[channel], c.requantize);
  }
}

}  // namespace vitkd::int8::dwconv
