// The reader of int8 files (docs/int8-format.md): safetensors with a JSON document of ours.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "int8/graph.h"
#include "int8/prepare.h"

namespace vitkd::int8 {

// What a file holds: the graph, and how images are prepared for it.
struct Model {
  Graph graph;
  std::array<double, 3> mean, std;  // of pixels in [0, 1]
  double crop_pct = 1;
  Interpolation interpolation = Interpolation::bilinear;
  std::vector<std::string> classes;  // UTF-8; none, or one for each logit
  bool multilabel = false;           // classes are not exclusive: a sigmoid of each logit
  double temperature = 1;            // what logits are divided by before they become probabilities
};

// Checks all of it, its graph by `check`. Arrays are borrowed from `file`, which is aligned to 8
// bytes; what is allocated is a few times the header's size at most, whatever the file claims.
// Throws GraphError, which says what was expected and what was given.
Model read(std::span<const uint8_t> file);

}  // namespace vitkd::int8
