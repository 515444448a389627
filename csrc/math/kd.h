// Distillation loss of one row of logits s (student) and t (teacher), for host and device:
//   loss = kd_weight * T^2 * KL(softmax(t/T) || softmax(s/T)) + ce_weight * CE(s, y)
// A row is read once. Sums relative to the running maxima are merged as in online softmax:
//   KL = dot / sum_t + log(sum_s / sum_t), dot = sum e^v (v - u)
//   u = (s - max_s) / T, v = (t - max_t) / T
// y is never dense: two class ids, their mixing weight and the label smoothing stand for it.
// Log-sum-exps are kept as (maximum, logarithm of the shifted sum): added up in fp32 they would
// lose the digits that logits of +-1e4 need.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "math/hd.h"

namespace vitkd::kd {

// What holds for every row of a call.
template <class A>
struct Weights {
  A kd;
  A ce;
  A smoothing;
};

// One row's target: y~ = (1 - smoothing) * (lam * onehot(a) + (1 - lam) * onehot(b)) + smoothing/V.
// With plain labels b == a.
template <class A>
struct Target {
  int64_t a = 0;
  int64_t b = 0;
  A lam = 1;
};

// Sums over a row or a part of one. The maxima start at the lowest finite number and not at -inf,
// so that a masked logit (-inf) minus a maximum is -inf and never NaN.
template <class A>
struct Sums {
  A max_s = std::numeric_limits<A>::lowest();
  A max_t = std::numeric_limits<A>::lowest();
  A sum_s = 0;    // sum exp(u)
  A sum_t = 0;    // sum exp(v)
  A dot = 0;      // sum exp(v) * (v - u)
  A sum_1 = 0;    // sum exp(s - max_s): the student at T = 1, for the cross-entropy
  A total_s = 0;  // sum (s - max_s): for label smoothing
  A count = 0;
};

// The exponentials of add_class and grad_class: exp(d / T - log) and exp(d - log). A backend may
// pass a faster one.
template <class A>
struct Exp {
  A inv_t;
  VITKD_HD A at_t(A d, A log = 0) const { return std::exp(d * inv_t - log); }
  VITKD_HD A at_1(A d, A log = 0) const { return std::exp(d - log); }
};

// exp(v) * (v - u) for one class, from d_t = t - max_t and d_s alike: 0 where the teacher is
// masked, +inf where only the student is, even if exp(v) has underflowed. The difference comes
// before 1/T: equal logits then give 0 also where a compiler fuses multiply and subtract.
template <class A>
VITKD_HD A dot_term(A exp_v, A d_s, A d_t, A inv_t) {
  if (d_t == -std::numeric_limits<A>::infinity()) return 0;
  constexpr A kFloor = std::numeric_limits<A>::min();
  return (exp_v < kFloor ? kFloor : exp_v) * ((d_t - d_s) * inv_t);
}

// The same sums, relative to larger maxima.
template <class A>
VITKD_HD Sums<A> rebase(Sums<A> x, A max_s, A max_t, A inv_t) {
  const A up_s = x.max_s - max_s;  // <= 0
  const A up_t = x.max_t - max_t;
  if (x.count == 0 || (up_s == 0 && up_t == 0)) {
    x.max_s = max_s;
    x.max_t = max_t;
    return x;
  }
  const A scale_t = std::exp(up_t * inv_t);
  if (x.sum_t > 0) {
    const A moved = x.dot + x.sum_t * (up_t - up_s) * inv_t;
    // an infinite dot must survive a scale that underflows
    x.dot = x.dot == std::numeric_limits<A>::infinity() ? x.dot : scale_t * moved;
  }
  x.sum_s *= std::exp(up_s * inv_t);
  x.sum_t *= scale_t;
  x.sum_1 *= std::exp(up_s);
  x.total_s += x.count * up_s;
  x.max_s = max_s;
  x.max_t = max_t;
  return x;
}

template <class A>
VITKD_HD Sums<A> merge(const Sums<A>& a, const Sums<A>& b, A inv_t) {
  const A max_s = a.max_s > b.max_s ? a.max_s : b.max_s;
  const A max_t = a.max_t > b.max_t ? a.max_t : b.max_t;
  Sums<A> x = rebase(a, max_s, max_t, inv_t);
  const Sums<A> y = rebase(b, max_s, max_t, inv_t);
  x.sum_s += y.sum_s;
  x.sum_t += y.sum_t;
  x.dot += y.dot;
  x.sum_1 += y.sum_1;
  x.total_s += y.total_s;
  x.count += y.count;
  return x;
}

// Adds one class to sums whose maxima already cover it; the caller counts the classes.
template <bool kCe, class A, class E>
VITKD_HD void add_class(Sums<A>& x, A s, A t, const E& exp) {
  const A d_s = s - x.max_s;
  const A d_t = t - x.max_t;
  const A exp_v = exp.at_t(d_t);
  x.sum_s += exp.at_t(d_s);
  x.sum_t += exp_v;
  x.dot += dot_term(exp_v, d_s, d_t, exp.inv_t);
  if (kCe) {
    x.sum_1 += exp.at_1(d_s);
    x.total_s += d_s;
  }
}

// What backward needs of a row: lse(s/T) = max_s/T + log_s, lse(t/T) = max_t/T + log_t,
// lse(s) = max_s + log_1.
template <class A>
struct Stats {
  A max_s, max_t, log_s, log_t, log_1;
};

template <class A>
VITKD_HD Stats<A> stats_of(const Sums<A>& x, bool ce) {
  return {x.max_s, x.max_t, std::log(x.sum_s), std::log(x.sum_t), ce ? std::log(x.sum_1) : A{0}};
}

// The student's logit in the mean of the target's classes, the smoothing aside.
template <class A>
VITKD_HD A hard_logit(const Target<A>& target, A logit_a, A logit_b) {
  // 0 * -inf would be NaN
  if (target.lam == 1) return logit_a;
  if (target.lam == 0) return logit_b;
  return target.lam * logit_a + (1 - target.lam) * logit_b;
}

// The loss of a row. `logit_a` and `logit_b` are the student's logits at the target's classes.
template <class A>
VITKD_HD A row_loss(const Sums<A>& x, const Stats<A>& st, const Weights<A>& w,
                    const Target<A>& target, A logit_a, A logit_b, A temperature) {
  A loss = 0;
  // a weight of zero switches its term off, also where the term is infinite
  if (w.kd != 0) {
    // not inf - inf: with every class masked, log_s would be -inf
    const A kl =
        x.dot == std::numeric_limits<A>::infinity() ? x.dot : x.dot / x.sum_t - st.log_t + st.log_s;
    loss = w.kd * temperature * temperature * kl;
  }
  if (w.ce != 0) {
    // sum y~ (s - max_s)
    A expected = 0;
    if (w.smoothing != 1) {
      expected = (1 - w.smoothing) * (hard_logit(target, logit_a, logit_b) - st.max_s);
    }
    if (w.smoothing != 0) expected += w.smoothing * (x.total_s / x.count);
    loss += w.ce * (st.log_1 - expected);
  }
  return loss;
}

// d loss / d s_i = kd * (q_i - p_i) + ce * (q1_i - y~_i), with q, p the softmaxes at T and q1 at 1.
// The factors hold the row's share of the loss and the incoming gradient.
template <class A>
struct GradFactors {
  A kd;       // grad * share * kd_weight * T  (T^2 / T)
  A ce;       // grad * share * ce_weight
  A uniform;  // ce * smoothing / V, subtracted from every class
  A at_a;     // ce * (1 - smoothing) * lam, subtracted at class a
  A at_b;     // ce * (1 - smoothing) * (1 - lam), subtracted at class b
};

template <class A>
VITKD_HD GradFactors<A> grad_factors(A grad_share, const Weights<A>& w, A lam, A temperature,
                                     int64_t classes) {
  const A ce = grad_share * w.ce;
  const A hard = ce * (1 - w.smoothing);
  return {grad_share * w.kd * temperature, ce, ce * w.smoothing / static_cast<A>(classes),
          hard * lam, hard * (1 - lam)};
}

// The gradient at one class, the target's classes not yet subtracted.
template <bool kCe, class A, class E>
VITKD_HD A grad_class(const GradFactors<A>& f, const Stats<A>& st, A s, A t, const E& exp) {
  const A d = s - st.max_s;
  A g = f.kd * (exp.at_t(d, st.log_s) - exp.at_t(t - st.max_t, st.log_t));
  if (kCe) g += f.ce * exp.at_1(d, st.log_1) - f.uniform;
  return g;
}

}  // namespace vitkd::kd
