#include "int8/from_python.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace py = pybind11;

namespace vitkd::int8 {
namespace {

// short and printable, whatever it is
std::string show(py::handle value) {
  PyObject* const p = value.ptr();
  int overflow = 0;
  if (PyLong_Check(p) && (PyLong_AsLongLongAndOverflow(p, &overflow), overflow != 0)) {
    return "an integer of more than 64 bits";
  }
  if (PyLong_Check(p) || PyFloat_Check(p) || PyUnicode_Check(p) || PyTuple_Check(p) ||
      value.is_none()) {
    if (const auto ascii = py::reinterpret_steal<py::object>(PyObject_ASCII(p))) {
      auto text = ascii.cast<std::string>();
      return text.size() > 80 ? text.substr(0, 77) + "..." : text;
    }
    PyErr_Clear();  // a tuple of integers of too many digits
  }
  return Py_TYPE(p)->tp_name;
}

// The attributes of a Python object, each of exactly the type that graph.py states.
class Attributes {
 public:
  Attributes(py::handle from, std::string where) : from_(from), where_(std::move(where)) {}

  py::object get(const char* name) const { return py::getattr(from_, name, py::none()); }

  [[noreturn]] void fail(const char* name, const std::string& expected,
                         const std::string& given) const {
    throw GraphError(where_ + name + ": expected " + expected + ", got " + given);
  }
  [[noreturn]] void fail(const char* name, const std::string& expected) const {
    fail(name, expected, show(get(name)));
  }

  int integer(const char* name) const { return integer(name, get(name)); }

  double number(const char* name) const { return number(name, get(name)); }

  float single(const char* name) const { return single(name, get(name)); }

  bool boolean(const char* name) const {
    if (!PyBool_Check(get(name).ptr())) fail(name, "True or False");
    return get(name).ptr() == Py_True;
  }

  std::string string(const char* name) const {
    const py::object value = get(name);
    if (PyUnicode_Check(value.ptr()) && PyUnicode_GET_LENGTH(value.ptr()) <= 1024) {
      Py_ssize_t size = 0;
      if (const char* text = PyUnicode_AsUTF8AndSize(value.ptr(), &size))
        return {text, text + size};
      PyErr_Clear();  // surrogates
    }
    fail(name, "text of up to 1024 characters");
  }

  std::vector<int> integers(const char* name) const {
    std::vector<int> values;
    for (const py::handle value : tuple(name, "a tuple")) values.push_back(integer(name, value));
    return values;
  }

  template <size_t N>
  std::array<int, N> integers(const char* name) const {
    std::array<int, N> values;
    const py::tuple from = tuple(name, "a tuple of " + std::to_string(N), N);
    for (size_t i = 0; i < N; ++i) values[i] = integer(name, from[i]);
    return values;
  }

  template <size_t N>
  std::array<float, N> singles(const char* name) const {
    std::array<float, N> values;
    const py::tuple from = tuple(name, "a tuple of " + std::to_string(N), N);
    for (size_t i = 0; i < N; ++i) values[i] = single(name, from[i]);
    return values;
  }

  template <class T>
  Array<T> array(const char* name) const {
    const py::object value = get(name);
    const std::string type = py::str(py::dtype::of<T>());
    if (!py::isinstance<py::array>(value)) {
      fail(name, "an array of " + type, Py_TYPE(value.ptr())->tp_name);
    }
    const auto array = py::cast<py::array>(value);
    if (!array.dtype().equal(py::dtype::of<T>())) {
      fail(name, type, std::string(py::str(array.dtype())).substr(0, 80));
    }
    constexpr int kFlags =
        py::array::c_style | static_cast<int>(py::detail::npy_api::NPY_ARRAY_ALIGNED_);
    if ((array.flags() & kFlags) != kFlags) {
      fail(name, "a contiguous, aligned array", "one that is not");
    }
    return {static_cast<const T*>(array.data()), {array.shape(), array.shape() + array.ndim()}};
  }

