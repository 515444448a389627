// A row of student, teacher and gradient, shared by a group of threads: loads and stores of kMany
// classes at a time, the row's sums, and its gradient.
#pragma once

#include "binding/kd_call.h"
#include "cuda/common.cuh"

namespace vitkd::kd {
namespace {

enum class Access { kVector, kScalar, kTiled, kShort };

constexpr int kChunk = 8;        // classes that a thread has in flight
constexpr int kTileRows = 32;    // kTiled: rows of a block
constexpr int kTileThreads = 8;  // kTiled: threads per row, at most
template <class A>
constexpr int kShortMany = std::is_same_v<A, double> ? 4 : 8;  // kShort: classes of a thread

// Exponentials for 16-bit logits: one instruction each with an error of 2^-22, where expf takes
// eight and would be the bottleneck.
struct FastExp {
  float inv_t;
  static constexpr float kLog2e = 1.44269504f;
  // how far classes may exceed what is held for their maximum: e^16 times the sums
  __device__ float slack() const { return 16 / fmaxf(inv_t, 1); }
  __device__ float at_t(float d) const { return exp2_approx(d * (inv_t * kLog2e)); }
  __device__ float at_t(float d, float log) const {
    return exp2_approx(fmaf(d, inv_t * kLog2e, -log * kLog2e));
  }
  __device__ float at_1(float d) const { return exp2_approx(d * kLog2e); }
  __device__ float at_1(float d, float log) const {
    return exp2_approx(fmaf(d, kLog2e, -log * kLog2e));
  }
};

template <class A>
__device__ A load_as(const void* p, ScalarType dtype, int64_t i) {
  switch (dtype) {
    case ScalarType::Half:
      return static_cast<A>(static_cast<float>(static_cast<const Half*>(p)[i]));
    case ScalarType::BFloat16:
      return static_cast<A>(static_cast<float>(static_cast<const BFloat16*>(p)[i]));
    case ScalarType::Double:
      return static_cast<A>(static_cast<const double*>(p)[i]);
    default:
      return static_cast<A>(static_cast<const float*>(p)[i]);
  }
}

// kChunk numbers as they lie in memory, of two or four bytes each.
struct Chunk {
  uint4 words[2];
};

// from 16-byte aligned memory
__device__ inline void fetch_chunk(Chunk& to, const void* p, ScalarType dtype, int64_t i) {
  if (dtype == ScalarType::Float) {
    const auto* const q = reinterpret_cast<const uint4*>(static_cast<const float*>(p) + i);
    to.words[0] = q[0];
    to.words[1] = q[1];
  } else {
    to.words[0] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + i);
  }
}

template <class A>
__device__ void unpack(const Chunk& from, ScalarType dtype, A (&out)[kChunk]) {
  const uint4 a = from.words[0], b = from.words[1];
  if (dtype == ScalarType::Float) {
    const unsigned words[kChunk] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int j = 0; j < kChunk; ++j) out[j] = __uint_as_float(words[j]);
    return;
  }
  const unsigned words[kChunk / 2] = {a.x, a.y, a.z, a.w};
  if (dtype == ScalarType::Half) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const auto bits = static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
      out[j] = static_cast<float>(Half(bits, Half::from_bits()));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const unsigned word = words[j / 2];
      out[j] = __uint_as_float(j % 2 ? word & 0xffff0000u : word << 16);
    }
  }
}

