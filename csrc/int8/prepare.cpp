#include "int8/prepare.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "int8/float_state.h"
#include "int8/prepare_kernels.h"

namespace vitkd::int8 {
namespace {

constexpr int64_t kMostSide = 1 << 24;
constexpr double kPi = 3.14159265358979323846;

// sin(pi x) by its series: the C library's differs between CPUs
double sine(double x) {
  const double whole = std::floor(x + 0.5), t = kPi * (x - whole);
  double sum = 0;
  for (int i = 22; i > 0; i -= 2) sum = 1 - sum * t * t / (i * (i + 1));
  sum *= t;
  return std::fmod(whole, 2) == 0 ? sum : -sum;
}

double sinc(double x) { return x == 0 ? 1 : sine(x) / (kPi * x); }

// Of a result's neighbour, x pixels away.
double weight(Interpolation interpolation, double x) {
  const double d = std::abs(x);
  switch (interpolation) {
    case Interpolation::box:
      return x > -0.5 && x <= 0.5 ? 1 : 0;
    case Interpolation::bilinear:
      return d < 1 ? 1 - d : 0;
    case Interpolation::hamming:
      return d < 1 ? sinc(d) * (0.54F + 0.46F * sine(d + 0.5)) : 0;
    case Interpolation::bicubic:  // Keys, a = -0.5
      if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
      return d < 2 ? (((d - 5) * d + 8) * d - 4) * -0.5 : 0;
    case Interpolation::lanczos:
      return x >= -3 && x < 3 ? sinc(d) * sinc(d / 3) : 0;
    case Interpolation::nearest:
      break;
  }
  return 1;
}

double radius(Interpolation interpolation) {
  switch (interpolation) {
    case Interpolation::bilinear:
    case Interpolation::hamming:
      return 1;
    case Interpolation::bicubic:
      return 2;
    case Interpolation::lanczos:
      return 3;
    default:
      return 0.5;
  }
}

// Where the results that are kept lie, of an axis.
struct Axis {
  Axis(int64_t source, int64_t resized, int image_size) : source(source), resized(resized) {
    const int64_t excess = resized - image_size, half = std::abs(excess) / 2;
    if (excess < 0) {
      border = half;
    } else {
      begin = half + (excess % 2 != 0 && half % 2 != 0);  // of two middles the even one
    }
    kept = static_cast<int>(std::min<int64_t>(resized, image_size));
  }

