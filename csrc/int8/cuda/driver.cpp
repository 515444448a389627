#include "int8/cuda/driver.h"

#include <dlfcn.h>

// of the file that fatbin.py writes; null in a build without CUDA
extern "C" [[gnu::weak, gnu::visibility("hidden")]] const unsigned char vitkd_int8_kernels[];
extern "C" [[gnu::weak, gnu::visibility("hidden")]] const char vitkd_int8_kernels_built[];

namespace vitkd::int8::cuda {
namespace {

std::string dotted(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Driver opened() {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw CudaError("no NVIDIA driver on this machine: libcuda.so.1 cannot be loaded");
  }
  Driver driver;
  const auto find = [&](const char* name) {
    void* const symbol = dlsym(library, name);
    if (symbol == nullptr) {
      throw CudaError(std::string("the NVIDIA driver is too old (CUDA 12.0 is needed): it lacks ") +
                      name);
    }
    return symbol;
  };
#define X(name, symbol, ...) driver.name = reinterpret_cast<int (*)(__VA_ARGS__)>(find(#symbol));
  VITKD_CUDA_DRIVER(X)
#undef X
  driver.check(driver.init(0), "no CUDA device can be used: cuInit");
  driver.check(driver.driver_version(&driver.version), "cuDriverGetVersion");
  return driver;
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver = opened();
  return driver;
}

void Driver::check(int error, const char* what) const {
  if (error == 0) return;
  const char *name = nullptr, *text = nullptr;
  error_name(error, &name), error_string(error, &text);
  const std::string number = "error " + std::to_string(error);
  throw CudaError(std::string(what) + ": " + (name ? name : number) + (text ? ": " : "") +
                  (text ? text : ""));
}

const unsigned char* kernels_image() { return vitkd_int8_kernels; }

std::string kernels_built() { return kernels_image() == nullptr ? "" : vitkd_int8_kernels_built; }

Device::Device(int wanted)
    : driver(kernels_image() == nullptr ? throw CudaError("this package was built without CUDA: "
                                                          "no toolkit, or VITKD_FAST_CUDA=0")
                                        : Driver::get()),
      ordinal(wanted) {
  int count = 0, device = 0;
  driver.check(driver.device_count(&count), "cuDeviceGetCount");
  if (ordinal >= count) {
    throw CudaError("no CUDA device " + std::to_string(ordinal) + ": there " +
                    (count == 1 ? "is 1" : "are " + std::to_string(count)));
  }
  driver.check(driver.device_get(&device, ordinal), "cuDeviceGet");
  char text[128] = {};
  driver.check(driver.device_name(text, sizeof text - 1, device), "cuDeviceGetName");
  name = text;
  int major = 0, minor = 0;
  driver.check(driver.device_attribute(&multiprocessors, kMultiprocessors, device), "attribute");
  driver.check(driver.device_attribute(&major, kMajor, device), "attribute");
  driver.check(driver.device_attribute(&minor, kMinor, device), "attribute");
  driver.check(driver.retain_context(&context, device), "cuDevicePrimaryCtxRetain");
  try {
    const Current current(*this);
    const int error = driver.load_module(&module, kernels_image());
    driver.check(error, (name + ", compute capability " + std::to_string(major) + "." +
                         std::to_string(minor) + ", driver for CUDA " + dotted(driver.version) +
                         ", cannot load kernels built by CUDA " + kernels_built())
                            .c_str());
  } catch (...) {
    driver.release_context(device);
    throw;
  }
}

Device::~Device() {
  // at the end of a process the driver may be gone: what it says then is of no use
  if (driver.push_context(context) == 0) {
    driver.unload_module(module);
    Context popped;
    driver.pop_context(&popped);
  }
  int device = 0;
  if (driver.device_get(&device, ordinal) == 0) driver.release_context(device);
}

Device::Current::Current(const Device& device) : driver_(device.driver) {
  driver_.check(driver_.push_context(device.context), "cuCtxPushCurrent");
}

Device::Current::~Current() {
  Context popped;
  driver_.pop_context(&popped);
}

}  // namespace vitkd::int8::cuda
