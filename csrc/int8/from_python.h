// The graph of vitkd_fast/int8/graph.py in C++. Types are checked here, what they mean by `check`.
#pragma once

#include <pybind11/pybind11.h>

#include "int8/graph.h"

namespace vitkd::int8 {

// Arrays are borrowed, and belong to `graph`. Throws GraphError as `check`.
Graph graph_from_python(const pybind11::object& graph);

}  // namespace vitkd::int8
