// What the losses of rows of logits share on the GPU beside a row (kd_row.cuh): tensors as rows of
// classes, and sums over all rows in a fixed order.
#pragma once

#include <cassert>

#include "binding/kd_call.h"
#include "cuda/common.cuh"
#include "cuda/kd_row.cuh"
#include "cuda/sums.cuh"

namespace vitkd::kd {
namespace {

// A thread's row, and its place among the `group` threads of that. Rows of tiles are neighbours.
struct Place {
  int64_t row;
  int lane;
  bool
      there;  // beyond the last row, threads are not, but may have to meet the others of their warp
};

template <bool kTiles>
__device__ Place place_of(const RowShape& shape, int group) {
  if constexpr (kTiles) {
    const int64_t tiles = (shape.inner + kTileRows - 1) / kTileRows;
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * (kTileThreads / group) +
                         static_cast<int>(threadIdx.y) / group;
    const int64_t outer = tile / tiles, inner = (tile - outer * tiles) * kTileRows + threadIdx.x;
    const bool there = outer < shape.outer && inner < shape.inner;
    return {there ? outer * shape.inner + inner : 0, static_cast<int>(threadIdx.y) % group, there};
  } else {
    const int64_t row =
        static_cast<int64_t>(blockIdx.x) * (blockDim.x / group) + threadIdx.x / group;
    const bool there = row < shape.rows();
    return {there ? row : 0, static_cast<int>(threadIdx.x) % group, there};
  }
}

// Threads of a row of a tile: up to 32 classes each, which stay in L1.
inline int tile_group(int64_t classes) {
  int group = 1;
  while (group < kTileThreads && classes > 32 * group) group *= 2;
  return group;
}

inline int64_t tile_blocks(const RowShape& shape, int group) {
  return ceil_div(shape.outer * ceil_div(shape.inner, kTileRows), kTileThreads / group);
}

// a temperature <= 0 cannot be reported from here: its row becomes NaN
template <class A>
__device__ A checked_temperature(A t) {
  return t > 0 ? t : std::numeric_limits<A>::quiet_NaN();
}

template <class A>
__device__ void check_labels(const Call<A>& c, const Target<A>& target) {
  if (c.labels_a) assert(c.in_range(target) && "vitkd_fast: a label is out of range");
}

// Of the rows of a call that count.
template <class Call>
struct RowWeights {
  Call c;
  __device__ double operator()(int64_t row) const {
    return c.ignored(row) ? 0.0 : static_cast<double>(c.row_weight[row]);
  }
  __device__ double finish(double sum) const { return sum == 0 ? 0 : 1 / sum; }
};

// Makes the rows' shares those of a mean, and returns the memory that holds what it is divided by.
template <class A, class Call>
Tensor take_mean(Call& c, const Tensor& like) {
  const int64_t rows = c.shape.rows();
  Tensor inv_total;
  if (c.labels_a || c.row_weight.data) {
    inv_total = torch::stable::new_empty(like, {1}, kDtype<A>);
    A* const at = inv_total.template mutable_data_ptr<A>();
    sum_of(RowWeights<Call>{c}, rows, at, like);
    c.inv_total.data = at;
  } else {
    c.inv_total.value = rows == 0 ? 0 : A{1} / static_cast<A>(rows);
  }
  return inv_total;
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

// Names a call's rows anew, so that they are found without a division where their strides allow it,
// and so that neighbours in memory are `inner` ones where classes are not side by side.
template <class Call>
void straighten(Call& c) {
  RowShape& shape = c.shape;
  RowView* const views[] = {&c.student, &c.teacher, &c.grad};
  const auto straight = [&](const RowView* v) {
    return v->data == nullptr || v->outer_stride == shape.inner * v->inner_stride;
  };
  if (shape.outer == 1 || (straight(views[0]) && straight(views[1]) && straight(views[2]))) {
    shape.outer *= std::exchange(shape.inner, 1);
    for (RowView* v : views) v->outer_stride = v->inner_stride;
  }
  if (shape.inner == 1 && c.student.class_stride > c.student.outer_stride) {
    std::swap(shape.outer, shape.inner);
    for (RowView* v : views) v->inner_stride = v->outer_stride;
  }
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