  int64_t source, resized;
  int64_t begin = 0;   // the first of `resized` that is kept
  int64_t border = 0;  // black before it
  int kept;
};

Weights nearest(const Axis& axis) {
  Weights weights;
  weights.taps = 4;
  weights.values.assign(int64_t{axis.kept} * weights.taps, 0);
  const double scale = static_cast<double>(axis.source) / static_cast<double>(axis.resized);
  double position = scale * 0.5;  // added up, as Pillow does
  for (int64_t i = 0; i < axis.begin; ++i) position += scale;
  for (int i = 0; i < axis.kept; ++i, position += scale) {
    weights.windows.push_back({std::min(static_cast<int64_t>(position), axis.source - 1), 1});
    weights.values[int64_t{i} * weights.taps] = 1 << kWeightBits;
  }
  return weights;
}

Weights weigh(const Axis& axis, Interpolation interpolation) {
  if (interpolation == Interpolation::nearest) return nearest(axis);
  const double scale = static_cast<double>(axis.source) / static_cast<double>(axis.resized);
  const double stretch = std::max(scale, 1.0), reach = radius(interpolation) * stretch;
  Weights weights;
  weights.taps = (static_cast<int>(std::ceil(reach)) * 2 + 1 + 3) / 4 * 4;
  weights.values.assign(int64_t{axis.kept} * weights.taps, 0);
  std::vector<double> shares(weights.taps);
  for (int i = 0; i < axis.kept; ++i) {
    const double centre = (static_cast<double>(axis.begin + i) + 0.5) * scale;
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(centre - reach + 0.5), 0);
    const int64_t end = std::min(static_cast<int64_t>(centre + reach + 0.5), axis.source);
    const int count = static_cast<int>(end - first);
    double sum = 0;
    for (int k = 0; k < count; ++k) {
      const double from_centre = static_cast<double>(k + first) - centre + 0.5;
      sum += shares[k] = weight(interpolation, from_centre * (1 / stretch));
    }
    for (int k = 0; k < count; ++k) {
      const double share = sum == 0 ? shares[k] : shares[k] / sum;
      const double scaled = share * (1 << kWeightBits);
      weights.values[int64_t{i} * weights.taps + k] =
          static_cast<int32_t>(scaled + (scaled < 0 ? -0.5 : 0.5));
    }
    weights.windows.push_back({first, count});
  }
  return weights;
}

// Results from the last to the first.
void mirror(Weights& weights) {
  std::reverse(weights.windows.begin(), weights.windows.end());
  const int64_t results = weights.results(), taps = weights.taps;
  for (int64_t i = 0; i < results / 2; ++i) {
    std::swap_ranges(weights.values.begin() + i * taps, weights.values.begin() + (i + 1) * taps,
                     weights.values.begin() + (results - 1 - i) * taps);
  }
}

uint8_t rounded(uint32_t sum) {
  const int32_t value = static_cast<int32_t>(sum + (1u << (kWeightBits - 1))) >> kWeightBits;
  return static_cast<uint8_t>(std::clamp(value, 0, 255));
}

void along_rows(const uint8_t* const* rows, const Weights& columns, uint8_t* const* out) {
  for (int row = 0; row < kRows; ++row) {
    for (int x = 0; x < columns.results(); ++x) {
      const auto [first, count] = columns.windows[x];
      const uint8_t* pixel = rows[row] + 3 * first;
      const int32_t* weights = columns.of(x);
      uint32_t sums[3] = {};
      for (int k = 0; k < count; ++k) {
        for (int c = 0; c < 3; ++c) sums[c] += static_cast<uint32_t>(weights[k]) * pixel[3 * k + c];
      }
      for (int c = 0; c < 3; ++c) out[row][3 * x + c] = rounded(sums[c]);
    }
  }
}

void along_columns(const uint8_t* const* rows, const int32_t* weights, int taps, int bytes,
                   uint8_t* out) {
  constexpr int kBlock = 64;
  for (int from = 0; from < bytes; from += kBlock) {
    uint32_t sums[kBlock] = {};
    for (int k = 0; k < taps; ++k) {
      const uint8_t* row = rows[k] + from;
      for (int i = 0; i < kBlock; ++i) sums[i] += static_cast<uint32_t>(weights[k]) * row[i];
    }
    for (int i = 0; i < std::min(kBlock, bytes - from); ++i) out[from + i] = rounded(sums[i]);
  }
}

const Passes& passes(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::avx2:
    case Isa::avxvnni:
    case Isa::avx512:
    case Isa::avx512vnni:
    case Isa::amx:
      return kAvx2Passes;
    default:
      return kScalarPasses;
  }
#elif defined(__aarch64__)
  return isa == Isa::scalar ? kScalarPasses : kNeonPasses;
#else
  return kScalarPasses;
#endif
}

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void check(int64_t height, int64_t width, int64_t stride) {
  if (std::min(height, width) < 1 || std::max(height, width) > kMostSide) {
    fail("height and width: expected 1 to " + std::to_string(kMostSide) + ", got " +
         std::to_string(height) + " and " + std::to_string(width));
  }
  if (std::abs(stride) < 3 * width && height > 1) {
    fail("stride: expected a row's bytes, " + std::to_string(3 * width) + ", or more, got " +
         std::to_string(stride));
  }
}

void check(const Preprocessing& wanted) {
  if (!(wanted.crop_pct >= 0.1 && wanted.crop_pct <= 2)) {
    fail("crop_pct: expected 0.1 to 2, got " + std::to_string(wanted.crop_pct));
  }
  if (wanted.image_size < wanted.crop_pct || wanted.image_size > kMostSide) {
    fail("image_size: expected crop_pct to " + std::to_string(kMostSide) + ", got " +
         std::to_string(wanted.image_size));
  }
}

