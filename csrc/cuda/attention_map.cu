// Divergence of softmax(b) from softmax(a) over keys, b = q_s k_s^T factor_s and a of the teacher
// alike, and its gradients, without a map in memory: a block keeps the rows of some queries (d_k:
// keys) in shared memory and streams tiles of the other side past them by cp.async, two stages; a
// warp forms 16 or 32 rows by 32 columns of both scores on tensor cores and turns them into sums
// or, from the log-sum-exps, into gradients ds, which are an operand of the next product as they
// lie. Sums stay with the thread until the end: KL = sum e^v (v - u) / sum e^v + log(sum e^u /
// sum e^v), u and v the scores less a maximum that is raised only when it is 2^16 too low.
// Shared memory rows are 16 bytes longer than their content: ldmatrix meets no bank conflict.
// Counted, bf16, dim 64, 196 tokens, a pair of scores: forward 256 flops, 2 exps, 10 instructions,
// each gradient 384, 2, 6; see benches/notes/attention_map.md. No atomics: bitwise the same twice.
#include "binding/attention_map_call.h"
#include "cuda/common.cuh"

namespace vitkd::attention_map {
namespace {

constexpr int kWarps = 4;             // of a block, or fewer where rows are long
constexpr int kSlice = 32;            // bytes of a row that a product takes
constexpr int kTiles = 4;             // tensor-core tiles of 8 columns that a warp has at a time
constexpr int kColumns = 8 * kTiles;  // one for each bit of a mask
constexpr float kNothing = -1e30f;    // the score of a masked key; finite, so that 0 * it is 0
constexpr float kSlack = 16;          // how far scores may exceed what is held for their maximum

using Quad = const uint32_t (&)[4];

// Numbers as they lie in memory, and how a tensor core multiplies 32 bytes of a row by as many.
// kTall: tiles of 16 rows that a warp has at a time.
struct Fp16 {
  using T = Half;
  static constexpr int kTall = 2;
  static __device__ uint32_t pack(float low, float high) { return pack_f16(low, high); }
  static __device__ void multiply(float (&acc)[4], Quad a, uint32_t b0, uint32_t b1) {
    multiply_f16(acc, a, b0, b1);
  }
};

struct Bf16 {
  using T = BFloat16;
  static constexpr int kTall = 2;
  static __device__ uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  static __device__ void multiply(float (&acc)[4], Quad a, uint32_t b0, uint32_t b1) {
    multiply_bf16(acc, a, b0, b1);
  }
};

// float32, rounded to tf32; or (kExact) as the sum of two tf32, of whose four products three count.
// Products are added up apart and then to the rest in the usual way: tensor cores cut off what a
// sum of many cannot spare. a . b and b . a are the same to the last bit, so that d_q and d_k see
// the scores that the forward saw.
template <bool kExact>
struct Wide {
  using T = float;
  static constexpr int kTall = 1;
  static __device__ uint32_t high(uint32_t x) {
    return round_tf32(__uint_as_float(x)) & 0xffffe000u;
  }
  static __device__ uint32_t low(uint32_t x) {
    return round_tf32(__uint_as_float(x) - __uint_as_float(high(x)));
  }
  static __device__ void multiply(float (&acc)[4], Quad a, uint32_t b0, uint32_t b1) {
    const uint32_t big[4] = {high(a[0]), high(a[1]), high(a[2]), high(a[3])};
    float sum[4] = {};
    if constexpr (kExact) {
      float other[4] = {};
      multiply_tf32(sum, {low(a[0]), low(a[1]), low(a[2]), low(a[3])}, high(b0), high(b1));
      multiply_tf32(other, big, low(b0), low(b1));
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += other[i];
    }
    multiply_tf32(sum, big, high(b0), high(b1));
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] += sum[i];
  }
};

template <class E>
constexpr bool kPairs = sizeof(typename E::T) == 2;  // two numbers in a register

// Scores are held times log2(e) where two numbers share a register, so that one instruction gives
// their difference from a maximum and one its power. Of float32 they are held as they are, and
// rounded before they are subtracted: of a single key, the difference is then 0.
template <class E>
constexpr float kUnit = kPairs<E> ? 1.44269504f : 1.0f;
template <class E>
constexpr float kNatural = kPairs<E> ? 0.693147181f : 1.0f;

template <class E>
__device__ __forceinline__ float less(float product, float factor, float top) {
  if constexpr (kPairs<E>) return fmaf(product, factor, -top);
  return __fsub_rn(__fmul_rn(product, factor), top);
}

template <class E>
__device__ __forceinline__ float power(float x) {
  if constexpr (kPairs<E>) return exp2_approx(x);
  return expf(x);
}

// How a call is cut.
struct Plan {
  int warps = kWarps;
  int tile = 0;          // rows of the streamed side in a stage
  int pitch[2] = {};     // bytes from row to row in shared memory: student, teacher
  int copiers[2] = {};   // log2 of the threads that copy a row
  bool aligned = false;  // by 16 bytes
  int64_t blocks = 0;    // of a (batch, head)
  int chunks = 1;        // of the gradient's dim, each by a block of its own

  // forward: [blocks, warps] sums of rows; null where each row's loss is wanted
  float* parts = nullptr;

