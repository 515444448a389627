#include "int8/cuda/plan.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace vitkd::int8::cuda {
namespace {

constexpr int64_t kAlign = 256;  // of every place in memory
constexpr int kImagePixel = 4;   // bytes of the depth for a pixel of the image

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

Requantize requantize_of(const Node& n) {
  return {n.zero_point, n.lo, n.hi, n.hardswish ? n.hardswish_scale : 0.0f};
}

struct Tile {
  Kernel pixels, taps;  // by what is read
  int rows, outputs;
};
constexpr Tile kTiles[] = {
#define X(rows, outputs) \
  {Kernel::gemm_##rows##_##outputs, Kernel::conv_##rows##_##outputs, rows, outputs},
    VITKD_INT8_GEMMS(X)
#undef X
};

// Cycles of a multiprocessor, counted: 8 instructions to finish an output, 12 for 16 bytes that
// are fetched, 2 of a warp for 4096 products; or, where it has few blocks, the wait for memory.
double cycles(const Tile& tile, const GemmCall& c, int multiprocessors) {
  const double pixels = gemm_pixels(tile.rows), outputs = tile.outputs, depth = c.depth;
  const double issue = pixels * outputs * 8 + (pixels + outputs) * depth / 16 * 12 +
                       pixels * outputs * depth / 4096 * 64 + 300 * kGemmThreads;
  const int64_t blocks =
      ceil_div(c.pixels, gemm_pixels(tile.rows)) * ceil_div(c.outputs, tile.outputs);
  const auto waves = static_cast<double>(ceil_div(blocks, multiprocessors));
  return std::max(waves * issue / 128, 1500 + depth / kSlice * 300);
}

Launch product(int layer, GemmCall c, const Chip& chip, Reads reads) {
  Tile best{Kernel::conv_image, Kernel::conv_image, 2, 32};
  if (reads != Reads::image) {
    best = *std::min_element(std::begin(kTiles), std::end(kTiles), [&](auto& a, auto& b) {
      return cycles(a, c, chip.multiprocessors) < cycles(b, c, chip.multiprocessors);
    });
  }
  c.groups = static_cast<unsigned>(ceil_div(c.outputs, best.outputs));
  const auto tiles = static_cast<unsigned>(ceil_div(c.pixels, gemm_pixels(best.rows)));
  const Kernel kernel = reads == Reads::pixels ? best.pixels : best.taps;
  const int shared = gemm_shared(best.rows, best.outputs);
  return {layer, kernel, tiles * c.groups, 1, kGemmThreads, shared, c};
}

unsigned blocks_of(int64_t words) { return static_cast<unsigned>(ceil_div(words, kMapThreads)); }

template <int kKernel, int kStride>
Launch depthwise_launch(int layer, Kernel kernel, dwconv::Call c, const Chip& chip) {
  const dwconv::Grid grid = dwconv::grid_of<kKernel, kStride>(c, [&](int shared) {
    return int64_t{chip.multiprocessors} * chip.blocks_at_once(kernel, dwconv::kThreads, shared);
  });
  return {layer, kernel, grid.groups, grid.rows, dwconv::kThreads, grid.shared, c};
}

// all that a launch of a node needs
struct Context {
  int batch;
  const Memory& at;
  const Chip& chip;
  const std::vector<Layer>& layers;
  uint32_t image_padding;

  uint8_t* map(int node) const { return at.arena + layers[node].offset * batch; }
  const uint8_t* input(const Layer& layer, int i = 0) const {
    return layer.node.inputs[i] < 0 ? at.images : map(layer.node.inputs[i]);
  }
  int zero_point(const Layer& layer, int i = 0) const {
    return layer.node.inputs[i] < 0 ? 0 : layers[layer.node.inputs[i]].node.zero_point;
  }
  int pixel(const Layer& layer, int i = 0) const {
    return layer.node.inputs[i] < 0 ? 3 : layers[layer.node.inputs[i]].pixel;
  }
  template <class T>
  const T* constant(size_t offset) const {
    return reinterpret_cast<const T*>(at.constants + offset);
  }
};

Launch dense(int i, const Layer& layer, const Context& on) {
  const Node& n = layer.node;
  const bool of_image = n.inputs[0] < 0;
  GemmCall c{};
  c.x = on.input(layer);
  c.weight = on.constant<int8_t>(layer.weight);
  c.bias = on.constant<int32_t>(layer.bias);
  c.multiplier = on.constant<float>(layer.multipliers);
  c.pixels = static_cast<int>(on.batch * layer.out.pixels());
  c.width = layer.in.width, c.height = layer.in.height, c.pixel = on.pixel(layer);
  c.out_width = layer.out.width, c.out_height = layer.out.height;
  c.kernel_w = layer.kernel_w, c.stride_h = n.stride[0], c.stride_w = n.stride[1];
  c.top = layer.top, c.left = layer.left;
  c.taps = layer.kernel_h * layer.kernel_w * (of_image ? kImagePixel : c.pixel);
  c.depth = static_cast<int>(round_up(c.taps, 32));
  c.outputs = layer.outputs, c.y_pixel = layer.pixel;
  c.padding = of_image ? on.image_padding : 0x01010101u * on.zero_point(layer);
  const bool one_tap = layer.kernel_h * layer.kernel_w == 1 && n.stride == std::array{1, 1};
  c.requantize = requantize_of(n);
  c.fine = n.fine;
  c.finish = n.op == Op::classifier ? Finish::logits
             : n.fine || n.residual ? Finish::values
             : n.hardswish          ? Finish::hardswish
                                    : Finish::bytes;
  if (n.residual) {
    const Layer& b = on.layers[n.inputs[1]];
    c.residual = on.input(layer, 1);
    c.residual_pixel = b.pixel;
    c.residual_is_fine = b.out.channels > layer.outputs;
    c.residual_zero_point = b.node.zero_point;
    c.residual_multiplier = n.residual_multiplier;
  }
  if (n.op == Op::classifier) {
    c.y = on.at.logits;
  } else {
    c.y = on.map(i);
  }
  return product(i, c, on.chip, of_image ? Reads::image : one_tap ? Reads::pixels : Reads::taps);
}

Launch depthwise_of(int i, const Layer& layer, const Context& on) {
  const Node& n = layer.node;
  const int kernel = layer.kernel_h, stride = n.stride[0];
  if (kernel == layer.kernel_w && (kernel == 3 || kernel == 5) && stride <= 2 &&
      n.stride[1] == stride) {
    dwconv::Call c{};
    c.x = reinterpret_cast<const char*>(on.input(layer));
    c.weight = on.constant<uint32_t>(layer.weight);
    c.bias = on.constant<int32_t>(layer.bias);
    c.multiplier = on.constant<float>(layer.multipliers);
    c.y = reinterpret_cast<char*>(on.map(i));
    c.batch = on.batch, c.height = layer.in.height, c.width = layer.in.width;
    c.words = layer.pixel / 4, c.pixel = layer.pixel;
    c.out_height = layer.out.height, c.out_width = layer.out.width;
    c.top = layer.top, c.left = layer.left;
    c.row = c.width * c.pixel, c.out_row = c.out_width * c.pixel;
    c.padding = 0x01010101u * on.zero_point(layer);
    c.requantize = requantize_of(n);
#define X(k, s)                                                                                    \
  if (kernel == k && stride == s) {                                                                \
    return depthwise_launch<k, s>(                                                                 \
        i, n.hardswish ? Kernel::depthwise_##k##_##s##_hardswish : Kernel::depthwise_##k##_##s, c, \
        on.chip);                                                                                  \
  }
    VITKD_INT8_DEPTHWISE(X)
#undef X
  }
  dwconv::PlainCall c{};
  // what is after the last row and column follows from the output's size
  const auto after = [](int in, int out, int before, int k, int step) {
    return (out - 1) * step + k - before - in;
  };
  c.shape = {on.batch,
             layer.in.height,
             layer.in.width,
             layer.pixel,
             layer.kernel_h,
             layer.kernel_w,
             n.stride[0],
             n.stride[1],
             layer.top,
             after(layer.in.height, layer.out.height, layer.top, layer.kernel_h, n.stride[0]),
             layer.left,
             after(layer.in.width, layer.out.width, layer.left, layer.kernel_w, n.stride[1]),
             static_cast<uint8_t>(on.zero_point(layer))};
  c.requantize = requantize_of(n);
  c.x = on.input(layer);
  c.weight = on.constant<int8_t>(layer.weight);
  c.bias = on.constant<int32_t>(layer.bias);
  c.multiplier = on.constant<float>(layer.multipliers);
  c.y = on.map(i);
  const int64_t bytes = on.batch * layer.out.pixels() * layer.pixel;
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>(ceil_div(bytes, dwconv::kThreads), 1 << 16));
  return {i, Kernel::depthwise_any, blocks, 1, dwconv::kThreads, 0, c};
}

SumsCall sums_of(const Layer& layer, const Context& on) {
  SumsCall c{};
  c.x = on.input(layer);
  c.images = on.batch, c.pixels = static_cast<int>(layer.in.pixels());
  c.pixel = on.pixel(layer), c.channels = layer.in.channels;
  c.zero_point = on.zero_point(layer);
  c.multiplier = layer.multiplier;
  c.requantize = requantize_of(layer.node);
  return c;
}

Launch launch_of(int i, const SumsCall& c) {
  return {i,
          Kernel::sums,
          static_cast<unsigned>(ceil_div(c.pixel, kSumChannels)),
          static_cast<unsigned>(c.images),
          kMapThreads,
          0,
          c};
}

void squeeze_excite(int i, const Layer& layer, const Context& on, std::vector<Launch>* launches) {
  const int channels = layer.in.channels, middle = layer.middle;
  // means, hidden values and factors, of all images each
  const auto floats = [&](int64_t before) {
    return reinterpret_cast<float*>(on.at.arena + (layer.scratch + before) * on.batch);
  };
  float* const means = floats(0);
  float* const factors = floats(round_up(4 * channels, kAlign));
  float* const hidden = floats(2 * round_up(4 * channels, kAlign));
  SumsCall sums = sums_of(layer, on);
  sums.means = means;
  launches->push_back(launch_of(i, sums));

  const auto layer_of = [&](const float* x, size_t q, size_t s, size_t b, float* y, int in, int out,
                            Gate gate) {
    const LinearCall c{x,
                       on.constant<int8_t>(q),
                       on.constant<float>(s),
                       on.constant<float>(b),
                       y,
                       on.batch,
                       in,
                       out,
                       gate,
                       static_cast<float>(layer.node.ratio)};
    launches->push_back(
        {i, Kernel::linear, blocks_of(out), static_cast<unsigned>(on.batch), kMapThreads, 0, c});
  };
  layer_of(means, layer.weight, layer.multipliers, layer.bias, hidden, channels, middle,
           layer.node.hidden_hardswish ? Gate::hardswish : Gate::relu);
  layer_of(hidden, layer.weight_2, layer.multipliers_2, layer.bias_2, factors, middle, channels,
           Gate::factor);

  ScaleCall c{};
  c.x = on.input(layer), c.factors = factors, c.y = on.map(i);
  c.words = on.batch * layer.out.pixels() * (layer.pixel / 16);
  c.pixels = static_cast<int>(layer.in.pixels()), c.pixel = layer.pixel, c.channels = channels;
  c.zero_point = on.zero_point(layer);
  c.requantize = requantize_of(layer.node);
  launches->push_back({i, Kernel::scale, blocks_of(c.words), 1, kMapThreads, 0, c});
}

Launch addition(int i, const Layer& layer, const Context& on) {
  AddCall c{};
  c.a = on.input(layer, 0), c.b = on.input(layer, 1), c.y = on.map(i);
  c.words = on.batch * layer.out.pixels() * (layer.pixel / 16);
  c.zero_a = on.zero_point(layer, 0), c.zero_b = on.zero_point(layer, 1);
  c.multiplier_a = layer.node.multipliers[0], c.multiplier_b = layer.node.multipliers[1];
  c.requantize = requantize_of(layer.node);
  return {i, Kernel::add, blocks_of(c.words), 1, kMapThreads, 0, c};
}

}  // namespace

