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

// m = b p + (1 - b) q is hi * (1 - x) with hi the larger of the two, x = weight of the smaller *
// (1 - e^-|log q - log p|): nothing overflows, and equal ones give log(1) = 0.
struct Js {
  template <class V>
  VITKD_HD_INLINE static Term<V> term(const Parameters<V>& k, V q, V p, V log_q, V log_p) {
    const V d = log_q - log_p;
    const auto p_is_more = less(d, V{0.f});
    const V down = min(d, V{0.f} - d);  // -|d|
    const V rest = V{1.f} - k.beta;
    const V low = select(p_is_more, rest, k.beta);
    const V above = V{0.f} - log(V{1.f} - low * (V{1.f} - exp(down)));  // log hi - log m
    const V below = down + above;
    const V w = product(rest * q, select(p_is_more, below, above));
    const V w_p = product(k.beta * p, select(p_is_more, above, below));
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
  V scale, total;  // the gradient in u is scale * w - total * q,
  V label;         // but for DKD's label, which has w = q = 0: this
  V along;         // sum of the gradient in u times u
  V moved;         // along and the same of v: d loss / dT = -moved / T
};

template <class V>
VITKD_HD_INLINE Row<V> row_of(const Sums<V>& x) {
  const V along = x.w_u - x.w * x.q_u;
  return {x.loss, V{1.f}, x.w, V{0.f}, along, along + (x.w_p_v - x.w_p * x.p_v)};
}

// DKD: of the sums over the other classes, and of the label's class with the logits u_y and v_y
// relative to the maxima of the others.
template <class V>
VITKD_HD_INLINE Row<V> dkd_row(const Parameters<V>& k, const Sums<V>& x, V u_y, V v_y, V log_s,
                               V log_t) {
  const Decoupled<V> label = decoupled(u_y - log_s, v_y - log_t);
  const V d_z_s = k.alpha * label.d_z_s, d_z_t = k.alpha * label.d_z_t;
  const Row<V> others = row_of(x);
  const V along = k.beta * others.along + (product(d_z_s, u_y) - d_z_s * x.q_u);
  const V along_v = k.beta * (others.moved - others.along) + (product(d_z_t, v_y) - d_z_t * x.p_v);
  return {k.alpha * label.loss + k.beta * x.loss,
          k.beta,
          k.beta * x.w + d_z_s,
          d_z_s,
          along,
          along + along_v};
}
