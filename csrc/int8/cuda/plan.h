// The launches of a graph on a GPU: one kernel per node, four for a squeeze-excite; activations of
// a batch side by side in one arena, first fit by lifetime. Everything is computed here, on the
// CPU; session.h gives it memory and a device.
#pragma once

#include <cstdint>
#include <functional>
#include <variant>
#include <vector>

#include "int8/cuda/calls.h"
#include "int8/graph.h"

namespace vitkd::int8::cuda {

struct Launch {
  int layer;
  Kernel kernel;
  unsigned grid_x, grid_y;
  int threads, shared;  // of a block; shared in bytes
  std::variant<GemmCall, dwconv::Call, dwconv::PlainCall, AddCall, SumsCall, LinearCall, ScaleCall>
      call;
};

// Where the device has what the launches read and write.
struct Memory {
  const uint8_t* constants = nullptr;
  const uint8_t* images = nullptr;  // [batch, size, size, 3]
  uint8_t* arena = nullptr;
  float* logits = nullptr;  // [batch, classes]
};

// How large the device is.
struct Chip {
  int multiprocessors = 0;
  // blocks of a kernel that a multiprocessor holds, with so many bytes of shared memory each
  std::function<int(Kernel, int threads, int shared)> blocks_at_once;
};

struct Layer {
  Node node;  // without its arrays
  Shape in, out;
  int top = 0, left = 0;  // padding
  int kernel_h = 1, kernel_w = 1;
  int outputs = 0;       // channels that are computed: fine maps have twice as many
  int pixel = 0;         // bytes of an output pixel
  float multiplier = 0;  // of sums over pixels
  // in the constants; squeeze-excite: weight and weight_2, scales and biases of its layers
  size_t weight = 0, bias = 0, multipliers = 0, weight_2 = 0, bias_2 = 0, multipliers_2 = 0;
  int middle = 0;               // squeeze-excite: channels between its layers
  size_t offset = 0;            // of the output, in an arena of one image
  size_t scratch = 0;           // squeeze-excite: of its floats
  int64_t macs = 0, bytes = 0;  // per image; of maps, each read and written once
  int64_t weight_bytes = 0;

  size_t scratch_bytes() const;
};

class Plan {
 public:
  Plan(const Graph& graph, int image_size);  // throws GraphError; borrows nothing

  int classes() const { return layers.back().out.channels; }
  // The launches of a batch. Arenas of a batch are batch times as large as of one image.
  std::vector<Launch> launches(int batch, const Memory& at, const Chip& chip) const;

  const int image_size;
  std::vector<Layer> layers;
  std::vector<uint8_t> constants;  // to be copied to the device
  size_t arena = 0;                // bytes for an image

 private:
  void pack(const Node& node, Layer& layer);
  void place();
  template <class T>
  size_t keep(const T* rows, int64_t count, int64_t length, int64_t padded_count, int64_t padded);

  uint32_t image_padding_ = 0;
};

}  // namespace vitkd::int8::cuda