// Streaming stores: what is written is not read again, and L2 is kept for the rows.
template <class S>
__device__ void store_chunk(S* p, const float (&x)[kChunk]) {
  if constexpr (sizeof(S) == 4) {
    __stcs(reinterpret_cast<float4*>(p), make_float4(x[0], x[1], x[2], x[3]));
    __stcs(reinterpret_cast<float4*>(p) + 1, make_float4(x[4], x[5], x[6], x[7]));
  } else {
    unsigned words[kChunk / 2];
#pragma unroll
    for (int j = 0; j < kChunk / 2; ++j) {
      const unsigned low = static_cast<S>(x[2 * j]).x, high = static_cast<S>(x[2 * j + 1]).x;
      words[j] = low | high << 16;
    }
    __stcs(reinterpret_cast<uint4*>(p), make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// One row of student, teacher and gradient, as one of `group` threads that share it sees it.
template <class A, class S, Access kAccess>
struct Row {
  const S* s;
  const void* t;
  S* g;
  ScalarType t_dtype;
  int64_t s_stride, t_stride, g_stride;
  int64_t begin, end;  // classes of this block
  int lane, group;

  __device__ A student(int64_t i) const { return static_cast<A>(s[i * s_stride]); }
  __device__ A teacher(int64_t i) const { return load_as<A>(t, t_dtype, i * t_stride); }

  static constexpr bool kShort = kAccess == Access::kShort;
  // classes in flight
  static constexpr int kMany = kAccess == Access::kVector  ? kChunk
                               : kShort                    ? kShortMany<A>
                               : std::is_same_v<A, double> ? 2
                                                           : 4;
  A held_x[kShort ? kMany : 1], held_y[kShort ? kMany : 1];  // kShort: all of this thread
  int held;

  // classes first, first + group, ..., and how many of kMany there are
  __device__ int load(A (&x)[kMany], A (&y)[kMany], int64_t first) const {
    int n = 0;
#pragma unroll
    for (int j = 0; j < kMany; ++j) {
      if (first + j * group >= end) continue;
      x[j] = student(first + j * group);
      y[j] = teacher(first + j * group);
      n = j + 1;
    }
    return n;
  }

  __device__ void hold() {
    if constexpr (kShort) held = load(held_x, held_y, begin + lane);
  }

  // visit(s, t, n, first, step): n <= kMany classes first, first + step, ...
  template <class F>
  __device__ void sweep(F&& visit) const {
    A x[kMany], y[kMany];
    if constexpr (kShort) {
      visit(held_x, held_y, held, begin + lane, group);
    } else if constexpr (kAccess == Access::kVector) {
      // up to the first boundary of a chunk, and beyond the last, one class per thread
      const auto at = reinterpret_cast<uintptr_t>(s + begin) / sizeof(S) % kChunk;
      const int64_t head = min(begin + static_cast<int64_t>((kChunk - at) % kChunk), end);
      const int64_t chunks = (end - head) / kChunk;
      Chunk next_x, next_y;  // on their way while those before are worked on
      const auto fetch = [&](int64_t k) {
        if (k >= chunks) return;
        fetch_chunk(next_x, s, s_dtype(), head + k * kChunk);
        fetch_chunk(next_y, t, t_dtype, head + k * kChunk);
      };
      fetch(lane);
      for (int64_t k = lane; k < chunks; k += group) {
        unpack(next_x, s_dtype(), x);
        unpack(next_y, t_dtype, y);
        fetch(k + group);
        visit(x, y, kChunk, head + k * kChunk, 1);
      }
      // at most 7 classes on either side: threads 0 to 6 and 8 to 14
      const bool front = lane < kChunk;
      const int64_t i = front ? begin + lane : head + chunks * kChunk + lane - kChunk;
      if (i < (front ? head : end) && lane < 2 * kChunk) {
        x[0] = student(i);
        y[0] = teacher(i);
        visit(x, y, 1, i, 1);
      }
    } else {
      for (int64_t first = begin + lane; first < end; first += kMany * group) {
        const int n = load(x, y, first);
        visit(x, y, n, first, group);
      }
    }
  }

  static __device__ constexpr ScalarType s_dtype() {
    return std::is_same_v<S, float> ? ScalarType::Float : two_bytes();
  }
  static __device__ constexpr ScalarType two_bytes() {
    return std::is_same_v<S, Half> ? ScalarType::Half : ScalarType::BFloat16;
  }

  static constexpr bool kFast = sizeof(S) == 2;
  using E = std::conditional_t<kFast, FastExp, Exp<A>>;

  // whether there is a cross-entropy is asked once, not for each class
  __device__ Sums<A> sums(A inv_t, bool ce) const {
    return ce ? sums_of<true>(inv_t) : sums_of<false>(inv_t);
  }

  __device__ void gradient(const GradFactors<A>& f, const Stats<A>& st, A inv_t, bool ce,
                           const Target<A>& target) const {
    ce ? gradient_of<true>(f, st, inv_t, target) : gradient_of<false>(f, st, inv_t, target);
  }

  __device__ void zero_gradient() const {
    for (int64_t i = begin + lane; i < end; i += group) g[i * g_stride] = S(0.0f);
  }

  __device__ void write(const A (&d)[kMany], int n, int64_t first, int step) const {
    if constexpr (kAccess == Access::kVector) {
      if (n == kMany) return store_chunk(g + first, d);
    }
#pragma unroll
    for (int j = 0; j < kMany; ++j) {
      if (j < n) g[(first + j * step) * g_stride] = static_cast<S>(d[j]);
    }
  }

 private:
  template <bool kCe>
  __device__ Sums<A> sums_of(A inv_t) const {
    const E exp{inv_t};
    Sums<A> all;
    A slack = 0;
    if constexpr (kFast) slack = exp.slack();
    sweep([&](const A(&x)[kMany], const A(&y)[kMany], int n, int64_t, int) {
      A max_s = all.max_s, max_t = all.max_t;
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        if (j >= n) continue;
        max_s = fmax(max_s, x[j]);
        max_t = fmax(max_t, y[j]);
      }
      if (!kFast || max_s > all.max_s + slack || max_t > all.max_t + slack) {
        all = rebase(all, max_s, max_t, inv_t);
      }
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        if (j < n) add_class<kCe>(all, x[j], y[j], exp);
      }
      all.count += static_cast<A>(n);
    });
    return all;
  }

  template <bool kCe>
  __device__ void gradient_of(const GradFactors<A>& f, const Stats<A>& st, A inv_t,
                              const Target<A>& target) const {
    const E exp{inv_t};
    sweep([&](const A(&x)[kMany], const A(&y)[kMany], int n, int64_t first, int step) {
      A d[kMany];
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        if (j >= n) continue;
        d[j] = grad_class<kCe>(f, st, x[j], y[j], exp);
        const int64_t i = first + j * step;
        if (kCe && i == target.a) d[j] -= f.at_a;
        if (kCe && i == target.b) d[j] -= f.at_b;
      }
      write(d, n, first, step);
    });
  }
};

