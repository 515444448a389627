// The kernel of row_loss.cpp, included once per instruction set, inside its namespace and region.
// A strip is [steps][kLanes] Reals: one row, whose lanes are classes and whose sums go across them
// (kAcross), or kLanes rows side by side. Every number of a row is a Vec: in the first case the
// same in all lanes.
#include "cpu/rows.inl"
//
#include "math/row_loss.inl"

constexpr int64_t kBlock = 32;  // steps: longer chains of additions would lose digits

// sum of add(sum, i) over the steps, block by block
template <class Sum, class F>
VITKD_INLINE Sum blocked(int64_t steps, F&& add) {
  Sum total{};
  for (int64_t from = 0; from < steps; from += kBlock) {
    Sum part{};
    const int64_t end = std::min(from + kBlock, steps);
    for (int64_t i = from; i < end; ++i) add(part, i);
    total = total + part;
  }
  return total;
}

struct Pair {
  Vec s, t;
};

VITKD_INLINE Pair operator+(const Pair& a, const Pair& b) { return {a.s + b.s, a.t + b.t}; }

struct Strip {
  int64_t row, rows;                   // the first, and how many
  int64_t steps, live;                 // the last step has `live` lanes
  Vec top_s, top_t;                    // maxima
  const Real *s, *t;                   // the logits, -inf behind the last class
  Real *own_s, *own_t;                 // the same, where a label is hidden among them
  Real *e_s, *e_t;                     // exponentials; w takes the place of e_t
  Real* e_1;                           // exponentials of the student at T = 1
  Real *out, *last;                    // the gradient of all steps but the last, and of this one
  const char *next_s, *next_t, *grad;  // what is wanted in cache, a step further
  int64_t step_s, step_t;              // bytes of a step there, 0 for nothing
};

struct Side {  // softmax(x) = exp((x - top) * inv_t) * inv_sum
  Vec top, inv_t, log_sum, inv_sum;
};

template <bool kAcross>
VITKD_INLINE Vec across(Vec x) {
  if constexpr (kAcross) return Vec{reduce_add(x)};
  return x;
}

template <bool kAcross>
VITKD_INLINE Pair across(const Pair& x) {
  return {across<kAcross>(x.s), across<kAcross>(x.t)};
}

struct Moments {
  Pair mean;  // minus the maxima
  Pair std;
};

template <bool kAcross>
Moments moments_of(const Strip& at, Vec classes) {
  const auto sums = [&](auto&& of) {  // over all classes
    const auto d = [&](int64_t i) {
      return Pair{Vec::load(at.s + i * kLanes) - at.top_s, Vec::load(at.t + i * kLanes) - at.top_t};
    };
    const int64_t last = at.steps - 1;
    const Vec::Mask live = Vec::first(at.live);
    Pair rest = of(d(last));
    rest = {select(live, rest.s, Vec{0.f}), select(live, rest.t, Vec{0.f})};
    return across<kAcross>(
        blocked<Pair>(last, [&](Pair& sum, int64_t i) { sum = sum + of(d(i)); }) + rest);
  };
  const Vec inv = Vec{1.f} / classes;
  const Pair sum = sums([](const Pair& d) { return d; });
  const Pair mean{sum.s * inv, sum.t * inv};
  const Pair square = sums([&](const Pair& d) {
    const Vec s = d.s - mean.s, t = d.t - mean.t;
    return Pair{s * s, t * t};
  });
  const Vec freedom = Vec{1.f} / (classes - Vec{1.f});
  return {mean, {sqrt(square.s * freedom), sqrt(square.t * freedom)}};
}

inline Vec top_of(const Real* x, int64_t steps) {
  Vec top{std::numeric_limits<Real>::lowest()};
  for (int64_t i = 0; i < steps; ++i) top = max(Vec::load(x + i * kLanes), top);
  return top;
}

// What is summed beside the exponentials: see KlSums.
enum Sum { kOnly, kDot, kMoved };

