// Relational distillation on the CPU, from the Gram matrices of student and teacher:
//   cos_ijk = r_ij r_ik (G_jk + alpha_j + alpha_k), alpha_j = G_ii / 2 - G_ij, r = 1 / distance
//   A = h'(cos_s - cos_t)
//   w_jk = sum over i of A r_ij r_ik
//   v_ij = sum over k of A (r_ik - r_ij cos_ijk)
//   dloss / d d2_jk = v_jk r_jk + v_kj r_kj - w_jk, which the Gram's gradient holds as a Laplacian
// Of the n^3 / 2 triplets, a tile of pairs (j, k), j < k, stays in L1 while the apexes i of a chunk
// pass: 16 vector instructions per kLanes triplets, and 2 n^2 numbers beside the Grams. Chunks are
// added in their order, so results do not depend on the number of threads.
#include "math/rkd.h"

#include <cmath>

#include "binding/rkd_call.h"
#include "simd/isa.h"
#include "simd/vec.h"
#include "simd/vec_one.h"

namespace vitkd::rkd {
namespace {

constexpr int64_t kApexes = 16;  // of a chunk
constexpr int64_t kRows = 8;     // of a tile: 24 KB of two Grams and w, in L1
constexpr int64_t kColumns = 256;
constexpr int64_t kMaxWorkers = 16;  // each has a w of its own: n^2 / 2 numbers
constexpr int64_t kPadding = 16;     // rows end on whole registers

struct Range {
  int64_t begin, end;
};

// Of the student or the teacher.
template <class A>
struct Model {
  const A* gram;   // [n, n]
  const A* norms;  // [n], its diagonal, then zeros
  int64_t n;
  A inverse_mean = 0;  // of the distances; 0 where all are 0
};

// One sample as the vertex of angles; rows of n numbers, then zeros.
template <class A>
struct Apex {
  int64_t i;
  const A *r_s, *product_s, *r_t, *product_t;
  A* v;
};

struct DistanceSums {
  double loss = 0, slope = 0;
};

// What rkd.inl holds, of one instruction set.
template <class A>
struct Kernels {
  double (*sum_distances)(const Model<A>& x);
  DistanceSums (*distance_sums)(const Model<A>& s, const Model<A>& t);
  void (*add_distance_gradient)(const Model<A>& s, const Model<A>& t, A weight, A mean_slope,
                                A* to);
  void (*fill_apex)(const Model<A>& x, int64_t i, A* inverse, A* product);
  double (*add_tile)(const Model<A>& s, const Model<A>& t, const Apex<A>* apexes, int64_t count,
                     A* const* w, Range rows, Range columns);
};

}  // namespace
}  // namespace vitkd::rkd

#define VITKD_NAMESPACE vitkd::rkd
#define VITKD_KERNELS "cpu/rkd.inl"
#include "simd/each_isa.h"

namespace vitkd::rkd {
namespace {

template <class A>
Kernels<A> selected_kernels() {
  if constexpr (std::is_same_v<A, double>)
    return float64::kKernels;
  else
    return VITKD_BEST(kKernels, float32::kKernels);
}

// The operands of a call, and the work of a chunk.
template <class A>
struct Call {
  Kernels<A> kernels;
  Model<A> s, t;
  int64_t n, padded;
  std::vector<int64_t> w_offsets;  // [n + 1]: row j of w holds columns first_column(j) .. padded

  static int64_t first_column(int64_t j) { return j / kPadding * kPadding; }

  Call(const A* gram_s, const A* gram_t, int64_t samples)
      : kernels(selected_kernels<A>()),
        s{gram_s, nullptr, samples},
        t{gram_t, nullptr, samples},
        n(samples),
        padded(ceil_div(samples, kPadding) * kPadding),
        w_offsets(samples + 1) {
    for (int64_t j = 0; j < n; ++j) w_offsets[j + 1] = w_offsets[j] + padded - first_column(j);
  }

  int64_t chunks() const { return ceil_div(n, kApexes); }
  int64_t w_size() const { return w_offsets[n]; }
  int64_t scratch_size() const { return w_size() + 5 * kApexes * padded; }

  // Apexes of one chunk: fills w [w_size] and then v [kApexes, padded] in scratch.
  double run_chunk(int64_t chunk, A* scratch) const {
    A* const w = scratch;
    A* const v = w + w_size();
    A* const rows = v + kApexes * padded;
    std::fill(w, rows, A{0});
    std::vector<A*> w_rows(n);
    for (int64_t j = 0; j < n; ++j) w_rows[j] = w + w_offsets[j] - first_column(j);

    const int64_t first = chunk * kApexes, count = std::min(kApexes, n - first);
    Apex<A> apexes[kApexes];
    for (int64_t a = 0; a < count; ++a) {
      A* const row = rows + 4 * a * padded;
      kernels.fill_apex(s, first + a, row, row + padded);
      kernels.fill_apex(t, first + a, row + 2 * padded, row + 3 * padded);
      apexes[a] = {first + a,        row,           row + padded, row + 2 * padded,
                   row + 3 * padded, v + a * padded};
    }

    double loss = 0;
    for (int64_t j = 0; j < n; j += kRows) {
      const Range tile_rows{j, std::min(j + kRows, n)};
      for (int64_t k = first_column(j); k < n; k += kColumns) {
        const Range columns{k, std::min(k + kColumns, n)};
        loss += kernels.add_tile(s, t, apexes, count, w_rows.data(), tile_rows, columns);
      }
    }
    for (int64_t a = 0; a < count; ++a) {
      for (int64_t j = 0; j < n; ++j) apexes[a].v[j] *= apexes[a].r_s[j];
    }
    return loss;
  }

