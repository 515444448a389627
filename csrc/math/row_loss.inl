// The formulas of row_loss.h for any type of number V. Included once per instruction set, inside
// its namespace and region, since a template takes its instructions from where it is written.
// Equal student and teacher give exactly 0: differences come before products, and no product is
// fused with a sum.

template <class V>
struct Parameters {
  V alpha, beta;
  bool linear;  // beta is 1: no power has to be taken
};

// One class's share of a divergence.
template <class V>
struct Term {
  V loss;
  V w;    // the gradient in u is w - q * sum(w); any multiple of q may be part of it
  V w_p;  // the gradient in v, likewise
};

template <class V>
VITKD_HD_INLINE V product(V weight, V factor) {  // 0 where the weight is
  return select(not_equal(weight, V{0.f}), weight * factor, V{0.f});
}

// a (log a - log b): 0 where a is masked, inf where only b is, even if a has underflowed.
template <class V>
VITKD_HD_INLINE V kl_term(V a, V log_a, V log_b) {
  const V masked{-INFINITY};
  const V term = select(not_equal(log_b, masked), a * (log_a - log_b), V{INFINITY});
  return select(not_equal(log_a, masked), term, V{0.f});
}

// Each divergence: its share of a class with the probabilities q and p.
struct Kl {
  template <class V>
  VITKD_HD_INLINE static Term<V> term(const Parameters<V>&, V q, V p, V log_q, V log_p) {
    const V loss = kl_term(p, log_p, log_q);
    return {loss, q - p, loss};
  }
};

struct ReverseKl {
  template <class V>
  VITKD_HD_INLINE static Term<V> term(const Parameters<V>&, V q, V p, V log_q, V log_p) {
    const V loss = kl_term(q, log_q, log_p);
    return {loss, loss, p - q};
  }
};

// m = b p + (1 - b) q is hi * (1 - x) with hi and lo the larger and the smaller of the two, and x =
// lo's weight * (1 - lo / hi): equal ones give log(1) = 0. What is masked or has underflowed has no
// weight: all it has to be is finite. Where q is near p, first-order terms cancel: x comes from the
// same difference as they do, without loss of digits.
struct Js {
  template <class V>
  VITKD_HD_INLINE static Term<V> term(const Parameters<V>& k, V q, V p, V log_q, V log_p) {
    const V zero{0.f}, one{1.f};
    const V d = log_q - log_p;
    const auto p_is_more = less(d, zero);
    const V rest = one - k.beta;
    const V low = select(p_is_more, rest, k.beta);
    const V down = max(min(d, zero - d), V{-FLT_MAX});  // log lo - log hi; NaN where both are -inf
    const V x = low * (zero - expm1_negative(down));
    const V y = one - x;
    const V above = ((y - one) + x) - log_normal(y);  // log hi - log m
    const V below = down + above;                     // log lo - log m
    const V w = rest * q * select(p_is_more, below, above);
    const V w_p = k.beta * p * select(p_is_more, above, below);
    return {w + w_p, w, w_p};
  }
};

struct Tv {
  template <class V>
  VITKD_HD_INLINE static Term<V> term(const Parameters<V>&, V q, V p, V, V) {
    const V half{0.5f}, zero{0.f};
    const V d = half * (q - p);
    const V sign = select(less(d, zero), zero - half, select(less(zero, d), half, zero));
    return {max(d, zero - d), q * sign, zero - p * sign};
  }
};

// All classes but the label's; `ofa_label` has that one. -c log q, c = p^b.
struct Ofa {
  template <class V>
  VITKD_HD_INLINE static Term<V> term(const Parameters<V>& k, V q, V p, V log_q, V log_p) {
    (void)q;
    const V power = k.linear ? p : select(not_equal(p, V{0.f}), exp(k.beta * log_p), V{0.f});
    const V loss = product(power, V{0.f} - log_q);
    return {loss, V{0.f} - power, k.beta * loss};
  }
};

// c = (1 + p)^b - 1
template <class V>
VITKD_HD_INLINE Term<V> ofa_label(const Parameters<V>& k, V p, V log_q) {
  const V more = V{1.f} + p;
  const V power = k.linear ? more : exp(k.beta * log(more));
  const V c = k.linear ? p : power - V{1.f};
  return {product(c, V{0.f} - log_q), V{0.f} - c,
          product(k.beta * p * (power / more), V{0.f} - log_q)};
}

template <class V>
VITKD_HD_INLINE V log_1p(V x) {  // for 0 <= x <= 1
  const V y = V{1.f} + x;
  return log(y) + (x - (y - V{1.f})) / y;
}

template <class V>
struct Sigmoid {
  V yes, no;          // sigmoid(z), sigmoid(-z)
  V log_yes, log_no;  // their logarithms
};

template <class V>
VITKD_HD_INLINE Sigmoid<V> sigmoid(V z) {
  const V zero{0.f}, one{1.f};
  const V small = exp(min(z, zero - z));
  const V major = one / (one + small), minor = small / (one + small), tail = log_1p(small);
  const auto negative = less(z, zero);
  return {select(negative, minor, major), select(negative, major, minor), min(z, zero) - tail,
          min(zero - z, zero) - tail};
}

