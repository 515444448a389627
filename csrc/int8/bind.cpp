// vitkd_fast._int8: the engine's objects for Python. Links no torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "isa.h"

PYBIND11_MODULE(_int8, module) {
  module.doc() = "The compiled int8 engine of vitkd_fast.";
  module.def("isa", [] {
    std::vector<std::string> names;
    for (vitkd::Isa isa : vitkd::available_isas()) names.emplace_back(vitkd::name(isa));
    return names;
  });
}
