// What all instruction sets share: the pick of one, and the layout of panels and their constants.

#include "int8/kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace vitkd::int8 {
namespace {

// the least and the largest sum of any input
std::pair<int64_t, int64_t> sums(const ConvSpec& spec, int channel) {
  int64_t low = spec.bias[channel], high = low;
  for (int tap = 0; tap < spec.taps(); ++tap) {
    for (int c = 0; c < (spec.depthwise ? 1 : spec.in); ++c) {
      const int64_t product = 255 * int64_t{spec.at(channel, tap, c)};
      (product < 0 ? low : high) += product;
    }
  }
  return {low, high};
}

// adds to a panel's flags what one of its channels allows, for every input
void restrict(const ConvSpec& spec, int channel, Packed::Panel* panel) {
  const auto [low, high] = sums(spec, channel);
  const double m = spec.multiplier[channel], shift = double{kMagicFloat} * m;
  panel->magic &= -(1 << 22) < low && high < (1 << 22) && shift == static_cast<float>(shift);
  const double steps = m / kBitsGrid;
  const double most = m * static_cast<double>(std::max(-low, high));
  panel->bits &= steps == std::rint(steps) && m <= 1 && most < 32000;
}

}  // namespace

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::amx:
      return amx_kernels();
    case Isa::avx512vnni:
      return kAvx512Vnni;
    case Isa::avx512:
    case Isa::avx2:
      return kAvx2;
#endif
    default:
      return kScalar;
  }
}

void lay_out(const ConvSpec& spec, const Layout& layout, Packed* packed) {
  packed->spec = spec;
  size_t end = 0;
  for (int channel = 0; channel < spec.out;) {
    Packed::Panel panel;
    panel.channel = channel;
    panel.width = std::min<int>(layout.widest, pixel_bytes(spec.out - channel) / 16);
    panel.vectors = layout.vectors ? layout.vectors : panel.width;
    panel.constants = end;
    panel.weights = end + panel.vectors * 3 * kLine;
    panel.magic = layout.magic;
    const Epilogue& e = spec.epilogue;
    panel.bits = e.kind == EpilogueKind::bytes && e.requantize.zero_point % 2 == 0;
    const int channels = std::min(spec.out - channel, panel.width * 16);
    for (int i = 0; i < channels && panel.magic; ++i) restrict(spec, channel + i, &panel);
    panel.bits &= panel.magic;
    end = panel.weights + round_up(panel.vectors * layout.weight_bytes, kLine);
    channel += channels;
    packed->panels.push_back(panel);
  }
  packed->own = Buffer(end);
  packed->data = packed->own.data();
  std::memset(packed->own.data(), 0, end);
  for (const Packed::Panel& panel : packed->panels) {
    const int lanes = panel.vectors * 16;
    auto* bias = reinterpret_cast<int32_t*>(packed->own.data() + panel.constants);
    auto* multiplier = reinterpret_cast<float*>(bias + lanes);
    float* shift = multiplier + lanes;
    for (int i = 0; i < lanes; ++i) {
      const int channel = panel.channel + layout.lanes(panel.width, i / 16, i % 16);
      const bool real = channel < spec.out;
      bias[i] = real ? spec.bias[channel] : 0;
      multiplier[i] = real ? spec.multiplier[channel] : 0;
      if (panel.magic) {
        bias[i] += kMagicBits;
        shift[i] = -kMagicFloat * multiplier[i];
      }
      if (panel.bits) {
        multiplier[i] = -multiplier[i];
        shift[i] =
            -shift[i] - kMagicFloat - static_cast<float>(spec.epilogue.requantize.zero_point);
      }
    }
  }
}

void lay_out_gemm(const ConvSpec& spec, int64_t pixel, Layout layout, Packed* packed) {
  packed->segments = spec.kernel_h;
  packed->steps = static_cast<int>(((spec.kernel_w - 1) * pixel + spec.in + 3) / 4);
  packed->stride = static_cast<int>(round_up(packed->steps, layout.step_multiple));
  layout.weight_bytes = size_t{kLine} * packed->segments * packed->stride;
  lay_out(spec, layout, packed);
  for (const Packed::Panel& panel : packed->panels) {
    auto* weights = reinterpret_cast<int8_t*>(packed->own.data() + panel.weights);
    for (int i = 0; i < panel.vectors * 16; ++i) {
      const int channel = panel.channel + layout.lanes(panel.width, i / 16, i % 16);
      if (channel >= spec.out) continue;
      for (int tap = 0; tap < spec.taps(); ++tap) {
        const int64_t begin = int64_t{tap / spec.kernel_w} * packed->stride * 4;
        for (int c = 0; c < spec.in; ++c) {
          const int64_t k = begin + tap % spec.kernel_w * pixel + c;
          weights[(k / 4 * panel.vectors * 16 + i) * 4 + k % 4] = spec.at(channel, tap, c);
        }
      }
    }
  }
}

}  // namespace vitkd::int8
