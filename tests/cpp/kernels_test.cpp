// Every kernel of every instruction set of this machine, beside the arithmetic that
// docs/int8-format.md states: random shapes and values, compared bit by bit. What lies behind
// a result must stay as it was.
//
//   kernels_test [cases] [seed]

#include "int8/kernels/kernels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

using namespace vitkd;
using namespace vitkd::int8;

namespace {

constexpr uint8_t kUntouched = 0xA5;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  int64_t integer(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(engine_);
  }
  double real(double least, double most) {
    return std::uniform_real_distribution<double>(least, most)(engine_);
  }
  bool chance(double p) { return real(0, 1) < p; }
  int one_of(std::initializer_list<int> values) {
    return values.begin()[integer(0, static_cast<int64_t>(values.size()) - 1)];
  }
  // of all sizes, often just about a multiple of a vector
  int channels() {
    return std::max(1, chance(0.5) ? 16 * one_of({1, 2, 3, 4, 6, 8}) + one_of({-1, 0, 0, 1})
                                   : one_of({1, 2, 3, 5, 8, 24, 40, 72, 88}));
  }
  // noise, or the extremes
  Buffer bytes(int64_t size) {
    Buffer buffer(size);
    const int kind = one_of({0, 0, 0, 1, 2});
    for (int64_t i = 0; i < size + kSlack; ++i) {
      buffer.data()[i] = static_cast<uint8_t>(kind == 1   ? 255
                                              : kind == 2 ? one_of({0, 255})
                                                          : integer(0, 255));
    }
    return buffer;
  }

 private:
  std::mt19937_64 engine_;
};

uint8_t requantized(float v, const Requantize& r) {
  v = std::nearbyint(std::clamp(v, -32768.0f, 32767.0f));
  return static_cast<uint8_t>(std::clamp(static_cast<int>(v) + r.zero_point, r.lo, r.hi));
}

// Weights and constants such that sums spread over the bytes, or lie far beyond them.
struct Convolution {
  ConvSpec spec;
  std::vector<int8_t> weight;
  std::vector<int32_t> bias;
  std::vector<float> multiplier;

  Convolution(Random& random, ConvSpec wanted, std::initializer_list<int> kinds) : spec(wanted) {
    const int64_t depth = int64_t{spec.taps()} * (spec.depthwise ? 1 : spec.in);
    const int largest = random.one_of({1, 20, 127, 127});
    const bool extreme = random.chance(0.2);
    for (int64_t i = 0; i < depth * spec.out; ++i) {
      weight.push_back(static_cast<int8_t>(extreme ? random.one_of({-largest, largest})
                                                   : random.integer(-largest, largest)));
    }
    const double spread = 90.0 * largest * std::sqrt(static_cast<double>(depth));
    // quantize() leaves multipliers on grids that some kernels make use of
    const int grid = random.one_of({0, 1, 2});
    Epilogue& e = spec.epilogue;
    e.kind = static_cast<EpilogueKind>(random.one_of(kinds));
    const double scale = random.one_of({1, 1, 1, 40}) * 100 / spread;
    for (int o = 0; o < spec.out; ++o) {
      bias.push_back(static_cast<int32_t>(random.real(-1, 1) * spread));
      auto m = static_cast<float>(random.real(0.2, 1) * scale);
      if (grid == 1) m = static_cast<float>(std::ceil(m * 65536) / 65536);
      if (grid == 2) m = static_cast<float>(std::ldexp(std::rint(std::ldexp(m, 30)), -30));
      multiplier.push_back(m);
    }
    if (e.kind == EpilogueKind::hardswish) {
      for (float& m : multiplier) m /= 16;
      e.requantize.hardswish_scale = static_cast<float>(random.real(2, 30));
    }
    e.requantize.zero_point = static_cast<int32_t>(random.integer(0, 255));
    if (random.chance(0.3)) {
      e.requantize.lo = static_cast<int32_t>(random.integer(0, 128));
      e.requantize.hi = static_cast<int32_t>(random.integer(e.requantize.lo, 255));
    }
    e.residual_zero_point = static_cast<int32_t>(random.integer(0, 255));
    e.residual_multiplier = static_cast<float>(random.real(-2, 2));
    spec.weight = weight.data(), spec.bias = bias.data(), spec.multiplier = multiplier.data();
  }

  float value(int64_t acc, int channel) const {
    float v = static_cast<float>(static_cast<int32_t>(acc)) * multiplier[channel];
    if (spec.epilogue.kind == EpilogueKind::hardswish) {
      const float u = std::min(std::max(v + 3.0f, 0.0f), 6.0f);
      v = v * u;
      v = v * spec.epilogue.requantize.hardswish_scale;
    }
    return v;
  }
};

