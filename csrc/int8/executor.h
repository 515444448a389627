// Runs a plan's steps: images on one thread, or each image on several.
#pragma once

#include <cstdint>
#include <vector>

#include "int8/plan.h"
#include "int8/thread_team.h"

namespace vitkd::int8 {

// A thread's memory. Threads that share an image use the first's activations and vectors.
struct Workspace {
  explicit Workspace(const Plan& plan);
  void poison() const;  // with 0xA5

  Buffer arena, rings, scratch, gemm_scratch, products, inputs, values, sums, means, middle,
      factors;
};

size_t workspace_bytes(const Plan& plan);

struct NodeTime {
  double seconds = 0;
  const char* kernel = nullptr;  // of the largest call, where there is one
  int64_t pixels = 0;            // of that call
};

// What is observed of a run, by node.
struct Observed {
  std::vector<NodeTime>* times = nullptr;
  std::vector<std::vector<uint8_t>>* activations = nullptr;  // of the last image; none in a chain
};

// images [count, image_size, image_size, 3], logits [count, classes]
void execute(const Plan& plan, const Workspace& own, const uint8_t* images, int64_t count,
             float* logits, const Observed& observed = {});
// the same on all threads of a team, of which this is one; `first` is the workspace of thread 0
void execute_together(const Plan& plan, const Workspace& first, const Workspace& own,
                      ThreadTeam& team, int thread, const uint8_t* images, int64_t count,
                      float* logits);

}  // namespace vitkd::int8
