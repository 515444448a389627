// Plain loops, which compilers turn into vectors of each set: five operations a byte beside the
// products that made the values, and no file that has not this one's flags (-ffp-contract=off).

#include "int8/kernels/fine.h"

#include "simd/target.h"

namespace vitkd::int8 {
namespace {

// kResidual: 0 none, 1 of bytes, 2 fine
template <int kResidual, bool kFineOutput>
VITKD_INLINE void finish(const FineCall& call, const Epilogue& e) {
  const Requantize& r = e.requantize;
  const int channels = call.channels;
  const auto zero = static_cast<float>(r.zero_point);
  const auto lo = static_cast<float>(r.lo - r.zero_point);
  const auto hi = static_cast<float>(r.hi - r.zero_point);
  const auto residual_zero = static_cast<float>(e.residual_zero_point);
  const float multiplier = e.residual_multiplier, part = multiplier / kFine;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded
  for (int64_t p = 0; p < call.pixels; ++p) {
    const float* __restrict x = call.values + p * call.values_pixel;
    const uint8_t* __restrict b = call.residual + (kResidual > 0 ? p * call.residual_pixel : 0);
    uint8_t* __restrict y = call.y + p * call.y_pixel;
    uint8_t* __restrict lacking = y + channels;
    for (int c = 0; c < channels; ++c) {
      float v = x[c];
      if constexpr (kResidual > 0) {
        v = add(v, mul(static_cast<float>(b[c]) - residual_zero, multiplier));
      }
      if constexpr (kResidual == 2) {
        v = add(v, mul(static_cast<float>(b[channels + c]) - residual_zero, part));
      }
      const float level = add(clamp(v, lo, hi), kRound) - kRound;
      y[c] = static_cast<uint8_t>(static_cast<int32_t>(level + zero));
      if constexpr (kFineOutput) {
        const float lost = mul(v - level, static_cast<float>(kFine));
        const float eighths = add(clamp(lost, lo, hi), kRound) - kRound;
        lacking[c] = static_cast<uint8_t>(static_cast<int32_t>(eighths + zero));
      }
    }
  }
}

VITKD_INLINE void finish_any(const FineCall& call, const Epilogue& e) {
  const int residual = call.residual == nullptr ? 0 : call.residual_is_fine ? 2 : 1;
  if (call.fine) {
    residual == 0   ? finish<0, true>(call, e)
    : residual == 1 ? finish<1, true>(call, e)
                    : finish<2, true>(call, e);
  } else {
    residual == 0   ? finish<0, false>(call, e)
    : residual == 1 ? finish<1, false>(call, e)
                    : finish<2, false>(call, e);
  }
}

void finish_baseline(const FineCall& call, const Epilogue& e) { finish_any(call, e); }

#if defined(__x86_64__)
VITKD_TARGET_BEGIN(VITKD_AVX2)
void finish_avx2(const FineCall& call, const Epilogue& e) { finish_any(call, e); }
VITKD_TARGET_END

VITKD_TARGET_BEGIN(VITKD_AVX512)
void finish_avx512(const FineCall& call, const Epilogue& e) { finish_any(call, e); }
VITKD_TARGET_END
#endif

}  // namespace

void finish_fine(Isa isa, const FineCall& call, const Epilogue& e) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::scalar:
    case Isa::sse41:
      break;
    case Isa::avx2:
    case Isa::avxvnni:
      return finish_avx2(call, e);
    default:
      return finish_avx512(call, e);
  }
#endif
  (void)isa;
  finish_baseline(call, e);
}

}  // namespace vitkd::int8
