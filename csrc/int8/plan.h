// The execution plan of a graph at one image size and thread count: shapes and padding resolved,
// weights packed, a place in memory for every activation, convolutions fused to chains.
//
// A step is one node or one fused chain. A chain holds convolutions whose intermediate activations
// do not fit the near cache. Its output is computed in strips of rows, and of each intermediate
// activation only the rows that its reader still needs are kept, in a ring buffer. Threads share a
// node by rows or by panels of channels, and a chain by rows.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "int8/graph.h"
#include "int8/kernels/kernels.h"

namespace vitkd::int8 {

struct Options {
  int image_size = 0;
  int threads = 1;
  Isa isa = Isa::scalar;
  bool fuse = true;  // tests: chains change no byte
  // tests: memory is filled with 0xA5 before each call, and threads share the smallest image
  bool poison = false;
};

struct Layer {
  Node node;  // without its arrays
  Shape in, out;
  int top = 0, left = 0;  // padding
  Packed packed;          // convolutions and the classifier; squeeze-excite: its bytes
  Buffer padding;         // a row of the input's padding bytes
  // squeeze-excite: where they are in packed.data, [in][out rounded up to 16]
  size_t b1 = 0, s1 = 0, q1 = 0, b2 = 0, s2 = 0, q2 = 0;
  int middle = 0;             // squeeze-excite: channels between its layers
  float mean_multiplier = 0;  // squeeze-excite and pool
  int64_t pixel = 0;          // bytes of an output pixel
  // a convolution whose output or residual is fine: its products are values, which finish_fine
  // turns into bytes
  bool through_values = false, residual_is_fine = false;
  size_t offset = 0;       // of the output, in the arena or (ring > 0) in a thread's rings
  int ring = 0;            // rows in memory, inside a chain
  bool by_panels = false;  // how threads share it; else by rows
  int images = 1;          // in one output: the head computes several images at once
  int64_t macs = 0;        // per image
  int64_t bytes = 0;       // read and written per image, each once

  size_t activation_bytes() const {
    const size_t rows = ring > 0 ? ring : out.height * images;
    return round_up(rows * out.width * pixel + kSlack, kLine);
  }
};

constexpr int kLongestChain = 16;
constexpr int kImages = 8;  // that the head computes at once

struct Step {
  int first, last;  // nodes
  int strip_rows;
  bool barrier_after;  // all threads finish it before any starts the next step
};

struct Plan {
  // throws GraphError; borrows nothing, and calls `arrays_read` when it needs no array any more
  Plan(const Graph& graph, const Options& options, const std::function<void()>& arrays_read);

  Options options;
  const Kernels& with;
  std::vector<Layer> layers;
  std::vector<Step> steps;
  size_t head = 0;      // the step of the pool and what follows it: products of single pixels
  size_t arena = 0;     // bytes of activations outside chains
  size_t rings = 0;     // bytes of the largest chain's rings, per thread
  Buffer packed;        // what `Layer::packed` points to
  size_t weights = 0;   // bytes packed
  size_t channels = 0;  // of the widest activation
  int64_t macs = 0;     // of one image

  int zero_point(int node) const { return node < 0 ? 0 : layers[node].node.zero_point; }

 private:
  void pack_layer(const Node& node, const std::array<int, 3>& image_padding, Layer& layer);
  void pack_weights();
  void fuse_chains();
  void find_head();
  void split_work();
  bool keeps_apart(int node, int reader) const;
  void plan_memory();
};

}  // namespace vitkd::int8
