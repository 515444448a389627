// The kernels in plain C++: what a CPU without AVX2 runs, and the easiest to read of the three.

#include <algorithm>
#include <cstring>

#include "int8/kernels/kernels.h"

namespace vitkd::int8 {
namespace {

int in_order(int, int vector, int lane) { return vector * 16 + lane; }

// one vector per panel; weights [segments][steps][16][4]
void pack_gemm(const ConvSpec& spec, int64_t pixel, Packed* packed) {
  lay_out_gemm<int8_t>(spec, pixel, {1, 0, 0, false, in_order}, packed);
}

const int32_t* bias_of(const Packed& packed, const Packed::Panel& panel) {
  return reinterpret_cast<const int32_t*>(packed.data + panel.constants);
}

void gemm_u8s8_1x16_scalar(const Packed& packed, const GemmCall& call) {
  const Epilogue& e = packed.spec.epilogue;
  for (int i = call.panel; i < call.panel_end; ++i) {
    const Packed::Panel& panel = packed.panels[i];
    const int32_t* bias = bias_of(packed, panel);
    const auto* m = reinterpret_cast<const float*>(bias + 16);
    const int lanes = std::min(16, packed.spec.out - panel.channel);
    for (int64_t p = 0; p < call.pixels; ++p) {
      const auto* w = reinterpret_cast<const int8_t*>(packed.data + panel.weights);
      int32_t acc[16];
      std::copy_n(bias, 16, acc);
      for (int segment = 0; segment < packed.segments; ++segment) {
        const uint8_t* x = call.x[segment] + p * call.x_pixel;
        for (int step = 0; step < packed.steps; ++step, x += 4, w += 64) {
          for (int lane = 0; lane < 16; ++lane) {
            for (int k = 0; k < 4; ++k) acc[lane] += x[k] * w[lane * 4 + k];
          }
        }
      }
      uint8_t* y =
          call.y + p * call.y_pixel + panel.channel * (e.kind == EpilogueKind::logits ? 4 : 1);
      const uint8_t* b = call.residual + p * call.residual_pixel + panel.channel;
      for (int lane = 0; lane < lanes; ++lane) {
        const float v = mul(static_cast<float>(acc[lane]), m[lane]);
        if (e.kind == EpilogueKind::logits) {
          std::memcpy(y + 4 * lane, &v, 4);
        } else if (e.kind == EpilogueKind::residual) {
          const auto q = static_cast<float>(b[lane] - e.residual_zero_point);
          y[lane] = to_byte(vitkd::int8::add(v, mul(q, e.residual_multiplier)), e.requantize);
        } else {
          y[lane] = requantize(acc[lane], m[lane], e.requantize);
        }
      }
    }
  }
}

// one vector per panel; weights [taps][16]
void pack_depthwise(const ConvSpec& spec, Packed* packed) {
  lay_out(spec, {1, 0, size_t{16} * spec.taps(), false, in_order}, packed);
  for (const Packed::Panel& panel : packed->panels) {
    auto* weights = reinterpret_cast<int8_t*>(packed->own.data() + panel.weights);
    for (int tap = 0; tap < spec.taps(); ++tap) {
      for (int lane = 0; lane < std::min(16, spec.out - panel.channel); ++lane) {
        weights[tap * 16 + lane] = spec.at(panel.channel + lane, tap, 0);
      }
    }
  }
}

void depthwise_1x1x16_scalar(const Packed& packed, const DepthwiseCall& call) {
  const ConvSpec& spec = packed.spec;
  for (int i = call.panel; i < call.panel_end; ++i) {
    const Packed::Panel& panel = packed.panels[i];
    const int32_t* bias = bias_of(packed, panel);
    const auto* m = reinterpret_cast<const float*>(bias + 16);
    const auto* weights = reinterpret_cast<const int8_t*>(packed.data + panel.weights);
    const int lanes = std::min(16, spec.out - panel.channel);
    for (int row = call.row; row < call.row_end; ++row) {
      for (int column = 0; column < call.y.width; ++column) {
        int32_t acc[16];
        std::copy_n(bias, 16, acc);
        for (int tap = 0; tap < spec.taps(); ++tap) {
          const int r = row * spec.stride_h - call.top + tap / spec.kernel_w;
          const int c = column * spec.stride_w - call.left + tap % spec.kernel_w;
          const bool inside = r >= 0 && r < call.x.height && c >= 0 && c < call.x.width;
          const uint8_t* x = inside ? call.x.row(r) + c * call.x.pixel : call.padding_row;
          for (int lane = 0; lane < lanes; ++lane) {
            acc[lane] += x[panel.channel + lane] * weights[tap * 16 + lane];
          }
        }
        uint8_t* y = call.y.row(row) + column * call.y.pixel + panel.channel;
        for (int lane = 0; lane < lanes; ++lane) {
          y[lane] = requantize(acc[lane], m[lane], spec.epilogue.requantize);
        }
      }
    }
  }
}

void add(const uint8_t* a, int z_a, float m_a, const uint8_t* b, int z_b, float m_b,
         const Requantize& requantize, int64_t n, uint8_t* y) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = mul(static_cast<float>(a[i] - z_a), m_a);
    y[i] = to_byte(vitkd::int8::add(v, mul(static_cast<float>(b[i] - z_b), m_b)), requantize);
  }
}

void channel_sums(const uint8_t* x, int64_t pixels, int64_t pixel, int64_t channels,
                  int32_t* sums) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += x[p * pixel + c];
  }
}

void scale(const uint8_t* x, int z, const float* factor, const Requantize& requantize,
           int64_t pixels, int64_t pixel, uint8_t* y) {
  for (int64_t p = 0; p < pixels; ++p, x += pixel, y += pixel) {
    for (int64_t c = 0; c < pixel; ++c) {
      y[c] = to_byte(mul(static_cast<float>(x[c] - z), factor[c]), requantize);
    }
  }
}

void linear(const int8_t* q, int64_t stride, const float* s, const int32_t* inputs, const float* x,
            int count, int out, float* h) {
  for (int i = 0; i < count; ++i) {
    const int8_t* row = q + inputs[i] * stride;
    for (int j = 0; j < out; ++j) {
      const float w = mul(static_cast<float>(row[j]), s[j]);
      h[j] = vitkd::int8::add(h[j], mul(w, x[i]));
    }
  }
}

}  // namespace

const Kernels kScalar{Isa::scalar,
                      [](const Packed&, const GemmCall&) { return "gemm_u8s8_1x16_scalar"; },
                      [](const Packed&, const DepthwiseCall&) { return "depthwise_1x1x16_scalar"; },
                      pack_gemm,
                      gemm_u8s8_1x16_scalar,
                      pack_depthwise,
                      depthwise_1x1x16_scalar,
                      add,
                      channel_sums,
                      scale,
                      linear};

}  // namespace vitkd::int8
