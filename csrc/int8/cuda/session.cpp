#include "int8/cuda/session.h"

#include <algorithm>
#include <string>

namespace vitkd::int8::cuda {
namespace {

constexpr int64_t kMostArena = int64_t{1} << 30;  // bytes of the activations of a batch
constexpr int64_t kMostImages = 1024;             // of a batch
constexpr size_t kMostGraphs = 64;

}  // namespace

DeviceMemory::DeviceMemory(const Device& device, size_t bytes) : device_(&device) {
  const std::string what = "cuMemAlloc of " + std::to_string(bytes) + " bytes";
  device.driver.check(device.driver.allocate(&at_, std::max<size_t>(bytes, 1)), what.c_str());
}

DeviceMemory::~DeviceMemory() {
  if (at_ != 0) device_->driver.free(at_);
}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(at_, other.at_);
  return *this;
}

Session::Session(const Graph& graph, int image_size, int ordinal)
    : plan_(graph, image_size), device_(ordinal) {
  const Driver& driver = device_.driver;
  const Device::Current current(device_);
  for (const char* name : kKernelNames) {
    Function& function = functions_.emplace_back();
    driver.check(driver.get_function(&function, device_.module, name), name);
  }
  most_ = static_cast<int>(
      std::clamp<int64_t>(kMostArena / static_cast<int64_t>(plan_.arena + 1), 1, kMostImages));
  constants_ = DeviceMemory(device_, plan_.constants.size());
  // not apart from the legacy default stream, on which callers may have left work
  driver.check(driver.create_stream(&stream_, 0), "cuStreamCreate");
  driver.check(
      driver.to_device(constants_.at(), plan_.constants.data(), plan_.constants.size(), stream_),
      "cuMemcpyHtoD of the weights");
  driver.check(driver.synchronize(stream_), "cuStreamSynchronize");
}

Session::~Session() {
  const Driver& driver = device_.driver;
  Context popped;
  if (driver.push_context(device_.context) != 0) return;  // the driver is gone, at the end
  for (auto& [_, exec] : execs_) driver.destroy_exec(exec);
  for (DeviceMemory* memory : {&constants_, &images_, &arena_, &logits_}) *memory = {};
  driver.destroy_stream(stream_);
  driver.pop_context(&popped);
}

size_t Session::image_bytes() const { return size_t{3} * plan_.image_size * plan_.image_size; }

// Memory for a batch; graphs hold its addresses, so that more memory makes them anew.
void Session::reserve(int batch) {
  if (batch <= reserved_ && execs_.size() < kMostGraphs) return;
  for (auto& [_, exec] : execs_) device_.driver.destroy_exec(exec);
  execs_.clear();
  if (batch <= reserved_) return;
  reserved_ = 0;
  for (DeviceMemory* memory : {&images_, &arena_, &logits_}) *memory = {};
  images_ = DeviceMemory(device_, image_bytes() * batch);
  arena_ = DeviceMemory(device_, plan_.arena * batch);
  logits_ = DeviceMemory(device_, logit_bytes() * batch);
  reserved_ = batch;
}

std::vector<Launch> Session::launches(int batch) const {
  const Driver& driver = device_.driver;
  const auto blocks_at_once = [&](Kernel kernel, int threads, int shared) {
    int blocks = 0;
    const Function function = functions_[static_cast<int>(kernel)];
    driver.check(driver.blocks_at_once(&blocks, function, threads, shared),
                 "cuOccupancyMaxActiveBlocksPerMultiprocessor");
    return std::max(blocks, 1);
  };
  return plan_.launches(
      batch,
      {constants_.as<uint8_t>(), images_.as<uint8_t>(), arena_.as<uint8_t>(), logits_.as<float>()},
      {device_.multiprocessors, blocks_at_once});
}

void Session::launch(const Launch& l) const {
  std::visit(
      [&](auto call) {
        void* parameters[] = {&call};
        const int kernel = static_cast<int>(l.kernel);
        const int error =
            device_.driver.launch(functions_[kernel], l.grid_x, l.grid_y, 1, l.threads, 1, 1,
                                  l.shared, stream_, parameters, nullptr);
        device_.driver.check(error, kKernelNames[kernel]);
      },
      l.call);
}

Exec Session::captured(int batch) {
  if (const auto known = execs_.find(batch); known != execs_.end()) return known->second;
  const Driver& driver = device_.driver;
  const std::vector<Launch> all = launches(batch);
  CapturedGraph graph = nullptr;
  Exec exec = nullptr;
  driver.check(driver.begin_capture(stream_, kRelaxedCapture), "cuStreamBeginCapture");
  try {
    for (const Launch& l : all) launch(l);
  } catch (...) {
    driver.end_capture(stream_, &graph);
    if (graph) driver.destroy_graph(graph);
    throw;
  }
  driver.check(driver.end_capture(stream_, &graph), "cuStreamEndCapture");
  const int error = driver.instantiate(&exec, graph, 0);
  driver.destroy_graph(graph);
  driver.check(error, "cuGraphInstantiate");
  return execs_[batch] = exec;
}

