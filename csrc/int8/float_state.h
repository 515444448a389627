// What makes float arithmetic the same whatever the calling thread is set to.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace vitkd::int8 {

#if defined(__x86_64__)
constexpr uint64_t kFloatState = 0x1F80;
inline uint64_t float_state() { return _mm_getcsr(); }
inline void set_float_state(uint64_t state) { _mm_setcsr(static_cast<unsigned>(state)); }
#elif defined(__aarch64__)
constexpr uint64_t kFloatState = 0;
inline uint64_t float_state() {
  uint64_t fpcr;
  asm volatile("mrs %0, fpcr" : "=r"(fpcr) : : "memory");
  return fpcr;
}
inline void set_float_state(uint64_t fpcr) {
  asm volatile("msr fpcr, %0" : : "r"(fpcr) : "memory");
}
#else
constexpr uint64_t kFloatState = 0;
inline uint64_t float_state() { return 0; }
inline void set_float_state(uint64_t) {}
#endif

// rounding to nearest, no flush to zero and no traps, as long as it lives
class FloatState {
 public:
  FloatState() : saved_(float_state()) { set_float_state(kFloatState); }
  ~FloatState() { set_float_state(saved_); }

 private:
  uint64_t saved_;
};

}  // namespace vitkd::int8
