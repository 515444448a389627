// The vector kernel of kd.cpp, included once per instruction set, inside its namespace and region.
// A block is [steps][kLanes] floats in L1: of one row (kRows: lanes are classes, sums go across
// them) or of kLanes rows at once (kColumns: lanes are rows, for a class dimension that is
// strided).
#include "cpu/rows.inl"

struct Factors {  // per lane: gradient = s * e_s - t * e_t + one * e_1 - uniform
  Vec s, t, one, uniform;
};

struct Origin {  // per lane: what exponentials are relative to
  Vec max_s, max_t, inv_t;
  Scale by;  // of inv_t
};

struct Point {  // per lane: the same with the log-sums, for softmaxes
  Vec max_s, max_t, inv_t, log_s, log_t, log_1;
};

struct LaneSums {
  Vec sum_s, sum_t, dot, sum_1, total_s;
};

constexpr int64_t kBlock = 1024 / kLanes;          // steps of a block
constexpr int64_t kKeptSteps = kMaxKept / kLanes;  // steps whose exponentials are kept

// Where a block's logits are read, where its exponentials go, and what comes next in memory.
struct Block {
  const float *s, *t;
  float *e_s, *e_t, *e_1;
  const char *next_s, *next_t, *grad;
  int64_t step_s, step_t;  // bytes of a vector there
};

// Sums over one step. kCe: 0 without cross-entropy, 1 with it at T = 1, where e_1 is e_s, and 2
// with an exponential of its own. kMasked: some student logit is -inf.
template <int kCe, bool kMasked>
VITKD_INLINE void sum_step(LaneSums& sums, Vec s, Vec t, const Origin& at, const Block& block,
                           int64_t i, Vec::Mask live) {
  const Vec d = s - at.max_s, d_t = t - at.max_t;
  const Vec u = d * at.inv_t, v = d_t * at.inv_t;
  const Vec e_s = exp_scaled(d, at.by);
  const Vec e_t = exp_scaled(d_t, at.by);
  sums.sum_s = sums.sum_s + e_s;
  sums.sum_t = sums.sum_t + e_t;
  if constexpr (kMasked) {
    // +inf where only the student is masked, even if e_t is 0; nothing where the teacher is
    const Vec dot = fma(max(Vec{FLT_MIN}, e_t), v - u, sums.dot);
    sums.dot = select(not_equal(v, Vec{-INFINITY}), dot, sums.dot);
  } else {
    sums.dot = fma(e_t, max(Vec{-FLT_MAX}, v - u), sums.dot);  // 0 where v is -inf
  }
  e_s.store(block.e_s + i * kLanes);
  e_t.store(block.e_t + i * kLanes);
  if constexpr (kCe > 0) {
    const Vec e_1 = kCe == 2 ? exp(d) : e_s;
    if constexpr (kCe == 2) e_1.store(block.e_1 + i * kLanes);
    sums.sum_1 = sums.sum_1 + e_1;
    sums.total_s = select(live, sums.total_s + d, sums.total_s);
  }
}

// Sums over a block whose first `steps` vectors are read in place and whose last, if there is a
// rest, was staged in e_s and e_t.
template <int kCe, bool kMasked>
LaneSums sum_block(const Block block, int64_t steps, int64_t rest, const Origin at) {
  const Vec zero{0.f};
  LaneSums sums{zero, zero, zero, zero, zero};
  for (int64_t i = 0; i < steps; ++i) {
    // what comes next is on its way while these exponentials are computed
    __builtin_prefetch(block.next_s + i * block.step_s);
    __builtin_prefetch(block.next_t + i * block.step_t);
    __builtin_prefetch(block.grad + i * block.step_s, 1);
    sum_step<kCe, kMasked>(sums, Vec::load(block.s + i * kLanes), Vec::load(block.t + i * kLanes),
                           at, block, i, Vec::first(kLanes));
  }
  if (rest) {  // which ends with -inf
    sum_step<kCe, true>(sums, Vec::load(block.e_s + steps * kLanes),
                        Vec::load(block.e_t + steps * kLanes), at, block, steps, Vec::first(rest));
  }
  return sums;
}