// What the sweeps take is passed by value: read through a reference, it would be read again after
// each store.
template <Sum kSum>
KlSums<Vec> exponentials(const Strip at, const Side s, const Side t) {
  const Scale by_s(s.inv_t), by_t(t.inv_t);
  return blocked<KlSums<Vec>>(at.steps, [&](KlSums<Vec>& sum, int64_t i) {
    // the next row is on its way while these exponentials are computed
    __builtin_prefetch(at.next_s + i * at.step_s);
    __builtin_prefetch(at.next_t + i * at.step_t);
    const Vec d_s = Vec::load(at.s + i * kLanes) - s.top,
              d_t = Vec::load(at.t + i * kLanes) - t.top;
    const Vec e_s = exp_scaled(d_s, by_s), e_t = exp_scaled(d_t, by_t);
    e_s.store(at.e_s + i * kLanes);
    e_t.store(at.e_t + i * kLanes);
    sum.s = sum.s + e_s;
    sum.t = sum.t + e_t;
    if constexpr (kSum == kOnly) return;
    __builtin_prefetch(at.grad + i * at.step_s, 1);
    const Vec u = d_s * s.inv_t, v = d_t * t.inv_t;
    const Vec dot = dot_term(e_t, u, v);
    sum.dot = sum.dot + dot;
    if constexpr (kSum == kMoved) {
      sum.s_u = sum.s_u + e_s * max(Vec{-FLT_MAX}, u);  // 0 where u is -inf
      sum.t_u = sum.t_u + product(e_t, u);
      sum.t_v = sum.t_v + product(e_t, v);
      sum.dot_v = sum.dot_v + product(dot, v);
    }
  });
}

using Exponentials = KlSums<Vec> (*)(Strip, Side, Side);
constexpr Exponentials kExponentials[] = {exponentials<kOnly>, exponentials<kDot>,
                                          exponentials<kMoved>};

// Js with beta = 1/2 and m = (p + q) / 2, in half the time: log hi - log m and log lo - log m of
// the larger and the smaller are L +- |d| / 2 with d = log p - log q and L = log(1 - y^2) / 2,
//   y = |p - q| / (p + q) = tanh(|d| / 2)
// L is -atanh(x) with x = y^2 / (2 - y^2), which has no terms of first order in y, and where that
// is above 1/3, 2 atanh(x) - |d| / 2 with x = y / (2 + y): one quotient, and one polynomial.
struct EvenJs {
  VITKD_INLINE static Term<Vec> term(const Parameters<Vec>&, Vec q, Vec p, Vec log_q, Vec log_p) {
    const Vec zero{0.f}, half{0.5f};
    const Vec d = log_q - log_p;
    const auto p_is_more = less(d, zero);
    const Vec apart = min(max(d, zero - d), Vec{FLT_MAX});  // NaN where both are -inf
    const Vec difference = max(q - p, p - q), sum = q + p;
    const Vec difference2 = difference * difference, twice2 = (sum + sum) * sum;
    const auto near = less((difference2 + difference2) + (difference2 + difference2), twice2);
    const Vec x = select(near, difference2, difference) /
                  max(select(near, twice2 - difference2, (sum + sum) + difference), Vec{FLT_MIN});
    const Vec odd = twice_atanh(x);
    const Vec above = select(near, half * (apart - odd), odd);
    const Vec below = above - apart;
    const Vec w = half * q * select(p_is_more, below, above);
    const Vec w_p = half * p * select(p_is_more, above, below);
    return {w + w_p, w, w_p};
  }
};

