// A row of student, teacher and gradient, shared by a group of threads: loads and stores of kMany
// classes at a time, the row's sums, and its gradient.
#pragma once

#include "binding/kd_call.h"
#include "cuda/common.cuh"

namespace vitkd::kd {
namespace {

enum class Access { kVector, kScalar, kTiled };

constexpr int kChunk = 8;        // classes that a thread has in flight
constexpr int kTileRows = 32;    // kTiled: rows of a block
constexpr int kTileThreads = 8;  // kTiled: threads per row
constexpr int kTileSums = kTileThreads * kTileRows;

// Exponentials for 16-bit logits: one instruction each with an error of 2^-22, where expf takes
// eight and would be the bottleneck.
struct FastExp {
  float inv_t;
  static constexpr float kLog2e = 1.44269504f;
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

// kChunk numbers from 16-byte aligned memory.
template <class A>
__device__ void load_chunk(const void* p, ScalarType dtype, int64_t i, A (&out)[kChunk]) {
  if (dtype == ScalarType::Float) {
    const float4* q = reinterpret_cast<const float4*>(static_cast<const float*>(p) + i);
    const float4 a = q[0], b = q[1];
    const float values[kChunk] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int j = 0; j < kChunk; ++j) out[j] = values[j];
  } else {  // two bytes each
    const uint4 q = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + i);
    const unsigned words[kChunk / 2] = {q.x, q.y, q.z, q.w};
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

  // classes in flight
  static constexpr int kMany = kAccess == Access::kVector  ? kChunk
                               : std::is_same_v<A, double> ? 2
                                                           : 4;

  // visit(s, t, n, first, step): n <= kMany classes first, first + step, ...
  template <class F>
  __device__ void sweep(F&& visit) const {
    A x[kMany], y[kMany];
    if constexpr (kAccess == Access::kVector) {
      // up to the first boundary of a chunk, and beyond the last, one class per thread
      const auto at = reinterpret_cast<uintptr_t>(s + begin) / sizeof(S) % kChunk;
      const int64_t head = min(begin + static_cast<int64_t>((kChunk - at) % kChunk), end);
      const int64_t chunks = (end - head) / kChunk;
      for (int64_t k = lane; k < chunks; k += group) {
        const int64_t first = head + k * kChunk;
        load_chunk<A>(s, std::is_same_v<S, float> ? ScalarType::Float : two_bytes(), first, x);
        load_chunk<A>(t, t_dtype, first, y);
        visit(x, y, kChunk, first, 1);
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
        const int n =
            static_cast<int>(min(static_cast<int64_t>(kMany), (end - first + group - 1) / group));
#pragma unroll
        for (int j = 0; j < kMany; ++j) {
          if (j >= n) continue;
          x[j] = student(first + j * group);
          y[j] = teacher(first + j * group);
        }
        visit(x, y, n, first, group);
      }
    }
  }

  static __device__ constexpr ScalarType two_bytes() {
    return std::is_same_v<S, Half> ? ScalarType::Half : ScalarType::BFloat16;
  }

  using E = std::conditional_t<sizeof(S) == 2, FastExp, Exp<A>>;

  __device__ Sums<A> sums(A inv_t, bool ce) const {
    const E exp{inv_t};
    Sums<A> all;
    sweep([&](const A(&x)[kMany], const A(&y)[kMany], int n, int64_t, int) {
      A max_s = all.max_s, max_t = all.max_t;
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        if (j >= n) continue;
        max_s = fmax(max_s, x[j]);
        max_t = fmax(max_t, y[j]);
      }
      all = rebase(all, max_s, max_t, inv_t);
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        if (j >= n) continue;
        ce ? add_class<true>(all, x[j], y[j], exp) : add_class<false>(all, x[j], y[j], exp);
      }
      all.count += static_cast<A>(n);
    });
    return all;
  }

  __device__ void gradient(const GradFactors<A>& f, const Stats<A>& st, A inv_t, bool ce,
                           const Target<A>& target) const {
    const E exp{inv_t};
    sweep([&](const A(&x)[kMany], const A(&y)[kMany], int n, int64_t first, int step) {
      A d[kMany];
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        if (j >= n) continue;
        d[j] = ce ? grad_class<true>(f, st, x[j], y[j], exp)
                  : grad_class<false>(f, st, x[j], y[j], exp);
        const int64_t i = first + j * step;
        if (ce && i == target.a) d[j] -= f.at_a;
        if (ce && i == target.b) d[j] -= f.at_b;
      }
      write(d, n, first, step);
    });
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
};

template <class A>
__device__ Sums<A> shuffled(const Sums<A>& x, int mask) {
  return {__shfl_xor_sync(kFullMask, x.max_s, mask),   __shfl_xor_sync(kFullMask, x.max_t, mask),
          __shfl_xor_sync(kFullMask, x.sum_s, mask),   __shfl_xor_sync(kFullMask, x.sum_t, mask),
          __shfl_xor_sync(kFullMask, x.dot, mask),     __shfl_xor_sync(kFullMask, x.sum_1, mask),
          __shfl_xor_sync(kFullMask, x.total_s, mask), __shfl_xor_sync(kFullMask, x.count, mask)};
}

// Shared memory for sums; an array of them would have to be initialised.
template <class A, int kCount>
__device__ Sums<A>* shared_sums() {
  __shared__ alignas(16) char memory[kCount * sizeof(Sums<A>)];
  return reinterpret_cast<Sums<A>*>(memory);
}

// The sums of all threads of a row, given to each of them.
template <class A>
__device__ Sums<A> merge_group(Sums<A> x, int group, A inv_t) {
  for (int mask = 16; mask > 0; mask /= 2) x = merge(x, shuffled(x, mask), inv_t);
  if (group == 32) return x;
  auto* const warps = shared_sums<A, 32>();
  const int warp = threadIdx.x / 32, count = group / 32;
  if (threadIdx.x % 32 == 0) warps[warp] = x;
  __syncthreads();
  x = static_cast<int>(threadIdx.x % 32) < count ? warps[threadIdx.x % 32] : Sums<A>{};
  for (int mask = 16; mask > 0; mask /= 2) x = merge(x, shuffled(x, mask), inv_t);
  return x;
}

// The same where a row's threads are threadIdx.y.
template <class A>
__device__ Sums<A> merge_tile(const Sums<A>& x, A inv_t) {
  auto* const tile = shared_sums<A, kTileSums>() + threadIdx.x;
  tile[threadIdx.y * kTileRows] = x;
  __syncthreads();
  Sums<A> all = tile[0];
  for (int y = 1; y < kTileThreads; ++y) all = merge(all, tile[y * kTileRows], inv_t);
  return all;
}

}  // namespace
}  // namespace vitkd::kd
