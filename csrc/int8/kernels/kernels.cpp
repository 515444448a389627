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
  const Epilogue& e = spec.epilogue;
  double most = m * static_cast<double>(std::max(-low, high));
  if (e.kind == EpilogueKind::hardswish) most *= 6 * double{e.requantize.hardswish_scale};
  if (e.kind == EpilogueKind::residual) most += 255 * std::abs(double{e.residual_multiplier});
  panel->words &= most < 32000;
  const double steps = m / kBitsGrid;
  panel->bits &= panel->words && steps == std::rint(steps) && m <= 1;
}

}  // namespace

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
#if !defined(VITKD_WITHOUT_AVX512)
    case Isa::amx:
      return amx_kernels();
    case Isa::avx512vnni:
      return kAvx512Vnni;
    case Isa::avx512:
      return avx512_kernels();
#endif
#if !defined(VITKD_WITHOUT_AVXVNNI)
    case Isa::avxvnni:
      return avxvnni_kernels();
#endif
    case Isa::avx2:
      return kAvx2;
    case Isa::sse41:
      return kSse41;
#elif defined(__aarch64__)
#if !defined(VITKD_WITHOUT_NEONI8MM)
    case Isa::neoni8mm:
      return neoni8mm_kernels();
#endif
    case Isa::neondot:
      return neondot_kernels();
    case Isa::neon:
      return kNeon;
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
    panel.magic = panel.words = layout.magic;
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

template <class T>
void lay_out_gemm(const ConvSpec& spec, int64_t pixel, Layout layout, Packed* packed) {
  packed->segments = spec.kernel_h;
  packed->steps = static_cast<int>(((spec.kernel_w - 1) * pixel + spec.in + 3) / 4);
  packed->stride = static_cast<int>(round_up(packed->steps, layout.step_multiple));
  constexpr int kGroup = 4 / sizeof(T);  // inputs side by side
  layout.weight_bytes = sizeof(T) * kLine * packed->segments * packed->stride;
  lay_out(spec, layout, packed);
  for (const Packed::Panel& panel : packed->panels) {
    auto* weights = reinterpret_cast<T*>(packed->own.data() + panel.weights);
    for (int i = 0; i < panel.vectors * 16; ++i) {
      const int channel = panel.channel + layout.lanes(panel.width, i / 16, i % 16);
      if (channel >= spec.out) continue;
      for (int tap = 0; tap < spec.taps(); ++tap) {
        const int64_t begin = int64_t{tap / spec.kernel_w} * packed->stride * 4;
        for (int c = 0; c < spec.in; ++c) {
          const int64_t k = begin + tap % spec.kernel_w * pixel + c;
          weights[(k / kGroup * panel.vectors * 16 + i) * kGroup + k % kGroup] =
              spec.at(channel, tap, c);
        }
      }
    }
  }
}
template void lay_out_gemm<int8_t>(const ConvSpec&, int64_t, Layout, Packed*);
template void lay_out_gemm<int16_t>(const ConvSpec&, int64_t, Layout, Packed*);

template <class T>
void lay_out_depthwise(const ConvSpec& spec, Layout layout, int group_size, Packed* packed) {
  const int variants = spec.stride_h == 1 && group_size > 1 ? 2 : 1;
  const int rows = spec.kernel_h + variants - 1;
  struct Tap {
    int group, column;
  };
  std::vector<Tap> taps;
  int groups = 0;
  for (int row = 0; row < rows; ++groups) {
    // all rows of one column, or what is left of them, of two or four columns
    const int left = rows - row;
    const int per_column = std::min(group_size, left >= 3 ? 4 : left);
    const int columns = group_size / per_column;
    for (int i = 0; i < group_size; ++i) {
      packed->groups.push_back(std::min(row + i % per_column, rows - 1));
    }
    for (int i = 0; i < group_size; ++i) packed->groups.push_back(i / per_column);
    for (int c = 0; c < spec.kernel_w; c += columns) taps.push_back({groups, c});
    row += per_column;
  }
  packed->steps = static_cast<int>(taps.size());
  const int lanes = layout.vectors * 16;
  const int column_bytes = lanes * group_size * static_cast<int>(sizeof(T));
  const int group_bytes = kDepthwiseScratch / groups / column_bytes * column_bytes;
  for (const Tap& tap : taps) {
    packed->offsets.push_back(tap.group * group_bytes + tap.column * column_bytes);
  }
  layout.weight_bytes = taps.size() * variants * (column_bytes / layout.vectors);
  lay_out(spec, layout, packed);
  for (const Packed::Panel& panel : packed->panels) {
    auto* w = reinterpret_cast<T*>(packed->own.data() + panel.weights);
    for (const Tap& tap : taps) {
      const int32_t* place = &packed->groups[2 * group_size * tap.group];
      for (int variant = 0; variant < variants; ++variant) {
        for (int i = 0; i < lanes; ++i) {
          const int channel = panel.channel + layout.lanes(panel.width, i / 16, i % 16);
          for (int k = 0; k < group_size; ++k, ++w) {
            const int y = place[k] - variant, x = tap.column + place[group_size + k];
            // of rows that fill a group up, only the first counts
            const bool again = place[group_size + k] == 0 && k > 0 && place[k] == place[k - 1];
            if (channel < spec.out && !again && y >= 0 && y < spec.kernel_h && x < spec.kernel_w) {
              *w = spec.at(channel, y * spec.kernel_w + x, 0);
            }
          }
        }
      }
    }
  }
}
template void lay_out_depthwise<int8_t>(const ConvSpec&, Layout, int, Packed*);
template void lay_out_depthwise<int16_t>(const ConvSpec&, Layout, int, Packed*);

}  // namespace vitkd::int8
