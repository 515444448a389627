// The engine on a GPU, for Python; bind.cpp of the engine calls it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "int8/cuda/session.h"
#include "int8/python.h"

namespace py = pybind11;

namespace vitkd::int8 {
namespace {

// An array of the host's or a device's that the caller has checked: contiguous, of the right shape.
struct Place {
  uint64_t address = 0;
  bool on_device = false;
  uint64_t stream = 0;  // of CUDA, to be waited for; 0: none

  cuda::Session::Where where() const { return {on_device, reinterpret_cast<cuda::Stream>(stream)}; }
};

Place place_of(const py::tuple& tuple) {
  return {tuple[0].cast<uint64_t>(), tuple[1].cast<bool>(), tuple[2].cast<uint64_t>()};
}

void run(cuda::Session& session, const py::tuple& images, int64_t count, const py::tuple& logits) {
  const Place from = place_of(images), to = place_of(logits);
  const py::gil_scoped_release release;
  session.run(reinterpret_cast<const void*>(from.address), from.where(), count,
              reinterpret_cast<void*>(to.address), to.where());
}

py::list profile(cuda::Session& session, const Images& images, Logits logits) {
  std::vector<cuda::LaunchProfile> profile;
  {
    const uint8_t* const from = images.data();
    float* const to = logits.mutable_data();
    const int64_t count = images.shape(0);
    const py::gil_scoped_release release;
    profile = session.profile(from, count, to);
  }
  py::list rows;
  int last = -1;
  for (const cuda::LaunchProfile& p : profile) {
    const cuda::Layer& layer = session.plan().layers[p.layer];
    const std::array<int, 3> shape{layer.out.height, layer.out.width, layer.out.channels};
    // what a layer computes and moves is its first kernel's
    const bool first = p.layer != last;
    last = p.layer;
    rows.append(py::make_tuple(p.layer, layer.node.name, p.kernel, shape, p.seconds,
                               first ? layer.macs : 0,
                               first ? layer.bytes + layer.weight_bytes : 0));
  }
  return rows;
}

py::list activations(cuda::Session& session, const Images& image) {
  const py::ssize_t size = session.plan().image_size;
  if (image.size() != size * size * 3) throw std::invalid_argument("an image of the wrong size");
  py::list activations;
  const std::vector<std::vector<uint8_t>> all = session.activations(image.data());
  for (size_t i = 0; i < all.size(); ++i) {
    const cuda::Layer& layer = session.plan().layers[i];
    if (all[i].empty()) {
      activations.append(py::none());
      continue;
    }
    const int channels = layer.out.channels;
    py::array_t<uint8_t> output({layer.out.height, layer.out.width, channels});
    for (int64_t p = 0; p < layer.out.pixels(); ++p) {
      std::memcpy(output.mutable_data() + p * channels, all[i].data() + p * layer.pixel, channels);
    }
    activations.append(output);
  }
  return activations;
}

// The launches of a batch on a chip with so many multiprocessors, each of which holds two blocks of
// a depthwise convolution: name, kernel, output, multiply-adds and bytes of maps of an image, bytes
// of weights, blocks, threads of a block and its shared memory.
py::list launches(const File& file, int image_size, int batch, int multiprocessors) {
  const cuda::Plan plan(file.model.graph, image_size);
  const auto two = [](cuda::Kernel, int, int) { return 2; };
  py::list rows;
  int last = -1;
  for (const cuda::Launch& l : plan.launches(batch, {}, {multiprocessors, two})) {
    const cuda::Layer& layer = plan.layers[l.layer];
    const std::array<int, 3> shape{layer.out.height, layer.out.width, layer.out.channels};
    const bool first = l.layer != last;
    last = l.layer;
    rows.append(py::make_tuple(layer.node.name, cuda::kKernelNames[static_cast<int>(l.kernel)],
                               shape, first ? layer.macs : 0, first ? layer.bytes : 0,
                               first ? layer.weight_bytes : 0, int64_t{l.grid_x} * l.grid_y,
                               l.threads, l.shared));
  }
  return rows;
}

// dlpack.h's DLTensor, as far as it is read.
struct Tensor {
  void* data;
  int32_t device_type, device;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t offset;
};

// Address, shape, (code, bits) and whether it is contiguous, of a capsule, which stays its owner.
py::tuple dlpack(const py::capsule& capsule) {
  if (capsule.name() == nullptr || std::strcmp(capsule.name(), "dltensor") != 0) {
    throw std::invalid_argument("not a capsule of DLPack's");
  }
  const auto& tensor = *static_cast<const Tensor*>(capsule.get_pointer());
  py::tuple shape(tensor.dimensions);
  int64_t step = 1;
  bool contiguous = tensor.lanes == 1;
  for (int i = tensor.dimensions - 1; i >= 0; --i) {
    shape[i] = tensor.shape[i];
    contiguous &= tensor.strides == nullptr || tensor.shape[i] == 1 || tensor.strides[i] == step;
    step *= tensor.shape[i];
  }
  return py::make_tuple(reinterpret_cast<uint64_t>(tensor.data) + tensor.offset, shape,
                        py::make_tuple(tensor.code, tensor.bits), contiguous || step == 0);
}

}  // namespace

void bind_cuda(py::module_& module) {
  py::register_exception<cuda::CudaError>(module, "CudaError", PyExc_RuntimeError);
  module.def("cuda_kernels", &cuda::kernels_built);
  module.def("cuda_launches", &launches, py::arg("file"), py::kw_only(), py::arg("image_size"),
             py::arg("batch"), py::arg("multiprocessors"));
  module.def("dlpack", &dlpack);
  py::class_<cuda::Session>(module, "CudaSession")
      .def(py::init([](const File& file, int image_size, int device) {
             const py::gil_scoped_release release;
             return std::make_unique<cuda::Session>(file.model.graph, image_size, device);
           }),
           py::arg("file"), py::kw_only(), py::arg("image_size"), py::arg("device"))
      .def("run", &run)
      .def("profile", &profile)
      .def("activations", &activations)
      .def_property_readonly("classes", [](const cuda::Session& s) { return s.plan().classes(); })
      .def_property_readonly("device_name", [](const cuda::Session& s) { return s.device().name; })
      .def_property_readonly(
          "stream", [](const cuda::Session& s) { return reinterpret_cast<uint64_t>(s.stream()); })
      .def_property_readonly("weight_bytes",
                             [](const cuda::Session& s) { return s.plan().constants.size(); })
      .def_property_readonly("arena_bytes", [](const cuda::Session& s) { return s.plan().arena; });
}

}  // namespace vitkd::int8
