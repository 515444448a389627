// Divergence of softmax(b) from softmax(a) over keys, and its gradients, without a map in memory:
//   b = q_s k_s^T factor_s, a = q_t k_t^T factor_t
// A block keeps the rows of some queries (for d_k: keys) in shared memory and streams tiles of the
// other side past them by cp.async, in two stages. Rows too long for that pass in slices, both
// sides again for each tile. A warp forms 16 or 32 rows by 32 columns of both scores on tensor
// cores, at the ends multiples of 16 by 8; attention_map_fwd.cu makes sums of them,
// attention_map_grad.cu gradients. Rows in shared memory are 16 bytes longer than their content:
// ldmatrix has no bank conflicts.
#pragma once

#include "binding/attention_map_call.h"
#include "cuda/common.cuh"

namespace vitkd::attention_map {

// The loss of each row, or (per_row false) their sum, and the statistics.
void forward(const Call& c, const Tensor& like, bool per_row);

namespace {

constexpr int kWarps = 4;              // of a block, or fewer where rows are long
constexpr int kSlice = 32;             // bytes of a row that a product takes
constexpr int kTiles = 4;              // tensor-core tiles of 8 columns that a warp has at a time
constexpr int kColumns = 8 * kTiles;   // one for each bit of a mask
constexpr int kLongSlice = 256;        // bytes of a long row that are in shared memory at a time
constexpr int kPitch64 = 2 * 64 + 16;  // of rows of 64 numbers of 16 bits
constexpr float kSlack = 16;           // how far scores may exceed what is held for their maximum

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
// Each product starts from 0 and is added to the accumulator by an fp32 addition, as tensor cores
// truncate long sums. a . b and b . a are bitwise equal, so that d_q and d_k see the scores of the
// forward.
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

// How a call is divided into blocks and tiles.
struct Plan {
  int warps = kWarps;
  int tile = 0;          // rows of the streamed side in a stage
  bool sliced = false;   // rows pass in slices of kLongSlice, a model's after the other's
  int pitch[2] = {};     // bytes from row to row in shared memory: student (sliced: both), teacher
  int copiers[2] = {};   // log2 of the threads that copy a row
  bool aligned = false;  // by 16 bytes
  bool quick = false;    // all threads copy 16 bytes of as many rows of a stage, by 32-bit offsets
  int blocks = 0;        // of a (batch, head)
  int chunks = 1;        // of the gradient's dim, each by a block of its own

  // forward: [blocks, warps] sums of rows; null where each row's loss is wanted
  float* parts = nullptr;

