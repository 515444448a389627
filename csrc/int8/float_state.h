// What makes float arithmetic the same whatever the calling thread is set to.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace vitkd::int8 {

// rounding to nearest, no flush to zero and no traps, as long as it lives
class FloatState {
#if defined(__x86_64__)
 public:
  FloatState() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatState() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace vitkd::int8