// The results of both axes, rows first, in rows of `row` pixels.
void resize(const uint8_t* source, int64_t stride, const Axis& down, const Axis& across,
            Interpolation interpolation, bool flip, int64_t row, Isa isa, uint8_t* destination) {
  const int64_t height = down.source, width = across.source;
  const Weights rows = weigh(down, interpolation);
  Weights columns = weigh(across, interpolation);
  if (flip) mirror(columns);
  const Passes& pass = passes(isa);

  // results of the pass along rows, as many as one along columns needs
  const int bytes = 3 * across.kept, ring_stride = bytes + 64, ring_rows = rows.taps + kRows;
  std::vector<uint8_t> ring(int64_t{ring_rows} * ring_stride);
  const auto slot = [&](int64_t row) { return ring.data() + row % ring_rows * ring_stride; };
  // a copy of the row that lies last in memory, behind which nothing may be read, or of short rows
  const int64_t padded = 3 * width + kSlack, last = stride < 0 ? 0 : height - 1;
  const bool is_short = 3 * width < kSlack;
  std::vector<uint8_t> copies(kRows * padded);
  int64_t done = 0;
  const auto more_rows = [&](int64_t end) {
    const uint8_t* from[kRows];
    uint8_t* to[kRows];
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = std::min(done + i, end - 1);
      from[i] = source + row * stride;
      if (row == last || is_short) {
        from[i] = static_cast<uint8_t*>(
            std::memcpy(copies.data() + i * padded, from[i], static_cast<size_t>(3 * width)));
      }
      to[i] = slot(done + i);
    }
    pass.along_rows(from, columns, to);
    done += kRows;
  };

  std::vector<const uint8_t*> window(rows.taps);
  const int64_t end = rows.windows.back().first + rows.windows.back().count;
  for (int y = 0; y < down.kept; ++y) {
    const auto [first, count] = rows.windows[y];
    for (done = std::max(done, first); done < first + count;) more_rows(end);
    for (int k = 0; k < rows.taps; ++k) window[k] = slot(first + std::min(k, count - 1));
    pass.along_columns(window.data(), rows.of(y), (count + 1) / 2 * 2, bytes,
                       destination + ((down.border + y) * row + across.border) * 3);
  }
}

}  // namespace

const Passes kScalarPasses{along_rows, along_columns};

Interpolation interpolation_of(const std::string& name) {
  std::string accepted;
  for (size_t i = 0; i < kInterpolations.size(); ++i) {
    if (name == kInterpolations[i]) return static_cast<Interpolation>(i);
    accepted += kInterpolations[i] + std::string(", ");
  }
  throw std::invalid_argument("interpolation: expected one of " + accepted + "got " + name);
}

void prepare(const uint8_t* source, int64_t height, int64_t width, int64_t stride,
             const Preprocessing& wanted, Isa isa, uint8_t* destination) {
  check(height, width, stride);
  check(wanted);
  const FloatState state;
  const int size = wanted.image_size;
  const auto side = static_cast<int64_t>(std::floor(size / wanted.crop_pct));
  const int64_t longer = side * std::max(height, width) / std::min(height, width);
  const Axis down(height, height < width ? side : longer, size);
  const Axis across(width, height < width ? longer : side, size);
  if (down.kept < size || across.kept < size) {
    std::memset(destination, 0, static_cast<size_t>(size) * size * 3);
  }
  resize(source, stride, down, across, wanted.interpolation, false, size, isa, destination);
}

void crop(const uint8_t* source, int64_t height, int64_t width, int64_t stride, const Box& box,
          int out_height, int out_width, Interpolation interpolation, Isa isa,
          uint8_t* destination) {
  check(height, width, stride);
  if (std::min(out_height, out_width) < 1 || std::max(out_height, out_width) > kMostSide) {
    fail("out: expected sides of 1 to " + std::to_string(kMostSide) + ", got " +
         std::to_string(out_height) + " and " + std::to_string(out_width));
  }
  if (box.top < 0 || box.left < 0 || box.height < 1 || box.width < 1 ||
      box.height > height - box.top || box.width > width - box.left) {
    fail("box: expected top, left, height and width within [" + std::to_string(height) + ", " +
         std::to_string(width) + "], got " + std::to_string(box.top) + ", " +
         std::to_string(box.left) + ", " + std::to_string(box.height) + " and " +
         std::to_string(box.width));
  }
  const FloatState state;
  const Axis down(box.height, out_height, out_height), across(box.width, out_width, out_width);
  resize(source + box.top * stride + 3 * box.left, stride, down, across, interpolation, box.flip,
         out_width, isa, destination);
}

}  // namespace vitkd::int8
