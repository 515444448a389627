// The formulas of binary_kd.h for Vec, a register of Real. Included once per instruction set,
// inside its namespace and region, behind what a set has its own instructions for:
//   minus_abs(x) = -|x|, select_negative(x, a, b) = x < 0 ? a : b, log_ratio(z)
// Equal student and teacher give exactly 0.

// In place of infinities, which times 0 are NaN. NaN is preserved.
VITKD_HD_INLINE Vec cut_off(Vec x, Vec most) { return min(most, max(Vec{Real{0}} - most, x)); }

struct Sigmoid {
  Vec e, one_e;   // e^-|x|, and 1 + that
  Vec rest, hat;  // the smaller and the larger one of sigmoid(x) and sigmoid(-x)
};

VITKD_HD_INLINE Sigmoid sigmoid(Vec x) {
  const Vec one{Real{1}}, e = exp(minus_abs(x)), one_e = one + e, hat = one / one_e;
  return {e, one_e, e * hat, hat};
}

struct Number {
  Vec loss, grad;
};

// Of one class each. What is not asked for is left out by the compiler.
template <Kind kKind>
VITKD_HD_INLINE Number number(Vec s, Vec t, Vec y, const Factors<Vec>& f) {
  const Vec zero{Real{0}};
  Number sum{zero, zero};
  Sigmoid of_s;
  Vec q;
  s = cut_off(s, f.most);
  if constexpr (kKind != Kind::kBce) {
    const Vec u = s * f.inv_t, v = cut_off(t, f.most) * f.inv_t;
    of_s = sigmoid(u);
    q = select_negative(u, of_s.rest, of_s.hat);
    const Sigmoid of_t = sigmoid(v);
    const Vec p = select_negative(v, of_t.rest, of_t.hat);
    const Vec not_p = select_negative(v, of_t.hat, of_t.rest);
    const Vec down = min(zero, v) - min(zero, u), up = max(zero, u) - max(zero, v);
    const Vec logs = log_ratio((of_s.e - of_t.e) / (of_s.one_e + of_t.one_e));
    sum = {f.kd * fma(p, down, fma(not_p, up, logs)), f.kd_grad * (q - p)};
  }
  if constexpr (kKind != Kind::kKd) {
    if constexpr (kKind != Kind::kBothAt1) {
      of_s = sigmoid(s);
      q = select_negative(s, of_s.rest, of_s.hat);
    }
    const Vec log = log_ratio(of_s.e / (Vec{Real{1}} + of_s.one_e));
    const Vec bce = fma(zero - y, s, max(zero, s)) + log;
    sum = {fma(f.bce, bce, sum.loss), fma(f.bce_grad, q - y, sum.grad)};
  }
  return sum;
}