  // to[j, k] += weight * (w_jk - v_jk r_jk), of the chunks that start at `chunk` and lie in scratch
  void add_row(int64_t j, int64_t chunk, int64_t count, const A* scratch, A weight, A* to) const {
    A* const out = to + j * n;
    for (int64_t c = 0; c < count; ++c, scratch += scratch_size()) {
      const A* const w = scratch + w_offsets[j] - first_column(j);
      for (int64_t k = first_column(j); k < n; ++k) out[k] += weight * w[k];
      const int64_t apex = j - (chunk + c) * kApexes;
      if (apex < 0 || apex >= kApexes) continue;
      const A* const v = scratch + w_size() + apex * padded;
      for (int64_t k = 0; k < n; ++k) out[k] -= weight * v[k];
    }
  }

  // The mean of h over n^3 angles, times angle_weight; its gradient's parts are added to `to`.
  double add_angles(const Tensor& like, double angle_weight, A* to) const {
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t workers = std::clamp<int64_t>(chunks(), 1, std::min(threads, kMaxWorkers));
    Tensor held = torch::stable::new_empty(like, {workers, scratch_size()});
    A* const scratch = held.mutable_data_ptr<A>();
    const double weight = angle_weight / (static_cast<double>(n) * n * n);
    std::vector<double> losses(chunks());
    for (int64_t chunk = 0; chunk < chunks(); chunk += workers) {
      const int64_t count = std::min(workers, chunks() - chunk);
      torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          losses[chunk + c] = run_chunk(chunk + c, scratch + c * scratch_size());
        }
      });
      torch::stable::parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          add_row(j, chunk, count, scratch, static_cast<A>(weight), to);
        }
      });
    }
    double loss = 0;
    for (const double x : losses) loss += x;
    return weight * (2 * loss + lone_cosines());
  }

  // The angles (i; j, j) have a cosine of 1, or of 0 where i and j count as one: only in one of the
  // models, such a pair leaves h(1) = 1/2, and no gradient.
  double lone_cosines() const {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) sum += same(s, i, j) != same(t, i, j) ? 0.5 : 0.0;
    }
    return sum;
  }
  static bool same(const Model<A>& x, int64_t i, int64_t j) {
    const A total = x.norms[j] + x.norms[i], gram = x.gram[i * x.n + j];
    return counts_as_one(total - (gram + gram), total);
  }

  double add_distances(double distance_weight, A* to) {
    const double pairs = static_cast<double>(n) * (n - 1);
    for (Model<A>* x : {&s, &t}) {
      x->inverse_mean = static_cast<A>(inverse_mean(2 * kernels.sum_distances(*x), n));
    }
    const DistanceSums sums = kernels.distance_sums(s, t);
    const double weight = distance_weight / (static_cast<double>(n) * n);
    kernels.add_distance_gradient(s, t, static_cast<A>(weight) * s.inverse_mean,
                                  pairs == 0 ? A{0} : static_cast<A>(2 * sums.slope / pairs), to);
    return weight * 2 * sums.loss;
  }

  // to + to^T off the diagonal, and the diagonal that makes its rows sum to 0
  void symmetrise(A* to) const {
    constexpr int64_t kBlock = 32;
    std::vector<double> diagonal(n);
    for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
      for (int64_t j0 = i0; j0 < n; j0 += kBlock) {
        for (int64_t i = i0; i < std::min(i0 + kBlock, n); ++i) {
          for (int64_t j = std::max(i + 1, j0); j < std::min(j0 + kBlock, n); ++j) {
            const A sum = to[i * n + j] + to[j * n + i];
            to[i * n + j] = to[j * n + i] = sum;
            diagonal[i] -= sum;
            diagonal[j] -= sum;
          }
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) to[i * n + i] = static_cast<A>(diagonal[i]);
  }
};

template <class A>
std::tuple<Tensor, Tensor> run(const Tensor& gram_s, const Tensor& gram_t, double distance_weight,
                               double angle_weight) {
  const int64_t n = gram_s.size(0);
  Tensor loss = torch::stable::new_empty(gram_s, {});
  Tensor grad = torch::stable::new_zeros(gram_s, {n, n});
  A* const to = grad.mutable_data_ptr<A>();
  Call<A> call(gram_s.const_data_ptr<A>(), gram_t.const_data_ptr<A>(), n);
  std::vector<A> norms(2 * call.padded);
  for (int64_t i = 0; i < n; ++i) {
    norms[i] = call.s.gram[i * n + i];
    norms[call.padded + i] = call.t.gram[i * n + i];
  }
  call.s.norms = norms.data();
  call.t.norms = norms.data() + call.padded;
  double total = 0;
  if (n > 0 && angle_weight != 0) total += call.add_angles(gram_s, angle_weight, to);
  if (n > 0 && distance_weight != 0) total += call.add_distances(distance_weight, to);
  call.symmetrise(to);
  // one NaN reaches every distance's mean, but AVX-512 clamps it to 1
  if (std::isnan(total)) std::fill_n(to, n * n, static_cast<A>(total));
  *loss.mutable_data_ptr<A>() = static_cast<A>(total);
  return {std::move(loss), std::move(grad)};
}

std::tuple<Tensor, Tensor> rkd_fwd_grad(const Tensor& gram_s, const Tensor& gram_t,
                                        double distance_weight, double angle_weight) {
  return visit_grams(gram_s, gram_t, [&]<class A>(const Tensor& s, const Tensor& t) {
    return run<A>(s, t, distance_weight, angle_weight);
  });
}

}  // namespace
}  // namespace vitkd::rkd

STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU, m) {
  m.impl("rkd_fwd_grad", TORCH_BOX(&vitkd::rkd::rkd_fwd_grad));
}
