// The shape of a depthwise convolution, for the operations on every device, and how a GPU tiles it.
#pragma once

#include <cstdint>

#include "math/hd.h"
#include "math/requantize.h"

namespace vitkd::int8 {

struct DepthwiseShape {
  int64_t batch, height, width, channels;
  int kernel_h, kernel_w, stride_h, stride_w;
  int top, bottom, left, right;  // padding
  uint8_t padding_byte;

  VITKD_HD int64_t out_height() const { return (height + top + bottom - kernel_h) / stride_h + 1; }
  VITKD_HD int64_t out_width() const { return (width + left + right - kernel_w) / stride_w + 1; }
};

namespace dwconv {  // cuda/int8_dwconv.cuh

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
  static constexpr int kHeld = kTaps + 2;                  // and of biases, and of multipliers
  static_assert(kHeld * kBlockWords * 16 <= 48 << 10);
  VITKD_HD static constexpr int rows_of(int group) {
    return kInRows - 4 * group < 4 ? kInRows - 4 * group : 4;
  }
};

struct Place {
  int image, row_tile, column_tile;
};

// What a launch for square kernels of 3 or 5, strides of 1 or 2 and whole words of channels needs.
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
  Place step;  // from a thread's tile to its next one
  Requantize requantize;

  VITKD_HD Place place(unsigned tile) const {
    const unsigned rest = tile / column_tiles, image = rest / row_tiles;
    return {static_cast<int>(image), static_cast<int>(rest - image * row_tiles),
            static_cast<int>(tile - rest * column_tiles)};
  }
  // no division: a step is less than a map in each direction
  VITKD_HD void advance(Place& at) const {
    at.column_tile += step.column_tile;
    if (at.column_tile >= column_tiles) at.column_tile -= column_tiles, ++at.row_tile;
    at.row_tile += step.row_tile;
    if (at.row_tile >= row_tiles) at.row_tile -= row_tiles, ++at.image;
    at.image += step.image;
  }
};

// Any kernel and any channels.
struct PlainCall {
  DepthwiseShape shape;
  Requantize requantize;
  const uint8_t* x;         // [batch, height, width, channels]
  const int8_t* weight;     // [kernel_h, kernel_w, channels]
  const int32_t* bias;      // [channels]
  const float* multiplier;  // [channels]
  uint8_t* y;               // [batch, out_height, out_width, channels]
};

struct Grid {
  unsigned groups, rows;  // of blocks
  int shared;             // bytes of a block
};

// The launch of a call: fills in its tiles; occupancy(shared bytes) is how many blocks the chip
// holds. As many blocks as fit it, each with the same number of tiles.
template <int kKernel, int kStride, class Occupancy>
Grid grid_of(Call& c, Occupancy&& occupancy) {
  using T = Tile<kKernel, kStride>;
  const auto ceil_div = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  c.row_tiles = static_cast<int>(ceil_div(c.out_height, T::kRows));
  c.column_tiles = static_cast<int>(ceil_div(c.out_width, kColumns));
  const auto groups = static_cast<unsigned>(ceil_div(c.words, kBlockWords));
  c.block_words = static_cast<int>(ceil_div(c.words, groups));
  const int shared = T::kHeld * c.block_words * 16;
  const int64_t tiles = int64_t{c.batch} * c.row_tiles * c.column_tiles;
  const int64_t blocks = ceil_div(tiles, kThreads / c.block_words);
  int64_t most = occupancy(shared) / groups;
  most = most < 1 ? 1 : most > 65535 ? 65535 : most;
  const auto rows = static_cast<unsigned>(ceil_div(blocks, ceil_div(blocks, most)));
  c.step = c.place(rows * (kThreads / c.block_words));
  return {groups, rows, shared};
}

}  // namespace dwconv
}  // namespace vitkd::int8
