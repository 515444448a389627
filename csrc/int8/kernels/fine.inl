// finish(call, epilogue) with the Lanes of the region that includes this.

// channels [c, c + Lanes::kCount) of a pixel; those that are fine go on `channels` further
template <int kResidual, bool kFineOutput>  // kResidual: 0 none, 1 of bytes, 2 fine
VITKD_INLINE void finish_lanes(const FineCall& call, const Constants& k, const float* x,
                               const uint8_t* b, uint8_t* y, int c) {
  const int left = call.channels - c;
  auto v = Lanes::load(x + c, left);
  const auto plus = [&](const uint8_t* bytes, float multiplier) __attribute__((always_inline)) {
    const auto q = Lanes::sub(Lanes::bytes(bytes, left), Lanes::all(k.residual_zero));
    v = Lanes::add(v, Lanes::mul(q, Lanes::all(multiplier)));
  };
  if constexpr (kResidual > 0) plus(b + c, k.multiplier);
  if constexpr (kResidual == 2) plus(b + call.channels + c, k.part);
  const auto level = Lanes::rounded(Lanes::clamped(v, Lanes::all(k.lo), Lanes::all(k.hi)));
  Lanes::store(y + c, Lanes::add(level, Lanes::all(k.zero)), left);
  if constexpr (kFineOutput) {
    const auto lost = Lanes::mul(Lanes::sub(v, level), Lanes::all(kFine));
    const auto eighths = Lanes::rounded(Lanes::clamped(lost, Lanes::all(k.lo), Lanes::all(k.hi)));
    Lanes::store(y + call.channels + c, Lanes::add(eighths, Lanes::all(k.zero)), left);
  }
}

template <int kResidual, bool kFineOutput>
VITKD_INLINE void finish_pixels(const FineCall& call, const Constants& k) {
  for (int64_t p = 0; p < call.pixels; ++p) {
    const float* x = call.values + p * call.values_pixel;
    const uint8_t* b = kResidual > 0 ? call.residual + p * call.residual_pixel : nullptr;
    uint8_t* y = call.y + p * call.y_pixel;
    for (int c = 0; c < call.channels; c += Lanes::kCount) {
      finish_lanes<kResidual, kFineOutput>(call, k, x, b, y, c);
    }
  }
}

void finish(const FineCall& call, const Epilogue& e) {
  const Constants k = constants(e);
  const int residual = call.residual == nullptr ? 0 : call.residual_is_fine ? 2 : 1;
  if (call.fine) {
    residual == 0   ? finish_pixels<0, true>(call, k)
    : residual == 1 ? finish_pixels<1, true>(call, k)
                    : finish_pixels<2, true>(call, k);
  } else {
    residual == 0   ? finish_pixels<0, false>(call, k)
    : residual == 1 ? finish_pixels<1, false>(call, k)
                    : finish_pixels<2, false>(call, k);
  }
}
