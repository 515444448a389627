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
#include "binding/int8_call.h"
#include "cuda/common.cuh"

namespace vitkd::int8 {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4;      // outputs of a thread along a row
constexpr int kBlockWords = 64;  // most words of channels in a block

// The rows of x under a thread's outputs are taken in groups of four, the last of what is left.
template <int kKernel, int kStride>
struct Tile {
  static constexpr int kRows = kStride == 1 ? 2 : 1;
  static constexpr int kInRows = (kRows - 1) * kStride + kKernel;
  static constexpr int kInColumns = (kColumns - 1) * kStride + kKernel;
  static constexpr int kGroups = (kInRows + 3) / 4;
  static constexpr int kTaps = kKernel * kRows * kGroups;  // uint4 per word of channels
  static __host__ __device__ constexpr int rows_of(int group) {
    return kInRows - 4 * group < 4 ? kInRows - 4 * group : 4;
  }
};

struct Place {
  int image, row_tile, column_tile;
};

struct Call {
  const char* x;            // [batch, height, width, words] of 4 channels
  const uint32_t* weight;   // [kernel, kernel, words]
  const int32_t* bias;      // [4 words]
  const float* multiplier;  // [4 words]
  char* y;                  // [batch, out_height, out_width, words]
  int batch, height, width, words, out_height, out_width, top, left;
  int pixel, row, out_row;  // bytes
  uint32_t padding;         // four times the byte
  int block_words;          // of a block
  int column_tiles, row_tiles;
  Requantize requantize;

