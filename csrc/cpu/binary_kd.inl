// The vector kernel of binary_kd.cpp, included once per instruction set, inside its namespace and
// region. A block of every input is read in place where it has this type, else
// widened into scratch memory, in L1.
#include "math/binary_kd.inl"

constexpr int64_t kLanes = Vec::kLanes;
constexpr int64_t kChain = 16;  // registers that are added up one after another

struct Scratch {  // 10 KB of floats
  alignas(64) Real s[kBlock], t[kBlock], y[kBlock], factor[kBlock], grad[kBlock];
};

template <class S>
void widen_as(const char* from, int64_t n, Real* to) {
  const S* const p = reinterpret_cast<const S*>(from);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Vec::load(p + i).store(to + i);
  if (whole == n) return;
  S staged[kLanes] = {};
  std::memcpy(staged, p + whole, (n - whole) * sizeof(S));
  Vec::load(staged).store(to + whole);
}

template <class S>
void narrow_as(const Real* from, int64_t n, char* to) {
  S* const p = reinterpret_cast<S*>(to);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Vec::load(from + i).store(p + i);
  if (whole == n) return;
  S staged[kLanes];
  Vec::load(from + whole).store(staged);
  std::memcpy(p + whole, staged, (n - whole) * sizeof(S));
}

inline void fill_up(Real* x, int64_t n, Real by) {
  for (; n % kLanes; ++n) x[n] = by;
}

// Numbers at .. at + n of x, then `fill` up to a whole register.
inline const Real* block_of(const Numbers& x, int64_t at, int64_t n, Real fill, Real* scratch) {
  const char* const from = x.data + at * x.size;
  if (x.dtype == kDtype<Real> && n % kLanes == 0) return reinterpret_cast<const Real*>(from);
  if (x.size == 1) {  // bool and uint8
    for (int64_t i = 0; i < n; ++i) {
      scratch[i] = static_cast<Real>(reinterpret_cast<const uint8_t*>(from)[i]);
    }
  } else if constexpr (std::is_same_v<Real, float>) {
    if (x.dtype == ScalarType::Half) {
      widen_as<Half>(from, n, scratch);
    } else if (x.dtype == ScalarType::BFloat16) {
      widen_as<Bfloat16>(from, n, scratch);
    } else {
      widen_as<Real>(from, n, scratch);
    }
  } else {
    widen_as<Real>(from, n, scratch);
  }
  fill_up(scratch, n, fill);
  return scratch;
}

inline void store_block(const Real* from, int64_t n, const Numbers& to, int64_t at) {
  char* const p = to.data + at * to.size;
  if constexpr (std::is_same_v<Real, float>) {
    if (to.dtype == ScalarType::Half) return narrow_as<Half>(from, n, p);
    if (to.dtype == ScalarType::BFloat16) return narrow_as<Bfloat16>(from, n, p);
  }
  narrow_as<Real>(from, n, p);
}

// The weights of numbers at .. at + n, which start at class `first`; 0 where they are masked.
inline const Real* factors_of(const Call<Real>& c, int64_t at, int64_t first, int64_t n,
                              Real* scratch) {
  const Real* const weights = c.class_weights ? c.class_weights + first : nullptr;
  if (!c.mask) {
    if (n % kLanes == 0) return weights;
    std::copy_n(weights, n, scratch);
  } else {
    const uint8_t* const mask = c.mask + at;
    for (int64_t i = 0; i < n; ++i) scratch[i] = mask[i];
    for (int64_t i = 0; weights && i < n; ++i) scratch[i] *= weights[i];
  }
  fill_up(scratch, n, 0);
  return scratch;
}

// What is multiplied by 0 is not looked at: it may be NaN.
VITKD_INLINE Vec times(Vec x, Vec factor) {
  const Vec zero{Real{0}};
  return select(not_equal(factor, zero), x * factor, zero);
}

