// Sweeps exp, log and their kin of csrc/simd/vec.h over the floats and prints, for each instruction
// set that this CPU has, the largest errors in units in the last place of the result (long
// double's):
//   isa exp log log_near_1 log_normal expm1_negative
// What must hold exactly is checked here; a failure is a line "isa: what, x, given, wanted".
#include <immintrin.h>

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "simd/vec.h"

// y = name(x) for each instruction set; n is a multiple of 16
#define VITKD_MAP(name)                                  \
  void map_##name(const float* x, float* y, int64_t n) { \
    for (int64_t i = 0; i < n; i += Vec::kLanes) {       \
      name(Vec::load(x + i)).store(y + i);               \
    }                                                    \
  }
// exp(x / 4)
#define VITKD_MAP_SCALED                                  \
  void map_scaled(const float* x, float* y, int64_t n) {  \
    const Scale quarter(Vec{0.25f});                      \
    for (int64_t i = 0; i < n; i += Vec::kLanes) {        \
      exp_scaled(Vec::load(x + i), quarter).store(y + i); \
    }                                                     \
  }

VITKD_TARGET_BEGIN(VITKD_AVX512)
namespace vitkd::avx512 {
VITKD_MAP(exp)
VITKD_MAP(log)
VITKD_MAP(log_normal)
VITKD_MAP(expm1_negative)
VITKD_MAP_SCALED
}  // namespace vitkd::avx512
VITKD_TARGET_END

VITKD_TARGET_BEGIN(VITKD_AVX2)
namespace vitkd::avx2 {
VITKD_MAP(exp)
VITKD_MAP(log)
VITKD_MAP(log_normal)
VITKD_MAP(expm1_negative)
VITKD_MAP_SCALED
}  // namespace vitkd::avx2
VITKD_TARGET_END

namespace {

using Map = void (*)(const float*, float*, int64_t);

constexpr size_t kBatch = 4096;
constexpr uint32_t kStep = 131;  // odd, so that no low bits are left out
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Functions {
  const char* isa;
  Map exp, log, log_normal, expm1, scaled;
  double exp_ulp = 0, log_ulp = 0, log_ulp_near_1 = 0, log_normal_ulp = 0, expm1_ulp = 0;
  std::set<std::string> reported = {};

  void require(bool ok, const char* what, float x, float given, long double wanted) {
    if (ok || !reported.insert(what).second) return;
    std::printf("%s: %s, %.9g, %.9g, %.9Lg\n", isa, what, x, given, wanted);
  }
};

double ulps(float given, long double exact) {
  if (!std::isfinite(given)) return std::numeric_limits<double>::infinity();
  const int exponent = exact == 0 ? -126 : std::ilogb(exact);
  return static_cast<double>(std::fabs(given - exact) / std::ldexp(1.0L, exponent - 23));
}

void check_exp(std::vector<Functions>& all, const std::vector<float>& x) {
  std::vector<float> y(x.size());
  std::vector<long double> exact(x.size());
  for (size_t i = 0; i < x.size(); ++i) exact[i] = std::exp(static_cast<long double>(x[i]));
  for (Functions& f : all) {
    f.exp(x.data(), y.data(), x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const bool below = exact[i] < FLT_MIN;
      if (below) {
        f.require(y[i] == 0, "exp below FLT_MIN is 0", x[i], y[i], 0);
      } else {
        f.exp_ulp = std::fmax(f.exp_ulp, ulps(y[i], exact[i]));
      }
    }
  }
}

void check_expm1(std::vector<Functions>& all, const std::vector<float>& x) {
  std::vector<float> y(x.size());
  for (Functions& f : all) {
    f.expm1(x.data(), y.data(), x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const double error = ulps(y[i], std::expm1(static_cast<long double>(x[i])));
      f.expm1_ulp = std::fmax(f.expm1_ulp, error);
    }
  }
}

// Off by at most 3 roundings of 1, which is exp(0).
void check_scaled(std::vector<Functions>& all, const std::vector<float>& x) {
  std::vector<float> y(x.size());
  for (Functions& f : all) {
    f.scaled(x.data(), y.data(), x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const long double exact = std::exp(static_cast<long double>(x[i]) / 4);
      f.require(std::fabs(y[i] - exact) <= 1.5 * FLT_EPSILON, "exp_scaled", x[i], y[i], exact);
      f.require(exact >= FLT_MIN || y[i] <= 2 * FLT_MIN, "exp_scaled far below", x[i], y[i], 0);
    }
  }
}

void check_log(std::vector<Functions>& all, const std::vector<float>& x) {
  std::vector<float> y(x.size());
  std::vector<long double> exact(x.size());
  for (size_t i = 0; i < x.size(); ++i) exact[i] = std::log(static_cast<long double>(x[i]));
  for (Functions& f : all) {
    f.log(x.data(), y.data(), x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const double error = ulps(y[i], exact[i]);
      double& worst = x[i] > 0.5f && x[i] < 2 ? f.log_ulp_near_1 : f.log_ulp;
      worst = std::fmax(worst, error);
    }
    f.log_normal(x.data(), y.data(), x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      f.log_normal_ulp = std::fmax(f.log_normal_ulp, ulps(y[i], exact[i]));
    }
  }
}

// The floats whose bits are from, from + step, ... below `to`, in batches.
template <class F>
void sweep(uint32_t from, uint32_t to, uint32_t step, F&& check) {
  std::vector<float> x;
  for (uint64_t bits = from; bits < to; bits += step) {
    x.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
    if (x.size() == kBatch || bits + step >= to) {
      while (x.size() % 16) x.push_back(x.back());
      check(x);
      x.clear();
    }
  }
}

uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }

void check_special(Functions& f) {
  float x[16] = {0.f, -0.f, -kInf, kNan, -kNan, -1e4f, -FLT_MAX, 1.f};
  float y[16];
  f.exp(x, y, 16);
  f.require(y[0] == 1, "exp(0) is 1", 0, y[0], 1);
  f.require(y[1] == 1, "exp(-0) is 1", -0.f, y[1], 1);
  f.require(y[2] == 0, "exp(-inf) is 0", -kInf, y[2], 0);
  f.require(std::isnan(y[3]) && std::isnan(y[4]), "exp(NaN) is NaN", kNan, y[3], kNan);
  f.require(y[5] == 0 && y[6] == 0, "exp of what is far below is 0", x[5], y[5], 0);
  f.scaled(x, y, 16);
  f.require(y[0] == 1 && y[1] == 1, "exp_scaled(0) is 1", 0, y[0], 1);
  f.require(y[2] == 0, "exp_scaled(-inf) is 0", -kInf, y[2], 0);
  f.require(std::isnan(y[3]) && std::isnan(y[4]), "exp_scaled(NaN) is NaN", kNan, y[3], kNan);
  f.require(y[5] == 0 && y[6] == 0, "exp_scaled of what is far below is 0", x[5], y[5], 0);
  f.expm1(x, y, 16);
  f.require(y[0] == 0 && y[1] == 0, "expm1(0) is 0", 0, y[0], 0);
  f.require(y[2] == -1 && y[6] == -1, "expm1(-inf) is -1", -kInf, y[2], -1);
  for (float& value : x) value = kNan;
  x[0] = 1;
  f.log(x, y, 16);
  f.require(y[0] == 0, "log(1) is 0", 1, y[0], 0);
  f.require(std::isnan(y[1]), "log(NaN) is NaN", kNan, y[1], kNan);
}

}  // namespace

int main() {
  static_assert(std::numeric_limits<long double>::digits > std::numeric_limits<double>::digits);
  std::vector<Functions> all;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    using namespace vitkd;
    all.push_back({"avx2", avx2::map_exp, avx2::map_log, avx2::map_log_normal,
                   avx2::map_expm1_negative, avx2::map_scaled});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      all.push_back({"avx512", avx512::map_exp, avx512::map_log, avx512::map_log_normal,
                     avx512::map_expm1_negative, avx512::map_scaled});
    }
  }
  const auto exp = [&](const std::vector<float>& x) { check_exp(all, x); };
  const auto scaled = [&](const std::vector<float>& x) { check_scaled(all, x); };
  const auto expm1 = [&](const std::vector<float>& x) { check_expm1(all, x); };
  const auto log = [&](const std::vector<float>& x) { check_log(all, x); };
  for (Functions& f : all) check_special(f);
  sweep(bits_of(-0.f), bits_of(-87.f), kStep, exp);
  sweep(bits_of(-87.f), bits_of(-88.f), 1, exp);  // where exp passes FLT_MIN
  sweep(bits_of(-88.f), bits_of(-1e30f), 10 * kStep, exp);
  sweep(bits_of(0.f), bits_of(88.f) + 1, kStep, exp);
  sweep(bits_of(-0.f), bits_of(-1e30f), kStep, scaled);
  sweep(bits_of(-FLT_MIN), bits_of(-1e30f), kStep, expm1);
  sweep(bits_of(FLT_MIN), bits_of(FLT_MAX) + 1, kStep, log);
  sweep(bits_of(0.99f), bits_of(1.01f), 1, log);
  for (const Functions& f : all) {
    std::printf("%s %.4f %.4f %.4f %.4f %.4f\n", f.isa, f.exp_ulp, f.log_ulp, f.log_ulp_near_1,
                f.log_normal_ulp, f.expm1_ulp);
  }
}
