// From an RGB image of any size to the pixels that a session reads, as vitkd_fast/images.py has
// them: the short side is resized to floor(image_size / crop_pct), the long one in proportion,
// rounded down, and the centre is kept; what is smaller than image_size gets a black border.
//
// The resize is Pillow 12.3's, byte by byte: antialiased, weights of 22 bits computed in double
// from the geometry of the whole image, first along rows, then along columns, rounded to 8 bits
// after each. All sums are of integers, so every instruction set gives the same bytes; only the
// rows and columns that the crop keeps are computed. So is a box of an image, for training.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "simd/isa.h"

namespace vitkd::int8 {

enum class Interpolation { nearest, box, bilinear, hamming, bicubic, lanczos };
// as files spell them
inline constexpr std::array kInterpolations{"nearest", "box",     "bilinear",
                                            "hamming", "bicubic", "lanczos"};

struct Preprocessing {
  int image_size = 0;   // the side of the result
  double crop_pct = 1;  // 0.1 to 2
  Interpolation interpolation = Interpolation::bicubic;
};

// Of an image, in pixels.
struct Box {
  int64_t top, left, height, width;
  bool flip;  // left and right change places
};

// Of its name; throws std::invalid_argument, which names those there are.
Interpolation interpolation_of(const std::string& name);

// source [height, width, 3]: RGB of 8 bits, its rows `stride` bytes apart (negative: bottom up);
// bytes between them may be read, none behind the last. destination [image_size, image_size, 3],
// without gaps, apart from source. Any number of threads may call it at once; what it allocates, it
// frees.
// Throws std::invalid_argument, which names what was expected and what was given: sides of 1 to
// 2^24, a preprocessing in its bounds with image_size >= crop_pct.
void prepare(const uint8_t* source, int64_t height, int64_t width, int64_t stride,
             const Preprocessing& preprocessing, Isa isa, uint8_t* destination);

// A box of an image, resized to destination [out_height, out_width, 3] as if it were all of it:
// Pillow's crop and resize. Otherwise as `prepare`; throws std::invalid_argument for a box that is
// not inside.
void crop(const uint8_t* source, int64_t height, int64_t width, int64_t stride, const Box& box,
          int out_height, int out_width, Interpolation interpolation, Isa isa,
          uint8_t* destination);

}  // namespace vitkd::int8