  __device__ Place place(unsigned tile) const {
    const unsigned rest = tile / column_tiles, image = rest / row_tiles;
    return {static_cast<int>(image), static_cast<int>(rest - image * row_tiles),
            static_cast<int>(tile - rest * column_tiles)};
  }
  // no division: a step is less than a map in each direction
  __device__ void advance(Place& at, const Place& step) const {
    at.column_tile += step.column_tile;
    if (at.column_tile >= column_tiles) at.column_tile -= column_tiles, ++at.row_tile;
    at.row_tile += step.row_tile;
    if (at.row_tile >= row_tiles) at.row_tile -= row_tiles, ++at.image;
    at.image += step.image;
  }
};

__device__ __forceinline__ bool inside(int at, int size) {
  return static_cast<unsigned>(at) < static_cast<unsigned>(size);
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

// taps[column of the kernel][output row][group][word of channels], a component per channel
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
}

// grid: (channels / block_words, tiles)
template <int kKernel, int kStride, bool kHardswish>
__global__ void __launch_bounds__(kThreads, 2) int8_dwconv_kernel(const __grid_constant__ Call c) {
  using T = Tile<kKernel, kStride>;
  extern __shared__ uint4 taps[];
  const int first_word = blockIdx.x * c.block_words;
  build_taps<kKernel, kStride>(c, first_word, taps);
  __syncthreads();

  // 1. this thread's channels, and its first tile
  const int per_block = kThreads / c.block_words;
  const int lane = threadIdx.x % c.block_words, word = first_word + lane;
  if (word >= c.words || static_cast<int>(threadIdx.x) >= per_block * c.block_words) return;
  int32_t bias[4];
  float multiplier[4];
#pragma unroll
  for (int channel = 0; channel < 4; ++channel) {
    bias[channel] = c.bias[4 * word + channel];
    multiplier[channel] = c.multiplier[4 * word + channel];
  }
  const Place step = c.place(gridDim.y * per_block);
  Place at = c.place(blockIdx.y * per_block + threadIdx.x / c.block_words);
  for (; at.image < c.batch; c.advance(at, step)) {
    const int out_row = at.row_tile * T::kRows, out_column = at.column_tile * kColumns;

    // 2. the words under its outputs, transposed
    const int row = out_row * kStride - c.top, column = out_column * kStride - c.left;
    const int64_t first = (static_cast<int64_t>(at.image) * c.height + row) * c.width + column;
    const char* const x = c.x + first * c.pixel + 4 * word;
    uint32_t v[T::kInColumns][T::kGroups][4];
    const auto load = [&]<bool kInside>() {
#pragma unroll
      for (int r = 0; r < T::kInRows; ++r) {
        const char* const from = x + static_cast<int64_t>(r) * c.row;
        const bool there = kInside || inside(row + r, c.height);
#pragma unroll
        for (int i = 0; i < T::kInColumns; ++i) {
          v[i][r / 4][r % 4] = c.padding;
          if (there && (kInside || inside(column + i, c.width))) {
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
#pragma unroll
    for (int i = 0; i < T::kRows * kColumns * 4; ++i) {
      acc[i / 4 / kColumns][i / 4 % kColumns][i % 4] = bias[i % 4];
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

// Any kernel and any channels: one byte of y per thread and step.
__global__ void __launch_bounds__(kThreads)
    int8_dwconv_any_kernel(const __grid_constant__ DepthwiseShape s, int64_t out_height,
                           int64_t out_width, const __grid_constant__ Requantize requant,
                           const uint8_t* x, const int8_t* weight, const int32_t* bias,
                           const float* multiplier, uint8_t* y) {
  const int64_t n = s.batch * out_height * out_width * s.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    const int64_t channel = i % s.channels, pixel = i / s.channels, out_row = pixel / out_width;
    const int64_t column = pixel % out_width * s.stride_w - s.left;
    const int64_t row = out_row % out_height * s.stride_h - s.top;
    const uint8_t* const map = x + out_row / out_height * s.height * s.width * s.channels + channel;
    const int8_t* w = weight + channel;
    int32_t acc = bias[channel];
    for (int64_t r = row; r < row + s.kernel_h; ++r) {
      for (int64_t q = column; q < column + s.kernel_w; ++q, w += s.channels) {
        const bool inside = r >= 0 && r < s.height && q >= 0 && q < s.width;
        acc += *w * (inside ? map[(r * s.width + q) * s.channels] : s.padding_byte);
      }
    }
    y[i] = requantize(acc, multiplier[channel], requant);
  }
}

template <int kKernel, int kStride, bool kHardswish>
void launch(Call c, cudaStream_t stream) {
  using T = Tile<kKernel, kStride>;
  static_assert(T::kTaps * kBlockWords * sizeof(uint4) <= 48 << 10);
  c.row_tiles = static_cast<int>(ceil_div(c.out_height, T::kRows));
  c.column_tiles = static_cast<int>(ceil_div(c.out_width, kColumns));
  const auto groups = static_cast<unsigned>(ceil_div(c.words, kBlockWords));
  c.block_words = static_cast<int>(ceil_div(c.words, groups));

  // as many blocks as fit the chip, each with the same number of tiles
  auto* const kernel = int8_dwconv_kernel<kKernel, kStride, kHardswish>;
  const size_t shared = T::kTaps * c.block_words * sizeof(uint4);
  int at_once = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, kernel, kThreads, shared));
  const int64_t chip = int64_t{at_once} * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t tiles = int64_t{c.batch} * c.row_tiles * c.column_tiles;
  const int64_t blocks = ceil_div(tiles, kThreads / c.block_words);
  const int64_t most = std::clamp<int64_t>(chip / groups, 1, 65535);
  const auto rows = static_cast<unsigned>(ceil_div(blocks, ceil_div(blocks, most)));
  kernel<<<dim3(groups, rows), kThreads, shared, stream>>>(c);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor int8_dwconv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                   const Tensor& multiplier, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, int64_t x_zero_point, int64_t y_zero_point,
                   int64_t lo, int64_t hi, std::optional<double> hardswish_scale) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const char* const op = "int8_dwconv";
  const Operands on(op, "N, H, W, C", x, "kh, kw, C", weight, 2, bias, multiplier);
  const Requantize requantize = checked_requantize(op, y_zero_point, lo, hi, hardswish_scale);
  const DepthwiseShape s = checked_depthwise(on, stride, padding, x_zero_point);
  Tensor y = torch::stable::new_empty(
      on.x, std::vector{s.batch, s.out_height(), s.out_width(), s.channels});
  if (y.numel() == 0) return y;
  const cudaStream_t stream = current_stream(on.x);
  const auto aligned = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 4 == 0;
  };
  const bool square = s.kernel_h == s.kernel_w && s.stride_h == s.stride_w;
  const bool small = s.batch < 1 << 30 && (s.width + s.left + s.right) * s.channels < 1 << 30;
  if (!square || (s.kernel_h != 3 && s.kernel_h != 5) || s.stride_h > 2 || s.channels % 4 != 0 ||
      !small || !aligned(on.x) || !aligned(on.weight)) {
    const int64_t blocks = std::min<int64_t>(ceil_div(y.numel(), kThreads), 1 << 16);
    int8_dwconv_any_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        s, s.out_height(), s.out_width(), requantize, on.x.const_data_ptr<uint8_t>(),
        on.weight.const_data_ptr<int8_t>(), on.bias.const_data_ptr<int32_t>(),
        on.multiplier.const_data_ptr<float>(), y.mutable_data_ptr<uint8_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return y;
  }
  Call c{};
  c.x = static_cast<const char*>(on.x.const_data_ptr());
  c.weight = static_cast<const uint32_t*>(on.weight.const_data_ptr());
  c.bias = on.bias.const_data_ptr<int32_t>();
  c.multiplier = on.multiplier.const_data_ptr<float>();
  c.y = static_cast<char*>(y.mutable_data_ptr());
  c.batch = static_cast<int>(s.batch);
  c.height = static_cast<int>(s.height), c.width = static_cast<int>(s.width);
  c.out_height = static_cast<int>(s.out_height()), c.out_width = static_cast<int>(s.out_width());
  c.top = s.top, c.left = s.left;
  c.pixel = static_cast<int>(s.channels), c.words = c.pixel / 4;
  c.row = c.width * c.pixel, c.out_row = c.out_width * c.pixel;
  c.padding = s.padding_byte * 0x01010101u;
  c.requantize = requantize;
  const auto run = [&]<int kKernel, int kStride>() {
    requantize.hardswish_scale == 0 ? launch<kKernel, kStride, false>(c, stream)
                                    : launch<kKernel, kStride, true>(c, stream);
  };
  if (s.kernel_h == 3) {
    s.stride_h == 1 ? run.template operator()<3, 1>() : run.template operator()<3, 2>();
  } else {
    s.stride_h == 1 ? run.template operator()<5, 1>() : run.template operator()<5, 2>();
  }
  return y;
}

}  // namespace
}  // namespace vitkd::int8

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA, m) {
  m.impl("int8_dwconv", TORCH_BOX(&vitkd::int8::int8_dwconv));
}
