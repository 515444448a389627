// The vector kernels of wkd_feature.cpp, included once per instruction set, inside its namespace
// and region.
#include "cpu/features.inl"

constexpr int64_t kTokens = 8;    // whose sum stays in registers
constexpr int64_t kBlock = 1024;  // positions of a plane, likewise

// x, or (x - mean)^2, added
template <bool kSquares>
VITKD_INLINE Vec add_term(Vec x, Vec mean, Vec sum) {
  if constexpr (!kSquares) return sum + x;
  const Vec apart = x - mean;
  return fma(apart, apart, sum);
}

template <bool kSquares, class S>
double sum_of_plane(const S* x, int64_t n, Real mean_in) {
  const Vec zero{Real{0}}, mean{mean_in};
  double sum = 0;
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t end = std::min(from + kBlock, n);
    Vec a = zero, b = zero, c = zero, d = zero;
    int64_t i = from;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      a = add_term<kSquares>(Vec::load(x + i), mean, a);
      b = add_term<kSquares>(Vec::load(x + i + kLanes), mean, b);
      c = add_term<kSquares>(Vec::load(x + i + 2 * kLanes), mean, c);
      d = add_term<kSquares>(Vec::load(x + i + 3 * kLanes), mean, d);
    }
    for (; i + kLanes <= end; i += kLanes) a = add_term<kSquares>(Vec::load(x + i), mean, a);
    if (i < end) {
      const Vec last = add_term<kSquares>(load_first(x + i, end - i), mean, zero);
      b = b + select(Vec::first(end - i), last, zero);
    }
    sum += reduce_add((a + b) + (c + d));
  }
  return sum;
}

template <bool kSquares, int kRows, class S>
void add_tokens(const S* x, int64_t stride, int64_t channels, const Real* mean, Real* to) {
  int64_t i = 0;
  for (; i + kLanes <= channels; i += kLanes) {
    const Vec at = Vec::load(mean + i);
    Vec sum{Real{0}};
    for (int r = 0; r < kRows; ++r) {
      sum = add_term<kSquares>(Vec::load(x + r * stride + i), at, sum);
    }
    (Vec::load(to + i) + sum).store(to + i);
  }
  if (i == channels) return;
  const Vec at = Vec::load(mean + i);
  Vec sum{Real{0}};
  for (int r = 0; r < kRows; ++r) {
    sum = add_term<kSquares>(load_first(x + r * stride + i, channels - i), at, sum);
  }
  (Vec::load(to + i) + sum).store(to + i);
}

// part [padded(channels)] holds the sums of kChunk tokens.
template <bool kSquares, class S>
void sum_tokens(const S* x, int64_t stride, int64_t channels, int64_t n, const Real* mean,
                Real* part, Real* to) {
  const int64_t width = padded(channels);
  std::fill(to, to + width, Real{0});
  for (int64_t from = 0; from < n; from += kChunk) {
    const int64_t end = std::min(from + kChunk, n);
    std::fill(part, part + width, Real{0});
    int64_t j = from;
    for (; j + kTokens <= end; j += kTokens) {
      add_tokens<kSquares, kTokens>(x + j * stride, stride, channels, mean, part);
    }
    for (; j < end; ++j) add_tokens<kSquares, 1>(x + j * stride, stride, channels, mean, part);
    for (int64_t i = 0; i < width; i += kLanes)
      (Vec::load(to + i) + Vec::load(part + i)).store(to + i);
  }
}

template <class S>
void moments_as(const View& v, const char* from, int64_t channels, int64_t n,
                const Moments<Real>& to) {
  const S* const x = reinterpret_cast<const S*>(from);
  if (v.layout == Layout::kPlanes) {
    for (int64_t c = 0; c < channels; ++c) {
      const S* const plane = x + c * v.channel_stride;
      to.mean[c] = static_cast<Real>(sum_of_plane<false>(plane, n, Real{0}) / n);
      to.deviation[c] = deviation_of<Real>(sum_of_plane<true>(plane, n, to.mean[c]), n);
    }
    return;
  }
  std::fill(to.deviation, to.deviation + padded(channels), Real{0});  // no mean yet
  sum_tokens<false>(x, v.position_stride, channels, n, to.deviation, to.part, to.mean);
  for (int64_t i = 0; i < padded(channels); ++i) to.mean[i] /= static_cast<Real>(n);
  sum_tokens<true>(x, v.position_stride, channels, n, to.mean, to.part, to.deviation);
  for (int64_t i = 0; i < channels; ++i) to.deviation[i] = deviation_of<Real>(to.deviation[i], n);
}

inline void moments(const View& v, const char* from, int64_t channels, int64_t n,
                    const Moments<Real>& to) {
  if constexpr (std::is_same_v<Real, float>) {
    if (v.dtype == ScalarType::Half) return moments_as<Half>(v, from, channels, n, to);
    if (v.dtype == ScalarType::BFloat16) return moments_as<Bfloat16>(v, from, channels, n, to);
  }
  moments_as<Real>(v, from, channels, n, to);
}

template <class S, class O>
void gradient_as(const View& v, const char* from, const View& g, char* grad, int64_t channels,
                 int64_t n, const Real* mean, const Real* slope, const Real* shift) {
  const S* const x = reinterpret_cast<const S*>(from);
  O* const to = reinterpret_cast<O*>(grad);
  if (v.layout == Layout::kPlanes) {
    for (int64_t c = 0; c < channels; ++c) {
      const S* const plane = x + c * v.channel_stride;
      O* const out = to + c * g.channel_stride;
      const Vec at{mean[c]}, by{slope[c]}, plus{shift[c]};
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        fma(Vec::load(plane + i) - at, by, plus).store(out + i);
      }
      if (i < n) store_first(fma(load_first(plane + i, n - i) - at, by, plus), out + i, n - i);
    }
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    const S* const token = x + j * v.position_stride;
    O* const out = to + j * g.position_stride;
    int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes) {
      const Vec apart = Vec::load(token + i) - Vec::load(mean + i);
      fma(apart, Vec::load(slope + i), Vec::load(shift + i)).store(out + i);
    }
    if (i < channels) {
      const Vec apart = load_first(token + i, channels - i) - Vec::load(mean + i);
      store_first(fma(apart, Vec::load(slope + i), Vec::load(shift + i)), out + i, channels - i);
    }
  }
}

inline void gradient(const View& v, const char* from, const View& g, char* to, int64_t channels,
                     int64_t n, const Real* mean, const Real* slope, const Real* shift) {
  if constexpr (std::is_same_v<Real, float>) {
    if (v.dtype == ScalarType::Half) {
      return gradient_as<Half, float>(v, from, g, to, channels, n, mean, slope, shift);
    }
    if (v.dtype == ScalarType::BFloat16) {
      return gradient_as<Bfloat16, Bfloat16>(v, from, g, to, channels, n, mean, slope, shift);
    }
  }
  gradient_as<Real, Real>(v, from, g, to, channels, n, mean, slope, shift);
}

constexpr Kernels<Real> kKernels{moments, gradient};