// The panels of a call, and which channels they are.
struct Panels {
  int first, end, channel, channel_end;

  Panels(Random& random, const Packed& packed) {
    const auto count = static_cast<int>(packed.panels.size());
    first = random.chance(0.7) ? 0 : static_cast<int>(random.integer(0, count - 1));
    end = random.chance(0.7) ? count : static_cast<int>(random.integer(first + 1, count));
    channel = packed.panels[first].channel;
    channel_end = end < count ? packed.panels[end].channel : packed.spec.out;
  }
};

std::string failed(const std::string& what, int64_t at, double expected, double got) {
  return what + ": at " + std::to_string(at) + " expected " + std::to_string(expected) + ", got " +
         std::to_string(got);
}

// y is untouched behind its end
std::string untouched(const Buffer& y, size_t bytes) {
  for (size_t i = bytes; i < bytes + kSlack; ++i) {
    if (y.data()[i] != kUntouched) return failed("behind the result", i, kUntouched, y.data()[i]);
  }
  return "";
}

std::string gemm(Random& random, const Kernels& with) {
  ConvSpec wanted;
  const bool image = random.chance(0.2);  // of three bytes a pixel
  const bool deep = random.chance(0.1);
  wanted.out = random.channels();
  wanted.in = image  ? 3
              : deep ? 16 * random.one_of({40, 60, 80}) + random.one_of({0, 1})
                     : random.channels();
  wanted.kernel_h = random.one_of({1, 1, 1, 2, 3, 5});
  wanted.kernel_w = wanted.kernel_h == 1 ? 1 : random.one_of({1, 2, 3, 5});
  const Convolution conv(random, wanted, {0, 0, 1, 2, 3});
  const ConvSpec& spec = conv.spec;
  const int64_t pixel = image ? 3 : pixel_bytes(spec.in), pixels = random.integer(1, 40);
  const bool logits = spec.epilogue.kind == EpilogueKind::logits;
  Packed packed;
  with.pack_gemm(spec, pixel, &packed);
  const Panels panels(random, packed);

  std::vector<Buffer> rows;
  std::vector<const uint8_t*> x;
  const int step = random.one_of({1, 1, 2});
  for (int k = 0; k < spec.kernel_h; ++k) {
    rows.push_back(random.bytes((pixels * step + spec.kernel_w) * pixel));
    x.push_back(rows.back().data());
  }
  const int64_t y_pixel = logits ? 4 * spec.out : pixel_bytes(spec.out);
  const Buffer y(pixels * y_pixel), residual = random.bytes(pixels * pixel_bytes(spec.out));
  std::memset(y.data(), kUntouched, y.size() + kSlack);
  const Buffer scratch(packed.scratch);
  const uint8_t* fetched = nullptr;
  GemmCall call;
  call.x = x.data(), call.x_pixel = pixel * step, call.pixels = pixels;
  call.y = y.data(), call.y_pixel = y_pixel;
  call.residual = residual.data(), call.residual_pixel = pixel_bytes(spec.out);
  call.panel = panels.first, call.panel_end = panels.end;
  call.fetched = &fetched, call.scratch = scratch.data();
  with.gemm(packed, call);

  for (int64_t p = 0; p < pixels; ++p) {
    for (int o = panels.channel; o < panels.channel_end; ++o) {
      int64_t acc = conv.bias[o];
      for (int tap = 0; tap < spec.taps(); ++tap) {
        const uint8_t* at = x[tap / spec.kernel_w] + (p * step + tap % spec.kernel_w) * pixel;
        for (int c = 0; c < spec.in; ++c) acc += at[c] * spec.at(o, tap, c);
      }
      float v = conv.value(acc, o);
      const uint8_t* got = y.data() + p * y_pixel;
      if (logits) {
        float logit;
        std::memcpy(&logit, got + 4 * o, 4);
        if (logit != v) return failed(with.gemm_name(packed, call), p * spec.out + o, v, logit);
        continue;
      }
      if (spec.epilogue.kind == EpilogueKind::residual) {
        const int q = residual.data()[p * call.residual_pixel + o];
        v = v + static_cast<float>(q - spec.epilogue.residual_zero_point) *
                    spec.epilogue.residual_multiplier;
      }
      const uint8_t expected = requantized(v, spec.epilogue.requantize);
      if (got[o] != expected) {
        return failed(with.gemm_name(packed, call), p * spec.out + o, expected, got[o]);
      }
    }
  }
  return untouched(y, y.size());
}

