// Attention-map loss on the CPU, without an attention map in memory:
//   loss = D(softmax(q_t k_t^T factor_t), softmax(q_s k_s^T factor_s)), D as in
//   math/attention_map.h
// The scores of a block of queries with all keys stay in L2 until the loss and both gradients are
// formed from them: 4 matrix products, where a backward from saved statistics needs 6. Register
// tiles of up to 6 x 64 FMAs, or AMX, compute the products; exponentials are a tenth of the work.
// Layout: [batch, heads, tokens, dim], dim dense. Heads are spread over torch's threads; losses are
// added in row order, so results do not depend on the number of threads.
#include <cfloat>
#include <cmath>
#include <cstring>
#include <numeric>

#include "binding/attention_map_call.h"
#include "simd/isa.h"
#include "simd/vec.h"

namespace vitkd::attention_map {
namespace {

enum class Pass { kForward, kForwardGrad, kBackward };

constexpr float kLn2 = 0.693147180559945f;
constexpr int64_t kScoreBytes = 512 << 10;  // of a block's scores: they stay in L2

struct Kernel {
  int64_t (*scratch)(const Call&);  // floats of memory
  void (*run)(const Call&, int64_t begin, int64_t end, float* memory);
};

}  // namespace
}  // namespace vitkd::attention_map

namespace vitkd::attention_map::scalar {
namespace {
using vitkd::scalar::Vec;
#include "cpu/attention_map.inl"
#include "cpu/attention_map_fma.inl"
}  // namespace
}  // namespace vitkd::attention_map::scalar

#if defined(__x86_64__)
VITKD_TARGET_BEGIN(VITKD_AVX512)
namespace vitkd::attention_map::avx512 {
namespace {
using vitkd::avx512::Vec;
#include "cpu/attention_map.inl"
#include "cpu/attention_map_fma.inl"
}  // namespace
}  // namespace vitkd::attention_map::avx512
VITKD_TARGET_END

VITKD_TARGET_BEGIN(VITKD_AVX512 ",amx-tile,amx-bf16")
namespace vitkd::attention_map::avx512 {
namespace {
#include "cpu/attention_map_amx.inl"
}  // namespace
}  // namespace vitkd::attention_map::avx512
VITKD_TARGET_END

VITKD_TARGET_BEGIN(VITKD_AVX2)
namespace vitkd::attention_map::avx2 {
namespace {
using vitkd::avx2::Vec;
#include "cpu/attention_map.inl"
#include "cpu/attention_map_fma.inl"
}  // namespace
}  // namespace vitkd::attention_map::avx2
VITKD_TARGET_END
#endif

namespace vitkd::attention_map {
namespace {

template <Kind kKind, Pass kPass>
Kernel kernel_for(const Call& c) {
#if defined(__x86_64__)
  const Isa isa = selected_isa();
  const bool any_float = c.q_s.dtype == ScalarType::Float || c.q_t.dtype == ScalarType::Float;
  if (contains(isa, Isa::amx) && !any_float) {
    return {avx512::scratch<avx512::Tiles>, avx512::run_heads<avx512::Tiles, kKind, kPass>};
  }
  if (contains(isa, Isa::avx512)) {
    return {avx512::scratch<avx512::Fma>, avx512::run_heads<avx512::Fma, kKind, kPass>};
  }
  if (contains(isa, Isa::avx2)) {
    return {avx2::scratch<avx2::Fma>, avx2::run_heads<avx2::Fma, kKind, kPass>};
  }
#endif
  return {scalar::scratch<scalar::Fma>, scalar::run_heads<scalar::Fma, kKind, kPass>};
}

template <Pass kPass>
Kernel kernel_for(const Call& c) {
  switch (c.kind) {
    case Kind::kReverseKl:
      return kernel_for<Kind::kReverseKl, kPass>(c);
    case Kind::kJs:
      return kernel_for<Kind::kJs, kPass>(c);
    case Kind::kMse:
      return kernel_for<Kind::kMse, kPass>(c);
    default:
      return kernel_for<Kind::kKl, kPass>(c);
  }
}

template <Pass kPass>
void run(const Call& c, const Tensor& like) {
  const Kernel kernel = kernel_for<kPass>(c);
  const int64_t heads = c.batch * c.heads, floats = kernel.scratch(c);
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t workers = std::clamp<int64_t>(heads, 1, threads);
  // allocated by torch, so that its memory statistics include it
  Tensor memory = torch::stable::new_empty(like, {workers, floats}, ScalarType::Float);
  float* const scratch = memory.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernel.run(c, heads * i / workers, heads * (i + 1) / workers, scratch + i * floats);
    }
  });
}