// The gradient from kept exponentials; `out` may be e_s.
template <int kCe>
void scale_block(float* out, const Block& block, int64_t begin, int64_t end, const Factors& f) {
  for (int64_t i = begin; i < end; ++i) {
    const Vec e_s = Vec::load(block.e_s + i * kLanes);
    // two products and a difference: with fma, equal student and teacher would not give 0
    Vec g = f.s * e_s - f.t * Vec::load(block.e_t + i * kLanes);
    if constexpr (kCe > 0) {
      g = g + (f.one * (kCe == 2 ? Vec::load(block.e_1 + i * kLanes) : e_s) - f.uniform);
    }
    g.store(out + i * kLanes);
  }
}

// The gradient from the logits; `out` may be where they are.
template <int kCe>
void grad_block(float* out, const float* s, const float* t, int64_t steps, const Point& at,
                const Factors& f) {
  for (int64_t i = 0; i < steps; ++i) {
    const Vec d = Vec::load(s + i * kLanes) - at.max_s;
    const Vec v = (Vec::load(t + i * kLanes) - at.max_t) * at.inv_t;
    Vec g = f.s * (exp(d * at.inv_t - at.log_s) - exp(v - at.log_t));
    if constexpr (kCe > 0) g = g + (f.one * exp(d - at.log_1) - f.uniform);
    g.store(out + i * kLanes);
  }
}

using SumBlock = LaneSums (*)(Block, int64_t, int64_t, Origin);
using ScaleBlock = void (*)(float*, const Block&, int64_t, int64_t, const Factors&);
using GradBlock = void (*)(float*, const float*, const float*, int64_t, const Point&,
                           const Factors&);
constexpr SumBlock kSumBlock[][3] = {
    {sum_block<0, false>, sum_block<1, false>, sum_block<2, false>},
    {sum_block<0, true>, sum_block<1, true>, sum_block<2, true>}};
constexpr ScaleBlock kScaleBlock[] = {scale_block<0>, scale_block<1>, scale_block<2>};
constexpr GradBlock kGradBlock[] = {grad_block<0>, grad_block<1>, grad_block<1>};

inline int ce_kind(const Call<float>& c) {
  if (c.weights.ce == 0) return 0;
  return c.temperature.data == nullptr && c.temperature.value == 1 ? 1 : 2;
}

struct Scratch {
  explicit Scratch(int64_t steps, int buffers)
      : floats(
            static_cast<float*>(std::aligned_alloc(64, buffers * steps * kLanes * sizeof(float)))),
        s(floats.get()),
        t(s + steps * kLanes),
        one(buffers == 3 ? t + steps * kLanes : s) {}
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> floats;
  float *s, *t, *one;
};

