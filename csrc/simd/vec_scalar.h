// vitkd::scalar::Vec, see simd/vec.h: loops that a compiler makes vectors of, whatever it has.
#pragma once

#include "simd/vec_constants.h"

namespace vitkd::scalar {

struct Vec {
  static constexpr int kLanes = 8;
  struct Mask {
    bool v[kLanes];
  };
  float v[kLanes];

  Vec() = default;
  explicit Vec(float x) {
    for (float& lane : v) lane = x;
  }
  template <class F>
  static Vec of(F&& lane) {
    Vec y;
    for (int i = 0; i < kLanes; ++i) y.v[i] = lane(i);
    return y;
  }

  static Vec load(const float* p) {
    return of([&](int i) { return p[i]; });
  }
  static Vec load(const Bfloat16* p) {
    return of([&](int i) { return std::bit_cast<float>(uint32_t{p[i].bits} << 16); });
  }
  static Vec load(const Half* p) {
    return of([&](int i) { return static_cast<float>(std::bit_cast<_Float16>(p[i].bits)); });
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  void store(Half* p) const {
    for (int i = 0; i < kLanes; ++i) {
      p[i].bits = std::bit_cast<uint16_t>(static_cast<_Float16>(v[i]));
    }
  }
  void store(Bfloat16* p) const {
    for (int i = 0; i < kLanes; ++i) {
      const auto bits = std::bit_cast<uint32_t>(v[i]);
      const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      p[i].bits = static_cast<uint16_t>(v[i] == v[i] ? rounded : 0x7fc0);
    }
  }
};

inline Vec operator+(Vec a, Vec b) {
  return Vec::of([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return Vec::of([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return Vec::of([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return Vec::of([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // quicker than a call, rounded twice
inline Vec max(Vec a, Vec b) {
  return Vec::of([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec::Mask not_equal(Vec a, Vec b) {
  Vec::Mask m;
  for (int i = 0; i < Vec::kLanes; ++i) m.v[i] = a.v[i] != b.v[i];
  return m;
}
inline Vec select(Vec::Mask m, Vec a, Vec b) {
  return Vec::of([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
}
inline float reduce_add(Vec a) {
  float sum = 0;
  for (const float lane : a.v) sum += lane;
  return sum;
}
inline float reduce_max(Vec a) {
  float most = a.v[0];
  for (const float lane : a.v) most = lane > most ? lane : most;
  return most;
}
inline Vec exp(Vec x) {
  return Vec::of([&](int i) { return x.v[i] < kExpLowest ? 0.0f : std::exp(x.v[i]); });
}
inline Vec exp2(Vec x) {
  return Vec::of([&](int i) { return x.v[i] < -126.0f ? 0.0f : std::exp2(x.v[i]); });
}
inline Vec log(Vec x) {
  return Vec::of([&](int i) { return std::log(x.v[i]); });
}
// 8 rows become 8 columns
inline void transpose(Vec* x) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    for (int j = 0; j < i; ++j) std::swap(x[i].v[j], x[j].v[i]);
  }
}

}  // namespace vitkd::scalar
