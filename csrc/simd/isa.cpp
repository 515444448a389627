// Instruction sets by __builtin_cpu_supports, which also asks whether the system saves their
// registers.

#include "simd/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vitkd {
namespace {

constexpr Isa kBestFirst[] = {Isa::amx,  Isa::avx512vnni, Isa::avx512, Isa::avxvnni,
                              Isa::avx2, Isa::sse41,      Isa::scalar};

#if defined(__x86_64__)
// CPUID leaf 7, subleaf 1: bit 4 of EAX
bool avxvnni() {
#if defined(VITKD_WITHOUT_AVXVNNI)  // a smaller library
  return false;
#else
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4) != 0;
#endif
}

// Linux grants tile registers on request, for the whole process and permanently
bool tiles_granted() {
  unsigned a, b, c, d;
  constexpr unsigned kWanted = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kWanted) != kWanted) return false;
#if defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool cpu_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
#if defined(VITKD_WITHOUT_AVX512)
  constexpr bool avx512 = false;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
#endif
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::sse41:
      return __builtin_cpu_supports("sse4.1");
    case Isa::avx2:
      return avx2;
    case Isa::avxvnni:
      return avx2 && avxvnni();
    case Isa::avx512:
      return avx512;
    case Isa::avx512vnni:
      return avx512 && __builtin_cpu_supports("avx512vnni");
    case Isa::amx:
      return avx512 && __builtin_cpu_supports("avx512vnni") && tiles_granted();
  }
#endif
  return isa == Isa::scalar;
}

std::vector<Isa> detect() {
  std::vector<Isa> isas;
  for (Isa isa : kBestFirst) {
    if (cpu_has(isa)) isas.push_back(isa);
  }
  const char* wanted = std::getenv("VITKD_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas;

  const auto is_wanted = [wanted](Isa isa) { return std::string(name(isa)) == wanted; };
  const auto found = std::find_if(isas.begin(), isas.end(), is_wanted);
  if (found == isas.end()) {
    std::string here;
    for (Isa isa : isas) here += (here.empty() ? "" : ", ") + std::string(name(isa));
    throw std::runtime_error("VITKD_FAST_ISA: expected one of this CPU's, " + here + ", got " +
                             wanted);
  }
  return {found, isas.end()};
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::sse41:
      return "sse41";
    case Isa::avx2:
      return "avx2";
    case Isa::avxvnni:
      return "avxvnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512vnni:
      return "avx512vnni";
    case Isa::amx:
      return "amx";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  // an exception leaves this uninitialised, so a wrong VITKD_FAST_ISA is reported by every call
  static const std::vector<Isa> isas = detect();
  return isas;
}

Isa selected_isa() {
  static const Isa best = available_isas().front();
  return best;
}

}  // namespace vitkd