size_t Layer::scratch_bytes() const {
  if (node.op != Op::squeeze_excite) return 0;
  return 2 * round_up(4 * in.channels, kAlign) + round_up(4 * middle, kAlign);
}

Plan::Plan(const Graph& graph, int size) : image_size(size) {
  const std::vector<Shape> shapes = check(graph, size);
  for (int c = 0; c < 3; ++c) image_padding_ |= graph.padding_bytes[c] << (8 * c);
  layers.reserve(shapes.size());
  for (size_t i = 0; i < shapes.size(); ++i) {
    Layer& layer = layers.emplace_back();
    const int from = graph.nodes[i].inputs[0];
    layer.in = from < 0 ? Shape{size, size, 3} : shapes[from];
    layer.out = shapes[i];
    layer.pixel = static_cast<int>(round_up(layer.out.channels, 16));
    pack(graph.nodes[i], layer);
  }
  place();
}

// Rows of constants, with zeros after each and after all of them.
template <class T>
size_t Plan::keep(const T* rows, int64_t count, int64_t length, int64_t padded_count,
                  int64_t padded) {
  const size_t at = round_up(constants.size(), kAlign);
  constants.resize(at + padded_count * padded * sizeof(T));
  for (int64_t r = 0; r < count; ++r) {
    std::memcpy(constants.data() + at + r * padded * sizeof(T), rows + r * length,
                length * sizeof(T));
  }
  return at;
}

