// One number by the interface of a register, see simd/vec.h: what a kernel of vectors is on a CPU
// without any, and in float64.
#pragma once

#include <type_traits>

#include "simd/vec_constants.h"

namespace vitkd {

template <class A>
struct One {
  static constexpr int kLanes = 1;
  using Mask = bool;
  A v;

  One() = default;
  explicit One(A x) : v(x) {}

  static Mask first(int64_t n) { return n > 0; }
  static One load(const A* p) { return One{*p}; }
  static One load_part(const A* p, int64_t n, One other) { return n > 0 ? One{*p} : other; }
  void store(A* p) const { *p = v; }
  void store_part(A* p, int64_t n) const {
    if (n > 0) *p = v;
  }
  static One load(const Half* p)
    requires std::is_same_v<A, float>
  {
    return One{static_cast<float>(std::bit_cast<_Float16>(p->bits))};
  }
  void store(Half* p) const
    requires std::is_same_v<A, float>
  {
    p->bits = std::bit_cast<uint16_t>(static_cast<_Float16>(v));
  }
  static One load(const Bfloat16* p)
    requires std::is_same_v<A, float>
  {
    return One{std::bit_cast<float>(uint32_t{p->bits} << 16)};
  }
  void store(Bfloat16* p) const
    requires std::is_same_v<A, float>
  {
    const auto bits = std::bit_cast<uint32_t>(v);
    p->bits = static_cast<uint16_t>(v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
  }

  friend One operator+(One a, One b) { return One{a.v + b.v}; }
  friend One operator-(One a, One b) { return One{a.v - b.v}; }
  friend One operator*(One a, One b) { return One{a.v * b.v}; }
  friend One operator/(One a, One b) { return One{a.v / b.v}; }
  friend One fma(One a, One b, One c) { return One{a.v * b.v + c.v}; }
  friend One fnma(One a, One b, One c) { return One{c.v - a.v * b.v}; }
  friend One max(One a, One b) { return a.v > b.v ? a : b; }
  friend One min(One a, One b) { return a.v < b.v ? a : b; }
  friend Mask less(One a, One b) { return a.v < b.v; }
  friend Mask not_equal(One a, One b) { return a.v != b.v; }
  friend One select(Mask m, One a, One b) { return m ? a : b; }
  friend One select_negative(One x, One a, One b) { return x.v < 0 ? a : b; }
  friend One minus_abs(One x) { return One{-std::abs(x.v)}; }
  friend One clamp_to_1(One x) { return x.v > 1 ? One{1} : x.v < -1 ? One{-1} : x; }
  friend One twice_atanh(One x) { return One{2 * std::atanh(x.v)}; }
  friend One exp(One x) { return One{std::exp(x.v)}; }
  struct Scale {
    One inv_t;
    explicit Scale(One x) : inv_t(x) {}
  };
  friend One exp_scaled(One x, const Scale& by) { return exp(x * by.inv_t); }
  friend One log(One x) { return One{std::log(x.v)}; }
  friend One expm1_negative(One x) { return One{std::expm1(x.v)}; }
  friend One log_normal(One x) { return log(x); }
  friend One sqrt(One x) { return One{std::sqrt(x.v)}; }
  friend A reduce_add(One x) { return x.v; }
  friend A reduce_max(One x) { return x.v; }
};

}  // namespace vitkd
