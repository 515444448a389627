// Each enhancement blends an image with another, from + factor * (image - from) in float32, cut to
// 8 bits: with black, with the grey of its mean, and with its own grey. The compiler may fuse
// nothing (-ffp-contract=off), so every instruction set gives the same bytes.

#include "int8/jitter.h"

#include <cstddef>

#include "simd/target.h"

namespace vitkd::int8 {
namespace {

// of ITU-R 601, times 2^16
constexpr int kRed = 19595, kGreen = 38470, kBlue = 7471, kHalf = 1 << 15;

struct Loops {
  void (*blend)(uint8_t* image, int64_t pixels, int from, float factor);
  int64_t (*sum_of_greys)(const uint8_t* image, int64_t pixels);
  void (*saturate)(uint8_t* image, int64_t pixels, float factor);
};

namespace baseline {
#include "int8/jitter.inl"
}

#if defined(__x86_64__)
VITKD_TARGET_BEGIN(VITKD_AVX2)
namespace avx2 {
#include "int8/jitter.inl"
}
VITKD_TARGET_END
#endif

const Loops& loops(Isa isa) {
#if defined(__x86_64__)
  if (contains(isa, Isa::avx2)) return avx2::kLoops;
#endif
  static_cast<void>(isa);
  return baseline::kLoops;
}

}  // namespace

void jitter(uint8_t* image, int64_t pixels, const std::array<float, 3>& factors,
            const std::array<Enhancement, 3>& order, Isa isa) {
  if (pixels == 0) return;
  const Loops& run = loops(isa);
  for (const Enhancement enhancement : order) {
    const float factor = factors[static_cast<size_t>(enhancement)];
    switch (enhancement) {
      case Enhancement::brightness:
        run.blend(image, pixels, 0, factor);
        break;
      case Enhancement::contrast: {
        const auto sum = static_cast<double>(run.sum_of_greys(image, pixels));
        run.blend(image, pixels, static_cast<int>(sum / static_cast<double>(pixels) + 0.5), factor);
        break;
      }
      case Enhancement::saturation:
        run.saturate(image, pixels, factor);
        break;
    }
  }
}

}  // namespace vitkd::int8
