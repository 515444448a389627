// What the losses of rows of logits share on the GPU beside a row (kd_row.cuh): tensors as rows of
// classes, and sums over all rows in a fixed order.
#pragma once

#include <cassert>

#include "binding/kd_call.h"
#include "cuda/common.cuh"
#include "cuda/kd_row.cuh"

namespace vitkd::kd {
namespace {

// a temperature <= 0 cannot be reported from here: its row becomes NaN
template <class A>
__device__ A checked_temperature(A t) {
  return t > 0 ? t : std::numeric_limits<A>::quiet_NaN();
}

template <class A>
__device__ void check_labels(const Call<A>& c, const Target<A>& target) {
  if (c.labels_a) assert(c.in_range(target) && "vitkd_fast: a label is out of range");
}

// Student and teacher as [outer, classes, inner], copied only where their strides allow no view.
struct Logits {
  Tensor student, teacher;
  RowShape shape;
  RowView s, t;
  Logits(const Tensor& student_in, const Tensor& teacher_in, int64_t class_dim)
      : student(student_in), teacher(teacher_in), shape(row_shape(student_in, class_dim)) {
    s = viewed(student, class_dim);
    t = viewed(teacher, class_dim);
  }

 private:
  static RowView viewed(Tensor& x, int64_t class_dim) {
    auto view = row_view(x, class_dim);
    if (!view) {
      x = torch::stable::contiguous(x);
      view = row_view(x, class_dim);
    }
    return *view;
  }
};

inline Grad empty_grad(const Tensor& student, int64_t class_dim) {
  return Grad(student, class_dim, [](const RowView&) { return true; });
}

// How the classes of a call lie in memory.
template <class A>
Access access_of(const Call<A>& c) {
  const bool side_by_side = c.student.class_stride == 1 && c.teacher.class_stride == 1 &&
                            (c.grad.data == nullptr || c.grad.class_stride == 1);
  if (c.shape.classes != 1 && !side_by_side) {
    return c.shape.inner > 1 ? Access::kTiled : Access::kScalar;
  }
  // every row must start at the same distance from a boundary of kChunk classes everywhere
  const auto like_student = [&](const RowView& v) {
    return reinterpret_cast<uintptr_t>(v.data) % (kChunk * v.size) == 0 &&
           v.outer_stride % kChunk == c.student.outer_stride % kChunk &&
           v.inner_stride % kChunk == c.student.inner_stride % kChunk;
  };
  const bool vectors = !std::is_same_v<A, double> && like_student(c.student) &&
                       like_student(c.teacher) && (!c.grad.data || like_student(c.grad));
  return vectors ? Access::kVector : Access::kScalar;
}

}  // namespace
}  // namespace vitkd::kd
