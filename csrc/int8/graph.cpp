#include "int8/graph.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace vitkd::int8 {
namespace {

constexpr int kMaxNodes = 4096, kMaxImage = 8192, kMaxStride = 8;
constexpr int64_t kMaxChannels = 65536, kMaxPooled = int64_t{1} << 22;
constexpr int64_t kMaxMap = int64_t{1} << 31;  // bytes
constexpr double kMostValue = 0x1p30;          // before rounding: x86 converts 2^31 to -2^31

class Checker {
 public:
  Checker(const Graph& graph, int image_size) : graph_(graph), size_(image_size) {}

  std::vector<Shape> run() {
    if (size_ < 1 || size_ > kMaxImage) {
      throw GraphError("image_size is " + std::to_string(size_) + "; accepted is 1 to 8192");
    }
    const size_t count = graph_.nodes.size();
    if (count < 1 || count > kMaxNodes) fail("the graph has " + std::to_string(count) + " nodes");
    for (int byte : graph_.padding_bytes) require(byte >= 0 && byte <= 255, "a padding byte");
    for (index_ = 0; index_ < static_cast<int>(count); ++index_) {
      shapes_.push_back(shape_of(graph_.nodes[index_]));
      const Shape& shape = shapes_.back();
      const int64_t bytes = shape.pixels() * (shape.channels + 15);
      if (bytes > kMaxMap) fail("a map of " + std::to_string(bytes) + " bytes at this image size");
      const bool last = index_ + 1 == static_cast<int>(count);
      require(last == (graph_.nodes[index_].op == Op::classifier),
              "the last node, and no other, is the classifier; this");
    }
    return shapes_;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    const bool inside = index_ >= 0 && index_ < static_cast<int>(graph_.nodes.size());
    const std::string where =
        inside ? "node " + std::to_string(index_) + " (" + graph_.nodes[index_].name + "): " : "";
    throw GraphError(where + what);
  }

  void require(bool right, const char* what) const {
    if (!right) fail(std::string(what) + " is wrong");
  }

  template <class T>
  void has_shape(const Array<T>& array, std::vector<int64_t> wanted, const char* name) const {
    if (array.data == nullptr || array.shape != wanted) {
      std::string text;
      for (int64_t dim : wanted) text += (text.empty() ? "" : ", ") + std::to_string(dim);
      fail(std::string(name) + " is not of shape [" + text + "]");
    }
  }

  static bool constant(double value) { return std::isfinite(value) && std::abs(value) < 0x1p40; }

  Shape input(int i) const {
    const int from = graph_.nodes[index_].inputs[i];
    if (from == -1) return {size_, size_, 3};
    require(from >= 0 && from < index_, "an input");
    require(graph_.nodes[from].op != Op::classifier, "an input");
    return shapes_[from];
  }

  int output_size(const Node& node, int axis, int in) const {
    const int kernel = node.kernel(axis), stride = node.stride[axis];
    require(kernel >= 1 && kernel <= kMaxKernel, "the kernel's size");
    require(stride >= 1 && stride <= kMaxStride, "the stride");
    if (node.same) return (in - 1) / stride + 1;
    const int before = node.padding[axis], after = node.padding[axis + 2];
    require(before >= 0 && before < kernel && after >= 0 && after < kernel, "the padding");
    const int room = in + before + after - kernel;
    if (room < 0) fail("its map of " + std::to_string(in) + " is smaller than its kernel");
    return room / stride + 1;
  }

  // |bias| + 255 sum|w| < 2^31, and that times the multiplier < 2^30; returns the largest product
  double check_sums(const Node& node, int out, int64_t per_channel, bool innermost) const {
    double largest = 0;
    has_shape(node.bias, {out}, "bias");
    has_shape(node.multiplier, {out}, "multiplier");
    for (int o = 0; o < out; ++o) {
      int64_t sum = 0;
      for (int64_t i = 0; i < per_channel; ++i) {
        const int w = node.weight.data[innermost ? i * out + o : o * per_channel + i];
        require(w >= -127, "a weight");
        sum += std::abs(w);
      }
      const double most =
          std::abs(double{0} + node.bias.data[o]) + 255.0 * static_cast<double>(sum);
      const float m = node.multiplier.data[o];
      require(most < 0x1p31, "a bias");
      require(std::isnormal(m) && m > 0 && most * m < kMostValue, "a multiplier");
      largest = std::max(largest, most * m);
    }
    return largest;
  }

