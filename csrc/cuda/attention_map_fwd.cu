// The forward of attention_map_loss: a row's sums stay with a thread until the end,
//   KL = sum e^v (v - u) / sum e^v + log(sum e^u / sum e^v)
// with u and v the scores less a maximum: of 16-bit numbers that of a row's first keys, for which
// others may be up to 2^100 too large (a block with a row beyond that starts again); else one that
// is raised when it is 2^16 too low. Counted, bf16, dim 64, 196 tokens, for a pair of scores: 256
// flops, 2 exps, 8 instructions; see benches/notes/attention_map.md.
#include "cuda/attention_map.cuh"
#include "cuda/sums.cuh"

namespace vitkd::attention_map {
namespace {

// the sum over the four threads that share a row
__device__ float row_sum(float x) {
  x += __shfl_xor_sync(kFullMask, x, 1);
  return x + __shfl_xor_sync(kFullMask, x, 2);
}

// A row's sums, of its part that a thread has seen: p leads, the divergence is that of q from p.
template <class E>
struct Sums {
  float top_p = kMasked, top_q = kMasked;  // maxima, times kUnit
  float sum_p = 0, sum_q = 0;              // sum e^v and sum e^u: v, u relative to these
  float dot = 0;                           // sum e^v (v - u)

  __device__ void raise(float new_p, float new_q) {
    const float up_p = top_p - new_p, up_q = top_q - new_q;
    const float scale = power<E>(up_p);
    dot = scale * (dot + sum_p * (up_p - up_q));
    sum_p *= scale;
    sum_q *= power<E>(up_q);
    top_p = new_p;
    top_q = new_q;
  }
  // no number of it overflowed
  __device__ bool fits() const { return fabsf(dot) + sum_p + sum_q < INFINITY; }
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
template <class E, Kind kKind, bool kSliced>
__global__ void __launch_bounds__(32 * kWarps,
                                  kKind == Kind::kKl || kKind == Kind::kReverseKl ? 3 : 2)
    attention_map_fwd_kernel(const __grid_constant__ Call c, const __grid_constant__ Plan plan) {
  constexpr int kTall = E::kTall;
  constexpr bool kSwap = kKind == Kind::kReverseKl;  // the student leads
  constexpr bool kTwice = kKind == Kind::kJs || kKind == Kind::kMse;
  extern __shared__ __align__(16) char shared[];
  const Block<E, kTall, true, kSliced> block(c, plan, shared);
  const float c_s = fabsf(c.factor_s) * kUnit<E>, c_t = fabsf(c.factor_t) * kUnit<E>;

  // 1. a negative factor becomes a sign of the queries, so that scores grow with products; of the
  // products, where queries pass in slices
  [[maybe_unused]] const auto turn = [&](auto& s, auto& t, auto part) {
    each<kTall>(part, [&](int, int m, int n, int k) {
      if (c.factor_s < 0) s[m][n][k] = -s[m][n][k];
      if (c.factor_t < 0) t[m][n][k] = -t[m][n][k];
    });
  };
  if (!kSliced && (c.factor_s < 0 || c.factor_t < 0)) {
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
  for (bool careful = !kPairs<E>;; careful = true) {
    block.walk(false, [&](char* stage, int first) {
      block.scores(stage, first, [&](auto& s, auto& t, unsigned keep, auto part, int) {
        if constexpr (kSliced) turn(s, t, part);
        auto &p = kSwap ? s : t, &q = kSwap ? t : s;
        const float c_p = kSwap ? c_s : c_t, c_q = kSwap ? c_t : c_s;
        if (!part.kWhole && keep != kFullMask) {
          each<kTall>(part, [&](int, int m, int n, int k) {
            if (!kept(keep, n, k)) p[m][n][k] = q[m][n][k] = kMasked;
          });
        }
        // no key was seen yet, or all were masked
        if (careful || sums[0].top_p < 1e-4f * kMasked) {
          float max_p[2 * kTall], max_q[2 * kTall];
#pragma unroll
          for (int i = 0; i < 2 * kTall; ++i) max_p[i] = max_q[i] = kMasked;
          each<kTall>(part, [&](int i, int m, int n, int k) {
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
        }
        each<kTall>(part, [&](int i, int m, int n, int k) {
          p[m][n][k] = less<E>(p[m][n][k], c_p, sums[i].top_p);
          q[m][n][k] = less<E>(q[m][n][k], c_q, sums[i].top_q);
        });
        if (!part.kWhole && keep != kFullMask) {  // again, as a factor may be 0
          each<kTall>(part, [&](int, int m, int n, int k) {
            if (!kept(keep, n, k)) p[m][n][k] = q[m][n][k] = kMasked;
          });
        }
        each<kTall>(part, [&](int i, int m, int n, int k) {
          const float v = p[m][n][k], u = q[m][n][k], e = power<E>(v);
          sums[i].sum_p += e;
          sums[i].sum_q += power<E>(u);
          if constexpr (!kTwice) sums[i].dot += e * (v - u);
        });
      });
    });
    // a score that is far above those of the first keys, or NaN
    bool fits = true;
#pragma unroll
    for (const Sums<E>& x : sums) fits &= x.fits();
    if (careful || !__syncthreads_or(!fits)) break;
#pragma unroll
    for (Sums<E>& x : sums) x = {};
  }
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

  // 3. js and mse need p and q; maximum and logarithm apart are more exact than their sum
  if constexpr (kTwice) {
    block.walk(false, [&](char* stage, int first) {
      block.scores(stage, first, [&](auto& s, auto& t, unsigned keep, auto part, int) {
        if constexpr (kSliced) turn(s, t, part);
        each<kTall>(part, [&](int i, int m, int n, int k) {
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
  const int64_t before = block.rows_before();
  float part = 0;
#pragma unroll
  for (int i = 0; i < 2 * kTall; ++i) {
    const int token = block.first_row + threadIdx.x % 32 / 4 + 8 * i;
    if (threadIdx.x % 4 != 0 || token >= c.queries) continue;
    const int64_t row = before + token;
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

}  // namespace

void forward(const Call& c, const Tensor& like, bool per_row) {
  const cudaStream_t stream = current_stream(like);
  if (c.rows() == 0) {
    if (!per_row) sum_of(Numbers<float>{nullptr}, 0, c.loss, like);
    return;
  }
  visit_element(c, [&]<class E>() {
    Plan plan = cut<E, E::kTall>(c, c.queries, {c.q_s, c.k_s, c.q_t, c.k_t});
    const int64_t blocks = c.batch * c.heads * plan.blocks;
    Tensor parts;
    if (!per_row) {
      parts = torch::stable::new_empty(like, {blocks * plan.warps}, ScalarType::Float);
      plan.parts = parts.mutable_data_ptr<float>();
    }
    const auto run = [&]<bool kSliced>() {
      constexpr decltype(&attention_map_fwd_kernel<E, Kind::kKl, kSliced>) kKernels[] = {
          attention_map_fwd_kernel<E, Kind::kKl, kSliced>,
          attention_map_fwd_kernel<E, Kind::kReverseKl, kSliced>,
          attention_map_fwd_kernel<E, Kind::kJs, kSliced>,
          attention_map_fwd_kernel<E, Kind::kMse, kSliced>};
      start<E::kTall>(kKernels[static_cast<int>(c.kind)], c, plan, blocks, stream);
    };
    plan.sliced ? run.template operator()<true>() : run.template operator()<false>();
    if (!per_row) sum_of(Numbers<float>{plan.parts}, blocks * plan.warps, c.loss, like);
  });
}

namespace {

std::tuple<Tensor, Tensor> attention_map_fwd(const Options& options, const Tensor& q_s,
                                             const Tensor& k_s, const Tensor& q_t,
                                             const Tensor& k_t) {
  const torch::stable::accelerator::DeviceGuard guard(q_s.get_device_index());
  Prepared on(options, q_s, k_s, q_t, k_t);
  Call& c = on.call;
  Tensor loss = empty_loss(c, q_s), stats = empty_stats(c, q_s);
  c.loss = loss.mutable_data_ptr<float>();
  c.stats = stats.mutable_data_ptr<float>();
  forward(c, q_s, c.reduction == Reduction::kNone);
  return {std::move(loss), std::move(stats)};
}

}  // namespace
}  // namespace vitkd::attention_map

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA, m) {
  m.impl("attention_map_fwd",
         TORCH_BOX(&vitkd::Flat<&vitkd::attention_map::attention_map_fwd>::call));
}
