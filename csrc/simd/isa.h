// The CPU's instruction sets, and the one that the kernels use (torch-free: compiled into both
// extensions). A kernel is written once per instruction set and the pick is made at run time, so
// that a wheel built anywhere runs everywhere. VITKD_FAST_ISA names another (scalar, sse41, avx2,
// avxvnni, avx512, avx512vnni, amx; neon, neondot, neoni8mm), which is how every path is tested on
// one machine.

#pragma once

#include <vector>

namespace vitkd {

enum class Isa {
  scalar,
#if defined(__x86_64__)
  sse41,       // SSE4.1
  avx2,        // AVX2, FMA, F16C
  avxvnni,     // and AVX-VNNI
  avx512,      // AVX2 and AVX-512 F, BW, VL, DQ
  avx512vnni,  // and AVX-512 VNNI
  amx,         // and AMX-INT8 and AMX-BF16, their tiles granted by the system
#elif defined(__aarch64__)
  neon,      // Armv8.0
  neondot,   // and SDOT
  neoni8mm,  // and USMMLA and USDOT
#endif
};

const char* name(Isa isa);

// Whether a CPU that has `isa` has `part`.
bool contains(Isa isa, Isa part);

// What the kernels may use here, best first. Read once per process; throws std::runtime_error where
// VITKD_FAST_ISA names no instruction set, or one that this CPU lacks.
std::vector<Isa> available_isas();

// The best of them: the one that the kernels use.
Isa selected_isa();

}  // namespace vitkd