void Plan::pack(const Node& n, Layer& layer) {
  layer.node = n;
  for (auto* array : {&layer.node.weight, &layer.node.q1, &layer.node.q2}) *array = {};
  for (auto* array :
       {&layer.node.multiplier, &layer.node.s1, &layer.node.b1, &layer.node.s2, &layer.node.b2}) {
    *array = {};
  }
  layer.node.bias = {};
  const int64_t in_pixel = n.inputs[0] < 0 ? 3 : layers[n.inputs[0]].pixel;
  const int64_t channels = layer.in.channels;
  const auto pixels = static_cast<double>(layer.in.pixels());
  layer.outputs = layer.out.channels / (n.fine ? 2 : 1);
  layer.bytes = layer.in.pixels() * in_pixel + layer.out.pixels() * layer.pixel;
  if (n.inputs.size() > 1) layer.bytes += layer.out.pixels() * layers[n.inputs[1]].pixel;
  if (n.op == Op::conv || n.op == Op::depthwise) {
    layer.kernel_h = n.kernel(0), layer.kernel_w = n.kernel(1);
    layer.top = padding_before(n, 0, layer.in.height);
    layer.left = padding_before(n, 1, layer.in.width);
  }
  const int64_t taps = int64_t{layer.kernel_h} * layer.kernel_w;
  switch (n.op) {
    case Op::conv:
    case Op::classifier: {
      const int64_t rows = round_up(layer.outputs, kPadOutputs);
      const int64_t of_tap = n.inputs[0] < 0 ? kImagePixel : in_pixel;
      const int64_t depth = round_up(taps * of_tap, 32);
      // a tap's channels, padded as the pixels are
      std::vector<int8_t> weight(layer.outputs * taps * of_tap);
      for (int64_t r = 0; r < layer.outputs * taps; ++r) {
        std::memcpy(weight.data() + r * of_tap, n.weight.data + r * channels, channels);
      }
      layer.weight = keep(weight.data(), layer.outputs, taps * of_tap, rows, depth);
      layer.bias = keep(n.bias.data, 1, layer.outputs, 1, rows);
      layer.multipliers = keep(n.multiplier.data, 1, layer.outputs, 1, rows);
      layer.macs = layer.out.pixels() * layer.outputs * taps * channels;
      layer.weight_bytes = layer.outputs * (taps * channels + 8);
      break;
    }
    case Op::depthwise:
      layer.weight = keep(n.weight.data, taps, channels, taps, in_pixel);
      layer.bias = keep(n.bias.data, 1, channels, 1, in_pixel);
      layer.multipliers = keep(n.multiplier.data, 1, channels, 1, in_pixel);
      layer.macs = layer.out.pixels() * channels * taps;
      layer.weight_bytes = channels * (taps + 8);
      break;
    case Op::squeeze_excite: {
      const int64_t middle = n.b1.shape[0];
      layer.middle = static_cast<int>(middle);
      layer.multiplier = static_cast<float>(n.scale / pixels);
      layer.weight = keep(n.q1.data, 1, channels * middle, 1, channels * middle);
      layer.multipliers = keep(n.s1.data, 1, middle, 1, middle);
      layer.bias = keep(n.b1.data, 1, middle, 1, middle);
      layer.weight_2 = keep(n.q2.data, 1, channels * middle, 1, channels * middle);
      layer.multipliers_2 = keep(n.s2.data, 1, channels, 1, channels);
      layer.bias_2 = keep(n.b2.data, 1, channels, 1, channels);
      layer.macs = 2 * middle * channels + layer.out.pixels() * channels;
      layer.bytes += layer.in.pixels() * in_pixel;  // its input twice
      layer.weight_bytes = 2 * middle * channels;
      break;
    }
    case Op::pool:
      layer.multiplier = static_cast<float>(n.ratio / pixels);
      break;
    case Op::add:
      break;
  }
}

