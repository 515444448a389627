// CUDA's programming model on one CPU core, to run csrc/cuda/*.cu where there is no GPU: each
// thread of a block is a fiber with a stack of its own, and blocks run one after the other. What
// hardware leaves open differs from launch to launch: the order of threads, and when a cp.async
// arrives (at once, or as late as its wait allows), so that what needs a missing barrier comes out
// differently. Shared memory starts as NaN. A barrier or a warp's instruction that not all threads
// reach ends the process and says so, as do launches that a GPU would refuse. Which GPU it is, the
// environment says: VITKD_EMULATED_SHARED, KB of shared memory that a block may ask for (99, 163 or
// 227; on an H200 227), and VITKD_EMULATED_SMS, its multiprocessors. Not emulated: speed, caches,
// streams (all is synchronous), and threads of different blocks that run at the same time.
#pragma once

#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <typeindex>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;
constexpr int kReserved = 1 << 10;        // shared memory of each block that the GPU keeps
constexpr int kSharedDefault = 48 << 10;  // bytes of a block that does not ask for more

inline int of_environment(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}
inline const int shared_limit = of_environment("VITKD_EMULATED_SHARED", 227) << 10;
// few, so that blocks take several tiles each, and no power of 2
inline const int multiprocessors = of_environment("VITKD_EMULATED_SMS", 5);

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what.c_str());
  std::abort();
}

struct Copy {
  char* to;
  const char* from;
  int bytes, filled;  // filled: with what was there, the rest with 0
  void run() const {
    std::memcpy(to, from, filled);
    std::memset(to + filled, 0, bytes - filled);
  }
};

// What the lanes of a warp bring to an instruction that they execute together. Two of them, as a
// lane may reach the next instruction while others still read what was brought to this one.
struct Meeting {
  const char* what = nullptr;
  unsigned arrived = 0;
  alignas(16) char brought[kWarp][64];
};

struct Warp {
  Meeting meetings[2];
  int64_t generation = 0;
};

struct Thread {
  uint3 index;
  int lane = 0;
  Warp* warp = nullptr;
  bool done = false;
  const int64_t* gate = nullptr;  // runs on when this is no longer `closed`
  int64_t closed = 0;
  std::vector<Copy> copies;  // of the group that is still open
  std::vector<std::vector<Copy>> groups;
  std::unique_ptr<char[]> stack;
  void* top = nullptr;  // of its stack, while it waits
};

struct Block {
  uint3 index;
  dim3 size, grid;
  std::vector<char> dynamic;
  std::map<std::tuple<std::string, int, std::type_index>, std::vector<char>> variables;
  std::map<int64_t, int> votes;  // by the number of the barrier at which they meet
  std::vector<Warp> warps;
  int64_t barriers = 0;
  int live = 0, waiting = 0;
  bool late = false;    // copies arrive as late as they may
  bool uneven = false;  // some warps are far ahead of others
  const std::function<void()>* kernel = nullptr;
};

inline Block block;
inline std::vector<std::unique_ptr<Thread>> threads;
inline Thread* self = nullptr;
inline void* scheduler = nullptr;  // top of its stack, while a thread runs
inline std::mutex one_at_a_time;
inline std::mt19937 chance{0};
inline std::map<const void*, int> shared_limits;  // that were asked for
inline std::map<const void*, int64_t> slots;      // blocks that fit at once, as a launcher was told

// Leaves one stack for another: keeps on it what a call has to, and takes up what is kept there.
[[gnu::naked, gnu::noinline]] inline void switch_stacks(void** from, void* to) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

inline void to_scheduler() { switch_stacks(&self->top, scheduler); }

inline void wait_for(const int64_t& gate, int64_t closed) {
  self->gate = &gate;
  self->closed = closed;
  to_scheduler();
}

inline void open_barrier_if_complete() {
  if (block.live > 0 && block.waiting == block.live) {
    block.waiting = 0;
    ++block.barriers;
  }
}

inline void fiber() {
  for (;;) {
    (*block.kernel)();
    self->done = true;
    --block.live;
    open_barrier_if_complete();
    to_scheduler();
  }
}

inline void barrier() {
  const int64_t closed = block.barriers;
  ++block.waiting;
  open_barrier_if_complete();
  if (block.barriers == closed) wait_for(block.barriers, closed);
}

// All lanes of a warp bring something; returns what each brought. `what` names the instruction.
template <class T>
struct Brought {
  const Meeting* meeting;
  const T& operator[](int lane) const {
    return *reinterpret_cast<const T*>(meeting->brought[lane]);
  }
};

