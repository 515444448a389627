// Code for one instruction set inside a file built for the baseline: everything between BEGIN and
// END may use `isa`, and is only ever called after a run-time check. Standard and intrinsics
// headers are included before the region, so that no shared inline function is compiled inside it.
#pragma once

#include <cstdint>

#define VITKD_INLINE inline __attribute__((always_inline))

#define VITKD_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define VITKD_TARGET_BEGIN(isa) \
  VITKD_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define VITKD_TARGET_END VITKD_PRAGMA(clang attribute pop)
#else
#define VITKD_TARGET_BEGIN(isa)  \
  VITKD_PRAGMA(GCC push_options) \
  VITKD_PRAGMA(GCC target(isa))
#define VITKD_TARGET_END VITKD_PRAGMA(GCC pop_options)
#endif

#define VITKD_AVX2 "avx2,fma,f16c"
#define VITKD_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw"
#define VITKD_VNNI "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"

namespace vitkd {

// What _tile_loadconfig reads: eight AMX tiles of 16 rows of 64 bytes. A constant, since gcc 12
// thinks that 8 bytes are read, and drops the rest of what is on the stack.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig kWholeTiles;

}  // namespace vitkd
