// The arguments of binary_kd_fwd, binary_kd_fwd_grad and binary_kd_bwd, checked.
#pragma once

#include <limits>

#include "binding/common.h"
#include "binding/flat.h"
#include "binding/kd_call.h"
#include "math/binary_kd.h"

namespace vitkd::binary_kd {

using kd::kDtype, kd::Pass, kd::visit_accumulator;

// The operations' arguments behind their tensors: reference.BinaryKDOptions.
struct Options {
  using Fields =
      std::tuple<double, double, int64_t, OptionalTensor, OptionalTensor, OptionalTensor, double>;
  double temperature, kd_weight;
  int64_t reduction;
  OptionalTensor labels, mask, class_weights;
  double bce_weight;
};

struct Numbers {  // one after another
  char* data = nullptr;
  ScalarType dtype = ScalarType::Undefined;
  int64_t size = 0;
};

template <class A>
struct Call {
  int64_t count;   // of all numbers
  int64_t length;  // of a part, whose losses are added up: a row where it matters
  Kind kind;
  Numbers student, teacher, labels, grad;
  const uint8_t* mask;  // 0 or 1
  const A* class_weights;
  A temperature, kd_weight, bce_weight;
  A scale = 1;          // of a mean
  PerRow<A> grad_loss;  // of a part
  double* parts;

  int64_t count_parts() const { return ceil_div(count, length); }
  bool has_factors() const { return mask || class_weights; }
  Factors<A> factors_of(int64_t part) const {
    const A kd = kd_weight * temperature, by = grad_loss[part] * scale;
    const A most = std::numeric_limits<A>::max() / 2 * std::min(A{1}, temperature);
    return {1 / temperature, most, kd * temperature, bce_weight, by * kd, by * bce_weight};
  }
};

// Holds contiguous tensors.
template <class A>
struct Setup {
  Tensor student, teacher;
  OptionalTensor labels, mask, class_weights;
  PerRowHolder<A> grad_loss{std::nullopt, 1};
  Call<A> call{};

  Setup(const Options& o, const Tensor& s, const Tensor& t)
      : student(torch::stable::contiguous(s)), teacher(torch::stable::contiguous(t)) {
    STD_TORCH_CHECK(
        s.dim() == 2 && t.dim() == 2 && s.size(0) == t.size(0) && s.size(1) == t.size(1),
        "binary_kd_loss: student, teacher: expected [rows, classes] for both, got ", shape_of(s),
        ", ", shape_of(t));
    const bool wide = t.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK((wide == std::is_same_v<A, double>),
                    "binary_kd_loss: teacher: expected float64 where the student is float64, got ",
                    torch::headeronly::toString(t.scalar_type()));
    STD_TORCH_CHECK(o.temperature > 0, "binary_kd_loss: temperature: expected a number > 0, got ",
                    o.temperature);
    STD_TORCH_CHECK(o.bce_weight == 0 || o.labels,
                    "binary_kd_loss: labels: expected numbers in [0, 1], as bce_weight is ",
                    o.bce_weight, ", got none");
    call.count = s.numel();
    call.student = numbers(student);
    // a term without weight is not looked at, not even if it is NaN
    call.teacher = o.kd_weight == 0 ? call.student : numbers(teacher);
    call.temperature = static_cast<A>(o.temperature);
    call.kd_weight = static_cast<A>(o.kd_weight);
    call.bce_weight = static_cast<A>(o.bce_weight);
    call.grad_loss = grad_loss.get;
    if (o.bce_weight != 0) {
      labels = like_student("labels", *o.labels);
      const ScalarType dtype = labels->scalar_type();
      STD_TORCH_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Byte || dtype == kDtype<A>,
                      "binary_kd_loss: labels: expected bool, uint8 or the accumulation type, got ",
                      torch::headeronly::toString(dtype));
      call.labels = numbers(*labels);
    }
    if (o.mask) {
      mask = like_student("mask", *o.mask);
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool,
                      "binary_kd_loss: mask: expected bool, got ",
                      torch::headeronly::toString(mask->scalar_type()));
      call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    }
    if (o.class_weights) {
      STD_TORCH_CHECK(
          o.class_weights->numel() == s.size(1) && o.class_weights->scalar_type() == kDtype<A>,
          "binary_kd_loss: class_weights: expected ", s.size(1),
          " numbers in the accumulation type, got ",
          torch::headeronly::toString(o.class_weights->scalar_type()), " ",
          shape_of(*o.class_weights));
      class_weights = torch::stable::contiguous(*o.class_weights);
      call.class_weights = class_weights->template const_data_ptr<A>();
    }
    call.kind = o.bce_weight == 0       ? Kind::kKd
                : o.kd_weight == 0      ? Kind::kBce
                : call.temperature == 1 ? Kind::kBothAt1
                                        : Kind::kBoth;
    // rows of a few classes are no parts of their own unless they have to be
    const bool rows = o.class_weights || static_cast<Reduction>(o.reduction) == Reduction::kNone;
    call.length = rows ? std::max<int64_t>(1, s.size(1)) : 4096;
  }

  void take(const Options& o, const Tensor& grad_loss_in) {
    const bool rows = static_cast<Reduction>(o.reduction) == Reduction::kNone;
    const int64_t expected = rows ? student.size(0) : 1;
    STD_TORCH_CHECK(
        grad_loss_in.numel() == expected && grad_loss_in.scalar_type() == kDtype<A>,
        "binary_kd_bwd: grad_loss: expected ", expected, " numbers in the accumulation type, got ",
        torch::headeronly::toString(grad_loss_in.scalar_type()), " ", shape_of(grad_loss_in));
    grad_loss = PerRowHolder<A>(grad_loss_in, 0);
    call.grad_loss = grad_loss.get;
  }

 private:
  static Numbers numbers(const Tensor& x) {
    return {const_cast<char*>(static_cast<const char*>(x.const_data_ptr())), x.scalar_type(),
            static_cast<int64_t>(x.element_size())};
  }
  Tensor like_student(const char* name, const Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == student.size(0) && x.size(1) == student.size(1),
                    "binary_kd_loss: ", name, ": expected the shape of student ", shape_of(student),
                    ", got ", shape_of(x));
    return torch::stable::contiguous(x);
  }
};

}  // namespace vitkd::binary_kd
