// What the bindings of both engines, on CPUs and on GPUs, share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string_view>

#include "int8/reader.h"

namespace vitkd::int8 {

// A file's content, and the bytes that it borrows.
struct File {
  explicit File(const pybind11::bytes& from) : bytes(from) {
    const std::string_view view = bytes;
    const pybind11::gil_scoped_release release;
    model = read({reinterpret_cast<const uint8_t*>(view.data()), view.size()});
  }

  const pybind11::bytes bytes;
  Model model;
};

// The caller has checked: images uint8 [count, size, size, 3], logits float32 [count, classes],
// both contiguous.
using Images = pybind11::array_t<uint8_t, pybind11::array::c_style>;
using Logits = pybind11::array_t<float, pybind11::array::c_style>;

void bind_cuda(pybind11::module_& module);  // cuda/bind.cpp

}  // namespace vitkd::int8
