// The two passes of a resize, by instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace vitkd::int8 {

constexpr int kWeightBits = 22;
constexpr int kRows = 4;    // that the pass along rows takes at once
constexpr int kSlack = 16;  // bytes behind each row that may be read

// Of one axis: a result is the sum of `count` pixels from `first` on, weighted, rounded to 8 bits.
struct Weights {
  struct Window {
    int64_t first;
    int count;
  };
  std::vector<Window> windows;  // [results]
  int taps = 0;                 // of the longest window, rounded up to a multiple of 4
  std::vector<int32_t> values;  // [results, taps]: times 2^22; 0 behind a window

  int results() const { return static_cast<int>(windows.size()); }
  const int32_t* of(int result) const { return values.data() + int64_t{result} * taps; }
};

struct Passes {
  // rows [kRows][width, 3] to out [kRows][columns.results(), 3], and a byte more
  void (*along_rows)(const uint8_t* const* rows, const Weights& columns, uint8_t* const* out);
  // rows [taps][bytes] to out [bytes]; taps is even
  void (*along_columns)(const uint8_t* const* rows, const int32_t* weights, int taps, int bytes,
                        uint8_t* out);
};

extern const Passes kScalarPasses;
#if defined(__x86_64__)
extern const Passes kAvx2Passes;
#elif defined(__aarch64__)
extern const Passes kNeonPasses;
#endif

}  // namespace vitkd::int8