void check_mask(const Call& c) {
  if (!c.key_mask) return;
  for (int64_t i = 0; i < c.batch; ++i) {
    const bool* const mask = c.key_mask + i * c.keys;
    STD_TORCH_CHECK(std::find(mask, mask + c.keys, true) != mask + c.keys,
                    "attention_map_loss: key_mask keeps no key of batch element ", i);
  }
}

template <Pass kPass>
Tensor forward(Call& c, const Tensor& like) {
  check_mask(c);
  Tensor loss = empty_loss(c, like);
  float* const out = loss.mutable_data_ptr<float>();
  if (c.reduction == Reduction::kNone) {
    c.loss = out;
    run<kPass>(c, like);
    return loss;
  }
  Tensor rows = torch::stable::new_empty(like, {c.rows()}, ScalarType::Float);
  c.loss = rows.mutable_data_ptr<float>();
  run<kPass>(c, like);
  *out = static_cast<float>(std::accumulate(c.loss, c.loss + c.rows(), 0.0));
  return loss;
}

std::tuple<Tensor, Tensor> attention_map_fwd(const Options& options, const Tensor& q_s,
                                             const Tensor& k_s, const Tensor& q_t,
                                             const Tensor& k_t) {
  Setup setup(options, q_s, k_s, q_t, k_t);
  Tensor stats = empty_stats(setup.call, q_s);
  setup.call.stats = stats.mutable_data_ptr<float>();
  Tensor loss = forward<Pass::kForward>(setup.call, q_s);
  return {std::move(loss), std::move(stats)};
}

std::tuple<Tensor, Tensor, Tensor> attention_map_fwd_grad(const Options& options, const Tensor& q_s,
                                                          const Tensor& k_s, const Tensor& q_t,
                                                          const Tensor& k_t) {
  Setup setup(options, q_s, k_s, q_t, k_t);
  Grad d_q(q_s), d_k(k_s);
  if (setup.call.queries == 0) torch::stable::zero_(d_k.tensor);
  setup.call.d_q = d_q.view(), setup.call.d_k = d_k.view();
  Tensor loss = forward<Pass::kForwardGrad>(setup.call, q_s);
  return {std::move(loss), d_q.take(), d_k.take()};
}

std::tuple<Tensor, Tensor> attention_map_bwd(const Options& options, const Tensor& grad_loss,
                                             const Tensor& q_s, const Tensor& k_s,
                                             const Tensor& q_t, const Tensor& k_t,
                                             const Tensor& stats) {
  Setup setup(options, q_s, k_s, q_t, k_t);
  setup.take(grad_loss, stats);
  Grad d_q(q_s), d_k(k_s);
  if (setup.call.queries == 0) torch::stable::zero_(d_k.tensor);
  setup.call.d_q = d_q.view(), setup.call.d_k = d_k.view();
  run<Pass::kBackward>(setup.call, q_s);
  return {d_q.take(), d_k.take()};
}

}  // namespace
}  // namespace vitkd::attention_map

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU, m) {
  m.impl("attention_map_fwd",
         TORCH_BOX(&vitkd::Flat<&vitkd::attention_map::attention_map_fwd>::call));
  m.impl("attention_map_fwd_grad",
         TORCH_BOX(&vitkd::Flat<&vitkd::attention_map::attention_map_fwd_grad>::call));
  m.impl("attention_map_bwd",
         TORCH_BOX(&vitkd::Flat<&vitkd::attention_map::attention_map_bwd>::call));
}