  __host__ __device__ int row() const { return pitch[0] + pitch[1]; }
  // a stage: rows of the student, of the teacher, and four numbers of each
  __host__ __device__ int stage() const { return tile * (row() + 16); }
  int bytes(int own_rows) const { return own_rows * row() + 2 * stage(); }
};

// The rows of one tensor that belong to a (batch, head).
struct Rows {
  const char* data;
  int64_t stride;  // in bytes
  int tokens, bytes, pitch, copiers;
};

// Rows [first, first + rows) to shared memory, 0 beyond the last and up to the pitch.
template <class T>
__device__ void copy_rows(const Rows& x, bool aligned, int first, int rows, char* to) {
  const int width = x.pitch - 16;
  if (aligned) {
    const int step = blockDim.x >> x.copiers;
    const int place = threadIdx.x & ((1 << x.copiers) - 1);
    for (int column = 16 * place; column < width; column += 16 << x.copiers) {
      const int bytes = min(max(x.bytes - column, 0), 16);
      const int row = threadIdx.x >> x.copiers;
      const char* from = x.data + (first + row) * x.stride + column;
      char* at = to + row * x.pitch + column;
      for (int r = row; r < rows; r += step, from += step * x.stride, at += step * x.pitch) {
        const int there = first + r < x.tokens ? bytes : 0;
        copy_async_padded(at, there > 0 ? from : x.data, there);
      }
    }
  } else {
    for (int r = threadIdx.x / 32; r < rows; r += blockDim.x / 32) {
      const char* const from = x.data + (first + r) * x.stride;
      for (int i = threadIdx.x % 32 * sizeof(T); i < width; i += 32 * sizeof(T)) {
        const bool there = first + r < x.tokens && i < x.bytes;
        *reinterpret_cast<T*>(to + r * x.pitch + i) =
            there ? *reinterpret_cast<const T*>(from + i) : T(0.0f);
      }
    }
  }
}

// the first kCount tiles of acc [16 kTall, kColumns] = rows of x times rows of y
template <class E, int kCount, int kTall>
__device__ __forceinline__ void form_scores(float (&acc)[kTall][kTiles][4], const char* x,
                                            const char* y, int pitch) {
  const int lane = threadIdx.x % 32, steps = (pitch - 16) / kSlice;
#pragma unroll
  for (int m = 0; m < kTall; ++m) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0;
  }
  // matrices of x: rows 0-7, 8-15, and these again 16 bytes on; of y: 8 rows, 16 bytes on, the
  // next 8 rows, 16 bytes on
  x += lane % 16 * pitch + lane / 16 * 16;
  y += (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16;
  const auto add_slice = [&](int step) {
    uint32_t a[kTall][4];
#pragma unroll
    for (int m = 0; m < kTall; ++m) load_matrices(a[m], x + m * 16 * pitch + step * kSlice);
#pragma unroll
    for (int n = 0; n < kCount; n += 2) {
      uint32_t b[4];
      load_matrices(b, y + n * 8 * pitch + step * kSlice);
#pragma unroll
      for (int m = 0; m < kTall; ++m) {
        E::multiply(acc[m][n], a[m], b[0], b[1]);
        E::multiply(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  };
  if (kPairs<E> && kCount == kTiles && steps == 4) {  // dim 64
#pragma unroll
    for (int step = 0; step < 4; ++step) add_slice(step);
  } else {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) add_slice(step);
  }
}

// acc [16 kTall, kDim] += ds [16 kTall, columns] . y [columns, dims]
template <class E, int kTall, int kDim>
__device__ __forceinline__ void add_product(float (&acc)[kTall][kDim / 8][4],
                                            const float (&ds)[kTall][kTiles][4], const char* y,
                                            int pitch, int columns, int dims) {
  const int lane = threadIdx.x % 32;
  if constexpr (kPairs<E>) {
    y += lane % 16 * pitch + lane / 16 * 16;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      if (n > 0 && n * 8 >= columns) break;
      uint32_t a[kTall][4];
#pragma unroll
      for (int m = 0; m < kTall; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const pair = &ds[m][n + i / 2][i % 2 * 2];
          a[m][i] = E::pack(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int d = 0; d < kDim / 8; d += 2) {
        if (d > 0 && d * 8 >= dims) break;
        uint32_t b[4];
        load_matrices_transposed(b, y + n * 8 * pitch + d * 16);
#pragma unroll
        for (int m = 0; m < kTall; ++m) {
          E::multiply(acc[m][d], a[m], b[0], b[1]);
          E::multiply(acc[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  } else {
    // a thread has columns 2 t and 2 t + 1 of ds, and the product wants t and t + 4: it is told
    // another order of y's rows
    y += lane % 4 * 2 * pitch + lane / 4 * 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n > 0 && n * 8 >= columns) break;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        if (d > 0 && d * 8 >= dims) break;
        const char* const at = y + n * 8 * pitch + d * 32;
        const uint32_t b0 = *reinterpret_cast<const uint32_t*>(at);
        const uint32_t b1 = *reinterpret_cast<const uint32_t*>(at + pitch);
#pragma unroll
        for (int m = 0; m < kTall; ++m) {
          const float (&x)[4] = ds[m][n];
          E::multiply(acc[m][d],
                      {__float_as_uint(x[0]), __float_as_uint(x[2]), __float_as_uint(x[1]),
                       __float_as_uint(x[3])},
                      b0, b1);
        }
      }
    }
  }
}

// A block's part of a call: rows of its own, which stay, and those of the other side, which pass.
template <class E, int kTall, bool kOfQueries>
struct Block {
  const Call& c;
  const Plan& plan;
  int64_t head;   // of batch * heads
  int first_row;  // of this warp
  int chunk;      // of the gradient's dim
  Rows own[2], other[2];
  const bool* mask = nullptr;  // of the keys
  char *own_at[2], *stages;    // in shared memory; own_at: of this warp

  __device__ Block(const Call& call, const Plan& how, char* shared) : c(call), plan(how) {
    const int64_t part = blockIdx.x / plan.chunks;
    // by a shuffle, so that the compiler knows it to be the same for all
    const int warp = __shfl_sync(kFullMask, threadIdx.x / 32, 0);
    const int first = part % plan.blocks * (plan.warps * 16 * kTall);
    chunk = blockIdx.x % plan.chunks;
    head = part / plan.blocks;
    first_row = first + warp * 16 * kTall;
    const int64_t batch = head / c.heads;
    if (c.key_mask) mask = c.key_mask + batch * c.keys;
    const auto rows = [&](const Operand& x, bool queries, int which) {
      constexpr int64_t kSize = sizeof(typename E::T);
      const int64_t start = batch * x.batch_stride + (head - batch * c.heads) * x.head_stride;
      return Rows{x.data + start * kSize,
                  x.token_stride * kSize,
                  static_cast<int>(queries ? c.queries : c.keys),
                  static_cast<int>((which == 0 ? c.dim_s : c.dim_t) * kSize),
                  plan.pitch[which],
                  plan.copiers[which]};
    };
    const Rows q[2] = {rows(c.q_s, true, 0), rows(c.q_t, true, 1)};
    const Rows k[2] = {rows(c.k_s, false, 0), rows(c.k_t, false, 1)};
    char* at = shared;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      own[which] = kOfQueries ? q[which] : k[which];
      other[which] = kOfQueries ? k[which] : q[which];
      const int pitch = plan.pitch[which], count = plan.warps * 16 * kTall;
      copy_rows<typename E::T>(own[which], plan.aligned, first, count, at);
      own_at[which] = at + warp * 16 * kTall * pitch;
      at += count * pitch;
    }
    stages = at;
  }

  __device__ bool idle() const { return first_row >= own[0].tokens; }
  __device__ int64_t row_of(int token) const { return head * c.queries + token; }

  // Calls visit(stage, first) for the tiles of the other side, in order; with_stats: to each row
  // (a query) belong three numbers, and its loss's gradient where each has one.
  template <class Visit>
  __device__ void walk(bool with_stats, Visit&& visit) const {
    const auto fetch = [&](char* to, int first) {
      copy_rows<typename E::T>(other[0], plan.aligned, first, plan.tile, to);
      copy_rows<typename E::T>(other[1], plan.aligned, first, plan.tile,
                               to + plan.tile * plan.pitch[0]);
      if (with_stats) {
        float* const stats = stats_of(to);
        for (int i = threadIdx.x; i < min(plan.tile, other[0].tokens - first); i += blockDim.x) {
          const int64_t row = row_of(first + i);
#pragma unroll
          for (int k = 0; k < 3; ++k) {
            copy_async<4>(stats + k * plan.tile + i, c.stats + k * c.rows() + row);
          }
          if (grad_by_row()) copy_async<4>(stats + 3 * plan.tile + i, c.grad_loss + row);
        }
      }
      commit();
    };
    if (other[0].tokens == 0) return;
    __syncthreads();  // an earlier walk is over
    fetch(stages, 0);
    int stage = 0;
    for (int first = 0; first < other[0].tokens; first += plan.tile, stage ^= 1) {
      wait_for_all_but<0>();
      __syncthreads();  // the tile is there for all, and the one before it is free again
      if (first + plan.tile < other[0].tokens) {
        fetch(stages + (stage ^ 1) * plan.stage(), first + plan.tile);
      }
      if (!idle()) visit(stages + stage * plan.stage(), first);
    }
  }

  // Calls visit(s, t, keep, columns, at) for each kColumns rows of a stage, from row `at` on: both
  // scores [16 kTall, kColumns], of which `columns` count (tiles beyond are not even written), and
  // keep, whose bit i says that column i is not masked.
  template <class Visit>
  __device__ __forceinline__ void scores(const char* stage, int first, Visit&& visit) const {
    const int end = min(plan.tile, other[0].tokens - first), lane = threadIdx.x % 32;
#pragma unroll 1
    for (int at = 0; at < end; at += kColumns) {
      const int columns = min(end - at, kColumns);
      unsigned keep = kFullMask;
      if (columns < kColumns || (kOfQueries && mask)) {
        const bool here = lane < columns && (!kOfQueries || !mask || mask[first + at + lane]);
        keep = __ballot_sync(kFullMask, here);
      }
      float s[kTall][kTiles][4], t[kTall][kTiles][4];
      const char* const y_s = stage + at * plan.pitch[0];
      const char* const y_t = stage + plan.tile * plan.pitch[0] + at * plan.pitch[1];
      if (columns > 16) {
        form_scores<E, kTiles>(s, own_at[0], y_s, plan.pitch[0]);
        form_scores<E, kTiles>(t, own_at[1], y_t, plan.pitch[1]);
      } else {
        form_scores<E, 2>(s, own_at[0], y_s, plan.pitch[0]);
        form_scores<E, 2>(t, own_at[1], y_t, plan.pitch[1]);
      }
      visit(s, t, keep, columns, at);
    }
  }

  __device__ float* stats_of(char* stage) const {
    return reinterpret_cast<float*>(stage + plan.tile * plan.row());
  }
  __device__ bool grad_by_row() const { return c.grad_loss && c.reduction == Reduction::kNone; }
};

// Calls f(i, m, n, k) for every score [m][n][k] of a thread that lies in `columns`; i: it is in row
// lane / 4 + 8 i.
template <int kTall, class F>
__device__ __forceinline__ void each(int columns, F&& f) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n > 1 && n / 2 * 16 >= columns) break;
#pragma unroll
    for (int m = 0; m < kTall; ++m) {
#pragma unroll
      for (int k = 0; k < 4; ++k) f(2 * m + k / 2, m, n, k);
    }
  }
}

__device__ __forceinline__ bool kept(unsigned keep, int n, int k) {
  return keep >> (threadIdx.x % 4 * 2) >> (8 * n + k % 2) & 1;
}

// the sum over the four threads that share a row
__device__ float row_sum(float x) {
  x += __shfl_xor_sync(kFullMask, x, 1);
  return x + __shfl_xor_sync(kFullMask, x, 2);
}

// A row's sums, of its part that a thread has seen: p leads, the divergence is that of q from p.
template <class E>
struct Sums {
  float top_p = kNothing, top_q = kNothing;  // maxima, times kUnit
  float sum_p = 0, sum_q = 0;                // sum e^v and sum e^u: v, u relative to these
  float dot = 0;                             // sum e^v (v - u)

