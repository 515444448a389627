// The vector kernels of rkd.cpp, included once per instruction set, inside its namespace and
// region, where Vec holds kLanes numbers of type Real.

constexpr int64_t kLanes = Vec::kLanes;

VITKD_INLINE int64_t aligned_down(int64_t k) { return k / kLanes * kLanes; }

// Numbers k .. k + kLanes of a row of n, zeros behind its end.
VITKD_INLINE Vec load_row(const Real* row, int64_t k, int64_t n) {
  return k + kLanes <= n ? Vec::load(row + k) : Vec::load_part(row + k, n - k, Vec{Real{0}});
}

// Distances of samples i and k .. k + kLanes, and their inverses: 0 for those that count as one.
struct Distances {
  Vec length, inverse;
};

VITKD_INLINE Distances distances(const Model<Real>& x, int64_t i, int64_t k) {
  const Vec gram = load_row(x.gram + i * x.n, k, x.n);
  const Vec total = Vec::load(x.norms + k) + Vec{x.norms[i]};
  const Vec squared = total - (gram + gram);
  // a NaN is no small distance
  const auto same = less(squared, max(total * Vec{kSame<Real>}, Vec{kTiny<Real>}));
  const Vec zero{Real{0}};
  const Vec length = sqrt(select(same, zero, squared));
  return {length, select(same, zero, Vec{Real{1}} / length)};
}

// Lanes k .. k + kLanes of a row that lie behind sample i and before n; 0 in the others.
VITKD_INLINE Vec behind(int64_t i, int64_t k, int64_t n, Vec x) {
  const Vec zero{Real{0}};
  if (k <= i) x = select(Vec::first(i + 1 - k), zero, x);
  if (k + kLanes > n) x = select(Vec::first(n - k), x, zero);
  return x;
}

// sum of d_ij over i < j
double sum_distances(const Model<Real>& x) {
  double sum = 0;
  for (int64_t i = 0; i < x.n; ++i) {
    Vec row{Real{0}};
    for (int64_t k = aligned_down(i + 1); k < x.n; k += kLanes) {
      row = row + behind(i, k, x.n, distances(x, i, k).length);
    }
    sum += reduce_add(row);
  }
  return sum;
}

struct Difference {
  Vec smoothed, value;  // smooth-L1 and its derivative
};

VITKD_INLINE Difference smooth_l1(Vec x) {
  const Vec a = clamp_to_1(x);
  return {a * fnma(Vec{Real(0.5)}, a, x), a};
}

// Over i < j: the sum of h(psi_s - psi_t), and of h' psi_s; psi = d / mu.
DistanceSums distance_sums(const Model<Real>& s, const Model<Real>& t) {
  DistanceSums sums;
  const Vec by_s{s.inverse_mean}, by_t{t.inverse_mean};
  for (int64_t i = 0; i < s.n; ++i) {
    Vec loss{Real{0}}, slope{Real{0}};
    for (int64_t k = aligned_down(i + 1); k < s.n; k += kLanes) {
      const Vec psi = distances(s, i, k).length * by_s;
      const Vec other = distances(t, i, k).length * by_t;
      const Difference d = smooth_l1(behind(i, k, s.n, psi - other));
      loss = loss + d.smoothed;
      slope = fma(d.value, psi, slope);
    }
    sums.loss += reduce_add(loss);
    sums.slope += reduce_add(slope);
  }
  return sums;
}

// to[i, j] -= weight (h' - mean slope) / d_s for i < j
void add_distance_gradient(const Model<Real>& s, const Model<Real>& t, Real weight, Real mean_slope,
                           Real* to) {
  const Vec by_s{s.inverse_mean}, by_t{t.inverse_mean};
  for (int64_t i = 0; i < s.n; ++i) {
    for (int64_t k = aligned_down(i + 1); k < s.n; k += kLanes) {
      const Distances d = distances(s, i, k);
      const Vec other = distances(t, i, k).length * by_t;
      const Vec slope = smooth_l1(d.length * by_s - other).value - Vec{mean_slope};
      const Vec grad = behind(i, k, s.n, slope * d.inverse * Vec{weight});
      Real* const at = to + i * s.n + k;
      if (k + kLanes <= s.n) {
        (Vec::load(at) - grad).store(at);
      } else {
        (Vec::load_part(at, s.n - k, grad) - grad).store_part(at, s.n - k);
      }
    }
  }
}

// What the rows of an apex's samples hold of one model: 1 / d_ij, and that times alpha_j.
void fill_apex(const Model<Real>& x, int64_t i, Real* inverse, Real* product) {
  const Vec half{x.norms[i] / 2};
  for (int64_t k = 0; k < x.n; k += kLanes) {
    const Vec r = behind(-1, k, x.n, distances(x, i, k).inverse);
    r.store(inverse + k);
    (r * (half - load_row(x.gram + i * x.n, k, x.n))).store(product + k);
  }
}

