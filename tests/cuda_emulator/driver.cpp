// libcuda.so.1, as much of it as csrc/int8/cuda/driver.h asks for, of a GPU that emulator.h
// emulates. Device memory is the host's, but may be touched only while a stream's work runs, ends
// at a page that nobody may touch, and starts as 0xA5. A stream's work is done as late as it may
// be: when it is waited for. Copies from the host are of pageable memory, which the driver copies
// at once. VITKD_EMULATED_DEVICES: how many GPUs there are.
#include "int8/cuda/driver.h"

#include <sys/mman.h>

#include <chrono>
#include <deque>
#include <optional>

#include "int8/cuda/calls.h"

namespace vitkd::int8::cuda {

#define X(name, call) extern "C" void vitkd_int8_##name(const call);
VITKD_INT8_KERNELS(X)
#undef X

namespace {

using Work = std::function<void()>;

struct KernelOf {
  const void* address;
  std::function<Work(void**)> bind;  // copies its parameters
};

const std::map<std::string, KernelOf>& all_kernels() {
  static const std::map<std::string, KernelOf> kernels{
#define X(name, Call)                                                          \
  {"vitkd_int8_" #name,                                                        \
   {reinterpret_cast<const void*>(&vitkd_int8_##name), [](void** parameters) { \
      const Call call = *static_cast<const Call*>(parameters[0]);              \
      return Work([call] { vitkd_int8_##name(call); });                        \
    }}},
      VITKD_INT8_KERNELS(X)
#undef X
  };
  return kernels;
}

constexpr size_t kPage = 4096;
constexpr int kInvalidValue = 1, kOutOfMemory = 2, kInvalidImage = 200, kInvalidContext = 201,
              kNotFound = 500, kCapturing = 900;

struct Memory {
  char* pages;
  size_t bytes;  // of the pages that may be touched
};

std::mutex mutex;
std::map<Pointer, Memory> memory;  // by its address
thread_local int contexts = 0;     // of this thread
int retained = 0;

void allow(int access) {
  for (const auto& [_, m] : memory) mprotect(m.pages, m.bytes, access);
}

}  // namespace

struct FunctionOf : KernelOf {};
struct ContextOf {};
struct ModuleOf {};
struct EventOf {
  double at = 0;
};
struct GraphOf {
  std::vector<Work> work;
};
struct ExecOf : GraphOf {};
struct StreamOf {
  std::deque<Work> work;
  GraphOf* captured = nullptr;

  void add(Work one) { captured ? captured->work.push_back(std::move(one)) : work.push_back(one); }
  void run() {
    allow(PROT_READ | PROT_WRITE);
    for (; !work.empty(); work.pop_front()) work.front()();
    allow(PROT_NONE);
  }
};

namespace {

ContextOf only_context;
ModuleOf only_module;

double now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(since).count();
}

// a stream of the caller's, which is not one of ours: its work is done already
bool is_special(Stream stream) { return reinterpret_cast<uintptr_t>(stream) <= 2; }

}  // namespace

#define NEEDS_CONTEXT \
  if (contexts == 0) return kInvalidContext

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuGetErrorName(int, const char** text) { return *text = "CUDA_ERROR_OF_THE_EMULATOR", 0; }
int cuGetErrorString(int, const char** text) { return *text = "see driver.cpp", 0; }

int cuDeviceGetCount(int* count) {
  return *count = emulator::of_environment("VITKD_EMULATED_DEVICES", 1), 0;
}
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char* name, int, int) { return std::strcpy(name, "an emulated GPU"), 0; }
int cuDeviceGetAttribute(int* value, int which, int) {
  *value = which == kMultiprocessors ? emulator::multiprocessors : which == kMajor ? 9 : 0;
  return 0;
}

int cuDevicePrimaryCtxRetain(Context* context, int) {
  return *context = &only_context, ++retained, 0;
}
int cuDevicePrimaryCtxRelease_v2(int) { return retained-- > 0 ? 0 : kInvalidContext; }
int cuCtxPushCurrent_v2(Context) { return ++contexts, 0; }
int cuCtxPopCurrent_v2(Context* context) {
  *context = &only_context;
  return contexts-- > 0 ? 0 : kInvalidContext;
}

int cuModuleLoadData(Module* module, const void* image) {
  NEEDS_CONTEXT;
  *module = &only_module;
  return *static_cast<const uint32_t*>(image) == 0xBA55ED50 ? 0 : kInvalidImage;
}
int cuModuleUnload(Module) { return 0; }
int cuModuleGetFunction(Function* function, Module, const char* name) {
  static std::map<std::string, FunctionOf> functions;
  const std::lock_guard lock(mutex);
  const auto known = all_kernels().find(name);
  if (known == all_kernels().end()) return kNotFound;
  return *function = &(functions[name] = FunctionOf{known->second}), 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function, int threads, size_t shared) {
  NEEDS_CONTEXT;
  const std::lock_guard lock(emulator::one_at_a_time);
  const int room = emulator::shared_limit / (static_cast<int>(shared) + 1024);
  const int most = std::max(1, std::min(room, 1536 / threads));
  return *blocks = 1 + static_cast<int>(emulator::chance() % most), 0;
}

int cuMemAlloc_v2(Pointer* pointer, size_t bytes) {
  NEEDS_CONTEXT;
  if (bytes == 0) return kInvalidValue;
  const std::lock_guard lock(mutex);
  const size_t used = (bytes + 255) / 256 * 256, paged = (used + kPage - 1) / kPage * kPage;
  void* const all =
      mmap(nullptr, paged + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return kOutOfMemory;
  char* const pages = static_cast<char*>(all) + kPage;
  std::memset(pages, 0xA5, paged);
  mprotect(all, paged + 2 * kPage, PROT_NONE);
  *pointer = reinterpret_cast<Pointer>(pages + paged - used);
  memory[*pointer] = {pages, paged};
  return 0;
}
int cuMemFree_v2(Pointer pointer) {
  NEEDS_CONTEXT;
  const std::lock_guard lock(mutex);
  const auto known = memory.find(pointer);
  if (known == memory.end()) return kInvalidValue;
  munmap(known->second.pages - kPage, known->second.bytes + 2 * kPage);
  memory.erase(known);
  return 0;
}
int cuPointerGetAttribute(void* value, int, Pointer pointer) {
  const std::lock_guard lock(mutex);
  const auto after = memory.upper_bound(pointer);
  if (after == memory.begin()) return kInvalidValue;
  const Memory& m = std::prev(after)->second;
  if (pointer >= reinterpret_cast<Pointer>(m.pages) + m.bytes) return kInvalidValue;
  return *static_cast<int*>(value) = 0, 0;
}

int cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, Stream stream) {
  NEEDS_CONTEXT;
  const auto* const first = static_cast<const char*>(from);
  const std::vector<char> kept(first, first + bytes);
  stream->add([=] { std::memcpy(reinterpret_cast<void*>(to), kept.data(), kept.size()); });
  return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, Stream stream) {
  NEEDS_CONTEXT;
  stream->add([=] { std::memcpy(to, reinterpret_cast<const void*>(from), bytes); });
  return 0;
}
int cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, Stream stream) {
  NEEDS_CONTEXT;
  stream->add([=] {
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  });
  return 0;
}