  __device__ void raise(float new_p, float new_q) {
    const float up_p = top_p - new_p, up_q = top_q - new_q;
    const float scale = power<E>(up_p);
    dot = scale * (dot + sum_p * (up_p - up_q));
    sum_p *= scale;
    sum_q *= power<E>(up_q);
    top_p = new_p;
    top_q = new_q;
  }
  __device__ void merge(int mask) {
    Sums x;
    x.top_p = __shfl_xor_sync(kFullMask, top_p, mask);
    x.top_q = __shfl_xor_sync(kFullMask, top_q, mask);
    x.sum_p = __shfl_xor_sync(kFullMask, sum_p, mask);
    x.sum_q = __shfl_xor_sync(kFullMask, sum_q, mask);
    x.dot = __shfl_xor_sync(kFullMask, dot, mask);
    const float new_p = fmaxf(top_p, x.top_p), new_q = fmaxf(top_q, x.top_q);
    raise(new_p, new_q);
    x.raise(new_p, new_q);
    sum_p += x.sum_p;
    sum_q += x.sum_q;
    dot += x.dot;
  }
};

// grid: batch * heads * blocks of queries
template <class E, Kind kKind>
__global__ void __launch_bounds__(32 * kWarps,
                                  kKind == Kind::kKl || kKind == Kind::kReverseKl ? 3 : 2)
    attention_map_fwd_kernel(const __grid_constant__ Call c, const __grid_constant__ Plan plan) {
  constexpr int kTall = E::kTall;
  constexpr bool kSwap = kKind == Kind::kReverseKl;  // the student leads
  constexpr bool kTwice = kKind == Kind::kJs || kKind == Kind::kMse;
  extern __shared__ __align__(16) char shared[];
  const Block<E, kTall, true> block(c, plan, shared);
  const float c_s = fabsf(c.factor_s) * kUnit<E>, c_t = fabsf(c.factor_t) * kUnit<E>;

  // 1. scores shall grow with products: of a negative factor, the queries take the sign
  if (c.factor_s < 0 || c.factor_t < 0) {
    commit();
    wait_for_all_but<0>();
    __syncthreads();
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if ((which == 0 ? c.factor_s : c.factor_t) >= 0) continue;
      auto* const words = reinterpret_cast<uint32_t*>(block.own_at[which]);
      for (int i = lane; i < 16 * kTall * block.own[which].pitch / 4; i += 32) {
        words[i] ^= kPairs<E> ? 0x80008000u : 0x80000000u;
      }
    }
  }

