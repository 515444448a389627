// Instruction sets by __builtin_cpu_supports, which also asks whether the system saves their
// registers, and on aarch64 by what the system says of the CPU.

#include "simd/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vitkd {
namespace {

struct Entry {
  Isa isa;
  const char* name;
  Isa contains;  // and all that this one contains
};

#if defined(__x86_64__)
// avxvnni stands apart: some CPUs with AVX-512 VNNI lack it
constexpr Entry kBestFirst[] = {
    {Isa::amx, "amx", Isa::avx512vnni},  {Isa::avx512vnni, "avx512vnni", Isa::avx512},
    {Isa::avx512, "avx512", Isa::avx2},  {Isa::avxvnni, "avxvnni", Isa::avx2},
    {Isa::avx2, "avx2", Isa::sse41},     {Isa::sse41, "sse41", Isa::scalar},
    {Isa::scalar, "scalar", Isa::scalar}};

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

bool cpu_has(Isa isa) {
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
  return false;
}

#elif defined(__aarch64__)
constexpr Entry kBestFirst[] = {{Isa::neoni8mm, "neoni8mm", Isa::neondot},
                                {Isa::neondot, "neondot", Isa::neon},
                                {Isa::neon, "neon", Isa::scalar},
                                {Isa::scalar, "scalar", Isa::scalar}};

#if defined(__linux__)
bool dot_products() { return (getauxval(AT_HWCAP) & 1ul << 20) != 0; }      // HWCAP_ASIMDDP
bool matrix_products() { return (getauxval(AT_HWCAP2) & 1ul << 13) != 0; }  // HWCAP2_I8MM
#elif defined(__APPLE__)
bool feature(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool dot_products() { return feature("hw.optional.arm.FEAT_DotProd"); }
bool matrix_products() { return feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool dot_products() { return false; }
bool matrix_products() { return false; }
#endif

#if defined(VITKD_WITHOUT_NEONI8MM)  // a smaller library
constexpr bool kMatrixProducts = false;
#else
constexpr bool kMatrixProducts = true;
#endif

bool cpu_has(Isa isa) {
  switch (isa) {
    case Isa::scalar:
    case Isa::neon:
      return true;
    case Isa::neondot:
      return dot_products();
    case Isa::neoni8mm:
      return kMatrixProducts && dot_products() && matrix_products();
  }
  return false;
}

#else
constexpr Entry kBestFirst[] = {{Isa::scalar, "scalar", Isa::scalar}};

bool cpu_has(Isa isa) { return isa == Isa::scalar; }
#endif

const Entry& entry(Isa isa) {
  return *std::find_if(std::begin(kBestFirst), std::end(kBestFirst),
                       [isa](const Entry& e) { return e.isa == isa; });
}

std::vector<Isa> detect() {
  std::vector<Isa> isas;
  for (const Entry& e : kBestFirst) {
    if (cpu_has(e.isa)) isas.push_back(e.isa);
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

const char* name(Isa isa) { return entry(isa).name; }

bool contains(Isa isa, Isa part) {
  while (isa != part && isa != Isa::scalar) isa = entry(isa).contains;
  return isa == part;
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
