// DIST on the CPU: math/dist.h.
// dist_moments reads student and teacher once: a row's exponentials stay in L1 until they are added
// to the sums of the row and of its columns (20 KB for 1000 classes). dist_bwd reads both again and
// writes the gradient: 4 reads and 1 write in all. Columns are summed in fp32 over chunks of rows,
// which are added in their order in double, so results do not depend on the number of threads.
#include "math/dist.h"

#include <cfloat>
#include <cstring>

#include "binding/dist_call.h"
#include "cpu/row.h"
#include "simd/isa.h"
#include "simd/vec.h"

namespace vitkd::dist {
namespace {

template <class A>
struct Moments {  // of a row
  A v_q, v_p, c;
};

template <class A>
struct RowFactors {
  A inv_t, uniform, q, p;
};

// What comes next in memory: the next row of both, and where this one's gradient goes.
struct Ahead {
  const char *s, *t, *grad;
  int64_t s_size, t_size;
};

// What dist.inl holds, of one instruction set. Rows have padded(n) numbers.
template <class A>
struct Kernels {
  bool (*load)(const void* from, ScalarType dtype, int64_t n, A* to);
  A (*largest)(const A* x, int64_t n);
  A (*exponentials)(A* x, int64_t n, A max, A inv_t, const char* next, int64_t size);
  // adds q = by_s e_s and p = by_t e_t, less pivots [2, padded], to sums [5, padded]
  Moments<A> (*add_row)(const A* e_s, const A* e_t, A by_s, A by_t, A uniform, const A* pivots,
                        A* sums, int64_t n);
  A (*slopes)(A* s, A* t, const Stats<A>& st, const RowFactors<A>& f, const A* columns, int64_t n,
              const Ahead& ahead);
  void (*gradient)(const A* q, const A* g, A* to, int64_t n, A mean, A by);
  void (*store)(const A* from, void* to, ScalarType dtype, int64_t n);
};

}  // namespace
}  // namespace vitkd::dist

#define VITKD_NAMESPACE vitkd::dist
#define VITKD_KERNELS "cpu/dist.inl"
#define VITKD_REGISTERS_ONLY
#include "simd/each_isa.h"

namespace vitkd::dist {
namespace {

// One class at a time: float64, and CPUs without AVX2.
template <class A>
struct Scalar : ScalarRow<A> {
  static A exponentials(A* x, int64_t n, A max, A inv_t, const char*, int64_t) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp((x[i] - max) * inv_t);
    return static_cast<A>(sum);
  }
  static Moments<A> add_row(const A* e_s, const A* e_t, A by_s, A by_t, A uniform, const A* pivots,
                            A* sums, int64_t n) {
    const int64_t width = padded(n);
    double v_q = 0, v_p = 0, c = 0;
    for (int64_t i = 0; i < n; ++i) {
      const A q = e_s[i] * by_s, p = e_t[i] * by_t, u_q = q - uniform, u_p = p - uniform;
      v_q += u_q * u_q;
      v_p += u_p * u_p;
      c += u_q * u_p;
      Sums<A> x{sums[i], sums[width + i], sums[2 * width + i], sums[3 * width + i],
                sums[4 * width + i]};
      add(x, q - pivots[i], p - pivots[width + i]);
      const A values[] = {x.q, x.p, x.qq, x.pp, x.qp};
      for (int j = 0; j < 5; ++j) sums[j * width + i] = values[j];
    }
    return {static_cast<A>(v_q), static_cast<A>(v_p), static_cast<A>(c)};
  }
  static A slopes(A* s, A* t, const Stats<A>& st, const RowFactors<A>& f, const A* columns,
                  int64_t n, const Ahead&) {
    const int64_t width = padded(n);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const A q = std::exp((s[i] - st.max_s) * f.inv_t) * st.by_s;
      const A p = std::exp((t[i] - st.max_t) * f.inv_t) * st.by_t;
      s[i] = q;
      t[i] = slope(q, p, f.uniform, f.p, f.q, columns[i], columns[width + i],
                   columns[2 * width + i], columns[3 * width + i]);
      sum += s[i] * t[i];
    }
    return static_cast<A>(sum);
  }
  static void gradient(const A* q, const A* g, A* to, int64_t n, A mean, A by) {
    for (int64_t i = 0; i < n; ++i) to[i] = by * q[i] * (g[i] - mean);
  }
  static constexpr Kernels<A> kKernels{Scalar::load, Scalar::largest, exponentials, add_row,
                                       slopes,       gradient,        Scalar::store};
};

template <class A>
Kernels<A> selected_kernels() {
  if constexpr (std::is_same_v<A, double>)
    return Scalar<A>::kKernels;
  else
    return VITKD_BEST(kKernels, Scalar<A>::kKernels);
}