// DKD's term of the label's class against all others, from their logits: z_s = u_y - log sum of
// the others' exp(u), z_t alike. The gradient in u is d_z_s at the label and -q d_z_s elsewhere.
template <class V>
struct Decoupled {
  V loss, d_z_s, d_z_t;
};

template <class V>
VITKD_HD_INLINE Decoupled<V> decoupled(V z_s, V z_t) {
  const Sigmoid<V> q = sigmoid(z_s), p = sigmoid(z_t);
  return {product(p.yes, p.log_yes - q.log_yes) + product(p.no, p.log_no - q.log_no), q.yes - p.yes,
          product(p.yes * p.no, z_t - z_s)};
}

// Sums over a row's classes.
template <class V>
struct Sums {
  V loss, w;
  V w_u, q_u;         // of w u and q u: where logits are standardised, or T has a gradient
  V w_p, w_p_v, p_v;  // where T has a gradient
};

// Adds one class. kMoments: all sums are asked for. u and v are relative to their maxima.
template <bool kMoments, class V>
VITKD_HD_INLINE void add(Sums<V>& x, const Term<V>& term, V q, V p, V u, V v) {
  x.loss = x.loss + term.loss;
  x.w = x.w + term.w;
  if constexpr (kMoments) {
    x.w_u = x.w_u + product(term.w, u);
    x.q_u = x.q_u + product(q, u);
    x.w_p = x.w_p + term.w_p;
    x.w_p_v = x.w_p_v + product(term.w_p, v);
    x.p_v = x.p_v + product(p, v);
  }
}

template <class V>
VITKD_HD_INLINE Sums<V> operator+(const Sums<V>& a, const Sums<V>& b) {
  return {a.loss + b.loss, a.w + b.w,         a.w_u + b.w_u, a.q_u + b.q_u,
          a.w_p + b.w_p,   a.w_p_v + b.w_p_v, a.p_v + b.p_v};
}

// What a row's sums come to.
template <class V>
struct Row {
  V loss;          // without kd_weight and T^2
  V scale, total;  // the gradient in u is scale * w - total * q - label * q,
  V label;         // and this at DKD's label, which has w = q = 0; else 0
  V along;         // sum of the gradient in u times u
  V moved;         // along and the same of v: d loss / dT = -moved / T
};

template <class V>
VITKD_HD_INLINE Row<V> row_of(const Sums<V>& x) {
  const V along = x.w_u - x.w * x.q_u;
  // the gradient is NaN where the loss is, whatever w made of it
  const V total = x.w + select(not_equal(x.loss, x.loss), x.loss, V{0.f});
  return {x.loss, V{1.f}, total, V{0.f}, along, along + (x.w_p_v - x.w_p * x.p_v)};
}

// The same of KL without a sweep for its terms: sums over exponentials e_s = exp(u), e_t = exp(v)
// relative to the maxima. w is p.
template <class V>
struct KlSums {
  V s, t;                  // e_s, e_t
  V dot;                   // e_t (v - u)
  V s_u, t_u, t_v, dot_v;  // e_s u, e_t u, e_t v, e_t (v - u) v: where T has a gradient
};

template <class V>
VITKD_HD_INLINE KlSums<V> operator+(const KlSums<V>& a, const KlSums<V>& b) {
  return {a.s + b.s,     a.t + b.t,     a.dot + b.dot,    a.s_u + b.s_u,
          a.t_u + b.t_u, a.t_v + b.t_v, a.dot_v + b.dot_v};
}

// e_t (v - u): 0 where v is masked, inf where only u is, even if e_t has underflowed.
template <class V>
VITKD_HD_INLINE V dot_term(V e_t, V u, V v) {
  return select(not_equal(v, V{-INFINITY}), max(V{FLT_MIN}, e_t) * (v - u), V{0.f});
}

template <class V>
VITKD_HD_INLINE Row<V> kl_row(const KlSums<V>& x, V inv_s, V inv_t) {
  const V infinite{INFINITY}, one{1.f};
  const V dot = x.dot * inv_t;
  const V along = x.s_u * inv_s - x.t_u * inv_t;
  const V moved = along + (x.dot_v * inv_t - dot * (x.t_v * inv_t));
  // not inf - inf: with every class masked, log(s) would be -inf
  const V loss = select(not_equal(x.dot, infinite), dot + log(x.s / x.t), infinite);
  return {loss, V{0.f} - one, V{0.f} - one, V{0.f}, along, moved};
}

// DKD: of KL over the other classes, with its sums of q u and p v, and of the label's class with
// the logits u_y and v_y relative to the maxima of the others.
template <class V>
VITKD_HD_INLINE Row<V> dkd_row(const Parameters<V>& k, const Row<V>& others, V q_u, V p_v, V u_y,
                               V v_y, V log_s, V log_t) {
  const Decoupled<V> label = decoupled(u_y - log_s, v_y - log_t);
  const V d_z_s = k.alpha * label.d_z_s, d_z_t = k.alpha * label.d_z_t;
  const V along = k.beta * others.along + (product(d_z_s, u_y) - d_z_s * q_u);
  const V along_v = k.beta * (others.moved - others.along) + (product(d_z_t, v_y) - d_z_t * p_v);
  return {k.alpha * label.loss + k.beta * others.loss,
          k.beta * others.scale,
          k.beta * others.total,
          d_z_s,
          along,
          along + along_v};
}
