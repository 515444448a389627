// vitkd_fast._int8: the engine's objects for Python. Links no torch.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "int8/jitter.h"
#include "int8/prepare.h"
#include "int8/python.h"
#include "int8/session.h"
#include "simd/isa.h"

namespace py = pybind11;
using namespace vitkd;
using namespace vitkd::int8;

namespace {

std::unique_ptr<Session> make_session(const File& file, int image_size, int threads,
                                      const std::string& isa, bool fuse, bool poison) {
  const Options options{image_size, threads, isa_of(isa), fuse, poison};
  const py::gil_scoped_release release;
  return std::make_unique<Session>(file.model.graph, options);
}

void check(const Session& session, const Images& images, const Logits& logits) {
  const py::ssize_t size = session.plan().options.image_size;
  if (images.ndim() != 4 || images.shape(1) != size || images.shape(2) != size ||
      images.shape(3) != 3 || logits.ndim() != 2 || logits.shape(0) != images.shape(0) ||
      logits.shape(1) != session.classes()) {
    throw std::invalid_argument("images or logits of the wrong shape");
  }
}

void run(Session& session, const Images& images, Logits logits) {
  check(session, images, logits);
  const uint8_t* from = images.data();
  float* to = logits.mutable_data();
  const int64_t count = images.shape(0);
  const py::gil_scoped_release release;
  session.run(from, count, to);
}

py::list profile(Session& session, const Images& images, Logits logits) {
  check(session, images, logits);
  std::vector<NodeProfile> profile;
  {
    const py::gil_scoped_release release;
    profile = session.profile(images.data(), images.shape(0), logits.mutable_data());
  }
  py::list rows;
  for (const NodeProfile& p : profile) {
    const Layer& layer = *p.layer;
    const std::array<int, 3> shape{layer.out.height, layer.out.width, layer.out.channels};
    rows.append(py::make_tuple(p.step, layer.node.name, p.kernel, shape, p.seconds, layer.macs,
                               layer.bytes));
  }
  return rows;
}

py::list activations(Session& session, const Images& image) {
  const py::ssize_t size = session.plan().options.image_size;
  if (image.size() != size * size * 3) throw std::invalid_argument("an image of the wrong size");
  py::list activations;
  const std::vector<std::vector<uint8_t>> all = session.activations(image.data());
  for (size_t i = 0; i < all.size(); ++i) {
    const Shape& shape = session.plan().layers[i].out;
    if (all[i].empty()) {
      activations.append(py::none());
      continue;
    }
    py::array_t<uint8_t> output({shape.height, shape.width, shape.channels});
    std::memcpy(output.mutable_data(), all[i].data(), all[i].size());
    activations.append(output);
  }
  return activations;
}

// The caller has checked: frame uint8 [height, width, 3], the pixels of a row side by side, and
// prepared uint8 [size, size, 3], contiguous.
void prepare_frame(const py::array_t<uint8_t>& frame, double crop_pct,
                   const std::string& interpolation, const std::string& isa, Images prepared) {
  if (frame.ndim() != 3 || frame.shape(2) != 3 || frame.strides(2) != 1 || frame.strides(1) != 3 ||
      prepared.ndim() != 3 || prepared.shape(1) != prepared.shape(0) || prepared.shape(2) != 3) {
    throw std::invalid_argument("frame or prepared of the wrong shape");
  }
  const Preprocessing wanted{static_cast<int>(prepared.shape(0)), crop_pct,
                             interpolation_of(interpolation)};
  uint8_t* to = prepared.mutable_data();
  const py::gil_scoped_release release;
  prepare(frame.data(), frame.shape(0), frame.shape(1), frame.strides(0), wanted, isa_of(isa), to);
}

// frames: a list of uint8 [height, width, 3], the pixels of a row side by side; boxes [count, 5]:
// top, left, height, width, flip; out uint8 [count, rows, columns, 3], contiguous.
void crop_frames(const py::list& frames, const py::array_t<int64_t, py::array::c_style>& boxes,
                 const std::string& interpolation, const std::string& isa, Images out) {
  using Frame = py::array_t<uint8_t>;
  const auto count = static_cast<py::ssize_t>(frames.size());
  if (boxes.ndim() != 2 || boxes.shape(0) != count || boxes.shape(1) != 5 || out.ndim() != 4 ||
      out.shape(0) != count || out.shape(3) != 3) {
    throw std::invalid_argument("boxes or out of the wrong shape");
  }
  std::vector<Frame> held;
  held.reserve(frames.size());
  for (const py::handle frame : frames) {
    if (!py::isinstance<Frame>(frame)) throw std::invalid_argument("a frame is not of uint8");
    held.push_back(py::reinterpret_borrow<Frame>(frame));
    const Frame& last = held.back();
    if (last.ndim() != 3 || last.shape(2) != 3 || last.strides(2) != 1 || last.strides(1) != 3) {
      throw std::invalid_argument("a frame of the wrong shape");
    }
  }
  const Interpolation by = interpolation_of(interpolation);
  const Isa with = isa_of(isa);
  const auto rows = static_cast<int>(out.shape(1)), columns = static_cast<int>(out.shape(2));
  uint8_t* to = out.mutable_data();
  const int64_t* box = boxes.data();
  const py::gil_scoped_release release;
  for (const Frame& frame : held) {
    crop(frame.data(), frame.shape(0), frame.shape(1), frame.strides(0),
         {box[0], box[1], box[2], box[3], box[4] != 0}, rows, columns, by, with, to);
    box += 5;
    to += int64_t{3} * rows * columns;
  }
}

// images [count, height, width, 3], in place; factors [count, 3] of brightness, contrast and
// saturation; orders [count, 3]: a permutation of 0 to 2 each.
void jitter_images(Images images, const py::array_t<float, py::array::c_style>& factors,
                   const Images& orders, const std::string& isa) {
  if (images.ndim() != 4 || images.shape(3) != 3 || factors.ndim() != 2 || orders.ndim() != 2 ||
      factors.shape(0) != images.shape(0) || factors.shape(1) != 3 ||
      orders.shape(0) != images.shape(0) || orders.shape(1) != 3) {
    throw std::invalid_argument("images, factors or orders of the wrong shape");
  }
  const int64_t count = images.shape(0), pixels = images.shape(1) * images.shape(2);
  uint8_t* image = images.mutable_data();
  const float* by = factors.data();
  const uint8_t* order = orders.data();
  for (int64_t i = 0; i < 3 * count; ++i) {
    if (order[i] > 2) throw std::invalid_argument("orders: expected 0, 1 and 2");
  }
  const Isa with = isa_of(isa);
  const py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i, image += 3 * pixels, by += 3, order += 3) {
    jitter(image, pixels, {by[0], by[1], by[2]},
           {Enhancement{order[0]}, Enhancement{order[1]}, Enhancement{order[2]}}, with);
  }
}

}  // namespace