void Session::wait_for(Stream other) const {
  if (other == nullptr) return;
  const Driver& driver = device_.driver;
  Event event;
  driver.check(driver.create_event(&event, kEventWithoutTime), "cuEventCreate");
  const int recorded = driver.record_event(event, other);
  const int waited = recorded == 0 ? driver.wait_event(stream_, event, 0) : recorded;
  driver.destroy_event(event);
  driver.check(waited, "cuStreamWaitEvent");
}

void Session::check_device(const char* what, const void* array) const {
  int ordinal = 0;
  const auto at = reinterpret_cast<Pointer>(array);
  device_.driver.check(device_.driver.pointer_attribute(&ordinal, kPointerDevice, at), what);
  if (ordinal != device_.ordinal) {
    throw CudaError(std::string(what) + ": on CUDA device " + std::to_string(ordinal) +
                    ", the session on " + std::to_string(device_.ordinal));
  }
}

void Session::run(const void* images, Where from, int64_t count, void* logits, Where to) {
  const std::lock_guard lock(one_at_a_time_);
  const Driver& driver = device_.driver;
  const Device::Current current(device_);
  if (from.on_device && count > 0) check_device("images", images);
  if (to.on_device && count > 0) check_device("out", logits);
  wait_for(from.after);
  wait_for(to.after);
  const auto* image = static_cast<const uint8_t*>(images);
  auto* result = static_cast<uint8_t*>(logits);
  while (count > 0) {
    const int batch = static_cast<int>(std::min<int64_t>(most_, count));
    const size_t in = batch * image_bytes(), out = batch * logit_bytes();
    reserve(batch);
    const Exec exec = captured(batch);
    driver.check(from.on_device
                     ? driver.on_device(images_.at(), reinterpret_cast<Pointer>(image), in, stream_)
                     : driver.to_device(images_.at(), image, in, stream_),
                 "copying images");
    driver.check(driver.launch_graph(exec, stream_), "cuGraphLaunch");
    driver.check(to.on_device ? driver.on_device(reinterpret_cast<Pointer>(result), logits_.at(),
                                                 out, stream_)
                              : driver.to_host(result, logits_.at(), out, stream_),
                 "copying logits");
    image += in, result += out, count -= batch;
  }
  driver.check(driver.synchronize(stream_), "cuStreamSynchronize");
}

std::vector<LaunchProfile> Session::profile(const uint8_t* images, int64_t count, float* logits) {
  const std::lock_guard lock(one_at_a_time_);
  const Driver& driver = device_.driver;
  const Device::Current current(device_);
  const int batch = static_cast<int>(std::min<int64_t>(most_, count));
  reserve(batch);
  const std::vector<Launch> all = launches(batch);
  std::vector<Event> events(all.size() + 1);
  for (Event& event : events) driver.check(driver.create_event(&event, 0), "cuEventCreate");
  driver.check(driver.to_device(images_.at(), images, batch * image_bytes(), stream_), "copying");
  for (size_t i = 0; i < all.size(); ++i) {
    driver.check(driver.record_event(events[i], stream_), "cuEventRecord");
    launch(all[i]);
  }
  driver.check(driver.record_event(events.back(), stream_), "cuEventRecord");
  driver.check(driver.to_host(logits, logits_.at(), batch * logit_bytes(), stream_), "copying");
  driver.check(driver.synchronize(stream_), "cuStreamSynchronize");
  std::vector<LaunchProfile> profile;
  for (size_t i = 0; i < all.size(); ++i) {
    float milliseconds = 0;
    driver.check(driver.elapsed(&milliseconds, events[i], events[i + 1]), "cuEventElapsedTime");
    profile.push_back(
        {all[i].layer, kKernelNames[static_cast<int>(all[i].kernel)], milliseconds / 1e3 / batch});
  }
  for (Event event : events) driver.destroy_event(event);
  return profile;
}

std::vector<std::vector<uint8_t>> Session::activations(const uint8_t* image) {
  const std::lock_guard lock(one_at_a_time_);
  const Driver& driver = device_.driver;
  const Device::Current current(device_);
  reserve(1);
  driver.check(driver.to_device(images_.at(), image, image_bytes(), stream_), "copying images");
  std::vector<std::vector<uint8_t>> activations(plan_.layers.size());
  for (const Launch& l : launches(1)) {
    launch(l);
    const Layer& layer = plan_.layers[l.layer];
    if (layer.node.op == Op::classifier) continue;
    std::vector<uint8_t>& kept = activations[l.layer];
    kept.resize(layer.out.pixels() * layer.pixel);
    driver.check(driver.to_host(kept.data(), arena_.at() + layer.offset, kept.size(), stream_),
                 "copying an activation");
    driver.check(driver.synchronize(stream_), "cuStreamSynchronize");
  }
  return activations;
}

}  // namespace vitkd::int8::cuda
