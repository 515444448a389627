// The formulas of binary_kd.h for Vec, a register of Real. Included once per instruction set,
// inside its namespace and region. Equal student and teacher give exactly 0.

// In place of infinities, which times 0 are NaN. NaN is preserved.
VITKD_HD_INLINE Vec cut_off(Vec x, Vec most) { return min(most, max(Vec{Real{0}} - most, x)); }

struct Exponentials {  // e^-|x|; at T = 1, that of u is that of s
  Vec u, v, s;
};

// Apart from the rest: one chain of all operations would leave most of a core idle.
template <Kind kKind>
VITKD_HD_INLINE Exponentials exponentials(Vec s, Vec t, Vec inv_t) {
  Exponentials e;
  if constexpr (kKind != Kind::kBce) {
    e.u = exp(minus_abs(s * inv_t));
    e.v = exp(minus_abs(t * inv_t));
  }
  if constexpr (kKind == Kind::kBoth || kKind == Kind::kBce) e.s = exp(minus_abs(s));
  return e;
}

struct Sigmoid {
  Vec one_e, rest, hat;  // 1 + e^-|x|; the smaller and the larger one of sigmoid(x), sigmoid(-x)
  VITKD_HD_INLINE explicit Sigmoid(Vec e) {
    one_e = Vec{Real{1}} + e;
    hat = Vec{Real{1}} / one_e;
    rest = e * hat;
  }
};

struct Number {
  Vec loss, grad;
};

// Of one class each. What is not asked for is left out by the compiler.
template <Kind kKind>
VITKD_HD_INLINE Number number(Vec s, Vec t, Vec y, const Exponentials& e, const Factors<Vec>& f) {
  const Vec zero{Real{0}};
  Number sum{zero, zero};
  s = cut_off(s, f.most);
  if constexpr (kKind != Kind::kBce) {
    const Vec u = s * f.inv_t, v = cut_off(t, f.most) * f.inv_t;
    const Sigmoid of_s{e.u}, of_t{e.v};
    const Vec q = select_negative(u, of_s.rest, of_s.hat);
    const Vec p = select_negative(v, of_t.rest, of_t.hat);
    const Vec not_p = select_negative(v, of_t.hat, of_t.rest);
    const Vec down = min(zero, v) - min(zero, u), up = max(zero, u) - max(zero, v);
    const Vec logs = twice_atanh((e.u - e.v) / (of_s.one_e + of_t.one_e));
    sum = {f.kd * fma(p, down, fma(not_p, up, logs)), f.kd_grad * (q - p)};
  }
  if constexpr (kKind != Kind::kKd) {
    const Vec e_s = kKind == Kind::kBothAt1 ? e.u : e.s;
    const Sigmoid of_s{e_s};
    const Vec q = select_negative(s, of_s.rest, of_s.hat);
    const Vec log = twice_atanh(e_s / (Vec{Real{1}} + of_s.one_e));
    const Vec bce = fma(zero - y, s, max(zero, s)) + log;
    sum = {fma(f.bce, bce, sum.loss), fma(f.bce_grad, q - y, sum.grad)};
  }
  return sum;
}