  // 2. both log-sum-exps, and the divergence where it needs no more than sums
  Sums<E> sums[2 * kTall];
  block.walk(false, [&](const char* stage, int first) {
    block.scores(stage, first, [&](auto& s, auto& t, unsigned keep, int columns, int) {
      auto &p = kSwap ? s : t, &q = kSwap ? t : s;
      const float c_p = kSwap ? c_s : c_t, c_q = kSwap ? c_t : c_s;
      if (keep != kFullMask) {
        each<kTall>(columns, [&](int, int m, int n, int k) {
          if (!kept(keep, n, k)) p[m][n][k] = q[m][n][k] = kNothing;
        });
      }
      float max_p[2 * kTall], max_q[2 * kTall];
#pragma unroll
      for (int i = 0; i < 2 * kTall; ++i) max_p[i] = max_q[i] = kNothing;
      each<kTall>(columns, [&](int i, int m, int n, int k) {
        max_p[i] = fmaxf(max_p[i], p[m][n][k]);
        max_q[i] = fmaxf(max_q[i], q[m][n][k]);
      });
      bool raise = false;
#pragma unroll
      for (int i = 0; i < 2 * kTall; ++i) {
        max_p[i] *= c_p, max_q[i] *= c_q;
        raise |= max_p[i] > sums[i].top_p + kSlack || max_q[i] > sums[i].top_q + kSlack;
      }
      if (raise) {  // seldom, after the first
#pragma unroll
        for (int i = 0; i < 2 * kTall; ++i) {
          sums[i].raise(fmaxf(sums[i].top_p, max_p[i]), fmaxf(sums[i].top_q, max_q[i]));
        }
      }
      each<kTall>(columns, [&](int i, int m, int n, int k) {
        p[m][n][k] = less<E>(p[m][n][k], c_p, sums[i].top_p);
        q[m][n][k] = less<E>(q[m][n][k], c_q, sums[i].top_q);
      });
      if (keep != kFullMask) {  // again, as a factor may be 0
        each<kTall>(columns, [&](int, int m, int n, int k) {
          if (!kept(keep, n, k)) p[m][n][k] = q[m][n][k] = kNothing;
        });
      }
      each<kTall>(columns, [&](int i, int m, int n, int k) {
        const float v = p[m][n][k], u = q[m][n][k], e = power<E>(v);
        sums[i].sum_p += e;
        sums[i].sum_q += power<E>(u);
        if constexpr (!kTwice) sums[i].dot += e * (v - u);
      });
    });
  });
  float loss[2 * kTall], centre[2 * kTall], lse_s[2 * kTall], lse_t[2 * kTall];
#pragma unroll
  for (int i = 0; i < 2 * kTall; ++i) {
    Sums<E>& x = sums[i];
    x.merge(1);
    x.merge(2);
    const bool any = x.sum_p != 0;  // a key, or NaN
    const float log_p = logf(x.sum_p), log_q = logf(x.sum_q);
    const float lse_p = any ? x.top_p * kNatural<E> + log_p : 0,
                lse_q = any ? x.top_q * kNatural<E> + log_q : 0;
    lse_s[i] = kSwap ? lse_p : lse_q;
    lse_t[i] = kSwap ? lse_q : lse_p;
    loss[i] = any && !kTwice ? x.dot / x.sum_p * kNatural<E> + (log_q - log_p) : 0;
    centre[i] = kSwap ? loss[i] : 0;
    if constexpr (kTwice) x.sum_p = log_p * kUnit<E>, x.sum_q = log_q * kUnit<E>;
  }

