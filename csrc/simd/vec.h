// A register of floats for each instruction set: vitkd::avx2::Vec (8), vitkd::avx512::Vec (16) and,
// for all others, vitkd::scalar::Vec (8), with the same few operations, so that a kernel is written
// once and included per namespace. (No struct of theirs has default member values: gcc would build
// the constructor for the baseline.)
// exp() is accurate to 2 ulp for x <= 88 and 0 where the result would be below FLT_MIN;
// exp_scaled(), for x <= 0, to 3 roundings of 1, in fewer instructions.
#pragma once

#include "simd/vec_scalar.h"
#if defined(__x86_64__)
#include "simd/vec_avx2.h"
#include "simd/vec_avx512.h"
#endif