// Rows [begin, end), each with its classes next to one another.
inline void run_rows(const Call<float>& c, Pass pass, int64_t begin, int64_t end) {
  const int kind = ce_kind(c);
  const Memory student = memory(c.student.dtype), teacher = memory(c.teacher.dtype);
  const bool s_in_place = c.student.dtype == ScalarType::Float;
  const bool t_in_place = c.teacher.dtype == ScalarType::Float;
  const int64_t all_steps = (c.shape.classes + kLanes - 1) / kLanes;
  const bool kept = pass == Pass::kForwardGrad && all_steps <= kKeptSteps;
  Scratch scratch(kept ? all_steps : std::min(kBlock, all_steps), kept && kind == 2 ? 3 : 2);
  struct Maxima {
    float s, t;
  };
  std::vector<Maxima> maxima((all_steps + kBlock - 1) / kBlock);  // of each block

  for (int64_t row = begin; row < end; ++row) {
    const float temperature = c.temperature[row];
    const float inv_t = 1 / temperature;
    const float share = c.share_of(row);
    const char* const s_row = c.student.at(row, c.shape);
    const char* const t_row = c.teacher.at(row, c.shape);
    char* const g_row = pass == Pass::kForward ? nullptr : c.grad.at(row, c.shape);
    if (share == 0) {  // ignored: nothing is read, not even a NaN
      if (pass != Pass::kBackward) c.finish_ignored(row);
      if (g_row) std::memset(g_row, 0, c.shape.classes * c.student.size);
      continue;
    }

    // visit(maxima, block, from, steps, rest) for each block of the row
    const auto each_block = [&](auto&& visit) {
      for (size_t b = 0; b < maxima.size(); ++b) {
        const int64_t from = b * kBlock * kLanes;
        const int64_t n = std::min(kBlock * kLanes, c.shape.classes - from);
        const int64_t at = kept ? from : 0;
        const char* const s = s_row + from * c.student.size;
        const char* const t = t_row + from * c.teacher.size;
        Block block;
        block.e_s = scratch.s + at;
        block.e_t = scratch.t + at;
        block.e_1 = scratch.one + at;
        block.s = s_in_place ? reinterpret_cast<const float*>(s) : block.e_s;
        block.t = t_in_place ? reinterpret_cast<const float*>(t) : block.e_t;
        block.next_s = s + n * c.student.size;
        block.next_t = t + n * c.teacher.size;
        block.grad = g_row ? g_row + from * c.student.size : s;
        block.step_s = kLanes * c.student.size;
        block.step_t = kLanes * c.teacher.size;
        visit(maxima[b], block, from, n / kLanes, n % kLanes);
      }
    };
    const auto load = [&](const Block& block, int64_t from, int64_t steps, int64_t rest) {
      const Extent s = student.load(s_row + from * c.student.size, kLanes, steps, rest, block.e_s);
      const Extent t = teacher.load(t_row + from * c.teacher.size, kLanes, steps, rest, block.e_t);
      return std::pair{s, t};
    };

    const Target<float> target = c.target_of(row);
    Sums<float> sums;
    Stats<float> stats;
    if (pass == Pass::kBackward) {
      stats = c.load_stats(row);
    } else {
      each_block([&](Maxima& max, const Block& block, int64_t from, int64_t steps, int64_t rest) {
        const auto [s, t] = load(block, from, steps, rest);
        max = {reduce_max(s.top), reduce_max(t.top)};
        const bool masked = any_equal(s.bottom, Vec{-INFINITY});
        const Origin at{Vec{max.s}, Vec{max.t}, Vec{inv_t}, Scale(Vec{inv_t})};
        const LaneSums lanes = kSumBlock[masked][kind](block, steps, rest, at);
        const Sums<float> part{max.s,
                               max.t,
                               reduce_add(lanes.sum_s),
                               reduce_add(lanes.sum_t),
                               reduce_add(lanes.dot),
                               kind > 0 ? reduce_add(lanes.sum_1) : 0.f,
                               kind > 0 ? reduce_add(lanes.total_s) : 0.f,
                               static_cast<float>(steps * kLanes + rest)};
        sums = from == 0 ? part : merge(sums, part, inv_t);
      });
      stats = stats_of(sums, kind > 0);
      c.finish_row(row, sums, stats, target, temperature, share, logits_of(c, row));
    }
    if (pass == Pass::kForward) continue;

    const GradFactors<float> f =
        grad_factors(share * c.grad_loss[row], c.weights, target.lam, temperature, c.shape.classes);
    const Point at{Vec{stats.max_s}, Vec{stats.max_t}, Vec{inv_t},
                   Vec{stats.log_s}, Vec{stats.log_t}, Vec{stats.log_1}};
    each_block([&](const Maxima& max, const Block& block, int64_t from, int64_t steps,
                   int64_t rest) {
      char* const to = g_row + from * c.grad.size;
      // float32 goes straight to its place, but for a last vector that would not fit
      float* const out = s_in_place ? reinterpret_cast<float*>(to) : block.e_s;
      const int64_t last = rest > 0;
      if (kept) {
        const float up_s = max.s - sums.max_s, up_t = max.t - sums.max_t;
        const auto rise = [](float up) { return up == 0 ? 1.f : std::exp(up); };
        const Factors factors{Vec{f.kd * rise(up_s * inv_t) / sums.sum_s},
                              Vec{f.kd * rise(up_t * inv_t) / sums.sum_t},
                              Vec{kind > 0 ? f.ce * rise(up_s) / sums.sum_1 : 0.f}, Vec{f.uniform}};
        kScaleBlock[kind](out, block, 0, steps, factors);
        kScaleBlock[kind](block.e_s, block, steps, steps + last, factors);
      } else {
        const Factors factors{Vec{f.kd}, Vec{f.kd}, Vec{f.ce}, Vec{f.uniform}};
        load(block, from, steps, rest);
        kGradBlock[kind](out, block.s, block.t, steps, at, factors);
        kGradBlock[kind](block.e_s + steps * kLanes, block.e_s + steps * kLanes,
                         block.e_t + steps * kLanes, last, at, factors);
      }
      if (kind > 0) {
        for (const auto& [label, mass] : {std::pair{target.a, f.at_a}, {target.b, f.at_b}}) {
          const int64_t i = label - from;
          if (i < 0 || i >= steps * kLanes + rest) continue;
          (i < steps * kLanes ? out : block.e_s)[i] -= mass;
        }
      }
      const int64_t placed = s_in_place ? steps : 0;
      student.store(block.e_s + placed * kLanes, to + placed * kLanes * c.grad.size, kLanes,
                    steps - placed, rest);
    });
  }
}