// Sums of the terms; w takes the place of the teacher's exponentials.
template <class D, bool kMoments>
Sums<Vec> terms(const Strip at, const Side s, const Side t, const Parameters<Vec> k) {
  return blocked<Sums<Vec>>(at.steps, [&](Sums<Vec>& sums, int64_t i) {
    __builtin_prefetch(at.grad + i * at.step_s, 1);
    const Vec u = (Vec::load(at.s + i * kLanes) - s.top) * s.inv_t;
    const Vec v = (Vec::load(at.t + i * kLanes) - t.top) * t.inv_t;
    const Vec q = Vec::load(at.e_s + i * kLanes) * s.inv_sum;
    const Vec p = Vec::load(at.e_t + i * kLanes) * t.inv_sum;
    const Term<Vec> term = D::term(k, q, p, u - s.log_sum, v - t.log_sum);
    term.w.store(at.e_t + i * kLanes);
    add<kMoments>(sums, term, q, p, u, v);
  });
}

using Terms = Sums<Vec> (*)(Strip, Side, Side, Parameters<Vec>);
template <class D>
constexpr Terms kTermsOf[] = {terms<D, false>, terms<D, true>};

inline const Terms* terms_of(Divergence divergence, Real beta) {
  if constexpr (kLanes > 1) {
    if (divergence == Divergence::kJs && beta == Real{0.5}) return kTermsOf<EvenJs>;
  }
  switch (divergence) {
    case Divergence::kReverseKl:
      return kTermsOf<ReverseKl>;
    case Divergence::kJs:
      return kTermsOf<Js>;
    case Divergence::kTv:
      return kTermsOf<Tv>;
    default:
      return kTermsOf<Ofa>;
  }
}

// gradient = w * w - e_s * e_s - shift * e_s - mean - linear * (s - middle) + one * e_1 - uniform
struct Factors {
  Vec w, e_s, shift, mean, linear, middle, one, uniform;
};

enum Form { kNone, kDivergence, kShifted };  // of the divergence: shifted where a label is apart

template <Form kForm>
VITKD_INLINE Vec divergence_gradient(const Strip& at, const Factors& f, int64_t i) {
  if constexpr (kForm == kNone) return Vec{0.f};
  const Vec e_s = Vec::load(at.e_s + i * kLanes);
  const Vec g = f.w * Vec::load(at.e_t + i * kLanes) - f.e_s * e_s;
  return kForm == kShifted ? g - f.shift * e_s : g;
}

// Sums of the gradient in the standardised logits u, and of its product with them.
template <Form kForm>
Pair standardized_sums(const Strip at, const Factors f, Vec inv_t) {
  return blocked<Pair>(at.steps, [&](Pair& sum, int64_t i) {
    const Vec g = divergence_gradient<kForm>(at, f, i);
    sum.s = sum.s + g;
    sum.t = sum.t + product(g, (Vec::load(at.s + i * kLanes) - f.middle) * inv_t);
  });
}

template <Form kForm, bool kLinear, bool kCe>
void gradient(const Strip at, const Factors f) {
  const auto of = [&](int64_t i) {
    Vec g = divergence_gradient<kForm>(at, f, i);
    if constexpr (kLinear) {
      g = g - f.mean - product(Vec::load(at.s + i * kLanes) - f.middle, f.linear);
    }
    if constexpr (kCe) g = g + (f.one * Vec::load(at.e_1 + i * kLanes) - f.uniform);
    return g;
  };
  const int64_t last = at.steps - 1;
  for (int64_t i = 0; i < last; ++i) of(i).store(at.out + i * kLanes);
  of(last).store(at.last);
}

using Gradient = void (*)(Strip, Factors);
template <Form kForm>
constexpr Gradient kGradientOf[2][2] = {
    {gradient<kForm, false, false>, gradient<kForm, false, true>},
    {gradient<kForm, true, false>, gradient<kForm, true, true>}};

inline Gradient gradient_of(Form form, bool linear, bool ce) {
  if (form == kNone) return kGradientOf<kNone>[0][ce];
  return (form == kShifted ? kGradientOf<kShifted> : kGradientOf<kDivergence>)[linear][ce];
}

// A number of each row in the strip.
struct Lanes {
  alignas(64) Real of[kLanes] = {};
  VITKD_INLINE Vec vec(bool same) const { return same ? Vec{of[0]} : Vec::load(of); }
};

