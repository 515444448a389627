#include "int8/graph.h"

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdio>

namespace vitkd::int8 {
namespace {

constexpr int kMaxImage = 8192, kMaxStride = 8;
constexpr int64_t kMaxChannels = 65536, kMaxPooled = int64_t{1} << 22;
constexpr int64_t kMaxActivation = int64_t{1} << 31;  // bytes
constexpr int64_t kMaxRows = int64_t{1} << 26;        // bytes, of the rows that plans pad with
constexpr double kMaxConstant = 0x1p20, kMaxElement = 0x1p32;
constexpr double kMaxSum = 0x1p31;
constexpr double kMaxValue = 0x1p30;  // before rounding: x86 converts 2^31 to -2^31
constexpr double kMaxHidden = 0x1p100;

std::string text(std::integral auto value) { return std::to_string(value); }

std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.9g", value);
  return digits;
}

constexpr int64_t kAny = -1;  // of a shape

std::string text(const std::vector<int64_t>& shape) {
  std::string all;
  for (int64_t size : shape) all += (all.empty() ? "" : ", ") + (size == kAny ? "any" : text(size));
  return "[" + all + "]";
}

std::string text(const Shape& shape) {
  return text(std::vector<int64_t>{shape.height, shape.width, shape.channels});
}

class Checker {
 public:
  Checker(const Graph& graph, int image_size) : graph_(graph), size_(image_size) {}

  std::vector<Shape> run() {
    const auto count = static_cast<int64_t>(graph_.nodes.size());
    in_range("image_size", size_, 1, kMaxImage);
    in_range("nodes", count, 1, kMaxNodes);
    for (int byte : graph_.padding_bytes) in_range("padding_bytes", byte, 0, 255);
    for (index_ = 0; index_ < count; ++index_) {
      const Node& node = graph_.nodes[index_];
      if ((node.op == Op::classifier) != (index_ + 1 == count)) {
        fail("op", "classifier for the last node, and no other", kOps[static_cast<int>(node.op)]);
      }
      const Shape shape = shape_of(node);
      if (shape.pixels() * (shape.channels + 15) > kMaxActivation) {
        fail("output", "up to " + text(kMaxActivation) + " bytes", text(shape));
      }
      shapes_.push_back(shape);
    }
    return shapes_;
  }

 private:
  [[noreturn]] void fail(const std::string& name, const std::string& expected,
                         const std::string& given) const {
    const std::string where = index_ < 0 ? "" : describe(index_, graph_.nodes[index_].name);
    throw GraphError(where + name + ": expected " + expected + ", got " + given);
  }

  void in_range(const char* name, int64_t value, int64_t least, int64_t most) const {
    if (value < least || value > most) fail(name, text(least) + " to " + text(most), text(value));
  }

  void constant(const char* name, double value, bool positive = false) const {
    if (!(std::abs(value) < kMaxConstant) || (positive && value <= 0)) {
      fail(name, std::string(positive ? "a positive" : "a") + " number under 2^20", text(value));
    }
  }

  template <class T>
  void has_shape(const char* name, const Array<T>& array,
                 const std::vector<int64_t>& expected) const {
    const bool agrees =
        std::equal(array.shape.begin(), array.shape.end(), expected.begin(), expected.end(),
                   [](int64_t size, int64_t wanted) { return wanted == kAny || size == wanted; });
    if (array.data == nullptr || !agrees) fail(name, text(expected), text(array.shape));
  }

  Shape input(int i, bool or_image) const {
    const int from = graph_.nodes[index_].inputs[i];
    if (from == -1 && or_image) return {size_, size_, 3};
    if (from < 0 || from >= index_) {
      fail("inputs", or_image ? "earlier nodes, or -1 for the image" : "earlier nodes", text(from));
    }
    return shapes_[from];
  }

  void same_shape(const Shape& a, const Shape& b) const {
    if (a.height != b.height || a.width != b.width || a.channels != b.channels) {
      fail("inputs", "two of one shape", text(a) + " and " + text(b));
    }
  }