// Strips [begin, end) of kLanes rows along the inner dimension: lanes are rows.
inline void run_columns(const Call<float>& c, Pass pass, int64_t begin, int64_t end) {
  const int kind = ce_kind(c);
  const Memory student = memory(c.student.dtype), teacher = memory(c.teacher.dtype);
  const int64_t classes = c.shape.classes;
  const int64_t strips = (c.shape.inner + kLanes - 1) / kLanes;
  Scratch scratch(classes, kind == 2 ? 3 : 2);
  const Weights<float>& w = c.weights;

  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t row = strip / strips * c.shape.inner + strip % strips * kLanes;  // the first
    const int64_t lanes = std::min(kLanes, c.shape.inner - strip % strips * kLanes);
    const char* const s_strip = c.student.at(row, c.shape);
    const char* const t_strip = c.teacher.at(row, c.shape);
    const auto side_by_side = [&](const RowView& view) {
      return view.inner_stride == 1 && lanes == kLanes;
    };
    const auto load = [&](const Memory& m, const RowView& view, const char* from, float* to) {
      return side_by_side(view)
                 ? m.load(from, view.class_stride, classes, 0, to)
                 : m.gather(from, view.inner_stride, view.class_stride, classes, lanes, to);
    };
    const Extent s_extent = load(student, c.student, s_strip, scratch.s);
    const Extent t_extent = load(teacher, c.teacher, t_strip, scratch.t);
    const bool masked = any_equal(s_extent.bottom, Vec{-INFINITY});

    alignas(64) float temperatures[kLanes], shares[kLanes] = {}, grads[kLanes] = {};
    for (int64_t l = 0; l < kLanes; ++l) temperatures[l] = c.temperature[row + l % lanes];
    for (int64_t l = 0; l < lanes; ++l) shares[l] = c.share_of(row + l);
    for (int64_t l = 0; l < lanes; ++l) grads[l] = shares[l] * c.grad_loss[row + l];
    const Vec temperature = Vec::load(temperatures);
    const Vec share = Vec::load(shares);
    const Vec::Mask counted = not_equal(share, Vec{0.f});
    const Vec zero{0.f};

    Point at{s_extent.top, t_extent.top, Vec{1.f} / temperature, zero, zero, zero};
    Vec inv_s{1.f}, inv_t{1.f}, inv_1{1.f};  // what turns the kept exponentials into softmaxes
    const int64_t rows = c.shape.rows();
    if (pass == Pass::kBackward) {
      const auto saved = [&](int i) {
        return Vec::load_part(c.stats + i * rows + row, lanes, zero);
      };
      at = {saved(0), saved(1), at.inv_t, saved(2), saved(3), saved(4)};
    } else {
      const Block block{scratch.s, scratch.t, scratch.s, scratch.t, scratch.one,
                        s_strip,   t_strip,   s_strip,   0,         0};
      // the student's logits at the labels, before exponentials take their place
      alignas(64) float expected[kLanes] = {};
      for (int64_t l = 0; kind > 0 && l < lanes; ++l) {
        if (shares[l] == 0) continue;
        const Target<float> target = c.target_of(row + l);
        expected[l] =
            hard_logit(target, scratch.s[target.a * kLanes + l], scratch.s[target.b * kLanes + l]);
      }
      const LaneSums sums = kSumBlock[masked][kind](
          block, classes, 0, {at.max_s, at.max_t, at.inv_t, Scale(at.inv_t)});
      at.log_s = log(sums.sum_s);
      at.log_t = log(sums.sum_t);
      inv_s = Vec{1.f} / sums.sum_s;
      inv_t = Vec{1.f} / sums.sum_t;
      Vec loss = zero;
      if (w.kd != 0) {
        const Vec infinite{INFINITY};
        const Vec kl = select(not_equal(sums.dot, infinite),
                              sums.dot * inv_t + log(sums.sum_s / sums.sum_t), infinite);
        loss = Vec{w.kd} * temperature * temperature * kl;
      }
      if (kind > 0) {
        at.log_1 = log(sums.sum_1);
        inv_1 = Vec{1.f} / sums.sum_1;
        Vec mean = zero;
        if (w.smoothing != 1) mean = Vec{1 - w.smoothing} * (Vec::load(expected) - at.max_s);
        if (w.smoothing != 0) {
          mean = mean + Vec{w.smoothing / static_cast<float>(classes)} * sums.total_s;
        }
        loss = loss + Vec{w.ce} * (at.log_1 - mean);
      }
      select(counted, share * loss, zero).store_part(c.loss + row, lanes);
      const Vec saved[] = {at.max_s, at.max_t, at.log_s, at.log_t, at.log_1, share};
      for (int i = 0; c.stats && i < 6; ++i) saved[i].store_part(c.stats + i * rows + row, lanes);
    }
    if (pass == Pass::kForward) continue;

    const Vec grad = Vec::load(grads);
    const Vec kd = grad * Vec{w.kd} * temperature;
    const Vec ce = grad * Vec{w.ce};
    const Vec uniform = ce * Vec{w.smoothing / static_cast<float>(classes)};
    if (pass == Pass::kForwardGrad) {
      const Block block{scratch.s, scratch.t, scratch.s, scratch.t, scratch.one,
                        s_strip,   t_strip,   s_strip,   0,         0};
      kScaleBlock[kind](scratch.s, block, 0, classes,
                        {kd * inv_s, kd * inv_t, ce * inv_1, uniform});
    } else {
      kGradBlock[kind](scratch.s, scratch.s, scratch.t, classes, at, {kd, kd, ce, uniform});
    }
    for (int64_t l = 0; l < lanes; ++l) {
      if (shares[l] == 0) {  // a NaN in an ignored row has a gradient of 0 too
        for (int64_t i = 0; i < classes; ++i) scratch.s[i * kLanes + l] = 0;
      } else if (kind > 0) {
        const Target<float> target = c.target_of(row + l);
        const float hard = grads[l] * w.ce * (1 - w.smoothing);
        scratch.s[target.a * kLanes + l] -= hard * target.lam;
        scratch.s[target.b * kLanes + l] -= hard * (1 - target.lam);
      }
    }
    char* const to = c.grad.at(row, c.shape);
    if (side_by_side(c.grad)) {
      student.store(scratch.s, to, c.grad.class_stride, classes, 0);
    } else {
      student.scatter(scratch.s, to, c.grad.inner_stride, c.grad.class_stride, classes, lanes);
    }
  }
}

constexpr rows::Kernel<Call<float>> kRows{run_rows}, kColumns{run_columns, kLanes};