  // 3. the others need p and q; maximum and logarithm apart are more exact than their sum
  if constexpr (kTwice) {
    block.walk(false, [&](const char* stage, int first) {
      block.scores(stage, first, [&](auto& s, auto& t, unsigned keep, int columns, int) {
        each<kTall>(columns, [&](int i, int m, int n, int k) {
          if (!kept(keep, n, k)) return;
          const float x = less<E>(s[m][n][k], c_s, sums[i].top_q) - sums[i].sum_q;
          const float y = less<E>(t[m][n][k], c_t, sums[i].top_p) - sums[i].sum_p;
          const Term it = term<kKind>(power<E>(y), y * kNatural<E>, power<E>(x), x * kNatural<E>);
          loss[i] += it.loss;
          centre[i] += it.w;
        });
      });
    });
#pragma unroll
    for (int i = 0; i < 2 * kTall; ++i) {
      loss[i] = row_sum(loss[i]);
      centre[i] = row_sum(centre[i]);
    }
  }

  // 4. one thread of four writes a row
  float part = 0;
#pragma unroll
  for (int i = 0; i < 2 * kTall; ++i) {
    const int token = block.first_row + threadIdx.x % 32 / 4 + 8 * i;
    if (threadIdx.x % 4 != 0 || token >= c.queries) continue;
    const int64_t row = block.row_of(token);
    c.stats[row] = lse_s[i];
    c.stats[c.rows() + row] = lse_t[i];
    c.stats[2 * c.rows() + row] = centre[i];
    if (plan.parts == nullptr) c.loss[row] = loss[i] * c.loss_factor;
    part += loss[i] * c.loss_factor;
  }
  if (plan.parts == nullptr) return;
  part = warp_sum(part);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * plan.warps + threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) plan.parts[warp] = part;
}