// Losses and gradients of the strip's rows.
template <bool kAcross>
void work(const Call<Real>& c, Pass pass, const Strip& at) {
  const Vec zero{0.f}, one{1.f};
  const kd::Weights<Real>& w = c.weights;
  const Vec classes{static_cast<Real>(c.shape.classes)};
  const bool kd = w.kd != 0, ce = w.ce != 0, linear = kd && c.standardize;
  const bool dkd = c.divergence == Divergence::kDkd, ofa = c.divergence == Divergence::kOfa;
  const auto place = [](int64_t label, int64_t l) { return kAcross ? label : label * kLanes + l; };
  // visit(lane, target) where a row is not ignored
  Lanes shares, grads, temperatures;
  for (int64_t l = 0; l < at.rows; ++l) {
    shares.of[l] = c.share_of(at.row + l);
    grads.of[l] = shares.of[l] * c.grad_loss[at.row + l];
  }
  for (int64_t l = 0; l < kLanes; ++l) temperatures.of[l] = c.temperature[at.row + l % at.rows];
  const auto each_target = [&](auto&& visit) {
    for (int64_t l = 0; l < at.rows; ++l) {
      if (shares.of[l] != 0) visit(l, c.target_of(at.row + l));
    }
  };
  const Vec share = shares.vec(kAcross), grad = grads.vec(kAcross);
  const Vec temperature = temperatures.vec(kAcross);
  const auto put = [&](Real* to, Vec x) {
    x = select(not_equal(share, zero), x, zero);
    if (kAcross) {
      x.store_part(to + at.row, 1);
    } else {
      x.store_part(to + at.row, at.rows);
    }
  };

  Vec loss = zero;
  Factors f{zero, zero, zero, zero, zero, zero, zero, zero};
  if (ce) {
    Lanes expected;
    each_target([&](int64_t l, const kd::Target<Real>& y) {
      expected.of[l] = kd::hard_logit(y, at.s[place(y.a, l)], at.s[place(y.b, l)]);
    });
    const Vec::Mask live = Vec::first(at.live);
    const Pair sums = blocked<Pair>(at.steps, [&](Pair& sum, int64_t i) {
      const Vec d = Vec::load(at.s + i * kLanes) - at.top_s;
      const Vec e = exp(d);
      e.store(at.e_1 + i * kLanes);
      sum = {sum.s + e, sum.t + (i + 1 < at.steps ? d : select(live, d, zero))};
    });
    const Vec sum = across<kAcross>(sums.s);
    Vec mean = zero;
    if (w.smoothing != 1) mean = Vec{1 - w.smoothing} * (expected.vec(kAcross) - at.top_s);
    if (w.smoothing != 0) mean = mean + Vec{w.smoothing} * (across<kAcross>(sums.t) / classes);
    loss = Vec{w.ce} * (log(sum) - mean);
    f.one = grad * Vec{w.ce} / sum;
    f.uniform = grad * Vec{w.ce * w.smoothing} / classes;
  }

  Lanes at_label;  // the divergence's gradient there, where it is another than the other classes'
  if (kd) {
    const Vec inv_t = one / temperature;
    Side s{at.top_s, inv_t, zero, one}, t{at.top_t, inv_t, zero, one};
    Moments moments{{zero, zero}, {one, one}};
    if (c.standardize) {
      moments = moments_of<kAcross>(at, classes);
      s.inv_t = one / (temperature * (moments.std.s + Vec{kStandardizeEps}));
      t.inv_t = one / (temperature * (moments.std.t + Vec{kStandardizeEps}));
    }
    const Parameters<Vec> k{Vec{c.alpha}, Vec{c.beta}, c.linear};
    Sum sum = kOnly;
    if (dkd || c.divergence == Divergence::kKl) {
      sum = c.d_temperature ? kMoved : kDot;
    }
    Lanes y_s, y_t, e_y;  // of the label: logits, and the teacher's exponential
    if (dkd || ofa) {
      each_target([&](int64_t l, const kd::Target<Real>& y) {
        y_s.of[l] = at.s[place(y.a, l)];
        y_t.of[l] = at.t[place(y.a, l)];
      });
    }
    if (dkd) {
      each_target([&](int64_t l, const kd::Target<Real>& y) {
        at.own_s[place(y.a, l)] = at.own_t[place(y.a, l)] = -INFINITY;
      });
      s.top = top_of(at.s, at.steps);
      t.top = top_of(at.t, at.steps);
      if constexpr (kAcross) {
        s.top = Vec{reduce_max(s.top)};
        t.top = Vec{reduce_max(t.top)};
      }
    }
    KlSums<Vec> sums = kExponentials[sum](at, s, t);
    sums = {across<kAcross>(sums.s),    across<kAcross>(sums.t),   across<kAcross>(sums.dot),
            across<kAcross>(sums.s_u),  across<kAcross>(sums.t_u), across<kAcross>(sums.t_v),
            across<kAcross>(sums.dot_v)};
    s.log_sum = log(sums.s);
    t.log_sum = log(sums.t);
    s.inv_sum = one / sums.s;
    t.inv_sum = one / sums.t;
    const Vec u_y = dkd || ofa ? (y_s.vec(kAcross) - s.top) * s.inv_t : zero;
    const Vec v_y = dkd || ofa ? (y_t.vec(kAcross) - t.top) * t.inv_t : zero;
    Vec w_scale = t.inv_sum;  // what lies in e_t is w over this
    Row<Vec> row;
    if (sum != kOnly) {
      row = kl_row(sums, s.inv_sum, t.inv_sum);
      if (dkd) {
        row = dkd_row(k, row, sums.s_u * s.inv_sum, sums.t_v * t.inv_sum, u_y, v_y, s.log_sum,
                      t.log_sum);
        each_target(
            [&](int64_t l, const kd::Target<Real>& y) { at.own_s[place(y.a, l)] = y_s.of[l]; });
      }
    } else {
      if (ofa) {
        each_target([&](int64_t l, const kd::Target<Real>& y) {
          e_y.of[l] = std::exchange(at.e_t[place(y.a, l)], Real{0});
        });
      }
      Sums<Vec> of = terms_of(c.divergence, c.beta)[c.d_temperature != nullptr](at, s, t, k);
      of = {across<kAcross>(of.loss), across<kAcross>(of.w),   across<kAcross>(of.w_u),
            across<kAcross>(of.q_u),  across<kAcross>(of.w_p), across<kAcross>(of.w_p_v),
            across<kAcross>(of.p_v)};
      if (ofa) {
        const Vec p = e_y.vec(kAcross) * t.inv_sum;
        const Term<Vec> label = ofa_label(k, p, u_y - s.log_sum);
        add<true>(of, label, zero, p, u_y, v_y);  // q is among the sums already
        Lanes w_y;
        label.w.store(w_y.of);
        each_target(
            [&](int64_t l, const kd::Target<Real>& y) { at.e_t[place(y.a, l)] = w_y.of[l]; });
      }
      row = row_of(of);
      w_scale = one;
    }
    const Vec weight = Vec{w.kd} * temperature * temperature;
    loss = loss + weight * row.loss;
    if (c.d_temperature && pass != Pass::kForward) {
      put(c.d_temperature, grad * Vec{w.kd} * temperature * (row.loss + row.loss - row.moved));
    }
    const Vec in_s = grad * (linear ? weight * s.inv_t : Vec{w.kd} * temperature);
    f.w = in_s * row.scale * w_scale;
    f.e_s = in_s * row.total * s.inv_sum;
    f.shift = in_s * row.label * s.inv_sum;
    (in_s * row.label).store(at_label.of);
    if (linear) {
      f.middle = at.top_s + moments.mean.s;
      // the sum is 0 but for rounding, which does not go into the gradient
      const Pair sums = across<kAcross>(dkd ? standardized_sums<kShifted>(at, f, s.inv_t)
                                            : standardized_sums<kDivergence>(at, f, s.inv_t));
      const Vec of_label = in_s * row.label;
      const Vec along = sums.t + product(of_label, (y_s.vec(kAcross) - f.middle) * s.inv_t);
      f.mean = (sums.s + of_label) / classes;
      f.linear = along * temperature / ((classes - one) * moments.std.s);
    }
  } else if (c.d_temperature && pass != Pass::kForward) {
    put(c.d_temperature, zero);
  }
  if (pass != Pass::kBackward) put(c.loss, share * loss);
  if (pass == Pass::kForward) return;

  gradient_of(!kd ? kNone : dkd ? kShifted : kDivergence, linear, ce)(at, f);
  const auto move = [&](int64_t l, int64_t label, Real by) {
    const int64_t i = place(label, l), end = (at.steps - 1) * kLanes;
    (i < end ? at.out[i] : at.last[i - end]) += by;
  };
  each_target([&](int64_t l, const kd::Target<Real>& y) {
    if (kd && dkd) move(l, y.a, at_label.of[l]);
    if (!ce) return;
    const Real hard = grads.of[l] * w.ce * (1 - w.smoothing);
    move(l, y.a, -hard * y.lam);
    move(l, y.b, -hard * (1 - y.lam));
  });
}

