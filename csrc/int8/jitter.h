// Brightness, contrast and saturation for training, as Pillow's ImageEnhance has them, byte by
// byte.
#pragma once

#include <array>
#include <cstdint>

#include "simd/isa.h"

namespace vitkd::int8 {

// In the order of `factors`.
enum class Enhancement : uint8_t { brightness, contrast, saturation };

// image [pixels, 3], in place: each enhancement once, in this order, by its factor (1: as it is).
void jitter(uint8_t* image, int64_t pixels, const std::array<float, 3>& factors,
            const std::array<Enhancement, 3>& order, Isa isa);

}  // namespace vitkd::int8
