// Storage formats, and the polynomials of exp, exp2 and log, which every Vec shares.
#pragma once

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd/target.h"

namespace vitkd {

// Storage formats, by their bits.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// exp(x) = 2^n e^r with n = rint(x / ln 2) and a minimax polynomial for e^r, |r| <= ln(2)/2
// (relative error 2.6e-9, and exp(0) = 1). Adding kRound rounds to an integer and leaves it in the
// low bits.
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2Hi = 0.693359375f;
constexpr float kLn2Lo = -2.12194440e-4f;
constexpr float kRound = 12582912.0f;     // 1.5 * 2^23
constexpr float kExpLowest = -87.33654f;  // exp of anything lower is below FLT_MIN
constexpr float kExpPoly[] = {1.4061422552913427e-3f,
                              8.379058912396431e-3f,
                              4.166477173566818e-2f,
                              1.6666364669799805e-1f,
                              5.000000596046448e-1f,
                              1.0f,
                              1.0f};

// exp2(x) = 2^n 2^r with n = floor(x) and a minimax polynomial for 2^r, 0 <= r < 1 (relative error
// 2.0e-9, and exp2(0) = 1)
constexpr float kExp2Poly[] = {2.1612914861e-4f,
                               1.2467846973e-3f,
                               9.6754515544e-3f,
                               5.5485282093e-2f,
                               2.4022930861e-1f,
                               6.9314706326e-1f,
                               1.0f};

// exp_scaled(x, by) = exp(x / T), x <= 0, as 2^n 2^r with n = rint(x log2(e) / T), |r| <= 1/2
// (relative error 1.6e-8, and exp(0) = 1), in two instructions fewer. x / T is never rounded by
// itself, so that the relative error grows with |x| / T, but no error is above that of exp(0).
constexpr float kExp2NearPoly[] = {1.5353361960e-4f,
                                   1.3398875017e-3f,
                                   9.6184369177e-3f,
                                   5.5503323674e-2f,
                                   2.4022647738e-1f,
                                   6.9314718246e-1f,
                                   1.0f};

// log(x) = n ln 2 + log(m) for normal x > 0 (-inf for less), m in [sqrt(1/2), sqrt(2)): Cephes'
// polynomial, 2 ulp.
constexpr float kSqrtHalf = 0.707106781186547524f;
constexpr float kLogPoly[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                              -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                              2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};

// 2 atanh(x) = 2 x (1 + x^2 P(x^2)) for |x| <= 1/3, relative error 5e-9
constexpr float kAtanhPoly[] = {0.14012223482f, 0.13999570906f, 0.20010849833f, 0.33333206177f};

}  // namespace vitkd
