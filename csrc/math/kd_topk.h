// Distillation of one row from the K of its V classes that a teacher kept, for host and device:
//   loss = kd_weight * T^2 * KL(p || softmax(s/T)) + ce_weight * CE(s, y)
// p is the teacher's at its K classes; what is left of 1, `rest`, is by the tail
//   smooth  shared by the V - K others     zero  left out: p sums to less than 1
//   renorm  0: p is divided by its sum     bin   one class's, whose student is the others' sum
// The student's others have a maximum and sums of their own: their log-sum-exp is right also where
// they are far below the K, or where these are nearly all of the row.
#pragma once

#include "math/kd.h"

namespace vitkd::kd_topk {

enum class Tail : int64_t { kSmooth, kZero, kRenorm, kBin };

// What the teacher gives to its classes and to the others.
template <class A>
struct Masses {
  A by;       // what exp(log p) is divided by: 1, unless p is renormalised
  A top;      // its own classes, together
  A rest;     // the others, together
  A uniform;  // each of them, if smooth
};

// sum: of the K probabilities, of which rounded ones may make more than 1.
template <class A>
VITKD_HD Masses<A> masses(Tail tail, A sum, int64_t others) {
  const bool whole = tail == Tail::kRenorm || others == 0;
  const A by = whole || sum > 1 ? sum : A{1};
  const A rest = whole || tail == Tail::kZero || sum >= 1 ? A{0} : 1 - sum;
  return {by, sum / by, rest, tail == Tail::kSmooth && !whole ? rest / static_cast<A>(others) : 0};
}

// p (log p - log q) of a class: 0 where p is masked, +inf where only q is, even if p underflowed.
template <class A>
VITKD_HD A term(A p, A log_p, A log_q) {
  if (log_p == -std::numeric_limits<A>::infinity()) return 0;
  constexpr A kFloor = std::numeric_limits<A>::min();
  return (p < kFloor ? kFloor : p) * (log_p - log_q);
}

// Sums of the student over a part of a row: the teacher's classes, or others.
template <class A>
struct Part {
  A max = std::numeric_limits<A>::lowest();
  A sum = 0;    // sum exp((s - max) / T)
  A sum_1 = 0;  // sum exp(s - max), where that is asked for
  A total = 0;  // sum (s - max)
  A count = 0;
};

// The same sums, relative to a larger maximum.
template <class A>
VITKD_HD Part<A> rebase(Part<A> x, A max, A inv_t) {
  const A up = x.max - max;  // <= 0
  if (x.count != 0 && up != 0) {
    x.sum *= std::exp(up * inv_t);
    if (x.sum_1 != 0) x.sum_1 *= std::exp(up);
    x.total += x.count * up;
  }
  x.max = max;
  return x;
}

template <class A>
VITKD_HD Part<A> merge(const Part<A>& a, const Part<A>& b, A inv_t) {
  const A max = a.max > b.max ? a.max : b.max;
  Part<A> x = rebase(a, max, inv_t);
  const Part<A> y = rebase(b, max, inv_t);
  x.sum += y.sum;
  x.sum_1 += y.sum_1;
  x.total += y.total;
  x.count += y.count;
  return x;
}

// What backward needs of a row, in the places of kd's: of the student, max_s of all classes and
// max_t of the others; log sum exp at T of all, log_s, and of the others, log_t; at 1 of all.
template <class A>
VITKD_HD kd::Stats<A> stats_of(const Part<A>& all, const Part<A>& others, bool ce) {
  return {all.max, others.max, std::log(all.sum), std::log(others.sum),
          ce ? std::log(all.sum_1) : A{0}};
}

// log q at the largest of the others.
template <class A>
VITKD_HD A log_q_others(const kd::Stats<A>& st, A inv_t) {
  return (st.max_t - st.max_s) * inv_t - st.log_s;
}

// What the others add to the divergence.
template <class A>
VITKD_HD A rest_term(Tail tail, const Masses<A>& m, const Part<A>& others, const kd::Stats<A>& st,
                     A inv_t) {
  if (m.rest == 0) return 0;
  const A log_q = log_q_others(st, inv_t);
  if (tail == Tail::kBin) return m.rest * (std::log(m.rest) - (st.log_t + log_q));
  return m.rest * (std::log(m.uniform) - (others.total / others.count * inv_t + log_q));
}

// The loss of a row whose K terms sum to `terms`.
template <class A>
VITKD_HD A row_loss(Tail tail, A terms, const Masses<A>& m, const Part<A>& all,
                    const Part<A>& others, const kd::Stats<A>& st, const kd::Weights<A>& w,
                    const kd::Target<A>& target, A logit_a, A logit_b, A temperature) {
  A loss = 0;
  // a weight of zero switches its term off, also where the term is infinite
  if (w.kd != 0) {
    const A kl = terms + rest_term(tail, m, others, st, 1 / temperature);
    loss = w.kd * temperature * temperature * kl;
  }
  if (w.ce != 0) {
    kd::Sums<A> sums;
    sums.total_s = all.total;
    sums.count = all.count;
    const kd::Weights<A> ce{0, w.ce, w.smoothing};
    loss += kd::row_loss(sums, st, ce, target, logit_a, logit_b, temperature);
  }
  return loss;
}

// d loss / d s, from exponentials relative to max, the largest of the others or of the teacher's:
//   another class   others * exp((s - max) / T) + others_1 * exp(s - max) - shift
//   a teacher's     top * exp((s - max) / T) + top_1 * exp(s - max) - top_p * p - uniform
// At the target's classes, at_a and at_b are subtracted.
template <class A>
struct Factors {
  A others, others_1, shift;
  A top, top_1, top_p, uniform, at_a, at_b;
};

template <class A>
VITKD_HD Factors<A> factors(Tail tail, const kd::GradFactors<A>& f, const Masses<A>& m,
                            const kd::Stats<A>& st, A max_top, A inv_t) {
  const A kd = tail == Tail::kZero ? f.kd * m.top : f.kd;
  A others = kd * std::exp(log_q_others(st, inv_t));
  // a gradient of 0 where every one of them is masked
  const bool masked = st.log_t == -std::numeric_limits<A>::infinity();
  if (tail == Tail::kBin && !masked) others -= f.kd * m.rest * std::exp(-st.log_t);
  const A up = max_top - st.max_s;
  Factors<A> x{others,
               0,
               f.kd * m.uniform + f.uniform,
               kd * std::exp(up * inv_t - st.log_s),
               0,
               f.kd,
               f.uniform,
               f.at_a,
               f.at_b};
  if (f.ce != 0) {
    x.others_1 = f.ce * std::exp(st.max_t - st.max_s - st.log_1);
    x.top_1 = f.ce * std::exp(up - st.log_1);
  }
  return x;
}

// The gradient at one of the teacher's classes, from its probability and exponentials.
template <class A>
VITKD_HD A top_gradient(const Factors<A>& f, A p, A e, A e_1) {
  return f.top * e - f.top_p * p + (f.top_1 * e_1 - f.uniform);
}

}  // namespace vitkd::kd_topk
