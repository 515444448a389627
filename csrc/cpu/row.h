// Rows of logits in scratch memory: their padding, and the classes one at a time where there is no
// vector kernel (cpu/row.inl). For float64, and CPUs without AVX2.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>

#include "binding/common.h"

namespace vitkd {

constexpr int64_t kPadding = 16;  // rows end on whole registers

inline int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Uninitialised; n is a multiple of kPadding.
template <class A>
std::unique_ptr<A, Free> scratch_memory(int64_t n) {
  return std::unique_ptr<A, Free>(static_cast<A*>(std::aligned_alloc(64, n * sizeof(A))));
}

template <class A>
struct ScalarRow {
  static bool load(const void* from, ScalarType dtype, int64_t n, A* to) {
    visit_float(dtype, [&]<class S>() {
      const S* const p = static_cast<const S*>(from);
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(p[i]);
    });
    std::fill(to + n, to + padded(n), -std::numeric_limits<A>::infinity());
    return std::find(to, to + n, -std::numeric_limits<A>::infinity()) != to + n;
  }
  static A largest(const A* x, int64_t n) {
    A top = std::numeric_limits<A>::lowest();
    for (int64_t i = 0; i < n; ++i) top = std::max(top, x[i]);
    return top;
  }
  static void store(const A* from, void* to, ScalarType dtype, int64_t n) {
    visit_float(dtype, [&]<class S>() {
      for (int64_t i = 0; i < n; ++i) static_cast<S*>(to)[i] = static_cast<S>(from[i]);
    });
  }
};

}  // namespace vitkd