PYBIND11_MODULE(_int8, module) {
  module.doc() = "The compiled int8 engine of vitkd_fast.";
  py::register_exception<GraphError>(module, "GraphError", PyExc_ValueError);
  module.def("prepare", &prepare_frame, py::arg("frame").noconvert(), py::kw_only(),
             py::arg("crop_pct"), py::arg("interpolation"), py::arg("isa") = "",
             py::arg("out").noconvert());
  module.def("crop", &crop_frames, py::arg("frames"), py::arg("boxes").noconvert(), py::kw_only(),
             py::arg("interpolation"), py::arg("isa") = "", py::arg("out").noconvert());
  module.def("jitter", &jitter_images, py::arg("images").noconvert(),
             py::arg("factors").noconvert(), py::arg("orders").noconvert(), py::kw_only(),
             py::arg("isa") = "");
  module.def("isa", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(name(isa));
    return names;
  });
  module.def("vnni_peak", vnni_peak, py::call_guard<py::gil_scoped_release>());
  module.def("fma_peak", fma_peak, py::call_guard<py::gil_scoped_release>());
  py::class_<File>(module, "File")
      .def(py::init<py::bytes>())
      .def_readonly("data", &File::bytes)
      .def_property_readonly("image_size", [](const File& f) { return f.model.graph.image_size; })
      .def_property_readonly("mean",
                             [](const File& f) { return py::tuple(py::cast(f.model.mean)); })
      .def_property_readonly("std", [](const File& f) { return py::tuple(py::cast(f.model.std)); })
      .def_property_readonly("crop_pct", [](const File& f) { return f.model.crop_pct; })
      .def_property_readonly(
          "interpolation",
          [](const File& f) { return kInterpolations[static_cast<size_t>(f.model.interpolation)]; })
      .def_property_readonly("classes",
                             [](const File& f) { return py::tuple(py::cast(f.model.classes)); })
      .def_property_readonly("multilabel", [](const File& f) { return f.model.multilabel; })
      .def_property_readonly("temperature", [](const File& f) { return f.model.temperature; });
  py::class_<Session>(module, "Session")
      .def(py::init(&make_session), py::arg("file"), py::kw_only(), py::arg("image_size"),
           py::arg("threads") = 1, py::arg("isa") = "", py::arg("fuse") = true,
           py::arg("poison") = false)
      .def("run", &run)
      .def("profile", &profile)
      .def("activations", &activations)
      .def_property_readonly("classes", &Session::classes)
      .def_property_readonly("isa", [](const Session& s) { return name(s.plan().with.isa); })
      .def_property_readonly("weight_bytes", [](const Session& s) { return s.plan().weights; })
      .def_property_readonly("arena_bytes",
                             [](const Session& s) {
                               return s.plan().options.threads * (s.plan().arena + s.plan().rings);
                             })
      .def_property_readonly("steps", [](const Session& s) { return s.plan().steps.size(); });
  bind_cuda(module);
}
