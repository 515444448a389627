// The quantised graph as it comes from a file (vitkd_fast/int8/graph.py states what it means), and
// the checks that make it safe to run: whatever `check` accepts reads and writes only its own
// memory, and no sum or value overflows. They hold for every graph that is saved or loaded.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace vitkd::int8 {

struct GraphError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

constexpr int kMaxKernel = 31, kMaxNodes = 4096;

// Borrowed memory.
template <class T>
struct Array {
  const T* data = nullptr;
  std::vector<int64_t> shape;
  int64_t size() const {
    int64_t n = 1;
    for (int64_t dim : shape) n *= dim;
    return n;
  }
};

enum class Op { conv, depthwise, add, squeeze_excite, pool, classifier };
// as files spell them
inline constexpr std::array kOps{"conv",           "depthwise", "add",
                                 "squeeze_excite", "pool",      "classifier"};

struct Node {
  Op op = Op::conv;
  std::string name;
  std::vector<int> inputs;  // -1: the image

  Array<int8_t> weight;
  Array<int32_t> bias;
  Array<float> multiplier;
  Array<int8_t> q1, q2;  // squeeze_excite
  Array<float> s1, b1, s2, b2;

  std::array<int, 2> stride = {1, 1};
  bool same = false;                          // TensorFlow's padding
  std::array<int, 4> padding = {0, 0, 0, 0};  // top, left, bottom, right
  int zero_point = 0, lo = 0, hi = 255;
  bool hardswish = false, residual = false, hidden_hardswish = false;
  bool fine = false;  // conv: twice as many channels out
  float hardswish_scale = 0, residual_multiplier = 0;
  std::array<float, 2> multipliers = {0, 0};  // add
  double scale = 0;                           // squeeze_excite
  double ratio = 0;                           // squeeze_excite, pool

  int kernel(int axis) const {
    return static_cast<int>(weight.shape[axis + (op == Op::conv ? 1 : 0)]);
  }
};

struct Graph {
  std::vector<Node> nodes;
  std::array<int, 3> padding_bytes = {0, 0, 0};
  int image_size = 0;  // a session may have another
};

struct Shape {
  int height = 0, width = 0, channels = 0;
  int64_t pixels() const { return int64_t{height} * width; }
};

// Padding before an axis of `size`.
int padding_before(const Node& node, int axis, int size);

// "node 3 (blocks.0.conv_pw): ", in printable ASCII and short, for messages.
std::string describe(size_t index, const std::string& name);

// Checks everything and returns each node's output shape; throws GraphError, which says node,
// field, what was expected and what was given.
std::vector<Shape> check(const Graph& graph, int image_size);

}  // namespace vitkd::int8
