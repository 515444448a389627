// PyInit__C: makes the compiled operations importable. Loading the library is what registers them
// with torch (STABLE_TORCH_LIBRARY_IMPL in csrc/cpu and csrc/cuda); the module itself only says how
// it was built.

#include <Python.h>

#ifndef VITKD_CUDA
#define VITKD_CUDA ""
#endif

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "_C";
  definition.m_doc = "The compiled operations of vitkd_fast.";
  definition.m_size = -1;
  PyObject* module = PyModule_Create(&definition);
  // toolkit and architectures of the CUDA kernels, e.g. "13.0 (8.0;9.0+PTX)"; empty without them
  if (module != nullptr && PyModule_AddStringConstant(module, "cuda", VITKD_CUDA) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