struct Plus {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};

struct Larger {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return fmax(a, b);
  }
};

// Numbers of a row's threads, each brought together over all of them, in all of them: first what is
// in a warp, then what warps left in shared memory; of tiles, all is left there.
template <bool kTiles, class F, class A, int kCount>
__device__ void join(A (&x)[kCount], int group) {
  const F f;
  if constexpr (kTiles) {
    if (group == 1) return;
    __shared__ A tile[kCount][kTileThreads][kTileRows];
    __syncthreads();  // of what an earlier one left there
#pragma unroll
    for (int k = 0; k < kCount; ++k) tile[k][threadIdx.y][threadIdx.x] = x[k];
    __syncthreads();
    const int first = threadIdx.y & -group;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      x[k] = tile[k][first][threadIdx.x];
      for (int y = 1; y < group; ++y) x[k] = f(x[k], tile[k][first + y][threadIdx.x]);
    }
  } else {
    for (int mask = min(group, 32) / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] = f(x[k], __shfl_xor_sync(kFullMask, x[k], mask));
    }
    if (group <= 32) return;
    __shared__ A warps[kCount][32];
    __syncthreads();  // of what an earlier one left there
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) warps[k][threadIdx.x / 32] = x[k];
    }
    __syncthreads();
    const int count = group / 32;
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = warps[k][threadIdx.x & (count - 1)];
    for (int mask = count / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] = f(x[k], __shfl_xor_sync(kFullMask, x[k], mask));
    }
  }
}

// The sums of all threads of a row, given to each of them: the maxima first, so that each has its
// own relative to these but once.
template <bool kTiles, class A>
__device__ Sums<A> merge_group(Sums<A> x, int group, A inv_t, bool ce, int64_t classes) {
  A tops[2] = {x.max_s, x.max_t};
  join<kTiles, Larger>(tops, group);
  x = rebase(x, tops[0], tops[1], inv_t);
  A sums[3] = {x.sum_s, x.sum_t, x.dot}, of_ce[2] = {x.sum_1, x.total_s};
  join<kTiles, Plus>(sums, group);
  if (ce) join<kTiles, Plus>(of_ce, group);
  return {tops[0], tops[1], sums[0], sums[1], sums[2], of_ce[0], of_ce[1], static_cast<A>(classes)};
}

// What of shared memory that takes where threads of a block share rows.
template <class A, bool kTiles>
constexpr int kMergeBytes = (2 + 3 + 2) * (kTiles ? kTileThreads * kTileRows : 32) * sizeof(A);

}  // namespace
}  // namespace vitkd::kd