  Shape shape_of(const Node& node) const {
    const bool two = node.op == Op::add || (node.op == Op::conv && node.residual);
    require(node.inputs.size() == (two ? 2 : 1), "the number of inputs");
    const Shape x = input(0);
    if (node.op != Op::conv) require(node.inputs[0] >= 0, "an input");
    for (int byte : {node.zero_point, node.lo, node.hi}) {
      require(byte >= 0 && byte <= 255, "zero_point, lo or hi");
    }
    require(node.lo <= node.hi, "lo");
    if (node.hardswish) {
      require(constant(node.hardswish_scale) && node.hardswish_scale > 0, "hardswish_scale");
    }
    switch (node.op) {
      case Op::conv:
      case Op::depthwise: {
        const bool dense = node.op == Op::conv;
        require(node.weight.shape.size() == (dense ? 4u : 3u), "the weight's rank");
        const int64_t out = node.weight.shape[dense ? 0 : 2];
        require(out >= 1 && out <= kMaxChannels, "the number of channels");
        const Shape y{output_size(node, 0, x.height), output_size(node, 1, x.width),
                      static_cast<int>(out)};
        const int64_t taps = int64_t{node.kernel(0)} * node.kernel(1);
        if (dense) {
          has_shape(node.weight, {out, node.kernel(0), node.kernel(1), x.channels}, "weight");
        } else {
          has_shape(node.weight, {node.kernel(0), node.kernel(1), x.channels}, "weight");
        }
        const double most = check_sums(node, y.channels, taps * (dense ? x.channels : 1), !dense);
        require(!node.hardswish || most * 6 * node.hardswish_scale < kMostValue, "hardswish_scale");
        if (two) {
          require(!node.hardswish, "residual_multiplier beside hardswish_scale");
          require(most + 255 * std::abs(double{node.residual_multiplier}) < kMostValue,
                  "residual_multiplier");
          require(node.inputs[1] >= 0, "an input");
          require_same(input(1), y);
        }
        return y;
      }
      case Op::add:
        require(node.inputs[1] >= 0, "an input");
        require(255 * (std::abs(double{node.multipliers[0]}) + std::abs(node.multipliers[1])) <
                    kMostValue,
                "a multiplier");
        require_same(input(1), x);
        return x;
      case Op::squeeze_excite: {
        require(node.b1.shape.size() == 1, "the rank of b1");
        const int64_t middle = node.b1.shape[0];
        require(middle >= 1 && middle <= kMaxChannels, "the length of b1");
        has_shape(node.q1, {x.channels, middle}, "q1");
        has_shape(node.s1, {middle}, "s1");
        has_shape(node.b1, {middle}, "b1");
        has_shape(node.q2, {middle, x.channels}, "q2");
        has_shape(node.s2, {x.channels}, "s2");
        has_shape(node.b2, {x.channels}, "b2");
        for (const auto* array : {&node.s1, &node.b1, &node.s2, &node.b2}) {
          const float* end = array->data + array->size();
          require(std::all_of(array->data, end, constant), "a weight");
        }
        require(constant(node.scale) && node.scale > 0, "scale");
        require(node.ratio > 0 && 256 * node.ratio < kMostValue, "ratio");
        require(x.pixels() <= kMaxPooled, "the size of its map");
        return x;
      }
      case Op::pool:
        require(constant(node.ratio) && node.ratio > 0, "ratio");
        require(x.pixels() <= kMaxPooled, "the size of its map");
        return {1, 1, x.channels};
      case Op::classifier: {
        require(x.pixels() == 1, "the size of its map");
        require(node.weight.shape.size() == 2, "the weight's rank");
        const int64_t out = node.weight.shape[0];
        require(out >= 1 && out <= kMaxChannels, "the number of classes");
        has_shape(node.weight, {out, x.channels}, "weight");
        check_sums(node, static_cast<int>(out), x.channels, false);
        return {1, 1, static_cast<int>(out)};
      }
    }
    fail("its operation is unknown");
  }

  void require_same(const Shape& a, const Shape& b) const {
    require(a.height == b.height && a.width == b.width && a.channels == b.channels,
            "the shape of an input");
  }

  const Graph& graph_;
  const int size_;
  int index_ = -1;
  std::vector<Shape> shapes_;
};

}  // namespace

int padding_before(const Node& node, int axis, int size) {
  if (!node.same) return node.padding[axis];
  const int stride = node.stride[axis];
  return std::max((size - 1) / stride * stride + node.kernel(axis) - size, 0) / 2;
}

std::vector<Shape> check(const Graph& graph, int image_size) {
  return Checker(graph, image_size).run();
}

}  // namespace vitkd::int8