template <class T>
Brought<T> meet(const char* what, const T& mine) {
  static_assert(sizeof(T) <= sizeof(Meeting::brought[0]) && std::is_trivially_copyable_v<T>);
  Warp& warp = *self->warp;
  const int64_t generation = warp.generation;
  Meeting& meeting = warp.meetings[generation % 2];
  if (meeting.arrived == 0) {
    meeting.what = what;
  } else if (std::strcmp(meeting.what, what) != 0) {
    fail(std::string("lanes of a warp are at ") + meeting.what + " and at " + what);
  }
  std::memcpy(meeting.brought[self->lane], &mine, sizeof(T));
  meeting.arrived |= 1u << self->lane;
  if (meeting.arrived == 0xffffffffu) {
    warp.meetings[(generation + 1) % 2].arrived = 0;
    ++warp.generation;
  } else {
    wait_for(warp.generation, generation);
  }
  return {&meeting};
}

// Runs every thread of the block until it waits, again and again, in the given order; some warps,
// drawn by chance, wait longer.
inline void run_block(const std::vector<int>& order) {
  for (Warp& warp : block.warps) warp = {};
  for (const int i : order) {
    Thread& t = *threads[i];
    t.done = false;
    t.gate = nullptr;
    t.copies.clear();
    t.groups.clear();
  }
  block.live = static_cast<int>(order.size());
  block.waiting = 0;
  bool moved = true;
  while (block.live > 0) {
    const unsigned left_out = block.uneven && moved ? chance() : 0;
    moved = false;
    for (const int i : order) {
      self = threads[i].get();
      if (left_out >> (i / kWarp) & 1) continue;
      if (self->done || (self->gate && *self->gate == self->closed)) continue;
      self->gate = nullptr;
      moved = true;
      switch_stacks(&scheduler, self->top);
    }
    if (!moved && left_out == 0) fail("threads wait for others that have ended or wait elsewhere");
  }
}

inline void make_threads(size_t count) {
  while (threads.size() < count) {
    Thread& t = *threads.emplace_back(std::make_unique<Thread>());
    t.stack = std::make_unique_for_overwrite<char[]>(kStack);
    const auto end = reinterpret_cast<uintptr_t>(t.stack.get() + kStack) / 16 * 16;
    // as if fiber() had been called, and six registers been kept since
    auto** const top = reinterpret_cast<void**>(end) - 8;
    top[6] = reinterpret_cast<void*>(&fiber);
    t.top = top;
  }
}

// What a launch needs beside its arguments: memory, and blocks that end together.
inline void check_launch(const dim3& grid, int dynamic, const void* kernel) {
  const auto asked = shared_limits.find(kernel);
  const int limit = asked == shared_limits.end() ? kSharedDefault : asked->second;
  if (dynamic > limit) fail("more shared memory than was asked for by cudaFuncSetAttribute");
  if (const auto known = slots.find(kernel); known != slots.end()) {
    // of a grid that is cut to fit, a second round would be nearly empty
    if (grid.y > 1 && int64_t{grid.x} * grid.y * grid.z > known->second) {
      fail("more blocks than fit the GPU at once");
    }
    slots.erase(known);
  }
}

// What is known once a block has run: its static shared memory.
inline void check_static(int dynamic, const void* kernel) {
  int bytes = 0;
  for (const auto& [_, variable] : block.variables) bytes += static_cast<int>(variable.size()) - 64;
  const auto asked = shared_limits.find(kernel);
  if (asked != shared_limits.end() && bytes + asked->second > shared_limit) {
    fail("cudaFuncSetAttribute was asked for more than static shared memory leaves");
  }
  if (bytes + dynamic > (asked == shared_limits.end() ? kSharedDefault : shared_limit)) {
    fail("more shared memory, static and dynamic, than a block may have");
  }
}

inline void run_grid(const dim3& grid, const dim3& size, size_t shared, const void* kernel,
                     const std::function<void()>& call) {
  const std::lock_guard lock(one_at_a_time);
  const int count = static_cast<int>(size.x * size.y * size.z);
  if (count == 0 || count > 1024 || count % kWarp != 0)
    fail("a block is not of 32 to 1024 threads");
  if (uint64_t{grid.x} * grid.y * grid.z == 0 || grid.y > 65535) fail("a grid that CUDA refuses");
  check_launch(grid, static_cast<int>(shared), kernel);
  make_threads(count);
  block.size = size;
  block.grid = grid;
  block.kernel = &call;
  block.warps.resize(count / kWarp);
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < count; ++i) {
    const auto at = static_cast<unsigned>(i);
    threads[i]->index = {at % size.x, at / size.x % size.y, at / (size.x * size.y)};
    threads[i]->lane = i % kWarp;
    threads[i]->warp = &block.warps[i / kWarp];
  }
  uint3& at = block.index;
  for (at.z = 0; at.z < grid.z; ++at.z) {
    for (at.y = 0; at.y < grid.y; ++at.y) {
      for (at.x = 0; at.x < grid.x; ++at.x) {
        block.dynamic.assign(shared + 16, '\xff');
        block.variables.clear();
        block.votes.clear();
        block.late = chance() % 2;
        block.uneven = chance() % 2;
        const unsigned kind = chance() % 3;
        if (kind == 0) std::sort(order.begin(), order.end());
        if (kind == 1) std::sort(order.begin(), order.end(), std::greater{});
        if (kind == 2) std::shuffle(order.begin(), order.end(), chance);
        run_block(order);
        check_static(static_cast<int>(shared), kernel);
      }
    }
  }
}