  __host__ __device__ int row() const { return pitch[0] + pitch[1]; }
  // a stage: rows of the student, of the teacher, and four numbers of each
  __host__ __device__ int stage() const { return tile * (row() + 16); }
  int bytes(int own_rows) const { return own_rows * row() + (sliced ? 1 : 2) * stage(); }
};

// The rows of one tensor that belong to a (batch, head).
struct Rows {
  const char* data;
  int64_t stride;  // in bytes
  int tokens, bytes, pitch, copiers;
};

// Bytes from `begin` on of rows [first, first + rows) to shared memory: as many as the pitch holds,
// 0 beyond the end of a row and beyond the last.
template <class T>
__device__ void copy_rows(Rows x, bool aligned, int first, int rows, char* to, int begin = 0) {
  const int width = x.pitch - 16;
  x.data += begin;
  x.bytes -= begin;
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

// What of a tile counts: all of it, which the compiler knows (kWhole), or its first tensor-core
// tiles of 16 rows and of 8 columns.
template <bool kIsWhole>
struct Part {
  static constexpr bool kWhole = kIsWhole;
  int tall = 0, wide = 0;
  __device__ bool has_rows(int m) const { return kWhole || m < tall; }
  __device__ bool has_columns(int n) const { return kWhole || n < wide; }
};

// acc [16 kTall, kColumns] += rows of x times rows of y, of a part
template <class E, bool kWhole, int kTall, class Pitch>
__device__ __forceinline__ void add_scores(float (&acc)[kTall][kTiles][4], const char* x,
                                           const char* y, Pitch pitch, Part<kWhole> part) {
  const int lane = threadIdx.x % 32, steps = (pitch - 16) / kSlice;
  // matrices of x: rows 0-7, 8-15, and these again 16 bytes on; of y: 8 rows, 16 bytes on, the
  // next 8 rows, 16 bytes on
  x += lane % 16 * pitch + lane / 16 * 16;
  y += (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16;
  const auto add_slice = [&](int step) {
    uint32_t a[kTall][4];
#pragma unroll
    for (int m = 0; m < kTall && part.has_rows(m); ++m) {
      load_matrices(a[m], x + m * 16 * pitch + step * kSlice);
    }
#pragma unroll
    for (int n = 0; n < kTiles && part.has_columns(n); n += 2) {
      uint32_t b[4];
      load_matrices(b, y + n * 8 * pitch + step * kSlice);
#pragma unroll
      for (int m = 0; m < kTall && part.has_rows(m); ++m) {
        E::multiply(acc[m][n], a[m], b[0], b[1]);
        if (part.has_columns(n + 1)) E::multiply(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  };
  if constexpr (std::is_same_v<Pitch, int>) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) add_slice(step);
  } else {
#pragma unroll
    for (int step = 0; step < steps; ++step) add_slice(step);
  }
}

// A block's part of a call: rows of its own, which stay, and those of the other side, which pass.
template <class E, int kTall, bool kOfQueries, bool kSliced>
struct Block {
  const Call& c;
  const Plan& plan;
  int of_head;    // of batch * heads
  int first;      // row of the block
  int first_row;  // of this warp
  int chunk;      // of the gradient's dim
  Rows own[2], other[2];
  const bool* mask = nullptr;         // of the keys
  char *shared, *own_at[2], *stages;  // in shared memory; own_at: of this warp

  __device__ Block(const Call& call, const Plan& how, char* memory)
      : c(call), plan(how), shared(memory) {
    // all of a grid's numbers have 32 bits, of which a division is no call
    const int part = static_cast<int>(blockIdx.x / plan.chunks);
    // by a shuffle, so that the compiler knows it to be uniform
    const int warp = __shfl_sync(kFullMask, threadIdx.x / 32, 0);
    first = part % plan.blocks * (plan.warps * 16 * kTall);
    chunk = blockIdx.x % plan.chunks;
    first_row = first + warp * 16 * kTall;
    of_head = head();
    if (c.key_mask) mask = c.key_mask + of_head / static_cast<int>(c.heads) * c.keys;
    const auto rows = [&](const Operand& x, bool queries, int which) {
      constexpr int64_t kSize = sizeof(typename E::T);
      return Rows{x.data + start_of(x, of_head) * kSize,
                  x.token_stride * kSize,
                  static_cast<int>(queries ? c.queries : c.keys),
                  static_cast<int>((which == 0 ? c.dim_s : c.dim_t) * kSize),
                  plan.pitch[kSliced ? 0 : which],
                  plan.copiers[kSliced ? 0 : which]};
    };
    const Rows q[2] = {rows(c.q_s, true, 0), rows(c.q_t, true, 1)};
    const Rows k[2] = {rows(c.k_s, false, 0), rows(c.k_t, false, 1)};
    char* at = shared;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      own[which] = kOfQueries ? q[which] : k[which];
      other[which] = kOfQueries ? k[which] : q[which];
      const int pitch = plan.pitch[which], count = plan.warps * 16 * kTall;
      if constexpr (!kSliced) copy_rows<typename E::T>(own[which], plan.aligned, first, count, at);
      own_at[which] = at + warp * 16 * kTall * pitch;
      at += count * pitch;
    }
    stages = at;
  }

  __device__ bool idle() const { return first_row >= own[0].tokens; }
  // of_head, found again: kept in a register until the end, it is one too many for sm_100 in some
  // kernels, which put it on the stack
  __device__ int head() const {
    unsigned index = blockIdx.x;
    asm volatile("" : "+r"(index));  // not known to be what it was
    return static_cast<int>(index / plan.chunks / plan.blocks);
  }
  __device__ int64_t start_of(const Operand& x, int head) const {
    const int64_t batch = head / static_cast<int>(c.heads);
    return batch * x.batch_stride + (head - batch * c.heads) * x.head_stride;
  }
  __device__ int64_t rows_before() const { return head() * c.queries; }

  // Calls visit(stage, first) for the tiles of the other side, in order; with_stats: to each row
  // (a query) belong three numbers, and its loss's gradient where each has one. Sliced, a stage has
  // these alone until `scores` forms its products, for which it needs all warps.
  template <class Visit>
  __device__ void walk(bool with_stats, Visit&& visit) const {
    const auto fetch = [&](char* to, int first) {
      const int left = other[0].tokens - first;
      if (!kSliced && plan.quick && left >= plan.tile) {
        char* rows = to;
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const Rows& x = other[which];
          const auto stride = static_cast<unsigned>(x.stride);
          const int step = blockDim.x >> x.copiers;
          const unsigned row = threadIdx.x >> x.copiers;
          const unsigned column = 16 * (threadIdx.x & ((1u << x.copiers) - 1));
          unsigned from = (first + row) * stride + column;
          char* at = rows + row * x.pitch + column;
#pragma unroll 1
          for (int r = 0; r < plan.tile; r += step) {
            copy_async<16>(at, x.data + from);
            from += step * stride;
            at += step * x.pitch;
          }
          rows += plan.tile * x.pitch;
        }
      } else if constexpr (!kSliced) {
        const int rows = min(plan.tile, (left + 15) / 16 * 16);
        copy_rows<typename E::T>(other[0], plan.aligned, first, rows, to);
        copy_rows<typename E::T>(other[1], plan.aligned, first, rows,
                                 to + plan.tile * plan.pitch[0]);
      }
      if (with_stats) {
        float* const stats = stats_of(to);
        const int64_t first_row = rows_before() + first;
        for (int i = threadIdx.x; i < min(plan.tile, left); i += blockDim.x) {
          const int64_t row = first_row + i;
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
    if constexpr (kSliced) {
      for (int first = 0; first < other[0].tokens; first += plan.tile) {
        fetch(stages, first);
        visit(stages, first);
        __syncthreads();  // the tile is free again
      }
    } else {
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
  }

  // Calls visit(s, t, keep, part, at) for each kColumns rows of a stage, from row `at` on: both
  // scores [16 kTall, kColumns], of which a part counts (the others are 0), and keep, whose bit i
  // says that column i is not masked. Of a whole tile, all count and none is masked.
  template <class Visit>
  __device__ __forceinline__ void scores(char* stage, int first, Visit&& visit) const {
    const int lane = threadIdx.x % 32, tall = min(kTall, (own[0].tokens - first_row + 15) / 16);
    const int end = min(plan.tile, other[0].tokens - first);
    const bool* const masks = kOfQueries ? mask : nullptr;
    const char *y_s = stage, *y_t = stage + plan.tile * plan.pitch[0];
#pragma unroll 1
    for (int left = end; left > 0; left -= kColumns) {
      const int at = end - left;
      bool whole = !kSliced && tall == kTall && !masks && left >= kColumns;
      unsigned keep = kFullMask;
      if (!whole) {
        keep = __ballot_sync(kFullMask, lane < left && (!masks || masks[first + at + lane]));
        whole = !kSliced && tall == kTall && keep == kFullMask;
      }
      const auto form = [&]<bool kWhole>(Part<kWhole> part) {
        float s[kTall][kTiles][4] = {}, t[kTall][kTiles][4] = {};
        if constexpr (kSliced) {
          add_slices(s, 0, stage, first);
          add_slices(t, 1, stage, first);
        } else if (kWhole && kPairs<E> && plan.pitch[0] == kPitch64 && plan.pitch[1] == kPitch64) {
          add_scores<E>(s, own_at[0], y_s, std::integral_constant<int, kPitch64>{}, part);
          add_scores<E>(t, own_at[1], y_t, std::integral_constant<int, kPitch64>{}, part);
        } else {
          add_scores<E>(s, own_at[0], y_s, plan.pitch[0], part);
          add_scores<E>(t, own_at[1], y_t, plan.pitch[1], part);
        }
        visit(s, t, keep, part, at);
      };
      if (whole) {
        form(Part<true>{});
      } else {
        form(Part<false>{tall, min((left + 7) / 8, kTiles)});
      }
      y_s += kColumns * plan.pitch[0];
      y_t += kColumns * plan.pitch[1];
    }
  }

  // The scores of one model with the tile from row `first` on, a slice of both sides at a time.
  __device__ __forceinline__ void add_slices(float (&acc)[kTall][kTiles][4], int which, char* stage,
                                             int first_other) const {
    const int count = plan.warps * 16 * kTall;
#pragma unroll 1
    for (int begin = 0; begin < own[which].bytes; begin += kLongSlice) {
      __syncthreads();  // what is there has been read
      copy_rows<typename E::T>(own[which], plan.aligned, first, count, shared, begin);
      copy_rows<typename E::T>(other[which], plan.aligned, first_other, plan.tile, stage, begin);
      commit();
      wait_for_all_but<0>();
      __syncthreads();
      add_scores<E>(acc, own_at[0], stage, plan.pitch[0], Part<true>{});
    }
  }

  // Sliced: bytes [begin, begin + kBytes) of the student's rows of a tile, in place of all slices;
  // each row is kBytes + 16 from the next.
  template <int kBytes>
  __device__ const char* bring(int first_other, int begin) const {
    static_assert((kWarps * 16 + kColumns) * (kLongSlice + 16) >= kColumns * (kBytes + 16));
    Rows rows = other[0];
    rows.pitch = kBytes + 16;
    __syncthreads();
    copy_rows<typename E::T>(rows, plan.aligned, first_other, plan.tile, shared, begin);
    commit();
    wait_for_all_but<0>();
    __syncthreads();
    return shared;
  }

  __device__ float* stats_of(char* stage) const {
    return reinterpret_cast<float*>(stage + plan.tile * plan.row());
  }
  __device__ bool grad_by_row() const { return c.grad_loss && c.reduction == Reduction::kNone; }
};

// Calls f(i, m, n, k) for every score [m][n][k] of a thread in a part; i: it is in row
// lane / 4 + 8 i.
template <int kTall, bool kWhole, class F>
__device__ __forceinline__ void each(Part<kWhole> part, F&& f) {
#pragma unroll
  for (int n = 0; n < kTiles && part.has_columns(n); ++n) {
#pragma unroll
    for (int m = 0; m < kTall && part.has_rows(m); ++m) {
#pragma unroll
      for (int k = 0; k < 4; ++k) f(2 * m + k / 2, m, n, k);
    }
  }
}

__device__ __forceinline__ bool kept(unsigned keep, int n, int k) {
  return keep >> (threadIdx.x % 4 * 2) >> (8 * n + k % 2) & 1;
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

template <class E, int kTall>
Plan cut(const Call& c, int64_t rows, std::initializer_list<Operand> operands) {
  constexpr int64_t kSize = sizeof(typename E::T);
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  Plan p;
  p.aligned = p.quick = true;
  for (const Operand& x : operands) {
    const auto bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data));
    const int64_t strides = x.batch_stride | x.head_stride | x.token_stride;
    p.aligned = p.aligned && (bits | strides * kSize) % 16 == 0;
    p.quick = p.quick && std::max(c.queries, c.keys) * x.token_stride * kSize < 1 << 30;
  }
  for (int which = 0; which < 2; ++which) {
    const int64_t bytes = (which == 0 ? c.dim_s : c.dim_t) * kSize;
    p.pitch[which] = static_cast<int>(ceil_div(bytes, kSlice) * kSlice + 16);
    while (p.copiers[which] < 5 && 16 << p.copiers[which] < p.pitch[which] - 16) {
      ++p.copiers[which];
    }
  }
  // several blocks per multiprocessor where they fit
  constexpr struct {
    int warps, tile, blocks;
  } kCuts[] = {{4, 64, 3}, {4, 32, 2}, {4, 16, 2}, {2, 32, 2}, {1, 32, 1}, {1, 16, 1}};
  for (const auto& cut : kCuts) {
    p.warps = cut.warps;
    p.tile = cut.tile;
    if (cut.blocks * p.bytes(p.warps * 16 * kTall) <= most) break;
  }
  for (int which = 0; which < 2; ++which) {
    const int64_t bytes = (which == 0 ? c.dim_s : c.dim_t) * kSize;
    p.quick = p.quick && p.aligned && bytes == 16 << p.copiers[which] &&
              p.tile % (32 * p.warps >> p.copiers[which]) == 0;
  }
  if (p.bytes(p.warps * 16 * kTall) > most) {
    p.sliced = true;
    p.warps = kWarps;
    p.tile = kColumns;
    p.pitch[0] = kLongSlice + 16;
    p.pitch[1] = 0;
    p.copiers[0] = 4;
  }
  const int64_t of = p.warps * 16 * kTall;
  p.blocks = static_cast<int>(ceil_div(rows, of));
  return p;
}

template <int kTall>
void start(void (*kernel)(Call, Plan), const Call& c, const Plan& plan, int64_t blocks,
           cudaStream_t stream) {
  const int shared = plan.bytes(plan.warps * 16 * kTall);
  allowed_shared_memory(kernel);
  kernel<<<static_cast<unsigned>(blocks), 32 * plan.warps, shared, stream>>>(c, plan);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// A call whose tensors are copied to float32 where student and teacher differ in dtype, and where a
// row's own gradient, by which ds is multiplied for d_k, may overflow float16: in the forward as
// well, so that the backward forms the same scores. Numbers of 16 bits are exact in tf32, which
// then multiplies without loss.
struct Prepared : Setup {
  Prepared(const Options& o, const Tensor& q_s_in, const Tensor& k_s_in, const Tensor& q_t_in,
           const Tensor& k_t_in)
      : Setup(o, q_s_in, k_s_in, q_t_in, k_t_in) {
    const bool overflows = call.q_s.dtype == ScalarType::Half && call.reduction == Reduction::kNone;
    if (overflows || call.q_s.dtype != call.q_t.dtype) as_float();
  }

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

}  // namespace
}  // namespace vitkd::attention_map
