// Two registers side by side as one, see simd/vec.h; included in the namespace and region of an
// instruction set whose One is a register with minus_abs and select_negative. A long chain of
// operations, such as exp, a division and a polynomial, leaves much of a core idle: two are under
// way at a time.
struct Pair {
  static constexpr int kLanes = 2 * One::kLanes;
  struct Mask {
    One::Mask a, b;
  };
  One a, b;

  Pair() = default;
  VITKD_INLINE Pair(One x, One y) : a(x), b(y) {}
  VITKD_INLINE explicit Pair(float x) : a(x), b(x) {}
  template <class T>
  static VITKD_INLINE Pair load(const T* p) {
    return {One::load(p), One::load(p + One::kLanes)};
  }
  template <class T>
  VITKD_INLINE void store(T* p) const {
    a.store(p);
    b.store(p + One::kLanes);
  }
};

VITKD_INLINE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
VITKD_INLINE Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
VITKD_INLINE Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
VITKD_INLINE Pair operator/(Pair x, Pair y) { return {x.a / y.a, x.b / y.b}; }
VITKD_INLINE Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
VITKD_INLINE Pair max(Pair x, Pair y) { return {max(x.a, y.a), max(x.b, y.b)}; }
VITKD_INLINE Pair min(Pair x, Pair y) { return {min(x.a, y.a), min(x.b, y.b)}; }
VITKD_INLINE Pair::Mask less(Pair x, Pair y) { return {less(x.a, y.a), less(x.b, y.b)}; }
VITKD_INLINE Pair::Mask not_equal(Pair x, Pair y) {
  return {not_equal(x.a, y.a), not_equal(x.b, y.b)};
}
VITKD_INLINE Pair select(Pair::Mask m, Pair x, Pair y) {
  return {select(m.a, x.a, y.a), select(m.b, x.b, y.b)};
}
VITKD_INLINE Pair minus_abs(Pair x) { return {minus_abs(x.a), minus_abs(x.b)}; }
VITKD_INLINE Pair select_negative(Pair x, Pair y, Pair z) {
  return {select_negative(x.a, y.a, z.a), select_negative(x.b, y.b, z.b)};
}
VITKD_INLINE Pair exp(Pair x) { return {exp(x.a), exp(x.b)}; }
VITKD_INLINE float reduce_add(Pair x) { return reduce_add(x.a + x.b); }