std::string depthwise(Random& random, const Kernels& with) {
  ConvSpec wanted;
  wanted.depthwise = true;
  wanted.out = wanted.in = random.channels();
  wanted.kernel_h = random.one_of({1, 2, 3, 3, 3, 5, 5, 7});
  wanted.kernel_w = random.chance(0.8) ? wanted.kernel_h : random.one_of({1, 2, 3, 5, 9});
  if (random.chance(0.03)) wanted.kernel_h = wanted.kernel_w = 31;
  wanted.stride_h = random.one_of({1, 1, 2, 2, 3});
  wanted.stride_w = random.chance(0.8) ? wanted.stride_h : random.one_of({1, 2, 3, 8});
  const Convolution conv(random, wanted, {0, 0, 1});
  const ConvSpec& spec = conv.spec;
  Packed packed;
  with.pack_depthwise(spec, &packed);
  const Panels panels(random, packed);

  const int64_t pixel = pixel_bytes(spec.out);
  const int height = static_cast<int>(random.integer(1, 20));
  const int width = static_cast<int>(random.integer(1, 24));
  DepthwiseCall call;
  call.top = static_cast<int>(random.integer(0, spec.kernel_h - 1));
  call.left = static_cast<int>(random.integer(0, spec.kernel_w - 1));
  const int bottom = static_cast<int>(random.integer(0, spec.kernel_h - 1));
  const int right = static_cast<int>(random.integer(0, spec.kernel_w - 1));
  const int room_h = height + call.top + bottom - spec.kernel_h;
  const int room_w = width + call.left + right - spec.kernel_w;
  if (room_h < 0 || room_w < 0) return "";
  const int out_h = room_h / spec.stride_h + 1, out_w = room_w / spec.stride_w + 1;
  const Buffer x = random.bytes(height * width * pixel), y(out_h * out_w * pixel);
  const Buffer padding(width * pixel), scratch(kDepthwiseScratch);
  const auto zero = static_cast<uint8_t>(random.integer(0, 255));
  std::memset(padding.data(), zero, padding.size());
  std::memset(y.data(), kUntouched, y.size() + kSlack);
  call.x = {x.data(), height, width, height, pixel};
  call.y = {y.data(), out_h, out_w, out_h, pixel};
  call.padding_row = padding.data();
  call.row = random.chance(0.7) ? 0 : static_cast<int>(random.integer(0, out_h - 1));
  call.row_end = random.chance(0.7) ? out_h : static_cast<int>(random.integer(call.row + 1, out_h));
  call.panel = panels.first, call.panel_end = panels.end;
  call.scratch = scratch.data();
  with.depthwise(packed, call);

  for (int row = call.row; row < call.row_end; ++row) {
    for (int column = 0; column < out_w; ++column) {
      for (int o = panels.channel; o < panels.channel_end; ++o) {
        int64_t acc = conv.bias[o];
        for (int tap = 0; tap < spec.taps(); ++tap) {
          const int r = row * spec.stride_h - call.top + tap / spec.kernel_w;
          const int c = column * spec.stride_w - call.left + tap % spec.kernel_w;
          const bool inside = r >= 0 && r < height && c >= 0 && c < width;
          acc += (inside ? x.data()[(r * width + c) * pixel + o] : zero) * spec.at(o, tap, 0);
        }
        const uint8_t expected = requantized(conv.value(acc, o), spec.epilogue.requantize);
        const int64_t at = (int64_t{row} * out_w + column) * pixel + o;
        if (y.data()[at] != expected) {
          return failed(with.depthwise_name(packed, call), at, expected, y.data()[at]);
        }
      }
    }
  }
  return untouched(y, y.size());
}

Requantize random_requantize(Random& random) {
  Requantize r;
  r.zero_point = static_cast<int32_t>(random.integer(0, 255));
  r.lo = random.chance(0.5) ? 0 : static_cast<int32_t>(random.integer(0, 255));
  r.hi = random.chance(0.5) ? 255 : static_cast<int32_t>(random.integer(r.lo, 255));
  return r;
}

std::string add(Random& random, const Kernels& with) {
  const int64_t n = 16 * random.integer(1, 40);
  const Buffer a = random.bytes(n), b = random.bytes(n), y(n);
  const auto z_a = static_cast<int>(random.integer(0, 255));
  const auto z_b = static_cast<int>(random.integer(0, 255));
  const double most = random.one_of({1, 1, 1000000});
  const auto m_a = static_cast<float>(random.real(-most, most));
  const auto m_b = static_cast<float>(random.real(-most, most));
  const Requantize r = random_requantize(random);
  std::memset(y.data(), kUntouched, y.size() + kSlack);
  with.add(a.data(), z_a, m_a, b.data(), z_b, m_b, r, n, y.data());
  for (int64_t i = 0; i < n; ++i) {
    const float first = static_cast<float>(a.data()[i] - z_a) * m_a;
    const float second = static_cast<float>(b.data()[i] - z_b) * m_b;
    const uint8_t expected = requantized(first + second, r);
    if (y.data()[i] != expected) return failed("add", i, expected, y.data()[i]);
  }
  return untouched(y, n);
}