void Plan::place() {
  struct Placed {
    size_t begin, end;
    int last_use;
  };
  const int count = static_cast<int>(layers.size());
  std::vector<int> last_use(count);
  for (int i = 0; i < count; ++i) {
    last_use[i] = i;
    for (int from : layers[i].node.inputs) {
      if (from >= 0) last_use[from] = i;
    }
  }
  std::vector<Placed> live;
  // the first gap that is large enough
  const auto fit = [&](size_t bytes, int until) {
    std::sort(live.begin(), live.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
    size_t at = 0;
    for (const Placed& p : live) {
      if (at + bytes <= p.begin) break;
      at = std::max(at, p.end);
    }
    live.push_back({at, at + bytes, until});
    arena = std::max(arena, at + bytes);
    return at;
  };
  for (int i = 0; i < count; ++i) {
    Layer& layer = layers[i];
    std::erase_if(live, [&](const Placed& p) { return p.last_use < i; });
    if (layer.node.op == Op::classifier) continue;
    layer.offset = fit(round_up(layer.out.pixels() * layer.pixel, kAlign), last_use[i]);
    if (layer.scratch_bytes() > 0) layer.scratch = fit(layer.scratch_bytes(), i);
  }
}

std::vector<Launch> Plan::launches(int batch, const Memory& at, const Chip& chip) const {
  const Context on{batch, at, chip, layers, image_padding_};
  std::vector<Launch> launches;
  for (int i = 0; i < static_cast<int>(layers.size()); ++i) {
    const Layer& layer = layers[i];
    switch (layer.node.op) {
      case Op::conv:
      case Op::classifier:
        launches.push_back(dense(i, layer, on));
        break;
      case Op::depthwise:
        launches.push_back(depthwise_of(i, layer, on));
        break;
      case Op::add:
        launches.push_back(addition(i, layer, on));
        break;
      case Op::squeeze_excite:
        squeeze_excite(i, layer, on, &launches);
        break;
      case Op::pool: {
        SumsCall c = sums_of(layer, on);
        c.y = on.map(i);
        launches.push_back(launch_of(i, c));
        break;
      }
    }
  }
  return launches;
}

}  // namespace vitkd::int8::cuda
