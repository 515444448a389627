// The vector kernels of kd_topk.cpp, included once per instruction set, inside its namespace and
// region.
#include "cpu/row.inl"

constexpr int64_t kBlock = 1024;  // classes whose sums stay in registers

inline void exp_all(float* x, int64_t n) {
  for (int64_t i = 0; i < padded(n); i += kLanes) exp(Vec::load(x + i)).store(x + i);
}

template <bool kOne, bool kTotal>
void exponentials_of(float* x, float* e_1, int64_t n, float inv_t, const Ahead& ahead,
                     Part<float>& to) {
  const Vec max_x{to.max}, zero{0.f}, masked{-INFINITY};
  const Scale at_t(Vec{inv_t}), at_1(Vec{1.f});
  const char *next = ahead.next, *grad = ahead.grad;
  const int64_t step = kLanes * ahead.size;
  double sum = 0, sum_1 = 0, total = 0;
  for (int64_t from = 0; from < padded(n); from += kBlock) {
    Vec sums = zero, sums_1 = zero, totals = zero;
    for (int64_t i = from; i < std::min(from + kBlock, padded(n)); i += kLanes) {
      // what comes next is on its way while these exponentials are computed
      __builtin_prefetch(next += step);
      __builtin_prefetch(grad += step, 1);
      const Vec logit = Vec::load(x + i), d = logit - max_x, e = exp_scaled(d, at_t);
      e.store(x + i);
      sums = sums + e;
      if constexpr (kOne) {
        const Vec one = exp_scaled(d, at_1);
        one.store(e_1 + i);
        sums_1 = sums_1 + one;
      }
      // what was taken out counts for nothing
      if constexpr (kTotal) totals = totals + select(not_equal(logit, masked), d, zero);
    }
    sum += reduce_add(sums);
    if constexpr (kOne) sum_1 += reduce_add(sums_1);
    if constexpr (kTotal) total += reduce_add(totals);
  }
  to.sum = static_cast<float>(sum);
  to.sum_1 = static_cast<float>(sum_1);
  to.total = static_cast<float>(total);
}

inline void exponentials(float* x, float* e_1, int64_t n, float inv_t, bool with_total,
                         const Ahead& ahead, Part<float>& to) {
  const auto run =
      e_1 ? (with_total ? exponentials_of<true, true> : exponentials_of<true, false>)
          : (with_total ? exponentials_of<false, true> : exponentials_of<false, false>);
  run(x, e_1, n, inv_t, ahead, to);
}

inline float terms(const float* p, const float* log_p, const float* s, int64_t n,
                   const kd::Stats<float>& st, float inv_t) {
  const Vec max_s{st.max_s}, log_s{st.log_s}, masked{-INFINITY}, zero{0.f};
  double sum = 0;
  for (int64_t from = 0; from < padded(n); from += kBlock) {
    Vec sums = zero;
    for (int64_t i = from; i < std::min(from + kBlock, padded(n)); i += kLanes) {
      const Vec log_t = Vec::load(log_p + i);
      const Vec log_q = (Vec::load(s + i) - max_s) * Vec{inv_t} - log_s;
      // +inf where only the student is masked, even if p is 0; nothing where the teacher is
      const Vec x = max(Vec{FLT_MIN}, Vec::load(p + i)) * (log_t - log_q);
      sums = sums + select(not_equal(log_t, masked), x, zero);
    }
    sum += reduce_add(sums);
  }
  return static_cast<float>(sum);
}

template <bool kOne>
void gradient_of(const float* e, const float* e_1, float* to, int64_t n, float by, float by_1,
                 float shift) {
  const auto at = [&](int64_t i) {
    const Vec g = Vec{by} * Vec::load(e + i) - Vec{shift};
    return kOne ? fma(Vec{by_1}, Vec::load(e_1 + i), g) : g;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) at(i).store(to + i);
  if (i < n) at(i).store_part(to + i, n - i);
}

inline void gradient(const float* e, const float* e_1, float* to, int64_t n, float by, float by_1,
                     float shift) {
  e_1 ? gradient_of<true>(e, e_1, to, n, by, by_1, shift)
      : gradient_of<false>(e, e, to, n, by, by_1, shift);
}

constexpr Kernels<float> kKernels{load, largest, exp_all, exponentials, terms, gradient, store};
