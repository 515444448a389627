// A plan, ready to run from any number of threads at once.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "int8/plan.h"

namespace vitkd::int8 {

struct NodeProfile {
  const Layer* layer;
  const char* kernel;
  int step;        // nodes of one step make a chain
  double seconds;  // for all images
};

// The instruction set of that name, the best for none; throws std::invalid_argument.
Isa isa_of(const std::string& wanted);

class Session {
 public:
  // throws GraphError, and std::invalid_argument for threads; borrows nothing, and calls
  // `arrays_read` when it needs no array of the graph any more
  Session(const Graph& graph, const Options& options,
          const std::function<void()>& arrays_read = {});
  ~Session();

  const Plan& plan() const { return plan_; }
  int classes() const { return plan_.layers.back().out.channels; }
  size_t run_bytes() const;  // that each of the calls at one time needs
  // images [count, image_size, image_size, 3], logits [count, classes]. An image is RGB of 8 bits,
  // not normalised, as int8/prepare.h resizes and crops it and vitkd_fast/images.py opens it:
  // upright by its EXIF orientation, 16 bits divided by 257, alpha dropped
  void run(const uint8_t* images, int64_t count, float* logits);
  // the same on one thread, timed node by node
  std::vector<NodeProfile> profile(const uint8_t* images, int64_t count, float* logits);
  // every node's output [height, width, channels] for one image; none inside a chain
  std::vector<std::vector<uint8_t>> activations(const uint8_t* image);

 private:
  struct Caller;
  class Lease;

  const Plan plan_;
  std::vector<std::unique_ptr<Caller>> idle_;
  size_t callers_ = 0;
  int generation_;  // of the process: a fork has its parent's memory, but not its threads
};

}  // namespace vitkd::int8