  int output_size(const Node& node, int axis, int in) const {
    in_range("kernel size", node.weight.shape[axis + (node.op == Op::conv ? 1 : 0)], 1, kMaxKernel);
    in_range("stride", node.stride[axis], 1, kMaxStride);
    const int kernel = node.kernel(axis), stride = node.stride[axis];
    if (node.same) return (in - 1) / stride + 1;
    const int before = node.padding[axis], after = node.padding[axis + 2];
    for (int side : {before, after}) in_range("padding", side, 0, kernel - 1);
    const int room = in + before + after - kernel;
    if (room < 0) {
      fail("kernel size", "up to the padded input's size, " + text(in + before + after),
           text(kernel));
    }
    return room / stride + 1;
  }

  // |bias| + 255 sum|w| < 2^31 of each channel, and < 2^30 once multiplied
  void check_sums(const Node& node, int out) const {
    has_shape("bias", node.bias, {out});
    has_shape("multiplier", node.multiplier, {out});
    const bool innermost = node.op == Op::depthwise;
    const int64_t depth = node.weight.size() / out;
    const double activation = node.hardswish ? std::max(1.0, 6.0 * node.hardswish_scale) : 1.0;
    const double residual = node.residual ? 255 * std::abs(double{node.residual_multiplier}) : 0;
    for (int o = 0; o < out; ++o) {
      const int8_t* weight = node.weight.data + (innermost ? o : o * depth);
      int64_t sum = 0;
      int least = 0;
      for (int64_t i = 0; i < depth; ++i) {
        const int w = weight[innermost ? i * out : i];
        least = std::min(least, w);
        sum += std::abs(w);
      }
      const std::string channel = " in channel " + text(o);
      if (least < -127) fail("weight", "-127 to 127", text(least) + channel);
      const double bias = std::abs(static_cast<double>(node.bias.data[o]));
      const double most = bias + 255.0 * static_cast<double>(sum);
      const float m = node.multiplier.data[o];
      if (!(most < kMaxSum)) {
        fail("bias", "|bias| + 255 sum|weight| under 2^31", text(most) + channel);
      }
      if (!std::isnormal(m) || m < 0) {
        fail("multiplier", "normal, finite and positive numbers", text(double{m}) + channel);
      }
      if (!(most * m * activation + residual < kMaxValue)) {
        std::string value = "(|bias| + 255 sum|weight|) * multiplier";
        if (node.hardswish) value += " * max(1, 6 hardswish_scale)";
        if (node.residual) value += " + 255 |residual_multiplier|";
        fail("multiplier", value + " under 2^30", text(most * m * activation + residual) + channel);
      }
    }
  }

  // nothing may overflow: infinity minus infinity is not the same everywhere
  void check_squeeze_excite(const Node& node, int channels) const {
    constant("ratio", node.ratio, true);
    constant("scale", node.scale, true);
    has_shape("b1", node.b1, {kAny});
    const int64_t middle = node.b1.shape[0];
    in_range("length of b1", middle, 1, kMaxChannels);
    has_shape("q1", node.q1, {channels, middle});
    has_shape("s1", node.s1, {middle});
    has_shape("q2", node.q2, {middle, channels});
    has_shape("s2", node.s2, {channels});
    has_shape("b2", node.b2, {channels});
    const auto elements = [&](const char* name, const Array<float>& array) {
      for (int64_t i = 0; i < array.size(); ++i) {
        if (!(std::abs(array.data[i]) < kMaxElement)) {
          fail(name, "finite numbers under 2^32", text(double{array.data[i]}));
        }
      }
    };
    elements("s1", node.s1), elements("b1", node.b1);
    elements("s2", node.s2), elements("b2", node.b2);
    // the most that |b + sum of |q s| x| reaches, x the most of each input
    const auto largest = [](const Array<int8_t>& q, const Array<float>& s, const Array<float>& b,
                            const std::vector<double>& x) {
      std::vector<double> sums(b.data, b.data + b.size());
      for (double& sum : sums) sum = std::abs(sum);
      for (size_t c = 0; c < x.size(); ++c) {
        for (size_t j = 0; j < sums.size(); ++j) {
          const float w = static_cast<float>(q.data[c * sums.size() + j]) * s.data[j];
          sums[j] += x[c] * std::abs(w);
        }
      }
      return sums;
    };
    std::vector<double> hidden =
        largest(node.q1, node.s1, node.b1, std::vector<double>(channels, 256 * node.scale));
    for (double& value : hidden) value *= node.hidden_hardswish ? 6 : 1;
    const std::vector<double> sums = largest(node.q2, node.s2, node.b2, hidden);
    const double most = *std::max_element(sums.begin(), sums.end());
    if (!(most < kMaxHidden)) fail("weights", "sums under 2^100", "up to " + text(most));
  }