// Five buffers of a strip: 20 KB for 1000 classes, in L1.
struct Scratch {
  int64_t size;
  struct Free {
    void operator()(Real* p) const { std::free(p); }
  };
  std::unique_ptr<Real, Free> reals;
  explicit Scratch(int64_t steps)
      : size(ceil_div(steps * kLanes * sizeof(Real), 64) * 64 / sizeof(Real)),
        reals(static_cast<Real*>(std::aligned_alloc(64, 5 * size * sizeof(Real)))) {}
  Strip strip(int64_t steps, int64_t live) const {
    Strip at{};
    at.steps = steps;
    at.live = live;
    at.s = at.own_s = reals.get();
    at.t = at.own_t = at.own_s + size;
    at.e_s = at.own_t + size;
    at.e_t = at.e_s + size;
    at.e_1 = at.e_t + size;
    at.out = at.e_s;
    at.last = at.e_s + (steps - 1) * kLanes;
    return at;
  }
};

// Rows [begin, end), each with its classes next to one another; with one lane, any stride.
inline void run_rows(const Call<Real>& c, Pass pass, int64_t begin, int64_t end) {
  const int64_t classes = c.shape.classes, steps = ceil_div(classes, kLanes);
  const int64_t whole = classes / kLanes, rest = classes % kLanes;
  const auto stride = [](const RowView& x) { return kLanes == 1 ? x.class_stride : kLanes; };
  const Scratch scratch(steps);
  Strip at = scratch.strip(steps, rest ? rest : kLanes);
  at.rows = 1;
  // a row is read where it is, unless its end has to be filled up or a label to be hidden
  const bool copied = rest != 0 || c.divergence == Divergence::kDkd;
  const auto there = [&](const RowView& x) {
    return x.dtype == kd::kDtype<Real> && stride(x) == kLanes;
  };
  const bool s_there = !copied && there(c.student), t_there = !copied && there(c.teacher);
  const bool out_there = there(c.grad);
  const auto memory_of = [](const RowView& x, bool there) {
    return there ? memory<false>(x.dtype) : memory<true>(x.dtype);
  };
  const Memory student = memory_of(c.student, s_there), teacher = memory_of(c.teacher, t_there);

  for (at.row = begin; at.row < end; ++at.row) {
    char* const g_row = pass == Pass::kForward ? nullptr : c.grad.at(at.row, c.shape);
    if (c.share_of(at.row) == 0) {  // ignored: nothing is read, not even a NaN
      if (pass != Pass::kBackward) c.loss[at.row] = 0;
      if (g_row) {
        for (int64_t i = 0; i < steps; ++i) Vec{0.f}.store(at.e_s + i * kLanes);
        student.store(at.e_s, g_row, stride(c.grad), whole, rest);
        if (c.d_temperature) c.d_temperature[at.row] = 0;
      }
      continue;
    }
    const char* const s_row = c.student.at(at.row, c.shape);
    const char* const t_row = c.teacher.at(at.row, c.shape);
    const int64_t next = std::min(at.row + 1, end - 1);
    at.next_s = c.student.at(next, c.shape);
    at.next_t = c.teacher.at(next, c.shape);
    at.grad = g_row ? g_row : s_row;
    at.step_s = stride(c.student) * c.student.size;
    at.step_t = stride(c.teacher) * c.teacher.size;
    const Extent s = student.load(s_row, stride(c.student), whole, rest, at.own_s);
    const Extent t = teacher.load(t_row, stride(c.teacher), whole, rest, at.own_t);
    if (s_there) at.s = reinterpret_cast<const Real*>(s_row);
    if (t_there) at.t = reinterpret_cast<const Real*>(t_row);
    at.top_s = Vec{reduce_max(s.top)};
    at.top_t = Vec{reduce_max(t.top)};
    if (out_there && g_row) at.out = reinterpret_cast<Real*>(g_row);
    work<true>(c, pass, at);
    if (!g_row) continue;
    const int64_t placed = out_there ? steps - 1 : 0;
    student.store(at.e_s + placed * kLanes, g_row + placed * stride(c.grad) * c.grad.size,
                  stride(c.grad), whole - placed, rest);
  }
}