  py::tuple tuple(const char* name, const std::string& expected, size_t size = 0) const {
    const py::object value = get(name);
    if (!PyTuple_Check(value.ptr())) fail(name, expected);
    auto values = py::reinterpret_borrow<py::tuple>(value);
    if (size != 0 && values.size() != size) fail(name, expected);
    return values;
  }

 private:
  int integer(const char* name, py::handle value) const {
    // bool is a subclass of int
    if (!PyLong_CheckExact(value.ptr())) fail(name, "an integer", show(value));
    int overflow = 0;
    const long long n = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    using Limits = std::numeric_limits<int>;
    if (overflow != 0 || n < Limits::min() || n > Limits::max()) {
      fail(name, "an integer of 32 bits", show(value));
    }
    return static_cast<int>(n);
  }

  double number(const char* name, py::handle value) const {
    if (!PyFloat_Check(value.ptr())) fail(name, "a float", show(value));
    return PyFloat_AS_DOUBLE(value.ptr());
  }

  float single(const char* name, py::handle value) const {
    const double wide = number(name, value);
    const auto narrow = static_cast<float>(wide);
    if (narrow != wide) fail(name, "a float32", show(value));
    return narrow;
  }

  const py::handle from_;
  const std::string where_;
};

Node node_from_python(py::handle from, size_t index) {
  Node n;
  n.name = Attributes(from, "node " + std::to_string(index) + ": ").string("name");
  const Attributes given(from, describe(index, n.name));
  const py::object name = given.get("op");
  const auto op = std::find_if(kOps.begin(), kOps.end(), [&](const char* known) {
    return PyUnicode_Check(name.ptr()) && PyUnicode_CompareWithASCIIString(name.ptr(), known) == 0;
  });
  if (op == kOps.end()) given.fail("op", "conv, depthwise, add, squeeze_excite, pool, classifier");
  n.op = static_cast<Op>(op - kOps.begin());
  n.inputs = given.integers("inputs");
  if (n.op == Op::conv || n.op == Op::depthwise || n.op == Op::classifier) {
    n.weight = given.array<int8_t>("weight");
    n.bias = given.array<int32_t>("bias");
    n.multiplier = given.array<float>("multiplier");
  }
  if (n.op == Op::classifier) return n;
  n.zero_point = given.integer("zero_point");
  n.lo = given.integer("lo");
  n.hi = given.integer("hi");
  if (n.op == Op::conv || n.op == Op::depthwise) {
    n.stride = given.integers<2>("stride");
    const py::object padding = given.get("padding");
    n.same = PyUnicode_Check(padding.ptr());
    if (n.same && PyUnicode_CompareWithASCIIString(padding.ptr(), "same") != 0) {
      given.fail("padding", "'same' or a tuple of 4");
    }
    if (!n.same) n.padding = given.integers<4>("padding");
    n.hardswish = !given.get("hardswish_scale").is_none();
    if (n.hardswish) n.hardswish_scale = given.single("hardswish_scale");
    n.residual = n.op == Op::conv && !given.get("residual_multiplier").is_none();
    if (n.residual) n.residual_multiplier = given.single("residual_multiplier");
  } else if (n.op == Op::add) {
    n.multipliers = given.singles<2>("multipliers");
  } else if (n.op == Op::pool) {
    n.ratio = given.number("ratio");
  } else {
    n.q1 = given.array<int8_t>("q1"), n.q2 = given.array<int8_t>("q2");
    n.s1 = given.array<float>("s1"), n.b1 = given.array<float>("b1");
    n.s2 = given.array<float>("s2"), n.b2 = given.array<float>("b2");
    n.hidden_hardswish = given.boolean("hidden_hardswish");
    n.scale = given.number("scale");
    n.ratio = given.single("ratio");
  }
  return n;
}

}  // namespace

Graph graph_from_python(const py::object& from) {
  const Attributes given(from, "");
  Graph graph;
  graph.image_size = given.integer("image_size");
  graph.padding_bytes = given.integers<3>("padding_bytes");
  for (const py::handle node : given.tuple("nodes", "a tuple")) {
    graph.nodes.push_back(node_from_python(node, graph.nodes.size()));
  }
  return graph;
}

}  // namespace vitkd::int8
