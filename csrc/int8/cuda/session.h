// A graph on a GPU: constants and activations there, and a CUDA graph for each batch size.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "int8/cuda/driver.h"
#include "int8/cuda/plan.h"

namespace vitkd::int8::cuda {

// Memory of a device.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const Device& device, size_t bytes);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;

  Pointer at() const { return at_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(at_);
  }

 private:
  const Device* device_ = nullptr;
  Pointer at_ = 0;
};

struct LaunchProfile {
  int layer;
  const char* kernel;
  double seconds;
};

class Session {
 public:
  // throws GraphError and CudaError; borrows nothing
  Session(const Graph& graph, int image_size, int ordinal);
  ~Session();

  const Plan& plan() const { return plan_; }
  const Device& device() const { return device_; }

  // images [count, image_size, image_size, 3] and logits [count, classes], each on the host or the
  // device; what a stream of the caller's has yet to do to them, where there is one, is waited for.
  // The logits are there when this returns. Calls take turns.
  struct Where {
    bool on_device = false;
    Stream after = nullptr;
  };
  void run(const void* images, Where from, int64_t count, void* logits, Where to);
  // the same from host to host, kernel by kernel
  std::vector<LaunchProfile> profile(const uint8_t* images, int64_t count, float* logits);
  // every node's output for one image, pixels of round_up(channels, 16) bytes; none of the logits
  std::vector<std::vector<uint8_t>> activations(const uint8_t* image);
  // the stream of its work, for those who hand data over
  Stream stream() const { return stream_; }

 private:
  void reserve(int batch);
  std::vector<Launch> launches(int batch) const;
  void launch(const Launch& launch) const;
  Exec captured(int batch);
  void wait_for(Stream other) const;
  void check_device(const char* what, const void* array) const;
  size_t image_bytes() const;
  size_t logit_bytes() const { return sizeof(float) * plan_.classes(); }

  const Plan plan_;
  const Device device_;
  std::vector<Function> functions_;  // by Kernel
  Stream stream_ = nullptr;
  int most_ = 1;  // images at once
  DeviceMemory constants_, images_, arena_, logits_;
  int reserved_ = 0;           // images that there is memory for
  std::map<int, Exec> execs_;  // by batch
  std::mutex one_at_a_time_;
};

}  // namespace vitkd::int8::cuda