// ds, in place of the student's scores; stats(which, i, n, k): a number of the query whose score
// this is
template <class E, Kind kKind, int kTall, class Stats>
__device__ __forceinline__ void form_ds(const Call& c, float (&s)[kTall][kTiles][4],
                                        const float (&t)[kTall][kTiles][4], unsigned keep,
                                        int columns, float lift, Stats&& stats) {
  const float c_s = c.factor_s * kUnit<E>, c_t = c.factor_t * kUnit<E>;
  each<kTall>(columns, [&](int i, int m, int n, int k) {
    const float x = less<E>(s[m][n][k], c_s, stats(0, i, n, k));
    const float y = less<E>(t[m][n][k], c_t, stats(1, i, n, k));
    const float p = power<E>(y), q = power<E>(x);
    float ds = term<kKind>(p, y * kNatural<E>, q, x * kNatural<E>).w;
    if constexpr (kKind != Kind::kKl) ds -= q * stats(2, i, n, k);
    s[m][n][k] = ds * lift;
  });
  if (keep == kFullMask) return;
  each<kTall>(columns, [&](int, int m, int n, int k) {
    if (!kept(keep, n, k)) s[m][n][k] = 0;
  });
}

// d_q (kOfQueries) or d_k; grid: batch * heads * blocks of rows * chunks of kDim
template <class E, int kTall, int kDim, bool kOfQueries>
__global__ void __launch_bounds__(32 * kWarps, kPairs<E>&& kTall == 1 ? 3 : 2)
    attention_map_grad_kernel(const __grid_constant__ Call c, const __grid_constant__ Plan plan) {
  extern __shared__ __align__(16) char shared[];
  const Block<E, kTall, kOfQueries> block(c, plan, shared);
  const int lane = threadIdx.x % 32, first_dim = block.chunk * kDim;
  // small differences of half precision must not underflow; reverse_kl has no bound
  const float lift = std::is_same_v<E, Fp16> && c.kind != Kind::kReverseKl ? 4096.0f : 1.0f;

  // 1. a query's numbers belong to rows or to columns
  float rows[3][2 * kTall];
  if constexpr (kOfQueries) {
#pragma unroll
    for (int i = 0; i < 2 * kTall; ++i) {
      const int token = block.first_row + lane / 4 + 8 * i;
      const bool there = token < c.queries;
#pragma unroll
      for (int which = 0; which < 3; ++which) {
        const float x = there ? c.stats[which * c.rows() + block.row_of(token)] : 0;
        rows[which][i] = which < 2 ? x * kUnit<E> : x;
      }
    }
  }

  // 2. the products
  float acc[kTall][kDim / 8][4] = {};
  const int slice = first_dim * static_cast<int>(sizeof(typename E::T));
  const int dims = (plan.pitch[0] - 16 - slice) / static_cast<int>(sizeof(typename E::T));
  block.walk(!kOfQueries, [&](char* stage, int first) {
    block.scores(stage, first, [&](auto& s, auto& t, unsigned keep, int columns, int at) {
      const int tile = plan.tile;
      const float* const by_column = block.stats_of(stage) + at + lane % 4 * 2;
      const auto stats = [&](int which, int i, int n, int k) {
        if constexpr (kOfQueries) return rows[which][i];
        const float x = by_column[which * tile + 8 * n + k % 2];
        return which < 2 ? x * kUnit<E> : x;
      };
      const auto form = [&]<Kind kKind>() {
        form_ds<E, kKind>(c, s, t, keep, columns, lift, stats);
      };
      c.kind == Kind::kKl          ? form.template operator()<Kind::kKl>()
      : c.kind == Kind::kReverseKl ? form.template operator()<Kind::kReverseKl>()
      : c.kind == Kind::kJs        ? form.template operator()<Kind::kJs>()
                                   : form.template operator()<Kind::kMse>();
      if (!kOfQueries && block.grad_by_row()) {
        each<kTall>(columns, [&](int, int m, int n, int k) {
          if (kept(keep, n, k)) s[m][n][k] *= by_column[3 * tile + 8 * n + k % 2];
        });
      }
      add_product<E, kTall, kDim>(acc, s, stage + at * plan.pitch[0] + slice, plan.pitch[0],
                                  columns, dims);
    });
  });

  // 3. what all of a row share; a masked key has a score, but no part in this
  if (block.idle()) return;
  using T = typename E::T;
  const Operand& to = kOfQueries ? c.d_q : c.d_k;
  const int64_t batch = block.head / c.heads;
  T* const out = reinterpret_cast<T*>(to.data) + batch * to.batch_stride +
                 (block.head - batch * c.heads) * to.head_stride + first_dim;
  const int end = min(kDim, static_cast<int>(c.dim_s) - first_dim);
  const bool pairs = kPairs<E> && plan.aligned;
#pragma unroll
  for (int i = 0; i < 2 * kTall; ++i) {
    const int token = block.first_row + lane / 4 + 8 * i;
    if (token >= block.own[0].tokens) continue;
    float factor;
    if constexpr (kOfQueries) {
      factor = c.row_grad(block.row_of(token));
    } else {
      factor = block.grad_by_row() ? c.grad_factor : c.queries > 0 ? c.row_grad(0) : 0;
    }
    factor /= lift;
    const bool keep = kOfQueries || block.mask == nullptr || block.mask[token];
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      const int column = d * 8 + lane % 4 * 2;
      if (column >= end) continue;
      const float (&x)[4] = acc[i / 2][d];
      const float x0 = keep ? x[i % 2 * 2] * factor : 0, x1 = keep ? x[i % 2 * 2 + 1] * factor : 0;
      T* const at = out + token * to.token_stride + column;
      if constexpr (kPairs<E>) {
        if (pairs) {
          *reinterpret_cast<uint32_t*>(at) = E::pack(x0, x1);
          continue;
        }
      }
      at[0] = static_cast<T>(x0);
      if (column + 1 < end) at[1] = static_cast<T>(x1);
    }
  }
}