int cuStreamCreate(Stream* stream, unsigned) {
  NEEDS_CONTEXT;
  return *stream = new StreamOf, 0;
}
int cuStreamDestroy_v2(Stream stream) { return delete stream, 0; }
int cuStreamSynchronize(Stream stream) {
  NEEDS_CONTEXT;
  const std::lock_guard lock(mutex);
  if (stream->captured) return kCapturing;
  return stream->run(), 0;
}
int cuStreamWaitEvent(Stream, Event, unsigned) { return 0; }
int cuEventCreate(Event* event, unsigned) {
  NEEDS_CONTEXT;
  return *event = new EventOf, 0;
}
int cuEventDestroy_v2(Event event) { return delete event, 0; }
int cuEventRecord(Event event, Stream stream) {
  if (!is_special(stream)) stream->add([=] { event->at = now(); });
  return 0;
}
int cuEventElapsedTime(float* milliseconds, Event from, Event to) {
  return *milliseconds = static_cast<float>(to->at - from->at), 0;
}

int cuStreamBeginCapture_v2(Stream stream, int) {
  NEEDS_CONTEXT;
  if (stream->captured) return kCapturing;
  return stream->captured = new GraphOf, 0;
}
int cuStreamEndCapture(Stream stream, CapturedGraph* graph) {
  return *graph = std::exchange(stream->captured, nullptr), 0;
}
int cuGraphInstantiateWithFlags(Exec* exec, CapturedGraph graph, unsigned long long) {
  return *exec = new ExecOf{*graph}, 0;
}
int cuGraphDestroy(CapturedGraph graph) { return delete graph, 0; }
int cuGraphExecDestroy(Exec exec) { return delete exec, 0; }
int cuGraphLaunch(Exec exec, Stream stream) {
  NEEDS_CONTEXT;
  for (const Work& work : exec->work) stream->add(work);
  return 0;
}

int cuLaunchKernel(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x,
                   unsigned y, unsigned z, unsigned shared, Stream stream, void** parameters,
                   void**) {
  NEEDS_CONTEXT;
  const dim3 grid(grid_x, grid_y, grid_z), size(x, y, z);
  const void* const address = function->address;
  stream->add([=, call = function->bind(parameters)] {
    emulator::run_grid(grid, size, shared, address, call);
  });
  return 0;
}

// what tests move device arrays with
int cuMemcpyHtoD_v2(Pointer to, const void* from, size_t bytes) {
  NEEDS_CONTEXT;
  const std::lock_guard lock(mutex);
  allow(PROT_READ | PROT_WRITE);
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return allow(PROT_NONE), 0;
}
int cuMemcpyDtoH_v2(void* to, Pointer from, size_t bytes) {
  NEEDS_CONTEXT;
  const std::lock_guard lock(mutex);
  allow(PROT_READ | PROT_WRITE);
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return allow(PROT_NONE), 0;
}

}  // extern "C"

}  // namespace vitkd::int8::cuda
