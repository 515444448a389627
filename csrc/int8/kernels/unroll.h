// Loops unrolled by templates, whose indices are constants. The file is included inside a target
// region, as a function for the baseline cannot take in one for an instruction set.
#pragma once

namespace vitkd::int8 {
namespace {

// constant indices keep accumulators in registers
template <int N, class F, int... I>
VITKD_INLINE void unroll_over(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
VITKD_INLINE void unroll(F&& f) {
  unroll_over<N>(f, std::make_integer_sequence<int, N>{});
}
#define VITKD_UNROLL(n, i) unroll<n>([&](auto i) __attribute__((always_inline))
#define VITKD_END )

}  // namespace
}  // namespace vitkd::int8