// Strips [begin, end) of kLanes rows along the inner dimension: lanes are rows.
inline void run_columns(const Call<Real>& c, Pass pass, int64_t begin, int64_t end) {
  const Memory student = memory<true>(c.student.dtype), teacher = memory<true>(c.teacher.dtype);
  const int64_t classes = c.shape.classes, strips = ceil_div(c.shape.inner, kLanes);
  const Scratch scratch(classes);
  Strip at = scratch.strip(classes, kLanes);

  for (int64_t strip = begin; strip < end; ++strip) {
    at.row = strip / strips * c.shape.inner + strip % strips * kLanes;
    at.rows = std::min<int64_t>(kLanes, c.shape.inner - strip % strips * kLanes);
    const auto side_by_side = [&](const RowView& view) {
      return view.inner_stride == 1 && at.rows == kLanes;
    };
    const auto load = [&](const Memory& m, const RowView& view, Real* to) {
      const char* const from = view.at(at.row, c.shape);
      return side_by_side(view)
                 ? m.load(from, view.class_stride, classes, 0, to)
                 : m.gather(from, view.inner_stride, view.class_stride, classes, at.rows, to);
    };
    at.top_s = load(student, c.student, at.own_s).top;
    at.top_t = load(teacher, c.teacher, at.own_t).top;
    at.next_s = at.next_t = at.grad = c.student.at(at.row, c.shape);
    work<false>(c, pass, at);
    if (pass == Pass::kForward) continue;
    for (int64_t l = 0; l < at.rows; ++l) {
      if (c.share_of(at.row + l) != 0) continue;
      // a NaN in an ignored row has a gradient of 0 too
      for (int64_t i = 0; i < classes; ++i) at.e_s[i * kLanes + l] = 0;
    }
    char* const to = c.grad.at(at.row, c.shape);
    if (side_by_side(c.grad)) {
      student.store(at.e_s, to, c.grad.class_stride, classes, 0);
    } else {
      student.scatter(at.e_s, to, c.grad.inner_stride, c.grad.class_stride, classes, at.rows);
    }
  }
}

constexpr rows::Kernel<Call<Real>> kRows{run_rows}, kColumns{run_columns, kLanes};