// kRowsAtOnce rows j share what is loaded for the columns k; more would not fit the registers.
constexpr int kRowsAtOnce = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 1;

// One row j of pairs, seen from an apex: numbers in all lanes, where its Grams and its w are, and
// the sum over k that v_j grows by.
struct Row {
  Vec r_s, alpha_s, r_t, alpha_t, v;
  const Real *gram_s, *gram_t;
  Real* w;
};

// kLanes triplets (i; j, k ..) for each of kCount rows j; kEdge: those with k > j and k < n alone.
template <bool kEdge, int kCount>
VITKD_INLINE void add_triplets(Row (&rows)[kCount], const Apex<Real>& apex, int64_t j, int64_t k,
                               int64_t n, Vec& loss) {
  const Vec r_k = Vec::load(apex.r_s + k), product_s = Vec::load(apex.product_s + k);
  const Vec q_k = Vec::load(apex.r_t + k), product_t = Vec::load(apex.product_t + k);
  Vec v_k = Vec::load(apex.v + k);
#pragma GCC unroll 4
  for (int m = 0; m < kCount; ++m) {
    Row& row = rows[m];
    const Vec gram_s = kEdge ? load_row(row.gram_s, k, n) : Vec::load(row.gram_s + k);
    const Vec gram_t = kEdge ? load_row(row.gram_t, k, n) : Vec::load(row.gram_t + k);
    // both rounded: with a fused difference, equal models would not give 0
    const Vec cosine = row.r_s * fma(r_k, gram_s + row.alpha_s, product_s);
    const Vec other = row.r_t * fma(q_k, gram_t + row.alpha_t, product_t);
    const Vec difference = cosine - other;
    Vec a = clamp_to_1(difference);
    if (kEdge && j + m >= k) a = select(Vec::first(j + m + 1 - k), Vec{Real{0}}, a);
    loss = fma(a, fnma(Vec{Real(0.5)}, a, difference), loss);
    row.v = fma(a, fnma(row.r_s, cosine, r_k), row.v);
    v_k = fma(a, fnma(r_k, cosine, row.r_s), v_k);
    fma(a * r_k, row.r_s, Vec::load(row.w + k)).store(row.w + k);
  }
  v_k.store(apex.v + k);
}

// Rows j .. j + kCount of a tile.
template <int kCount>
VITKD_INLINE void add_rows(const Model<Real>& s, const Model<Real>& t, const Apex<Real> apex,
                           Real* const* w, int64_t j, Range columns, Vec& loss, Real* v) {
  const int64_t n = s.n, whole = aligned_down(std::min(columns.end, n));
  const Real *const from_s = s.gram + apex.i * n, *const from_t = t.gram + apex.i * n;
  const Real half_s = s.norms[apex.i] / 2, half_t = t.norms[apex.i] / 2;
  Row rows[kCount];
#pragma GCC unroll 4
  for (int m = 0; m < kCount; ++m) {
    const int64_t at = j + m;
    rows[m] = {
        Vec{apex.r_s[at]}, Vec{half_s - from_s[at]}, Vec{apex.r_t[at]}, Vec{half_t - from_t[at]},
        Vec{Real{0}},      s.gram + at * n,          t.gram + at * n,   w[at]};
  }
  int64_t k = std::max(columns.begin, aligned_down(j));
  if (k < j + kCount) {
    add_triplets<true>(rows, apex, j, k, n, loss);
    k += kLanes;
  }
  for (; k < whole; k += kLanes) add_triplets<false>(rows, apex, j, k, n, loss);
  if (k < columns.end) add_triplets<true>(rows, apex, j, k, n, loss);
#pragma GCC unroll 4
  for (int m = 0; m < kCount; ++m) v[m] = reduce_add(rows[m].v);
}

// Pairs (j, k), j < k, of a tile, seen from each apex of a chunk. Returns the sum of h.
double add_tile(const Model<Real>& s, const Model<Real>& t, const Apex<Real>* apexes, int64_t count,
                Real* const* w, Range rows, Range columns) {
  double total = 0;
  for (int64_t a = 0; a < count; ++a) {
    const Apex<Real> apex = apexes[a];
    Vec loss{Real{0}};
    Real v[kRows];
    int64_t j = rows.begin;
    for (; j + kRowsAtOnce <= rows.end; j += kRowsAtOnce) {
      add_rows<kRowsAtOnce>(s, t, apex, w, j, columns, loss, v + j - rows.begin);
    }
    for (; j < rows.end; ++j) add_rows<1>(s, t, apex, w, j, columns, loss, v + j - rows.begin);
    // not before: a register that holds what was just stored as one number would wait for it
    for (j = rows.begin; j < rows.end; ++j) apex.v[j] += v[j - rows.begin];
    total += reduce_add(loss);
  }
  return total;
}

constexpr Kernels<Real> kKernels{sum_distances, distance_sums, add_distance_gradient, fill_apex,
                                 add_tile};