  Shape shape_of(const Node& node) {
    const bool two = node.op == Op::add || node.residual;
    if (node.inputs.size() != (two ? 2 : 1)) {
      fail("inputs", two ? "2" : "1", text(node.inputs.size()));
    }
    const Shape x = input(0, node.op == Op::conv);
    in_range("zero_point", node.zero_point, 0, 255);
    in_range("hi", node.hi, 0, 255);
    in_range("lo", node.lo, 0, node.hi);
    switch (node.op) {
      case Op::conv:
      case Op::depthwise: {
        node.op == Op::conv ? has_shape("weight", node.weight, {kAny, kAny, kAny, x.channels})
                            : has_shape("weight", node.weight, {kAny, kAny, x.channels});
        const int64_t out = node.op == Op::conv ? node.weight.shape[0] : x.channels;
        in_range("output channels", out, 1, kMaxChannels);
        if (node.hardswish) constant("hardswish_scale", node.hardswish_scale, true);
        if (node.residual) constant("residual_multiplier", node.residual_multiplier);
        if (node.hardswish && node.residual) {
          fail("residual_multiplier", "no hardswish_scale beside it", "both");
        }
        if (node.hardswish && node.fine) fail("fine", "no hardswish_scale beside it", "both");
        Shape y{output_size(node, 0, x.height), output_size(node, 1, x.width),
                static_cast<int>(out)};
        check_sums(node, y.channels);
        rows_ += int64_t{x.width} * (x.channels + 15);
        if (rows_ > kMaxRows) {
          fail("input", "rows of up to " + text(kMaxRows) + " bytes in all", text(rows_));
        }
        if (two) {
          Shape b = input(1, false);
          if (graph_.nodes[node.inputs[1]].fine && b.channels == 2 * y.channels) b.channels /= 2;
          same_shape(b, y);
        }
        if (node.fine) y.channels *= 2;
        in_range("output channels", y.channels, 1, kMaxChannels);
        return y;
      }
      case Op::add:
        for (float multiplier : node.multipliers) constant("multipliers", multiplier);
        same_shape(input(1, false), x);
        return x;
      case Op::squeeze_excite:
        in_range("input's pixels", x.pixels(), 1, kMaxPooled);
        check_squeeze_excite(node, x.channels);
        return x;
      case Op::pool:
        in_range("input's pixels", x.pixels(), 1, kMaxPooled);
        constant("ratio", node.ratio, true);
        return {1, 1, x.channels};
      case Op::classifier: {
        if (x.pixels() != 1) fail("input", "1 pixel", text(x));
        has_shape("weight", node.weight, {kAny, x.channels});
        in_range("output channels", node.weight.shape[0], 1, kMaxChannels);
        const int out = static_cast<int>(node.weight.shape[0]);
        check_sums(node, out);
        return {1, 1, out};
      }
    }
    fail("op", "a known one", text(static_cast<int>(node.op)));
  }

  const Graph& graph_;
  const int size_;
  int64_t index_ = -1;
  int64_t rows_ = 0;
  std::vector<Shape> shapes_;
};

}  // namespace

int padding_before(const Node& node, int axis, int size) {
  if (!node.same) return node.padding[axis];
  const int stride = node.stride[axis];
  return std::max((size - 1) / stride * stride + node.kernel(axis) - size, 0) / 2;
}

std::string describe(size_t index, const std::string& name) {
  std::string shown;
  for (char c : name.substr(0, 80)) shown += c >= ' ' && c <= '~' ? c : '?';
  if (name.size() > 80) shown.replace(77, 3, "...");
  return "node " + std::to_string(index) + " (" + shown + "): ";
}

std::vector<Shape> check(const Graph& graph, int image_size) {
  return Checker(graph, image_size).run();
}

}  // namespace vitkd::int8
