// What losses of rows share on the CPU: the layout of the logits, how rows are spread over torch's
// threads, what is checked before any of them starts, and the sum of the rows' losses, in row
// order, so that results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "binding/kd_call.h"
#include "simd/isa.h"

namespace vitkd::rows {

using kd::Pass;

// Elements per lane-block whose exponentials are kept for the gradient: 256 KB a tensor, in L2.
constexpr int64_t kMaxKept = 65536;

enum class Layout { kRows, kColumns, kStrided };

inline Layout layout_of(const RowView& x, const RowShape& shape) {
  if (x.class_stride == 1 || shape.classes == 1) return Layout::kRows;
  if (shape.inner > 1 && x.inner_stride == 1 && shape.classes <= kMaxKept / 16) {
    return Layout::kColumns;
  }
  return Layout::kStrided;
}

// Student and teacher in one layout, copied only where their strides allow none.
struct Logits {
  Tensor student, teacher;
  int64_t class_dim;
  RowShape shape;
  RowView s, t;
  Layout layout = Layout::kStrided;
  Logits(const Tensor& student_in, const Tensor& teacher_in, int64_t dim)
      : student(student_in),
        teacher(teacher_in),
        class_dim(dim),
        shape(row_shape(student_in, dim)) {
    const auto s_view = row_view(student, class_dim);
    const auto t_view = row_view(teacher, class_dim);
    if (s_view && t_view && layout_of(*s_view, shape) == layout_of(*t_view, shape)) {
      use(*s_view, *t_view);
    }
    if (layout == Layout::kStrided) make_contiguous();
  }
  void make_contiguous() {
    student = torch::stable::contiguous(student);
    teacher = torch::stable::contiguous(teacher);
    use(*row_view(student, class_dim), *row_view(teacher, class_dim));
  }

 private:
  void use(const RowView& s_view, const RowView& t_view) {
    s = s_view;
    t = t_view;
    layout = layout_of(s, shape);
  }
};

// What serves rows [begin, end) of a call, or strips of `lanes` rows side by side.
template <class C>
struct Kernel {
  void (*run)(const C&, Pass, int64_t begin, int64_t end);
  int64_t lanes = 1;
};

template <class C, class Choose>
void run(C c, Layout layout, Pass pass, Choose&& choose) {
  if (c.shape.rows() == 0) return;
  // rows of a few classes do not fill a register: lanes are rows for them, too
  if (layout == Layout::kRows && c.shape.inner == 1 && c.shape.classes <= 32) {
    layout = Layout::kColumns;
    std::swap(c.shape.outer, c.shape.inner);
    for (RowView* view : {&c.student, &c.teacher, &c.grad}) {
      std::swap(view->outer_stride, view->inner_stride);
    }
  }
  const Kernel<C> kernel = choose(layout);
  const int64_t units =
      kernel.lanes == 1 ? c.shape.rows() : c.shape.outer * ceil_div(c.shape.inner, kernel.lanes);
  const int64_t grain = std::max<int64_t>(1, 32768 / (c.shape.classes * kernel.lanes));
  torch::stable::parallel_for(0, units, grain,
                              [&](int64_t begin, int64_t end) { kernel.run(c, pass, begin, end); });
}

// Labels out of range are found here, before any thread starts.
template <class A>
A checked_total(const kd::Call<A>& c, const char* loss) {
  double total = 0;
  for (int64_t row = 0; row < c.shape.rows(); ++row) {
    if (c.temperature.data) {
      STD_TORCH_CHECK(c.temperature[row] > 0, loss, ": temperature: expected a number > 0, got ",
                      c.temperature[row], " for row ", row);
    }
    if (c.ignored(row)) continue;
    for (const int64_t* labels : {c.labels_a, c.labels_b}) {
      STD_TORCH_CHECK(!labels || (labels[row] >= 0 && labels[row] < c.shape.classes), loss,
                      ": labels: expected 0 to ", c.shape.classes - 1, " or ignore_index ",
                      c.ignore_index, ", got ", labels ? labels[row] : 0, " for row ", row);
    }
    total += c.row_weight[row];
  }
  return static_cast<A>(total);
}

// A mean's divisor becomes a part of the call.
template <class A, class O>
void take_total(kd::Call<A>& c, const O& options) {
  const A total = c.labels_a || c.row_weight.data || c.temperature.data
                      ? checked_total(c, O::kLoss)
                      : static_cast<A>(c.shape.rows());
  if (static_cast<Reduction>(options.reduction) == Reduction::kMean) {
    c.inv_total.value = total == 0 ? 0 : 1 / total;
  }
}

// Calls run(), which leaves each row's loss in c.loss, and returns the reduced loss.
template <class A, class O, class F>
Tensor forward(kd::Call<A>& c, const O& options, const Tensor& student, F&& run) {
  take_total(c, options);
  Tensor loss = kd::empty_loss<A>(options, student);
  A* const out = loss.template mutable_data_ptr<A>();
  if (static_cast<Reduction>(options.reduction) == Reduction::kNone) {
    c.loss = out;
    run();
    return loss;
  }
  std::vector<A> rows(c.shape.rows());
  c.loss = rows.data();
  run();
  *out = static_cast<A>(std::accumulate(rows.begin(), rows.end(), 0.0));
  return loss;
}

// An uninitialised gradient in the logits' layout, which a contiguous one may ask to change.
inline kd::Grad empty_grad(Logits& logits, const Tensor& student) {
  kd::Grad grad(student, logits.class_dim, [&](const RowView& view) {
    return layout_of(view, logits.shape) == logits.layout;
  });
  if (layout_of(grad.view, logits.shape) != logits.layout) logits.make_contiguous();
  return grad;
}

}  // namespace vitkd::rows