// Returns the sums of the losses of whole registers, n numbers; writes their gradient.
template <Pass kPass, Kind kKind, bool kFactors>
Vec run_block(const Real* s, const Real* t, const Real* y, const Real* factor, Real* grad,
              int64_t n, const Factors<Real>& by) {
  const Factors<Vec> f{Vec{by.inv_t}, Vec{by.most},    Vec{by.kd},
                       Vec{by.bce},   Vec{by.kd_grad}, Vec{by.bce_grad}};
  const Vec zero{Real{0}};
  alignas(64) Real e_u[kBlock], e_v[kBlock], e_s[kBlock];
  for (int64_t i = 0; i < n; i += kLanes) {
    const auto e = exponentials<kKind>(Vec::load(s + i), Vec::load(t + i), f.inv_t);
    if constexpr (kKind != Kind::kBce) {
      e.u.store(e_u + i);
      e.v.store(e_v + i);
    }
    if constexpr (kKind == Kind::kBoth || kKind == Kind::kBce) e.s.store(e_s + i);
  }
  Vec total = zero;
  // one long chain of additions would lose digits
  for (int64_t from = 0; from < n; from += kChain * kLanes) {
    Vec sum = zero;
    for (int64_t i = from; i < std::min(from + kChain * kLanes, n); i += kLanes) {
      const Vec label = kKind == Kind::kKd ? zero : Vec::load(y + i);
      const Exponentials e{Vec::load(e_u + i), Vec::load(e_v + i), Vec::load(e_s + i)};
      Number x = number<kKind>(Vec::load(s + i), Vec::load(t + i), label, e, f);
      if constexpr (kFactors) {
        const Vec w = Vec::load(factor + i);
        x = {times(x.loss, w), times(x.grad, w)};
      }
      if constexpr (kPass != Pass::kBackward) sum = sum + x.loss;
      if constexpr (kPass != Pass::kForward) x.grad.store(grad + i);
    }
    total = total + sum;
  }
  return total;
}

using Block = Vec (*)(const Real*, const Real*, const Real*, const Real*, Real*, int64_t,
                      const Factors<Real>&);
template <Pass kPass>
constexpr Block kBlocks[4][2] = {
    {run_block<kPass, Kind::kKd, false>, run_block<kPass, Kind::kKd, true>},
    {run_block<kPass, Kind::kBothAt1, false>, run_block<kPass, Kind::kBothAt1, true>},
    {run_block<kPass, Kind::kBoth, false>, run_block<kPass, Kind::kBoth, true>},
    {run_block<kPass, Kind::kBce, false>, run_block<kPass, Kind::kBce, true>}};

// Parts [begin, end).
void run_parts(const Call<Real>& c, Pass pass, int64_t begin, int64_t end) {
  const auto& blocks = pass == Pass::kForward       ? kBlocks<Pass::kForward>
                       : pass == Pass::kForwardGrad ? kBlocks<Pass::kForwardGrad>
                                                    : kBlocks<Pass::kBackward>;
  const Block block = blocks[static_cast<int>(c.kind)][c.has_factors()];
  // such a class has the loss 0, and adds nothing where a block ends within a register
  constexpr Real kNothing = -std::numeric_limits<Real>::max();
  Scratch scratch;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t start = part * c.length, length = std::min(c.length, c.count - start);
    const Factors<Real> by = c.factors_of(part);
    double sum = 0;
    for (int64_t from = 0; from < length; from += kBlock) {
      const int64_t n = std::min(kBlock, length - from), at = start + from;
      const Real* const s = block_of(c.student, at, n, kNothing, scratch.s);
      const Real* const t = block_of(c.teacher, at, n, kNothing, scratch.t);
      const Real* const y = c.kind == Kind::kKd ? nullptr : block_of(c.labels, at, n, 0, scratch.y);
      const Real* const factor =
          c.has_factors() ? factors_of(c, at, from, n, scratch.factor) : nullptr;
      const bool direct = c.grad.dtype == kDtype<Real> && n % kLanes == 0;
      Real* const grad =
          direct ? reinterpret_cast<Real*>(c.grad.data + at * c.grad.size) : scratch.grad;
      sum += reduce_add(block(s, t, y, factor, grad, ceil_div(n, kLanes) * kLanes, by));
      if (pass != Pass::kForward && !direct) store_block(grad, n, c.grad, at);
    }
    if (pass != Pass::kBackward) c.parts[part] = sum;
  }
}

// The sum of the weights of each part.
void sum_weights(const Call<Real>& c, int64_t begin, int64_t end) {
  Scratch scratch;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t start = part * c.length, length = std::min(c.length, c.count - start);
    c.parts[part] = 0;
    for (int64_t from = 0; from < length; from += kBlock) {
      const int64_t n = std::min(kBlock, length - from);
      const Real* const factor = factors_of(c, start + from, from, n, scratch.factor);
      Vec sum{Real{0}};
      for (int64_t i = 0; i < n; i += kLanes) sum = sum + Vec::load(factor + i);
      c.parts[part] += reduce_add(sum);
    }
  }
}

constexpr Kernels<Real> kKernels{run_parts, sum_weights};