// The sum of n numbers in a fixed order, in double, by one block of 1024.
__global__ void __launch_bounds__(1024)
    attention_map_reduce_kernel(const float* parts, int64_t n, float* loss) {
  const double sum = sum_by_block(n, [&](int64_t i) { return parts[i]; });
  if (threadIdx.x == 0) *loss = static_cast<float>(sum);
}

// Calls f<E>() with how a call's numbers are multiplied.
template <class F>
void visit_element(const Call& c, F&& f) {
  switch (c.q_s.dtype) {
    case ScalarType::Half:
      return f.template operator()<Fp16>();
    case ScalarType::BFloat16:
      return f.template operator()<Bf16>();
    default:
      return c.allow_tf32 ? f.template operator()<Wide<false>>()
                          : f.template operator()<Wide<true>>();
  }
}

// Runs a call whose tensors have one dtype.
class Launcher {
 public:
  Launcher(const Call& c, const Tensor& like) : c_(c), like_(like), stream_(current_stream(like)) {}

  void forward(bool per_row) {
    if (c_.rows() == 0) {
      if (!per_row) reduce(nullptr, 0);
      return;
    }
    visit_element(c_, [&]<class E>() {
      Plan plan = cut<E, E::kTall>(c_.queries, {c_.q_s, c_.k_s, c_.q_t, c_.k_t});
      const int64_t blocks = c_.batch * c_.heads * plan.blocks;
      Tensor parts;
      if (!per_row) {
        parts = torch::stable::new_empty(like_, {blocks * plan.warps}, ScalarType::Float);
        plan.parts = parts.mutable_data_ptr<float>();
      }
      constexpr decltype(&attention_map_fwd_kernel<E, Kind::kKl>) kKernels[] = {
          attention_map_fwd_kernel<E, Kind::kKl>, attention_map_fwd_kernel<E, Kind::kReverseKl>,
          attention_map_fwd_kernel<E, Kind::kJs>, attention_map_fwd_kernel<E, Kind::kMse>};
      start<E::kTall>(kKernels[static_cast<int>(c_.kind)], plan, blocks);
      if (!per_row) reduce(plan.parts, blocks * plan.warps);
    });
  }

  void gradients() {
    visit_element(c_, [&]<class E>() {
      if (c_.dim_s <= 64) {
        gradient<E, E::kTall, 64, true>(c_.queries);
        gradient<E, E::kTall, 64, false>(c_.keys);
      } else {
        gradient<E, 1, 128, true>(c_.queries);
        gradient<E, 1, 128, false>(c_.keys);
      }
    });
  }

 private:
  template <class E, int kTall, int kDim, bool kOfQueries>
  void gradient(int64_t rows) {
    if (c_.batch * c_.heads * rows == 0) return;
    Plan plan = cut<E, kTall>(rows, {c_.q_s, c_.k_s, c_.q_t, c_.k_t, c_.d_q, c_.d_k});
    plan.chunks = static_cast<int>(ceil_div(c_.dim_s, kDim));
    start<kTall>(attention_map_grad_kernel<E, kTall, kDim, kOfQueries>, plan,
                 c_.batch * c_.heads * plan.blocks * plan.chunks);
  }