// Rows [begin, end): their stats, and their columns' sums in `columns` [5, classes].
template <class A>
void add_chunk(const Call<A>& c, const Kernels<A>& kernels, int64_t begin, int64_t end,
               double* columns) {
  const int64_t n = c.classes, width = padded(n);
  const auto memory = scratch_memory<A>(9 * width);
  A *const s = memory.get(), *const t = s + width, *const pivots = t + width,
           *const sums = pivots + 2 * width;
  std::fill(pivots, pivots + 7 * width, A{0});
  const A uniform = 1 / static_cast<A>(n);
  for (int64_t row = begin; row < end; ++row) {
    kernels.load(c.s_row(row), c.s_dtype, n, s);
    kernels.load(c.t_row(row), c.t_dtype, n, t);
    const int64_t next = std::min(row + 1, end - 1);
    const A max_s = kernels.largest(s, n), max_t = kernels.largest(t, n);
    const A sum_s = kernels.exponentials(s, n, max_s, c.inv_t, c.s_row(next), c.s_size);
    const A sum_t = kernels.exponentials(t, n, max_t, c.inv_t, c.t_row(next), c.t_size);
    const A by_s = 1 / sum_s, by_t = 1 / sum_t;
    if (row == begin) {
      for (int64_t i = 0; i < n; ++i) {
        pivots[i] = s[i] * by_s;
        pivots[width + i] = t[i] * by_t;
      }
    }
    const Moments<A> m = kernels.add_row(s, t, by_s, by_t, uniform, pivots, sums, n);
    c.save_stats(row, {max_s, by_s, max_t, by_t, m.v_q, m.v_p, m.c});
  }
  for (int64_t i = 0; i < n; ++i) {
    const Sums<A> x{sums[i], sums[width + i], sums[2 * width + i], sums[3 * width + i],
                    sums[4 * width + i]};
    const Sums<double> y = unshifted(x, pivots[i], pivots[width + i], end - begin);
    const double values[] = {y.q, y.p, y.qq, y.pp, y.qp};
    for (int j = 0; j < 5; ++j) columns[j * n + i] = values[j];
  }
}

std::tuple<Tensor, Tensor> dist_moments(const Tensor& student, const Tensor& teacher,
                                        double temperature) {
  return visit_accumulator(student, [&]<class A>() -> std::tuple<Tensor, Tensor> {
    Setup<A> setup(student, teacher, temperature);
    Call<A>& c = setup.call;
    Tensor stats = torch::stable::new_empty(student, {kStats, c.rows}, kDtype<A>);
    Tensor columns = torch::stable::new_empty(student, {5, c.classes}, ScalarType::Double);
    c.stats = stats.mutable_data_ptr<A>();
    double* const sums = columns.mutable_data_ptr<double>();
    const int64_t chunk = rows_of_chunk(c.rows), chunks = ceil_div(c.rows, chunk);
    const int64_t size = 5 * c.classes;
    std::vector<double> parts(chunks * size);
    const Kernels<A> kernels = selected_kernels<A>();
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * chunk;
        add_chunk(c, kernels, first, std::min(first + chunk, c.rows), parts.data() + i * size);
      }
    });
    std::fill(sums, sums + size, 0.0);
    for (int64_t i = 0; i < chunks; ++i) {
      for (int64_t j = 0; j < size; ++j) sums[j] += parts[i * size + j];
    }
    return {std::move(stats), std::move(columns)};
  });
}

template <class A>
void run_gradient(const Call<A>& c, const Kernels<A>& kernels, const A* columns, int64_t begin,
                  int64_t end) {
  const int64_t n = c.classes, width = padded(n);
  const bool direct = c.s_dtype == kDtype<A>;
  const auto memory = scratch_memory<A>(2 * width);
  A *const s = memory.get(), *const t = s + width;
  for (int64_t row = begin; row < end; ++row) {
    kernels.load(c.s_row(row), c.s_dtype, n, s);
    kernels.load(c.t_row(row), c.t_dtype, n, t);
    const int64_t next = std::min(row + 1, end - 1);
    const RowFactors<A> f{c.inv_t, 1 / static_cast<A>(n), c.row_factors[row],
                          c.row_factors[c.rows + row]};
    const A mean = kernels.slopes(s, t, c.load_stats(row), f, columns, n,
                                  {c.s_row(next), c.t_row(next), c.g_row(row), c.s_size, c.t_size});
    A* const to = direct ? reinterpret_cast<A*>(c.g_row(row)) : s;
    kernels.gradient(s, t, to, n, mean, *c.grad_loss * c.inv_t);
    if (!direct) kernels.store(s, c.g_row(row), c.s_dtype, n);
  }
}

Tensor dist_bwd(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                const Tensor& stats, const Tensor& row_factors, const Tensor& column_factors,
                double temperature) {
  return visit_accumulator(student, [&]<class A>() -> Tensor {
    Setup<A> setup(student, teacher, temperature);
    Call<A>& c = setup.call;
    const Factors<A> factors(c, stats, row_factors, column_factors, grad_loss);
    Tensor grad = torch::stable::new_empty(student, student.sizes());
    c.grad = static_cast<char*>(grad.mutable_data_ptr());
    const int64_t width = padded(c.classes);
    std::vector<A> columns(4 * width);
    for (int i = 0; i < 4; ++i) {
      std::copy_n(c.column_factors + i * c.classes, c.classes, columns.data() + i * width);
    }
    const Kernels<A> kernels = selected_kernels<A>();
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, c.classes));
    torch::stable::parallel_for(0, c.rows, grain, [&](int64_t begin, int64_t end) {
      run_gradient(c, kernels, columns.data(), begin, end);
    });
    return grad;
  });
}

}  // namespace
}  // namespace vitkd::dist

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU, m) {
  m.impl("dist_moments", TORCH_BOX(&vitkd::dist::dist_moments));
  m.impl("dist_bwd", TORCH_BOX(&vitkd::dist::dist_bwd));
}