std::string channel_sums(Random& random, const Kernels& with) {
  const int64_t channels = 16 * random.integer(1, 12), pixel = channels + 16 * random.integer(0, 2);
  const int64_t pixels = random.one_of({1, 2, 3, 49, 196, 1000});
  const Buffer x = random.bytes(pixels * pixel);
  std::vector<int32_t> sums(channels + 16);
  for (int32_t& sum : sums) sum = static_cast<int32_t>(random.integer(-1000, 1000));
  std::vector<int32_t> expected = sums;
  with.channel_sums(x.data(), pixels, pixel, channels, sums.data());
  for (int64_t c = 0; c < channels + 16; ++c) {
    for (int64_t p = 0; p < pixels && c < channels; ++p) expected[c] += x.data()[p * pixel + c];
    if (sums[c] != expected[c]) return failed("channel_sums", c, expected[c], sums[c]);
  }
  return "";
}

std::string scale(Random& random, const Kernels& with) {
  const int64_t pixel = 16 * random.integer(1, 12), pixels = random.integer(1, 50);
  const Buffer x = random.bytes(pixels * pixel), y(pixels * pixel), factor(pixel * 4);
  const auto z = static_cast<int>(random.integer(0, 255));
  auto* f = reinterpret_cast<float*>(factor.data());
  const double most = random.one_of({2, 2, 1000000});
  for (int64_t c = 0; c < pixel; ++c) f[c] = static_cast<float>(random.real(0, most));
  const Requantize r = random_requantize(random);
  std::memset(y.data(), kUntouched, y.size() + kSlack);
  with.scale(x.data(), z, f, r, pixels, pixel, y.data());
  for (int64_t i = 0; i < pixels * pixel; ++i) {
    const uint8_t expected = requantized(static_cast<float>(x.data()[i] - z) * f[i % pixel], r);
    if (y.data()[i] != expected) return failed("scale", i, expected, y.data()[i]);
  }
  return untouched(y, y.size());
}

std::string linear(Random& random, const Kernels& with) {
  const auto rows = static_cast<int>(random.integer(1, 60));
  const auto out = static_cast<int>(16 * random.integer(1, 12));
  std::vector<int32_t> inputs;  // those that are not skipped
  for (int c = 0; c < rows; ++c) {
    if (random.chance(0.7)) inputs.push_back(c);
  }
  const auto in = static_cast<int>(inputs.size());
  const Buffer q = random.bytes(int64_t{rows} * out), s(out * 4), x(in * 4), h(out * 4);
  const auto fill = [&](const Buffer& buffer, int count, double most) {
    auto* to = reinterpret_cast<float*>(buffer.data());
    for (int i = 0; i < count; ++i) to[i] = static_cast<float>(random.real(-most, most));
    return to;
  };
  std::memset(h.data(), kUntouched, h.size() + kSlack);
  const float *scales = fill(s, out, 0.1), *values = fill(x, in, 10);
  float* sums = fill(h, out, 5);
  std::vector<float> expected(sums, sums + out);
  const auto* weights = reinterpret_cast<const int8_t*>(q.data());
  with.linear(weights, out, scales, inputs.data(), values, in, out, sums);
  for (int j = 0; j < out; ++j) {
    for (int i = 0; i < in; ++i) {
      const float w = static_cast<float>(weights[inputs[i] * out + j]) * scales[j];
      const float product = w * values[i];
      expected[j] = expected[j] + product;
    }
    if (sums[j] != expected[j]) return failed("linear", j, expected[j], sums[j]);
  }
  return untouched(h, h.size());
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 300;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  struct Test {
    const char* name;
    std::string (*run)(Random&, const Kernels&);
  };
  constexpr Test kTests[] = {{"gemm", gemm},   {"depthwise", depthwise},
                             {"add", add},     {"channel_sums", channel_sums},
                             {"scale", scale}, {"linear", linear}};
  for (const Isa isa : available_isas()) {
    const Kernels& with = kernels(isa);
    if (with.isa != isa) continue;
    for (const Test& test : kTests) {
      for (int i = 0; i < cases; ++i) {
        Random random(seed + i);
        const std::string failure = test.run(random, with);
        if (!failure.empty()) {
          std::printf("%s, %s, seed %llu: %s\n", name(isa), test.name,
                      static_cast<unsigned long long>(seed + i), failure.c_str());
          return 1;
        }
      }
    }
    std::printf("%s: %d cases of each kernel\n", name(isa), cases);
  }
  return 0;
}