  template <class E, int kTall>
  Plan cut(int64_t rows, std::initializer_list<Operand> operands) const {
    constexpr int64_t kSize = sizeof(typename E::T);
    Plan p;
    p.aligned = true;
    for (const Operand& x : operands) {
      const auto bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data));
      const int64_t strides = x.batch_stride | x.head_stride | x.token_stride;
      p.aligned = p.aligned && (bits | strides * kSize) % 16 == 0;
    }
    for (int which = 0; which < 2; ++which) {
      const int64_t bytes = (which == 0 ? c_.dim_s : c_.dim_t) * kSize;
      p.pitch[which] = static_cast<int>(ceil_div(bytes, kSlice) * kSlice + 16);
      while (p.copiers[which] < 5 && 16 << p.copiers[which] < p.pitch[which] - 16) {
        ++p.copiers[which];
      }
    }
    // several blocks a multiprocessor if that can be
    constexpr struct {
      int warps, tile, blocks;
    } kCuts[] = {{4, 64, 3}, {4, 32, 2}, {2, 32, 2}, {1, 32, 1}, {1, 16, 1}};
    for (const auto& cut : kCuts) {
      p.warps = cut.warps;
      p.tile = cut.tile;
      if (cut.blocks * p.bytes(p.warps * 16 * kTall) <= most_) break;
    }
    const int64_t of = p.warps * 16 * kTall;
    p.blocks = ceil_div(rows, of);
    return p;
  }

  template <int kTall>
  void start(void (*kernel)(Call, Plan), const Plan& plan, int64_t blocks) const {
    const int shared = plan.bytes(plan.warps * 16 * kTall);
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<static_cast<unsigned>(blocks), 32 * plan.warps, shared, stream_>>>(c_, plan);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void reduce(const float* parts, int64_t n) const {
    attention_map_reduce_kernel<<<1, 1024, 0, stream_>>>(parts, n, c_.loss);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  const Call& c_;
  const Tensor& like_;
  cudaStream_t stream_;
  const int most_ = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
};

// A call whose tensors are copied to float32 where they come in two dtypes. What had 16 bits is a
// tf32 too: no accuracy is lost where that multiplies.
struct Prepared : Setup {
  using Setup::Setup;

  void as_float() {
    const auto is_float = [](const Operand& x) { return x.dtype == ScalarType::Float; };
    call.allow_tf32 = call.allow_tf32 || (!is_float(call.q_s) && !is_float(call.q_t));
    for (const auto& [tensor, view] : {std::pair{&q_s, &call.q_s}, std::pair{&k_s, &call.k_s},
                                       std::pair{&q_t, &call.q_t}, std::pair{&k_t, &call.k_t}}) {
      if (is_float(*view)) continue;
      Tensor copy = torch::stable::new_empty(*tensor, tensor->sizes(), ScalarType::Float);
      torch::stable::copy_(copy, *tensor);
      *tensor = copy;
      *view = operand(copy);
    }
  }
};

std::tuple<Tensor, Tensor> attention_map_fwd(const Tensor& q_s, const Tensor& k_s,
                                             const Tensor& q_t, const Tensor& k_t, double scale_s,
                                             double scale_t, double temperature, int64_t kind,
                                             int64_t reduction, OptionalTensor key_mask,
                                             bool allow_tf32) {
  const torch::stable::accelerator::DeviceGuard guard(q_s.get_device_index());
  Prepared on(q_s, k_s, q_t, k_t, scale_s, scale_t, temperature, kind, reduction, key_mask,
              allow_tf32);
  Call& c = on.call;
  if (c.q_s.dtype != c.q_t.dtype) on.as_float();
  Tensor loss = empty_loss(c, q_s), stats = empty_stats(c, q_s);
  c.loss = loss.mutable_data_ptr<float>();
  c.stats = stats.mutable_data_ptr<float>();
  Launcher(c, q_s).forward(c.reduction == Reduction::kNone);
  return {std::move(loss), std::move(stats)};
}

std::tuple<Tensor, Tensor, Tensor> attention_map_fwd_grad(
    const Tensor& q_s, const Tensor& k_s, const Tensor& q_t, const Tensor& k_t, double scale_s,
    double scale_t, double temperature, int64_t kind, int64_t reduction, OptionalTensor key_mask,
    bool allow_tf32) {
  const torch::stable::accelerator::DeviceGuard guard(q_s.get_device_index());
  Prepared on(q_s, k_s, q_t, k_t, scale_s, scale_t, temperature, kind, reduction, key_mask,
              allow_tf32);
  Call& c = on.call;
  if (c.q_s.dtype != c.q_t.dtype) on.as_float();
  Tensor loss = torch::stable::new_empty(q_s, std::vector<int64_t>{}, ScalarType::Float);
  const Tensor stats = empty_stats(c, q_s);
  Grad d_q(q_s, c.q_s.dtype), d_k(k_s, c.q_s.dtype);
  c.d_q = d_q.view(), c.d_k = d_k.view();
  c.loss = loss.mutable_data_ptr<float>();
  c.stats = stats.mutable_data_ptr<float>();
  Launcher launcher(c, q_s);
  launcher.forward(false);
  launcher.gradients();
  return {std::move(loss), d_q.take(), d_k.take()};
}

std::tuple<Tensor, Tensor> attention_map_bwd(const Tensor& grad_loss, const Tensor& q_s,
                                             const Tensor& k_s, const Tensor& q_t,
                                             const Tensor& k_t, const Tensor& stats, double scale_s,
                                             double scale_t, double temperature, int64_t kind,
                                             int64_t reduction, OptionalTensor key_mask,
                                             bool allow_tf32) {
  const torch::stable::accelerator::DeviceGuard guard(q_s.get_device_index());
  Prepared on(q_s, k_s, q_t, k_t, scale_s, scale_t, temperature, kind, reduction, key_mask,
              allow_tf32);
  Call& c = on.call;
  // a row's own gradient, by which ds is multiplied for d_k, may be beyond float16
  const bool wide = c.q_s.dtype == ScalarType::Half && c.reduction == Reduction::kNone;
  if (wide || c.q_s.dtype != c.q_t.dtype) on.as_float();
  on.take(grad_loss, stats);
  Grad d_q(q_s, c.q_s.dtype), d_k(k_s, c.q_s.dtype);
  c.d_q = d_q.view(), c.d_k = d_k.view();
  Launcher(c, q_s).gradients();
  return {d_q.take(), d_k.take()};
}

}  // namespace
}  // namespace vitkd::attention_map

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA, m) {
  m.impl("attention_map_fwd", TORCH_BOX(&vitkd::attention_map::attention_map_fwd));
  m.impl("attention_map_fwd_grad", TORCH_BOX(&vitkd::attention_map::attention_map_fwd_grad));
  m.impl("attention_map_bwd", TORCH_BOX(&vitkd::attention_map::attention_map_bwd));
}
