// The vector kernels of at.cpp, included once per instruction set, inside its namespace and region.
#include "cpu/features.inl"

constexpr int64_t kPlanes = 8;              // of channels, whose sum stays in registers
constexpr int64_t kChannels = 64 * kLanes;  // of a token, likewise

template <int kP>
VITKD_INLINE Vec add_power(Vec x, Vec sum) {
  if constexpr (kP == 2) return fma(x, x, sum);
  return sum + max(x, Vec{Real{0}} - x);
}

// |x|^p differentiated, times w / p
template <int kP>
VITKD_INLINE Vec slope(Vec x, Vec w) {
  if constexpr (kP == 2) return x * w;
  const Vec zero{Real{0}};
  return select(less(zero, x), w, select(less(x, zero), zero - w, zero));
}

template <class S, int kP, int kRows>
void add_planes(const S* x, int64_t stride, int64_t n, Real* q) {
  const Vec zero{Real{0}};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec sum = zero;
    for (int r = 0; r < kRows; ++r) sum = add_power<kP>(Vec::load(x + r * stride + i), sum);
    (Vec::load(q + i) + sum).store(q + i);
  }
  if (i == n) return;
  Vec sum = zero;
  for (int r = 0; r < kRows; ++r) sum = add_power<kP>(load_first(x + r * stride + i, n - i), sum);
  (Vec::load(q + i) + sum).store(q + i);
}

template <class S, int kP>
void energy_as(const View& v, const char* sample, int64_t channels, int64_t n, Real* q) {
  const S* const x = reinterpret_cast<const S*>(sample);
  std::fill(q, q + padded(n), Real{0});
  if (v.layout == Layout::kPlanes) {
    const int64_t stride = v.channel_stride;
    int64_t c = 0;
    for (; c + kPlanes <= channels; c += kPlanes) {
      add_planes<S, kP, kPlanes>(x + c * stride, stride, n, q);
    }
    for (; c < channels; ++c) add_planes<S, kP, 1>(x + c * stride, stride, n, q);
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    const S* const token = x + j * v.position_stride;
    for (int64_t from = 0; from < channels; from += kChannels) {
      const int64_t end = std::min(from + kChannels, channels);
      Vec a{Real{0}}, b = a, c = a, d = a;
      int64_t i = from;
      for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
        a = add_power<kP>(Vec::load(token + i), a);
        b = add_power<kP>(Vec::load(token + i + kLanes), b);
        c = add_power<kP>(Vec::load(token + i + 2 * kLanes), c);
        d = add_power<kP>(Vec::load(token + i + 3 * kLanes), d);
      }
      for (; i + kLanes <= end; i += kLanes) a = add_power<kP>(Vec::load(token + i), a);
      if (i < end) b = add_power<kP>(load_first(token + i, end - i), b);
      q[j] += reduce_add((a + b) + (c + d));
    }
  }
}

inline double squared_length(const Real* q, int64_t n) {
  double sum = 0;
  for (int64_t from = 0; from < padded(n); from += kBlock) {
    Vec part{Real{0}};
    for (int64_t i = from; i < std::min(from + kBlock, padded(n)); i += kLanes) {
      part = add_power<2>(Vec::load(q + i), part);
    }
    sum += reduce_add(part);
  }
  return sum;
}

inline Real distance(Real* q_s, Real* q_t, int64_t n, Real by) {
  // divided, so that a map of one position is exactly 1
  const Real length = length_of(squared_length(q_s, n));
  const Vec length_s{length}, length_t{static_cast<Real>(length_of(squared_length(q_t, n)))};
  double loss = 0, along = 0;
  for (int64_t from = 0; from < padded(n); from += kBlock) {
    Vec squares{Real{0}}, products = squares;
    for (int64_t i = from; i < std::min(from + kBlock, padded(n)); i += kLanes) {
      const Vec unit = Vec::load(q_s + i) / length_s, apart = unit - Vec::load(q_t + i) / length_t;
      unit.store(q_s + i);
      apart.store(q_t + i);
      squares = fma(apart, apart, squares);
      products = fma(unit, apart, products);
    }
    loss += reduce_add(squares);
    along += reduce_add(products);
  }
  if (by == 0) return static_cast<Real>(loss);
  // of the length that was divided out, nothing is left
  const Vec down{static_cast<Real>(-along)}, factor{2 * by / length};
  for (int64_t i = 0; i < padded(n); i += kLanes) {
    (factor * fma(Vec::load(q_s + i), down, Vec::load(q_t + i))).store(q_s + i);
  }
  return static_cast<Real>(loss);
}

template <class S, class O, int kP>
void gradient_as(const View& v, const char* sample, const View& g, char* grad, int64_t channels,
                 int64_t n, const Real* w) {
  const S* const x = reinterpret_cast<const S*>(sample);
  O* const to = reinterpret_cast<O*>(grad);
  if (v.layout == Layout::kPlanes) {
    for (int64_t c = 0; c < channels; ++c) {
      const S* const from = x + c * v.channel_stride;
      O* const out = to + c * g.channel_stride;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        slope<kP>(Vec::load(from + i), Vec::load(w + i)).store(out + i);
      }
      if (i < n)
        store_first(slope<kP>(load_first(from + i, n - i), Vec::load(w + i)), out + i, n - i);
    }
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    const S* const from = x + j * v.position_stride;
    O* const out = to + j * g.position_stride;
    const Vec by{w[j]};
    int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes) {
      slope<kP>(Vec::load(from + i), by).store(out + i);
    }
    if (i < channels) {
      store_first(slope<kP>(load_first(from + i, channels - i), by), out + i, channels - i);
    }
  }
}

template <int kP>
void energy_of(const View& v, const char* sample, int64_t channels, int64_t n, Real* q) {
  if constexpr (std::is_same_v<Real, float>) {
    if (v.dtype == ScalarType::Half) return energy_as<Half, kP>(v, sample, channels, n, q);
    if (v.dtype == ScalarType::BFloat16) return energy_as<Bfloat16, kP>(v, sample, channels, n, q);
  }
  energy_as<Real, kP>(v, sample, channels, n, q);
}

inline void energy(const View& v, const char* sample, int64_t channels, int64_t n, int64_t p,
                   Real* q) {
  p == 2 ? energy_of<2>(v, sample, channels, n, q) : energy_of<1>(v, sample, channels, n, q);
}

template <int kP>
void gradient_of(const View& v, const char* sample, const View& g, char* to, int64_t channels,
                 int64_t n, const Real* w) {
  if constexpr (std::is_same_v<Real, float>) {
    if (v.dtype == ScalarType::Half) {
      return gradient_as<Half, float, kP>(v, sample, g, to, channels, n, w);
    }
    if (v.dtype == ScalarType::BFloat16) {
      return gradient_as<Bfloat16, Bfloat16, kP>(v, sample, g, to, channels, n, w);
    }
  }
  gradient_as<Real, Real, kP>(v, sample, g, to, channels, n, w);
}

inline void gradient(const View& v, const char* sample, const View& g, char* to, int64_t channels,
                     int64_t n, int64_t p, const Real* w) {
  p == 2 ? gradient_of<2>(v, sample, g, to, channels, n, w)
         : gradient_of<1>(v, sample, g, to, channels, n, w);
}

constexpr Kernels<Real> kKernels{energy, distance, gradient};
