// The vector kernels of dist.cpp, included once per instruction set, inside its namespace and
// region.
#include "cpu/row.inl"

constexpr int64_t kBlock = 1024;  // classes whose sums stay in registers

// x becomes exp((x - max) / T); returns the sum.
inline float exponentials(float* x, int64_t n, float max_in, float inv_t, const char* next,
                          int64_t size) {
  const Vec max_x{max_in};
  const Scale at_t(Vec{inv_t});
  const int64_t step = kLanes * size;
  double sum = 0;
  for (int64_t from = 0; from < padded(n); from += kBlock) {
    Vec sums{0.f};
    for (int64_t i = from; i < std::min(from + kBlock, padded(n)); i += kLanes) {
      __builtin_prefetch(next += step);
      const Vec e = exp_scaled(Vec::load(x + i) - max_x, at_t);
      e.store(x + i);
      sums = sums + e;
    }
    sum += reduce_add(sums);
  }
  return static_cast<float>(sum);
}

inline Moments<float> add_row(const float* e_s, const float* e_t, float by_s, float by_t,
                              float uniform_in, const float* pivots, float* sums, int64_t n) {
  const int64_t width = padded(n);
  const Vec q_by{by_s}, p_by{by_t}, uniform{uniform_in}, zero{0.f};
  double v_q = 0, v_p = 0, c = 0;
  for (int64_t from = 0; from < width; from += kBlock) {
    Vec vq = zero, vp = zero, cs = zero;
    for (int64_t i = from; i < std::min(from + kBlock, width); i += kLanes) {
      const Vec q = Vec::load(e_s + i) * q_by, p = Vec::load(e_t + i) * p_by;
      Vec u_q = q - uniform, u_p = p - uniform;
      if (i + kLanes > n) {
        const Vec::Mask live = Vec::first(std::max<int64_t>(n - i, 0));
        u_q = select(live, u_q, zero);
        u_p = select(live, u_p, zero);
      }
      vq = fma(u_q, u_q, vq);
      vp = fma(u_p, u_p, vp);
      cs = fma(u_q, u_p, cs);
      const Vec d_q = q - Vec::load(pivots + i), d_p = p - Vec::load(pivots + width + i);
      float* const to = sums + i;
      (Vec::load(to) + d_q).store(to);
      (Vec::load(to + width) + d_p).store(to + width);
      fma(d_q, d_q, Vec::load(to + 2 * width)).store(to + 2 * width);
      fma(d_p, d_p, Vec::load(to + 3 * width)).store(to + 3 * width);
      fma(d_q, d_p, Vec::load(to + 4 * width)).store(to + 4 * width);
    }
    v_q += reduce_add(vq);
    v_p += reduce_add(vp);
    c += reduce_add(cs);
  }
  return {static_cast<float>(v_q), static_cast<float>(v_p), static_cast<float>(c)};
}

// s becomes q, t the slope; returns sum q * slope.
inline float slopes(float* s, float* t, const Stats<float>& st, const RowFactors<float>& f,
                    const float* columns, int64_t n, const Ahead& ahead) {
  const Vec max_s{st.max_s}, max_t{st.max_t}, by_s{st.by_s}, by_t{st.by_t};
  const Scale at_t(Vec{f.inv_t});
  const Vec uniform{f.uniform}, row_q{f.q}, row_p{f.p};
  const int64_t width = padded(n), step_s = kLanes * ahead.s_size, step_t = kLanes * ahead.t_size;
  const char *next_s = ahead.s, *next_t = ahead.t, *grad = ahead.grad;
  double sum = 0;
  for (int64_t from = 0; from < width; from += kBlock) {
    Vec sums{0.f};
    for (int64_t i = from; i < std::min(from + kBlock, width); i += kLanes) {
      __builtin_prefetch(next_s += step_s);
      __builtin_prefetch(next_t += step_t);
      __builtin_prefetch(grad += step_s, 1);
      const Vec q = by_s * exp_scaled(Vec::load(s + i) - max_s, at_t);
      const Vec p = by_t * exp_scaled(Vec::load(t + i) - max_t, at_t);
      const float* const column = columns + i;
      const Vec of_row = row_p * (p - uniform) - row_q * (q - uniform);
      const Vec of_p = Vec::load(column + 3 * width) * (p - Vec::load(column + width));
      const Vec of_q = Vec::load(column + 2 * width) * (q - Vec::load(column));
      const Vec g = of_row + (of_p - of_q);
      q.store(s + i);
      g.store(t + i);
      sums = fma(q, g, sums);
    }
    sum += reduce_add(sums);
  }
  return static_cast<float>(sum);
}

// to = by * q * (g - mean)
inline void gradient(const float* q, const float* g, float* to, int64_t n, float mean, float by) {
  const auto at = [&](int64_t i) {
    return Vec{by} * Vec::load(q + i) * (Vec::load(g + i) - Vec{mean});
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) at(i).store(to + i);
  if (i < n) at(i).store_part(to + i, n - i);
}

constexpr Kernels<float> kKernels{load, largest, exponentials, add_row, slopes, gradient, store};
