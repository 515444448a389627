#include "int8/plan.h"

#include <algorithm>
#include <cstring>

namespace vitkd::int8 {
namespace {

constexpr int64_t kNear = 192 << 10;   // bytes of an activation that is not worth a ring buffer
constexpr int64_t kStripPixels = 192;  // of a chain's output, at least

// the node without its arrays, which the file owns
Node numbers_of(Node node) {
  node.weight = {}, node.bias = {}, node.multiplier = {};
  node.q1 = {}, node.s1 = {}, node.b1 = {}, node.q2 = {}, node.s2 = {}, node.b2 = {};
  return node;
}

}  // namespace

Plan::Plan(const Graph& graph, const Options& o, const std::function<void()>& arrays_read)
    : options(o), with(kernels(o.isa)) {
  const std::vector<Shape> shapes = check(graph, o.image_size);
  layers.reserve(shapes.size());
  for (size_t i = 0; i < shapes.size(); ++i) {
    Layer& layer = layers.emplace_back();
    layer.node = numbers_of(graph.nodes[i]);
    const int from = layer.node.inputs[0];
    layer.in = from < 0 ? Shape{o.image_size, o.image_size, 3} : shapes[from];
    layer.out = shapes[i];
    layer.pixel = pixel_bytes(layer.out.channels);
    pack_layer(graph.nodes[i], graph.padding_bytes, layer);
    channels = std::max<size_t>(channels, layer.pixel);
    macs += layer.macs;
  }
  if (arrays_read) arrays_read();
  pack_weights();
  fuse_chains();
  find_head();
  split_work();
  plan_memory();
}

void Plan::pack_layer(const Node& n, const std::array<int, 3>& image_padding, Layer& layer) {
  const int from = n.inputs[0];
  const int64_t in_pixel = from < 0 ? 3 : layers[from].pixel;
  const Requantize requantize{n.zero_point, n.lo, n.hi, n.hardswish ? n.hardswish_scale : 0.0f};
  layer.bytes = layer.in.pixels() * layer.in.channels + layer.out.pixels() * layer.out.channels;
  switch (n.op) {
    case Op::conv:
    case Op::depthwise:
    case Op::classifier: {
      ConvSpec spec;
      spec.depthwise = n.op == Op::depthwise;
      spec.out = layer.out.channels / (n.fine ? 2 : 1), spec.in = layer.in.channels;
      if (n.op != Op::classifier) {
        spec.kernel_h = n.kernel(0), spec.kernel_w = n.kernel(1);
        layer.top = padding_before(n, 0, layer.in.height);
        layer.left = padding_before(n, 1, layer.in.width);
      }
      spec.stride_h = n.stride[0], spec.stride_w = n.stride[1];
      spec.weight = n.weight.data, spec.bias = n.bias.data, spec.multiplier = n.multiplier.data;
      spec.epilogue.requantize = requantize;
      layer.residual_is_fine = n.residual && layers[n.inputs[1]].out.channels > spec.out;
      layer.through_values = n.fine || layer.residual_is_fine;
      spec.epilogue.kind = n.op == Op::classifier || layer.through_values ? EpilogueKind::logits
                           : n.hardswish                                  ? EpilogueKind::hardswish
                           : n.residual                                   ? EpilogueKind::residual
                                                                          : EpilogueKind::bytes;
      if (n.residual) {
        spec.epilogue.residual_zero_point = zero_point(n.inputs[1]);
        spec.epilogue.residual_multiplier = n.residual_multiplier;
        layer.bytes += layer.out.pixels() * layer.out.channels;
      }
      if (spec.depthwise) {
        with.pack_depthwise(spec, &layer.packed);
      } else {
        with.pack_gemm(spec, in_pixel, &layer.packed);
      }
      layer.padding = Buffer(layer.in.width * in_pixel);
      weights += layer.padding.size();
      std::memset(layer.padding.data(), zero_point(from), layer.padding.size());
      if (from < 0) {
        for (size_t i = 0; i < layer.padding.size(); ++i) {
          layer.padding.data()[i] = static_cast<uint8_t>(image_padding[i % 3]);
        }
      }
      const int64_t depth = int64_t{spec.taps()} * (spec.depthwise ? 1 : spec.in);
      layer.macs = layer.out.pixels() * spec.out * depth;
      layer.bytes += spec.out * (depth + 8);
      break;
    }
    case Op::add:
      layer.bytes += layer.out.pixels() * layer.out.channels;
      break;
    case Op::squeeze_excite: {
      const int64_t middle = n.b1.shape[0], channels = layer.in.channels;
      layer.middle = static_cast<int>(middle);
      const auto each = [&](const auto& f) {  // in the order of their use
        f(n.b1, 1, middle, &layer.b1), f(n.s1, 1, middle, &layer.s1);
        f(n.q1, channels, middle, &layer.q1);
        f(n.b2, 1, channels, &layer.b2), f(n.s2, 1, channels, &layer.s2);
        f(n.q2, middle, channels, &layer.q2);
      };
      size_t bytes = 0;
      each([&](const auto& array, int64_t rows, int64_t columns, size_t* at) {
        *at = bytes;
        bytes += round_up(rows * round_up(columns, 16) * sizeof(*array.data), kLine);
      });
      Buffer& own = layer.packed.own = Buffer(bytes);
      std::memset(own.data(), 0, bytes);
      each([&](const auto& array, int64_t rows, int64_t columns, const size_t* at) {
        const size_t size = sizeof(*array.data), stride = round_up(columns, 16) * size;
        for (int64_t r = 0; r < rows; ++r) {
          std::memcpy(own.data() + *at + r * stride, array.data + r * columns, columns * size);
        }
      });
      layer.packed.data = own.data();
      layer.mean_multiplier = static_cast<float>(n.scale / static_cast<double>(layer.in.pixels()));
      layer.macs = 2 * middle * channels + layer.out.pixels() * channels;
      layer.bytes += 2 * middle * channels;
      this->channels = std::max<size_t>(this->channels, pixel_bytes(middle));
      break;
    }
    case Op::pool:
      layer.mean_multiplier = static_cast<float>(n.ratio / static_cast<double>(layer.in.pixels()));
      break;
  }
}

// All weights side by side, in the order of their use: kernels prefetch ahead.
void Plan::pack_weights() {
  size_t bytes = 0;
  for (const Layer& layer : layers) bytes += round_up(layer.packed.own.size(), kLine);
  packed = Buffer(bytes);
  weights += bytes;
  uint8_t* to = packed.data();
  for (Layer& layer : layers) {
    const size_t size = layer.packed.own.size();
    if (size == 0) continue;
    std::memcpy(to, layer.packed.data, size);
    layer.packed.data = to;
    layer.packed.own = Buffer();
    to += round_up(size, kLine);
  }
}

// A node joins the chain of the node before it if it is its only reader and the activation between
// them exceeds the near cache. That saves a round trip of the activation to a farther cache. It
// costs the rows that two threads both compute, and shorter runs of pixels.
void Plan::fuse_chains() {
  const int count = static_cast<int>(layers.size());
  std::vector<int> uses(count, 0);
  for (const Layer& layer : layers) {
    for (int from : layer.node.inputs) {
      if (from >= 0) ++uses[from];
    }
  }
  const auto convolves = [&](int i) {
    return layers[i].node.op == Op::conv || layers[i].node.op == Op::depthwise;
  };
  for (int i = 0; i < count; ++i) {
    const bool joins = options.fuse && i > 0 && convolves(i) && convolves(i - 1) &&
                       layers[i].node.inputs[0] == i - 1 && uses[i - 1] == 1 &&
                       i - steps.back().first < kLongestChain &&
                       layers[i - 1].out.pixels() * layers[i - 1].pixel > kNear;
    if (joins) {
      steps.back().last = i;
    } else {
      steps.push_back({i, i, 0, true});
    }
  }
  for (Step& step : steps) {
    const Layer& last = layers[step.last];
    step.strip_rows = static_cast<int>(
        std::min<int64_t>(round_up(kStripPixels / last.out.width + 1, 2), last.out.height));
    // the rows of each activation that one strip of its reader touches
    int rows = step.strip_rows;
    for (int i = step.last; i > step.first; --i) {
      const ConvSpec& reader = layers[i].packed.spec;
      rows = (rows - 1) * reader.stride_h + reader.kernel_h;
      layers[i - 1].ring = std::min(rows, layers[i - 1].out.height);
      rows = layers[i - 1].ring;
    }
  }
}

// The head: the last pool and all that follows it, if that is a sequence of products of one pixel.
// Its weights are read for one pixel each, so it computes several images of a batch together.
void Plan::find_head() {
  head = steps.size();
  for (size_t s = steps.size(); s-- > 0;) {
    const Layer& layer = layers[steps[s].last];
    const bool alone = steps[s].first == steps[s].last && layer.out.pixels() == 1;
    const bool follows = layer.node.inputs == std::vector<int>{steps[s].last - 1};
    if (alone && layer.node.op == Op::pool) {
      head = s;
      break;
    }
    // a stride would skip images
    const bool product = layer.packed.spec.taps() == 1 && !layer.packed.spec.depthwise &&
                         layer.node.stride == std::array{1, 1};
    if (!alone || !follows || !product || layer.in.pixels() != 1) break;
    if (layer.node.op != Op::conv && layer.node.op != Op::classifier) break;
  }
  for (size_t s = head; s < steps.size(); ++s) layers[steps[s].last].images = kImages;
}

// How threads share each node. By panels, each weight is read by one thread only; by rows, each
// byte of the activation. What one thread wrote and another reads moves from core to core.
void Plan::split_work() {
  const int threads = options.threads;
  for (size_t s = 0; s < steps.size(); ++s) {
    if (steps[s].first != steps[s].last) continue;
    Layer& layer = layers[steps[s].last];
    const ConvSpec& spec = layer.packed.spec;
    if (static_cast<int>(layer.packed.panels.size()) < 2 * threads) continue;
    if (layer.through_values) continue;
    if (spec.depthwise) {
      const int from = layer.node.inputs[0];
      layer.by_panels = layer.out.height < 2 * threads || (from >= 0 && layers[from].by_panels);
    } else {
      const int64_t weights = layer.macs / layer.out.pixels();
      layer.by_panels = weights > std::max(layer.in.pixels() * layer.in.channels,
                                           layer.out.pixels() * layer.out.channels);
    }
  }
  for (size_t s = 0; s + 1 < steps.size(); ++s) {
    const Step& next = steps[s + 1];
    steps[s].barrier_after =
        threads == 1 || next.first != next.last || !keeps_apart(steps[s].last, next.last);
  }
}

// Whether each thread reads of a node only what it wrote of it.
bool Plan::keeps_apart(int node, int reader) const {
  const Layer &a = layers[node], &b = layers[reader];
  if (b.node.inputs[0] != node || a.packed.panels.empty() || a.by_panels != b.by_panels)
    return false;
  if (!a.by_panels) {
    return a.out.height > 1 && b.node.op == Op::conv && b.packed.spec.taps() == 1 &&
           b.node.stride == std::array{1, 1};
  }
  return b.packed.spec.depthwise &&
         std::equal(a.packed.panels.begin(), a.packed.panels.end(), b.packed.panels.begin(),
                    b.packed.panels.end(),
                    [](const auto& x, const auto& y) { return x.channel == y.channel; });
}

// Activations are placed in the arena, first fit by lifetime, those of the head after all others.
// Rings lie one after another in each thread's own memory.
void Plan::plan_memory() {
  struct Placed {
    size_t begin, end, last_round;
  };
  std::vector<Placed> live;
  // a round ends at a barrier: within it, one thread may be steps ahead of another
  std::vector<size_t> last_use(layers.size(), 0), rounds(steps.size(), 0);
  for (size_t s = 0; s < steps.size(); ++s) {
    if (s > 0) rounds[s] = rounds[s - 1] + steps[s - 1].barrier_after;
    for (int i = steps[s].first; i <= steps[s].last; ++i) {
      for (int from : layers[i].node.inputs) {
        if (from >= 0) last_use[from] = rounds[s];
      }
    }
  }
  for (size_t s = 0; s < steps.size(); ++s) {
    size_t ring = 0;
    for (int i = steps[s].first; i < steps[s].last; ++i) {
      layers[i].offset = ring;
      ring += layers[i].activation_bytes();
    }
    rings = std::max(rings, ring);
    Layer& last = layers[steps[s].last];
    if (last.node.op == Op::classifier) continue;
    std::erase_if(live, [&](const Placed& p) { return p.last_round < rounds[s]; });
    std::sort(live.begin(), live.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
    if (s >= head) last.offset = arena;
    for (const Placed& p : live) {
      if (s >= head || last.offset + last.activation_bytes() <= p.begin) break;
      last.offset = std::max(last.offset, p.end);
    }
    const size_t end = last.offset + last.activation_bytes();
    live.push_back({last.offset, end, last_use[steps[s].last]});
    arena = std::max(arena, end);
  }
}

}  // namespace vitkd::int8