// kernel<<<grid, size, shared, stream>>>(arguments...) is written launch(kernel, grid, ...)(...)
template <class... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared, const void*) {
  return [=](Parameters... arguments) {
    run_grid(grid, size, shared, reinterpret_cast<const void*>(kernel),
             [&] { kernel(arguments...); });
  };
}

// __shared__ T name is written auto& name = shared_variable<T>(file, a number of its own there)
template <class T>
T& shared_variable(const char* file, int number) {
  std::vector<char>& bytes = block.variables[{file, number, typeid(T)}];
  if (bytes.empty()) bytes.assign(sizeof(T) + 64, '\xff');
  const auto address = reinterpret_cast<uintptr_t>(bytes.data());
  return *reinterpret_cast<T*>((address + 63) / 64 * 64);
}

// extern __shared__ T name[] is written T* name = dynamic_shared<T>()
template <class T>
T* dynamic_shared() {
  const auto address = reinterpret_cast<uintptr_t>(block.dynamic.data());
  return reinterpret_cast<T*>((address + 15) / 16 * 16);
}

}  // namespace emulator

#define threadIdx (emulator::self->index)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.size)
#define gridDim (emulator::block.grid)

// the runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

#undef STD_CUDA_CHECK
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_CHECK(x) static_cast<void>(x)
#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)

inline int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? emulator::multiprocessors
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin
               ? emulator::shared_limit
               : emulator::shared_limit + emulator::kReserved;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulator::shared_limit) emulator::fail("more shared memory than a block may have");
  const std::lock_guard lock(emulator::one_at_a_time);
  int& asked = emulator::shared_limits[reinterpret_cast<const void*>(kernel)];
  // another thread, which asked for more, may be about to launch
  if (bytes < asked) emulator::fail("cudaFuncSetAttribute lowers what was asked for");
  asked = bytes;
  return cudaSuccess;
}
// As many as shared memory and threads leave room for, or fewer, as registers may have it.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int threads,
                                                          size_t dynamic) {
  const std::lock_guard lock(emulator::one_at_a_time);
  const int room = (emulator::shared_limit + emulator::kReserved) /
                   (static_cast<int>(dynamic) + emulator::kReserved);
  const int most = std::min(room, 1536 / threads);
  *blocks = 1 + static_cast<int>(emulator::chance() % std::max(most, 1));
  emulator::slots[reinterpret_cast<const void*>(kernel)] =
      int64_t{*blocks} * emulator::multiprocessors;
  return cudaSuccess;
}

// the built-in types and functions that kernels use

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

inline void __syncthreads() { emulator::barrier(); }
inline int __syncthreads_or(int x) {
  int& all = emulator::block.votes[emulator::block.barriers];
  all |= x != 0;
  emulator::barrier();
  return all;
}
inline unsigned atomicOr(unsigned* to, unsigned bits) { return std::exchange(*to, *to | bits); }
inline void __syncwarp() { emulator::meet("__syncwarp", 0); }

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulator::meet("__shfl_sync", x)[lane];
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::meet("__shfl_xor_sync", x)[emulator::self->lane ^ mask];
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const auto all = emulator::meet("__ballot_sync", x);
  unsigned bits = 0;
  for (int i = 0; i < emulator::kWarp; ++i) bits |= unsigned{all[i]} << i;
  return bits;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, const T& x) {
  *p = x;
}

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

// never fused, though this is compiled as nvcc does, with fused multiply-adds
template <class T>
[[gnu::noinline]] T emulated_product(T a, T b) {
  return a * b;
}
inline float __fmul_rn(float a, float b) { return emulated_product(a, b); }
inline double __dmul_rn(double a, double b) { return emulated_product(a, b); }
[[gnu::noinline]] inline float __fadd_rn(float a, float b) { return a + b; }
[[gnu::noinline]] inline float __fsub_rn(float a, float b) { return a - b; }

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> (4 * i) & 7;
    result |= static_cast<unsigned>(bytes >> (8 * which) & 255) << (8 * i);
  }
  return result;
}
