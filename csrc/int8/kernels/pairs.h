// Products by vpmaddubsw: packing, and what comes before the multiplication.
#pragma once

#include "int8/kernels/kernels.h"

namespace vitkd::int8 {

// weights [steps][16 lanes][4] of each panel in its own order, behind its constants and shuffles,
// for tiles of `rows` pixels
void pack_pairs(const ConvSpec& spec, int64_t pixel, LaneOrder lanes, int rows, Packed* packed);

// Puts pixels into the orders of the panels, in call.scratch, and multiplies them.
using Multiply = void (*)(const Packed&, const GemmCall&);
void multiply_in_order(const Packed& packed, const GemmCall& call, Multiply multiply);

}  // namespace vitkd::int8
