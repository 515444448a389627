// The arguments of dist_moments and dist_bwd, checked.
#pragma once

#include <cmath>

#include "binding/common.h"
#include "math/dist.h"

namespace vitkd::dist {

template <class A>
constexpr ScalarType kDtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// Pointers of a call: logits are [rows, classes], classes side by side.
template <class A>
struct Call {
  int64_t rows, classes;
  const char *student, *teacher;
  ScalarType s_dtype, t_dtype;
  int64_t s_size, t_size;
  A inv_t;
  A* stats;                 // [kStats, rows]
  double* columns;          // [5, classes]: Sums
  const A* row_factors;     // [2, rows]: row_q, row_p
  const A* column_factors;  // [4, classes]: mean_q, mean_p, by_q, by_p
  const A* grad_loss;       // []
  char* grad;

  VITKD_HD const char* s_row(int64_t row) const { return student + row * classes * s_size; }
  VITKD_HD const char* t_row(int64_t row) const { return teacher + row * classes * t_size; }
  VITKD_HD char* g_row(int64_t row) const { return grad + row * classes * s_size; }
  VITKD_HD Stats<A> load_stats(int64_t row) const {
    const A* p = stats + row;
    return {p[0], p[rows], p[2 * rows], p[3 * rows], p[4 * rows], p[5 * rows], p[6 * rows]};
  }
  VITKD_HD void save_stats(int64_t row, const Stats<A>& x) const {
    const A values[] = {x.max_s, x.by_s, x.max_t, x.by_t, x.v_q, x.v_p, x.c};
    for (int i = 0; i < kStats; ++i) stats[i * rows + row] = values[i];
  }
};

// Holds contiguous logits.
template <class A>
struct Setup {
  Tensor student, teacher;
  Call<A> call{};
  Setup(const Tensor& s, const Tensor& t, double temperature)
      : student(torch::stable::contiguous(s)), teacher(torch::stable::contiguous(t)) {
    STD_TORCH_CHECK(
        s.dim() == 2 && t.dim() == 2 && s.size(0) == t.size(0) && s.size(1) == t.size(1),
        "dist_loss: student, teacher: expected [rows, classes] for both, got ", shape_of(s), ", ",
        shape_of(t));
    const bool wide = t.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK((wide == std::is_same_v<A, double>),
                    "dist_loss: teacher: expected float64 where the student is float64, got ",
                    torch::headeronly::toString(t.scalar_type()));
    call.rows = s.size(0);
    call.classes = s.size(1);
    call.student = static_cast<const char*>(student.const_data_ptr());
    call.teacher = static_cast<const char*>(teacher.const_data_ptr());
    call.s_dtype = student.scalar_type();
    call.t_dtype = teacher.scalar_type();
    call.s_size = static_cast<int64_t>(student.element_size());
    call.t_size = static_cast<int64_t>(teacher.element_size());
    call.inv_t = static_cast<A>(1 / temperature);
  }
};

// f<A>() with the accumulation type: float64 for float64, else float32.
template <class F>
auto visit_accumulator(const Tensor& student, F&& f) {
  if (student.scalar_type() == ScalarType::Double) return f.template operator()<double>();
  return f.template operator()<float>();
}

// Holds what dist_bwd gets beside the logits.
template <class A>
struct Factors {
  Tensor stats, rows, columns, grad_loss;
  Factors(Call<A>& c, const Tensor& stats_in, const Tensor& rows_in, const Tensor& columns_in,
          const Tensor& grad_loss_in)
      : stats(torch::stable::contiguous(stats_in)),
        rows(torch::stable::contiguous(rows_in)),
        columns(torch::stable::contiguous(columns_in)),
        grad_loss(torch::stable::contiguous(grad_loss_in)) {
    check("stats", stats, kStats * c.rows);
    check("row_factors", rows, 2 * c.rows);
    check("column_factors", columns, 4 * c.classes);
    check("grad_loss", grad_loss, 1);
    c.stats = const_cast<A*>(stats.const_data_ptr<A>());
    c.row_factors = rows.const_data_ptr<A>();
    c.column_factors = columns.const_data_ptr<A>();
    c.grad_loss = grad_loss.const_data_ptr<A>();
  }
  static void check(const char* name, const Tensor& x, int64_t numbers) {
    STD_TORCH_CHECK(x.numel() == numbers && x.scalar_type() == kDtype<A>, "dist_bwd: ", name,
                    ": expected ", numbers, " numbers in the accumulation type, got ",
                    torch::headeronly::toString(x.scalar_type()), " ", shape_of(x));
  }
};

// Rows whose columns are summed in fp32 before they are added up in double; of the shape alone, so
// that results do not depend on the number of threads.
inline int64_t rows_of_chunk(int64_t rows) {
  return std::clamp<int64_t>(ceil_div(rows, 32), 16, 256);
}

}  // namespace vitkd::dist
