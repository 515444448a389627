// The part of CUDA's driver (libcuda.so.1) that the engine uses, loaded when it is first needed:
// the package links nothing of CUDA's, and is built without its headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace vitkd::int8::cuda {

// No driver, no such device, kernels that were not built, or an error of the driver's.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Pointer = unsigned long long;  // to a device's memory
struct ContextOf;
struct ModuleOf;
struct FunctionOf;
struct StreamOf;
struct EventOf;
struct GraphOf;
struct ExecOf;
using Context = ContextOf*;
using Module = ModuleOf*;
using Function = FunctionOf*;
using Stream = StreamOf*;
using Event = EventOf*;
using CapturedGraph = GraphOf*;
using Exec = ExecOf*;

// name of a member, of the symbol, and its parameters; all return an error, 0 for none
#define VITKD_CUDA_DRIVER(X)                                                                      \
  X(init, cuInit, unsigned)                                                                       \
  X(driver_version, cuDriverGetVersion, int*)                                                     \
  X(error_name, cuGetErrorName, int, const char**)                                                \
  X(error_string, cuGetErrorString, int, const char**)                                            \
  X(device_count, cuDeviceGetCount, int*)                                                         \
  X(device_get, cuDeviceGet, int*, int)                                                           \
  X(device_name, cuDeviceGetName, char*, int, int)                                                \
  X(device_attribute, cuDeviceGetAttribute, int*, int, int)                                       \
  X(retain_context, cuDevicePrimaryCtxRetain, Context*, int)                                      \
  X(release_context, cuDevicePrimaryCtxRelease_v2, int)                                           \
  X(push_context, cuCtxPushCurrent_v2, Context)                                                   \
  X(pop_context, cuCtxPopCurrent_v2, Context*)                                                    \
  X(load_module, cuModuleLoadData, Module*, const void*)                                          \
  X(unload_module, cuModuleUnload, Module)                                                        \
  X(get_function, cuModuleGetFunction, Function*, Module, const char*)                            \
  X(blocks_at_once, cuOccupancyMaxActiveBlocksPerMultiprocessor, int*, Function, int, size_t)     \
  X(allocate, cuMemAlloc_v2, Pointer*, size_t)                                                    \
  X(free, cuMemFree_v2, Pointer)                                                                  \
  X(to_device, cuMemcpyHtoDAsync_v2, Pointer, const void*, size_t, Stream)                        \
  X(to_host, cuMemcpyDtoHAsync_v2, void*, Pointer, size_t, Stream)                                \
  X(on_device, cuMemcpyDtoDAsync_v2, Pointer, Pointer, size_t, Stream)                            \
  X(pointer_attribute, cuPointerGetAttribute, void*, int, Pointer)                                \
  X(create_stream, cuStreamCreate, Stream*, unsigned)                                             \
  X(destroy_stream, cuStreamDestroy_v2, Stream)                                                   \
  X(synchronize, cuStreamSynchronize, Stream)                                                     \
  X(wait_event, cuStreamWaitEvent, Stream, Event, unsigned)                                       \
  X(create_event, cuEventCreate, Event*, unsigned)                                                \
  X(destroy_event, cuEventDestroy_v2, Event)                                                      \
  X(record_event, cuEventRecord, Event, Stream)                                                   \
  X(elapsed, cuEventElapsedTime, float*, Event, Event)                                            \
  X(begin_capture, cuStreamBeginCapture_v2, Stream, int)                                          \
  X(end_capture, cuStreamEndCapture, Stream, CapturedGraph*)                                      \
  X(instantiate, cuGraphInstantiateWithFlags, Exec*, CapturedGraph, unsigned long long)           \
  X(destroy_graph, cuGraphDestroy, CapturedGraph)                                                 \
  X(destroy_exec, cuGraphExecDestroy, Exec)                                                       \
  X(launch_graph, cuGraphLaunch, Exec, Stream)                                                    \
  X(launch, cuLaunchKernel, Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
    unsigned, Stream, void**, void**)

struct Driver {
#define X(name, symbol, ...) int (*name)(__VA_ARGS__);
  VITKD_CUDA_DRIVER(X)
#undef X
  int version = 0;  // of CUDA, such as 13000

  // throws CudaError where there is none, and again at each call
  static const Driver& get();
  void check(int error, const char* what) const;
};

// cuDeviceGetAttribute and others number these
constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;
constexpr int kPointerDevice = 9;   // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
constexpr int kRelaxedCapture = 2;  // other threads' calls break no capture
constexpr int kEventWithoutTime = 2;

// The kernels (kernels.cu) as nvcc left them, for some architectures; null in a build without CUDA.
const unsigned char* kernels_image();
// what they were built with and for, such as "13.0 (9.0+PTX)"; "" without
std::string kernels_built();

// A device's context and the engine's kernels in it, shared by all that hold it.
class Device {
 public:
  explicit Device(int ordinal);  // throws CudaError
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // the context is this thread's as long as this lives
  class Current {
   public:
    explicit Current(const Device& device);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const Driver& driver_;
  };

  const Driver& driver;
  const int ordinal;
  Context context = nullptr;
  Module module = nullptr;
  int multiprocessors = 0;
  std::string name;  // such as "NVIDIA H200"
};

}  // namespace vitkd::int8::cuda
