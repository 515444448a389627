// DIST's correlations of student and teacher probabilities q, p [rows, classes], for host and
// device: of each row over its classes and of each class over the rows, from sums
//   rho = c / (sqrt(v_q v_p) + eps), c = sum (q - mean) (p - mean), v_q = sum (q - mean)^2
// Probabilities differ by about 1 / classes: sums are of deviations, from 1 / classes in a row and,
// in a column, from the first row at hand (a pivot), so that a constant column has sums of 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "math/hd.h"

namespace vitkd::dist {

// What a backward needs of a row: maxima and by = 1 / sum exp((x - max) / T), and the row's
// moments. Not the sum's logarithm: its rounding would move all probabilities of a row.
template <class A>
struct Stats {
  A max_s, by_s, max_t, by_t, v_q, v_p, c;
};
constexpr int kStats = 7;

// Sums over the rows of deviations from a pivot.
template <class A>
struct Sums {
  A q = 0, p = 0, qq = 0, pp = 0, qp = 0;
};

template <class A>
VITKD_HD void add(Sums<A>& x, A d_q, A d_p) {
  x.q += d_q;
  x.p += d_p;
  x.qq += d_q * d_q;
  x.pp += d_p * d_p;
  x.qp += d_q * d_p;
}

// The same sums of the numbers themselves, in double: they are added over blocks and processes.
template <class A>
VITKD_HD Sums<double> unshifted(const Sums<A>& x, A pivot_q, A pivot_p, int64_t rows) {
  const double n = static_cast<double>(rows), a = pivot_q, b = pivot_p;
  return {x.q + n * a, x.p + n * b, x.qq + 2 * a * x.q + n * a * a, x.pp + 2 * b * x.p + n * b * b,
          x.qp + a * x.p + b * x.q + n * a * b};
}

// d loss / d q = row_p (p - u) - row_q (q - u) + by_p (p - mean_p) - by_q (q - mean_q), u = 1 / V,
// up to what is constant in a row; functional/dist.py has the factors.
template <class A>
VITKD_HD A slope(A q, A p, A uniform, A row_p, A row_q, A mean_q, A mean_p, A by_q, A by_p) {
  return (row_p * (p - uniform) - row_q * (q - uniform)) +
         (by_p * (p - mean_p) - by_q * (q - mean_q));
}

}  // namespace vitkd::dist
