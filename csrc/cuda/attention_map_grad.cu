// The gradients of attention_map_loss: scores are formed again and, from the log-sum-exps, become
// gradients ds, which are an operand of the next product as they lie in registers:
//   d_q = ds k_s, d_k = ds^T q_s
// Counted, bf16, dim 64, 196 tokens, for a pair of scores and each gradient: 384 flops, 2 exps,
// 6 instructions; see benches/notes/attention_map.md. No atomics: bitwise the same every time.
#include "cuda/attention_map.cuh"

namespace vitkd::attention_map {
namespace {

// acc [16 kTall, kDim] += ds [16 kTall, kColumns] . y [kColumns, dims], of a part; ds beyond is 0
template <class E, int kTall, int kDim, bool kWhole>
__device__ __forceinline__ void add_product(float (&acc)[kTall][kDim / 8][4],
                                            const float (&ds)[kTall][kTiles][4], const char* y,
                                            int pitch, Part<kWhole> part, int dims) {
  const int lane = threadIdx.x % 32;
  if constexpr (kPairs<E>) {
    y += lane % 16 * pitch + lane / 16 * 16;
#pragma unroll
    for (int n = 0; n < kTiles && part.has_columns(n); n += 2) {
      uint32_t a[kTall][4];
#pragma unroll
      for (int m = 0; m < kTall && part.has_rows(m); ++m) {
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
        for (int m = 0; m < kTall && part.has_rows(m); ++m) {
          E::multiply(acc[m][d], a[m], b[0], b[1]);
          E::multiply(acc[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  } else {
    // a thread holds columns 2 t and 2 t + 1 of ds where the product takes t and t + 4: y's rows
    // are permuted to match
    y += lane % 4 * 2 * pitch + lane / 4 * 4;
#pragma unroll
    for (int n = 0; n < kTiles && part.has_columns(n); ++n) {
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        if (d > 0 && d * 8 >= dims) break;
        const char* const at = y + n * 8 * pitch + d * 32;
        const uint32_t b0 = *reinterpret_cast<const uint32_t*>(at);
        const uint32_t b1 = *reinterpret_cast<const uint32_t*>(at + pitch);
#pragma unroll
        for (int m = 0; m < kTall && part.has_rows(m); ++m) {
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

// ds, in place of the student's scores; stats(which, i, n, k): a number of the query whose score
// this is
template <class E, Kind kKind, int kTall, bool kWhole, class Stats>
__device__ __forceinline__ void form_ds(const Call& c, float (&s)[kTall][kTiles][4],
                                        const float (&t)[kTall][kTiles][4], unsigned keep,
                                        Part<kWhole> part, float lift, Stats&& stats) {
  const float c_s = c.factor_s * kUnit<E>, c_t = c.factor_t * kUnit<E>;
  each<kTall>(part, [&](int i, int m, int n, int k) {
    const float x = less<E>(s[m][n][k], c_s, stats(0, i, n, k));
    const float y = less<E>(t[m][n][k], c_t, stats(1, i, n, k));
    const float p = power<E>(y), q = power<E>(x);
    float ds = term<kKind>(p, y * kNatural<E>, q, x * kNatural<E>).w;
    if constexpr (kKind != Kind::kKl) ds -= q * stats(2, i, n, k);
    s[m][n][k] = ds * lift;
  });
  if (kWhole || keep == kFullMask) return;
  each<kTall>(part, [&](int, int m, int n, int k) {
    if (!kept(keep, n, k)) s[m][n][k] = 0;
  });
}

// blocks of a multiprocessor, which leave 168 registers where they are three; d_q of 128 columns
// needs more
template <class E, int kTall, int kDim, bool kOfQueries, bool kSliced>
constexpr int kBlocks = kPairs<E> && kTall == 1 && !(kOfQueries && kDim == 128 && !kSliced) ? 3 : 2;

// d_q (kOfQueries) or d_k; grid: batch * heads * blocks of rows * chunks of kDim
template <class E, int kTall, int kDim, bool kOfQueries, bool kSliced>
__global__ void __launch_bounds__(32 * kWarps, kBlocks<E, kTall, kDim, kOfQueries, kSliced>)
    attention_map_grad_kernel(const __grid_constant__ Call c, const __grid_constant__ Plan plan) {
  extern __shared__ __align__(16) char shared[];
  const Block<E, kTall, kOfQueries, kSliced> block(c, plan, shared);
  const int lane = threadIdx.x % 32, first_dim = block.chunk * kDim;
  // small differences of half precision must not underflow; reverse_kl has no bound
  const float lift = std::is_same_v<E, Fp16> && c.kind != Kind::kReverseKl ? 4096.0f : 1.0f;

  // 1. a query's numbers belong to rows or to columns
  float rows[3][2 * kTall];
  if constexpr (kOfQueries) {
    const int64_t before = block.rows_before();
#pragma unroll
    for (int i = 0; i < 2 * kTall; ++i) {
      const int token = block.first_row + lane / 4 + 8 * i;
      const bool there = token < c.queries;
#pragma unroll
      for (int which = 0; which < 3; ++which) {
        const float x = there ? c.stats[which * c.rows() + before + token] : 0;
        rows[which][i] = which < 2 ? x * kUnit<E> : x;
      }
    }
  }

  // 2. the products
  float acc[kTall][kDim / 8][4] = {};
  constexpr int kSize = sizeof(typename E::T);
  const int slice = first_dim * kSize;
  const int dims = ((block.own[0].bytes + kSlice - 1) / kSlice * kSlice - slice) / kSize;
  block.walk(!kOfQueries, [&](char* stage, int first) {
    block.scores(stage, first, [&](auto& s, auto& t, unsigned keep, auto part, int at) {
      const int tile = plan.tile;
      const float* const by_column = block.stats_of(stage) + at + lane % 4 * 2;
      const auto stats = [&](int which, int i, int n, int k) {
        if constexpr (kOfQueries) return rows[which][i];
        const float x = by_column[which * tile + 8 * n + k % 2];
        return which < 2 ? x * kUnit<E> : x;
      };
      const auto form = [&]<Kind kKind>() { form_ds<E, kKind>(c, s, t, keep, part, lift, stats); };
      c.kind == Kind::kKl          ? form.template operator()<Kind::kKl>()
      : c.kind == Kind::kReverseKl ? form.template operator()<Kind::kReverseKl>()
      : c.kind == Kind::kJs        ? form.template operator()<Kind::kJs>()
                                   : form.template operator()<Kind::kMse>();
      if (!kOfQueries && block.grad_by_row()) {
        each<kTall>(part, [&](int, int m, int n, int k) {
          if (kept(keep, n, k)) s[m][n][k] *= by_column[3 * tile + 8 * n + k % 2];
        });
      }
      const char* y = stage + at * plan.pitch[0] + slice;
      int pitch = plan.pitch[0];
      if constexpr (kSliced) {
        constexpr int kBytes = kDim * kSize;
        y = block.template bring<kBytes>(first, slice);
        pitch = kBytes + 16;
      }
      add_product<E, kTall, kDim>(acc, s, y, pitch, part, dims);
    });
  });

  // 3. what all of a row share; a masked key has a score, but no part in this
  if (block.idle()) return;
  using T = typename E::T;
  const Operand& to = kOfQueries ? c.d_q : c.d_k;
  T* const out = reinterpret_cast<T*>(to.data) +
                 block.start_of(to, kOfQueries ? block.of_head : block.head()) + first_dim;
  const int end = min(kDim, static_cast<int>(c.dim_s) - first_dim);
  const bool pairs = kPairs<E> && plan.aligned;
  const int64_t before = block.rows_before();
#pragma unroll
  for (int i = 0; i < 2 * kTall; ++i) {
    const int token = block.first_row + lane / 4 + 8 * i;
    if (token >= block.own[0].tokens) continue;
    float factor;
    if constexpr (kOfQueries) {
      factor = c.row_grad(before + token);
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

template <class E, int kTall, int kDim, bool kOfQueries>
void gradient(const Call& c, int64_t rows, cudaStream_t stream) {
  if (c.batch * c.heads * rows == 0) return;
  Plan plan = cut<E, kTall>(c, rows, {c.q_s, c.k_s, c.q_t, c.k_t, c.d_q, c.d_k});
  plan.chunks = static_cast<int>(ceil_div(c.dim_s, kDim));
  auto* const kernel = plan.sliced ? attention_map_grad_kernel<E, kTall, kDim, kOfQueries, true>
                                   : attention_map_grad_kernel<E, kTall, kDim, kOfQueries, false>;
  start<kTall>(kernel, c, plan, c.batch * c.heads * plan.blocks * plan.chunks, stream);
}

void gradients(const Call& c, const Tensor& like) {
  const cudaStream_t stream = current_stream(like);
  visit_element(c, [&]<class E>() {
    if (c.dim_s <= 64) {
      gradient<E, E::kTall, 64, true>(c, c.queries, stream);
      gradient<E, E::kTall, 64, false>(c, c.keys, stream);
    } else {
      gradient<E, 1, 128, true>(c, c.queries, stream);
      gradient<E, 1, 128, false>(c, c.keys, stream);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_map_fwd_grad(const Options& options, const Tensor& q_s,
                                                          const Tensor& k_s, const Tensor& q_t,
                                                          const Tensor& k_t) {
  const torch::stable::accelerator::DeviceGuard guard(q_s.get_device_index());
  Prepared on(options, q_s, k_s, q_t, k_t);
  Call& c = on.call;
  Tensor loss = torch::stable::new_empty(q_s, std::vector<int64_t>{}, ScalarType::Float);
  const Tensor stats = empty_stats(c, q_s);
  Grad d_q(q_s, c.q_s.dtype), d_k(k_s, c.q_s.dtype);
  c.d_q = d_q.view(), c.d_k = d_k.view();
  c.loss = loss.mutable_data_ptr<float>();
  c.stats = stats.mutable_data_ptr<float>();
  forward(c, q_s, false);
  gradients(c, q_s);
  return {std::move(loss), d_q.take(), d_k.take()};
}

std::tuple<Tensor, Tensor> attention_map_bwd(const Options& options, const Tensor& grad_loss,
                                             const Tensor& q_s, const Tensor& k_s,
                                             const Tensor& q_t, const Tensor& k_t,
                                             const Tensor& stats) {
  const torch::stable::accelerator::DeviceGuard guard(q_s.get_device_index());
  Prepared on(options, q_s, k_s, q_t, k_t);
  Call& c = on.call;
  on.take(grad_loss, stats);
  Grad d_q(q_s, c.q_s.dtype), d_k(k_s, c.q_s.dtype);
  c.d_q = d_q.view(), c.d_k = d_k.view();
  gradients(c, q_s);
  return {d_q.take(), d_k.take()};
}

}  // namespace
}  // namespace vitkd::attention_map

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA, m) {
  m.impl("attention_map_fwd_grad",
         TORCH_BOX(&vitkd::Flat<&vitkd::attention_map::attention_map_fwd_grad>::call));
  m.impl("attention_map_bwd",
         TORCH_BOX(&vitkd::Flat<&vitkd::attention_map::attention_map_bwd>::call));
}
