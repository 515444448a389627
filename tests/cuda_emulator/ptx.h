// csrc/cuda/ptx.h for the emulator: the same functions, by PTX's definition of each instruction.
// Products on tensor cores are exact, and their sum is cut off as Hopper cuts it off: terms are
// aligned to the largest, with two bits more than a float32 has, and what is beyond falls away.
#pragma once

#include "emulator.h"

namespace vitkd {

inline int32_t dot4(uint32_t x, uint32_t w, int32_t acc) {
  for (int i = 0; i < 4; ++i) {
    acc += static_cast<uint8_t>(x >> (8 * i)) * static_cast<int8_t>(w >> (8 * i));
  }
  return acc;
}

inline void start_copy(const emulator::Copy& copy) {
  const auto bits = reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from);
  if (bits % copy.bytes != 0) emulator::fail("cp.async: an address is not aligned");
  emulator::block.late ? emulator::self->copies.push_back(copy) : copy.run();
}

template <int kBytes>
void copy_async(void* to, const void* from) {
  start_copy({static_cast<char*>(to), static_cast<const char*>(from), kBytes, kBytes});
}

inline void copy_async_padded(void* to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) emulator::fail("cp.async: its size is not 0 to 16");
  start_copy({static_cast<char*>(to), static_cast<const char*>(from), 16, bytes});
}

inline void commit() {
  auto& t = *emulator::self;
  t.groups.push_back(std::exchange(t.copies, {}));
}

template <int kLeft>
void wait_for_all_but() {
  auto& groups = emulator::self->groups;
  while (groups.size() > kLeft) {
    for (const auto& copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}

inline auto meet_at_rows(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix: a row is not aligned");
  return emulator::meet("ldmatrix", static_cast<const char*>(row));
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const auto rows = meet_at_rows(row);
  const int lane = emulator::self->lane;
  for (int m = 0; m < 4; ++m) std::memcpy(&to[m], rows[8 * m + lane / 4] + lane % 4 * 4, 4);
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  const auto rows = meet_at_rows(row);
  const int lane = emulator::self->lane;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      std::memcpy(&pair[i], rows[8 * m + lane % 4 * 2 + i] + lane / 4 * 2, 2);
    }
    std::memcpy(&to[m], pair, 4);
  }
}

// what a lane brings to a product
struct Fragments {
  uint32_t a[4], b[2];
};

// Calls add(i, x, y) for the four sums acc[i] of a lane, with the 8 words of a's row and of b's
// column that meet. As the PTX manual draws it for each of these products, lane l has words l % 4
// and l % 4
// + 4 of rows l / 4 and l / 4 + 8 of a, the same words of column l / 4 of b, and the sums of these
// rows in columns 2 (l % 4) and the next.
template <class Add>
void each_sum(const char* what, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Add&& add) {
  const auto all = emulator::meet(what, Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = emulator::self->lane;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    uint32_t x[8], y[8];
    for (int w = 0; w < 8; ++w) {
      x[w] = all[row % 8 * 4 + w % 4].a[row / 8 + w / 4 * 2];
      y[w] = all[column * 4 + w % 4].b[w / 4];
    }
    add(i, x, y);
  }
}

inline void multiply(int32_t (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  each_sum("mma u8 s8", a, b0, b1, [&](int i, const uint32_t* x, const uint32_t* y) {
    for (int w = 0; w < 8; ++w) acc[i] = dot4(x[w], y[w], acc[i]);
  });
}

// acc and the terms, aligned to the largest of them; the sum is cut off too
inline float cut_off_sum(float acc, const double* terms, int count) {
  double largest = std::fabs(acc);
  bool finite = std::isfinite(acc);
  double plain = acc;
  for (int i = 0; i < count; ++i) {
    largest = std::max(largest, std::fabs(terms[i]));
    finite = finite && std::isfinite(terms[i]);
    plain += terms[i];
  }
  if (!finite) return static_cast<float>(plain);
  if (largest == 0) return 0;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 25);
  double sum = std::trunc(acc / unit);
  for (int i = 0; i < count; ++i) sum += std::trunc(terms[i] / unit);
  sum *= unit;
  if (sum == 0) return 0;
  const double last = std::ldexp(1.0, std::max(std::ilogb(sum), -126) - 23);
  return static_cast<float>(std::trunc(sum / last) * last);
}

template <class Value>
void multiply_pairs(const char* what, float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                    uint32_t b1, Value&& value) {
  each_sum(what, a, b0, b1, [&](int i, const uint32_t* x, const uint32_t* y) {
    double terms[16];
    for (int k = 0; k < 16; ++k) {
      const int shift = k % 2 * 16;
      terms[k] = static_cast<double>(value(static_cast<uint16_t>(x[k / 2] >> shift))) *
                 value(static_cast<uint16_t>(y[k / 2] >> shift));
    }
    acc[i] = cut_off_sum(acc[i], terms, 16);
  });
}

inline void multiply_bf16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_pairs("mma bf16", acc, a, b0, b1,
                 [](uint16_t x) { return __uint_as_float(uint32_t{x} << 16); });
}

inline void multiply_f16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_pairs("mma f16", acc, a, b0, b1,
                 [](uint16_t x) { return static_cast<float>(std::bit_cast<_Float16>(x)); });
}

// a word is one tf32, of which the lower 13 bits are not looked at
inline void multiply_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  each_sum("mma tf32", a, b0, b1, [&](int i, const uint32_t* x, const uint32_t* y) {
    double terms[8];
    for (int k = 0; k < 8; ++k) {
      terms[k] =
          static_cast<double>(__uint_as_float(x[k] & ~0x1fffu)) * __uint_as_float(y[k] & ~0x1fffu);
    }
    acc[i] = cut_off_sum(acc[i], terms, 8);
  });
}

inline uint32_t round_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t pack_bf16(float low, float high) {
  return round_bf16(low) | round_bf16(high) << 16;
}

inline uint32_t pack_f16(float low, float high) {
  const auto bits = [](float x) {
    return uint32_t{std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
  };
  return bits(low) | bits(high) << 16;
}

// to nearest, ties away from 0
inline uint32_t round_tf32(float x) {
  if (!std::isfinite(x)) return __float_as_uint(x);
  return (__float_as_uint(x) + 0x1000) & ~0x1fffu;
}

// right for integers, else as wrong as PTX allows: by up to 2^-22, as the bits of x would have it
inline float exp2_approx(float x) {
  if (std::fabs(x) < 0x1p-126f) x = 0;
  float y = std::exp2(x);
  if (x != std::floor(x)) {
    const uint32_t mixed = __float_as_uint(x) * 2654435761u;
    y *= static_cast<float>(1 + (mixed / 2147483648.0 - 1) * 0x1p-22);
  }
  return y < 0x1p-126f ? 0 : y;
}

}  // namespace vitkd
