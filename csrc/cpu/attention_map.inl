// What attention_map.cpp's vector kernels share, included once per instruction set, inside its
// namespace and region: rows in and out, losses and slopes, and the order of a head's phases.
// Products of matrices are left to a class (attention_map_fma.inl, attention_map_amx.inl). Rows of
// scores are whole vectors; those of keys that are masked or not there are kMasked.

constexpr int64_t kLanes = Vec::kLanes;

// Rows that are wanted later, fetched into L2 a few lines at a time beside the arithmetic.
class Ahead {
 public:
  void add(const char* first, int64_t stride, int64_t rows, int64_t bytes) {
    parts_[count_++] = {first, stride, rows, bytes};
  }
  VITKD_INLINE void fetch(int lines) {
    for (; lines > 0 && count_ > 0; --lines) {
      Part& p = parts_[count_ - 1];
      __builtin_prefetch(p.row + at_, 0, 2);
      at_ += 64;
      if (at_ < p.bytes) continue;
      at_ = 0;
      p.row += p.stride;
      if (--p.rows <= 0) --count_;
    }
  }

 private:
  struct Part {
    const char* row;
    int64_t stride, rows, bytes;
  };
  Part parts_[4];
  int count_ = 0;
  int64_t at_ = 0;
};

// n <= kLanes elements, and 0 behind them
template <class T>
VITKD_INLINE Vec load_row(const T* p, int64_t n) {
  if (n >= kLanes) return Vec::load(p);
  T staged[kLanes] = {};
  std::memcpy(staged, p, n * sizeof(T));
  return Vec::load(staged);
}

// [rows, dim] as [rows, stride] floats
template <class T>
void widen(const void* from, int64_t token_stride, int64_t rows, int64_t dim, float* to,
           int64_t stride) {
  const T* p = static_cast<const T*>(from);
  for (int64_t row = 0; row < rows; ++row, p += token_stride, to += stride) {
    for (int64_t d = 0; d < dim; d += kLanes) load_row(p + d, dim - d).store(to + d);
  }
}

// [rows, stride] floats as [rows, dim]
template <class T>
void narrow(const float* from, int64_t stride, int64_t rows, int64_t dim, void* to,
            int64_t token_stride) {
  T* p = static_cast<T*>(to);
  for (int64_t row = 0; row < rows; ++row, p += token_stride, from += stride) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      if (dim - d >= kLanes) {
        Vec::load(from + d).store(p + d);
      } else {
        T staged[kLanes];
        Vec::load(from + d).store(staged);
        std::memcpy(p + d, staged, (dim - d) * sizeof(T));
      }
    }
  }
}

template <class F>
void with_type(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Float) f.template operator()<float>();
  if (dtype == ScalarType::Half) f.template operator()<Half>();
  if (dtype == ScalarType::BFloat16) f.template operator()<Bfloat16>();
}

// from a product to a score
VITKD_INLINE Vec score_at(const float* x, const float* bias, Vec factor, int64_t i) {
  return fma(Vec::load(x + i), factor, Vec::load(bias + i));
}

VITKD_INLINE float largest(const float* x, const float* bias, float factor, int64_t n) {
  Vec most{-FLT_MAX};
  for (int64_t i = 0; i < n; i += kLanes) most = max(score_at(x, bias, Vec{factor}, i), most);
  return reduce_max(most);
}

struct RowSums {  // exponentials are relative to the maxima
  float s, t;
  float dot;  // sum e_t (a - max_t - b + max_s), for kl
};

// With kKeep, scores count in powers of two, and products make way for the exponentials.
template <bool kKeep>
VITKD_INLINE RowSums sums_of(const float* bias, float* t, float factor_t, float max_t, float* s,
                             float factor_s, float max_s, int64_t n) {
  const Vec top_t{max_t}, top_s{max_s};
  Vec sum_t{0.0f}, sum_s{0.0f}, dot{0.0f};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec a = score_at(t, bias, Vec{factor_t}, i) - top_t;
    const Vec b = score_at(s, bias, Vec{factor_s}, i) - top_s;
    const Vec e_t = kKeep ? exp2(a) : exp(a), e_s = kKeep ? exp2(b) : exp(b);
    sum_t = sum_t + e_t;
    sum_s = sum_s + e_s;
    dot = fma(e_t, a - b, dot);
    if constexpr (kKeep) e_t.store(t + i), e_s.store(s + i);
  }
  return {reduce_add(sum_s), reduce_add(sum_t), reduce_add(dot) * (kKeep ? kLn2 : 1)};
}

struct RowTerms {
  float loss, centre;
};

// Scores, less `top` and then less the logarithm of their sum, are the logarithms of attention; of
// the student's attention q is left, of the teacher's w (attention_map.h).
template <Kind kKind>
VITKD_INLINE RowTerms terms_of(const Call& c, const float* bias, float* t, float* s, float top_t,
                               float top_s, float log_t, float log_s, int64_t n) {
  Vec loss{0.0f}, centre{0.0f};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec log_p = score_at(t, bias, Vec{c.factor_t}, i) - Vec{top_t} - Vec{log_t};
    const Vec log_q = score_at(s, bias, Vec{c.factor_s}, i) - Vec{top_s} - Vec{log_s};
    const Vec p = exp(log_p), q = exp(log_q);
    Vec w;
    if constexpr (kKind == Kind::kKl) {
      w = q - p;
      loss = fma(p, log_p - log_q, loss);
    } else if constexpr (kKind == Kind::kReverseKl) {
      w = q * (log_q - log_p);
      loss = loss + w;
    } else if constexpr (kKind == Kind::kJs) {
      const Vec log_m = log(p + q) - Vec{kLn2};
      const auto apart = not_equal(p, q);  // both may have underflown
      w = select(apart, Vec{0.5f} * q * (log_q - log_m), Vec{0.0f});
      loss = loss + w + select(apart, Vec{0.5f} * p * (log_p - log_m), Vec{0.0f});
    } else {
      const Vec d = q - p;
      w = Vec{2.0f} * q * d;
      loss = fma(d, d, loss);
    }
    centre = centre + w;
    w.store(t + i);
    q.store(s + i);
  }
  return {reduce_add(loss), kKind == Kind::kKl ? 0.0f : reduce_add(centre)};
}

// the gradient of the scores, x * fx - y * fy, in place of x
VITKD_INLINE void combine(float* x, float fx, const float* y, float fy, int64_t n) {
  const Vec f{fx}, g{fy};
  for (int64_t i = 0; i < n; i += kLanes) {
    (Vec::load(x + i) * f - Vec::load(y + i) * g).store(x + i);
  }
}

constexpr int64_t whole(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Takes parts of some memory, or only counts them.
struct Memory {
  float* data;  // may be nullptr
  int64_t floats;
  float* take(int64_t n) {
    float* const part = data == nullptr ? nullptr : data + floats;
    floats += whole(n);
    return part;
  }
};

// A head, and the scores of some of its queries with all keys.
struct Head {
  const Call& c;
  int64_t columns;  // keys, in whole vectors
  int64_t block;    // queries at once
  float *s, *t;     // products, then what they become, [block, columns]
  float* bias;      // [columns]: kMasked where a key does not count
  int64_t batch, head;
  Ahead ahead;

  char* at(const Operand& x, int64_t token) const {
    const int64_t size = x.dtype == ScalarType::Float ? 4 : 2;
    return x.data + (batch * x.batch_stride + head * x.head_stride + token * x.token_stride) * size;
  }
};

// Products has
//   kStep                        a block of queries is a multiple of it
//   Products(call, block, columns, memory)
//   load_keys(head)              phase 1: prepares a head's keys
//   score(head, first, rows)     phase 2: products of `rows` queries with all keys
//   spread(head, first, rows)    phase 4: d_q and d_k from the gradients of scores, in head.t
template <class Products>
struct Worker {
  const Call& c;
  Head head;
  float* numbers;  // [6, block]: of each row
  Products products;

  Worker(const Call& call, Memory& memory)
      : c(call),
        head(sized(call, memory)),
        numbers(memory.take(6 * whole(head.block))),
        products(call, head.block, head.columns, memory) {}

  static Head sized(const Call& c, Memory& memory) {
    const int64_t columns = whole(c.keys);
    // blocks of nearly the same size, in whole register tiles, whose scores stay in L2
    const int64_t most = std::clamp<int64_t>(kScoreBytes / (8 * columns), 24, 96);
    const int64_t blocks = std::max<int64_t>((c.queries + most - 1) / most, 1);
    constexpr int64_t kStep = Products::kStep;
    const int64_t block = ((c.queries + blocks - 1) / blocks + kStep - 1) / kStep * kStep;
    float* const s = memory.take(block * columns);
    float* const t = memory.take(block * columns);
    return {c, columns, block, s, t, memory.take(columns), 0, 0, {}};
  }

  void expect_next() {
    Head next = head;
    if (++next.head == c.heads) ++next.batch, next.head = 0;
    if (next.batch == c.batch) return;
    const auto expect = [&](const Operand& x, int64_t rows, int64_t dim) {
      const int64_t size = x.dtype == ScalarType::Float ? 4 : 2;
      head.ahead.add(next.at(x, 0), x.token_stride * size, rows, dim * size);
    };
    // the last is fetched first
    expect(c.q_s, c.queries, c.dim_s), expect(c.q_t, c.queries, c.dim_t);
    expect(c.k_t, c.keys, c.dim_t), expect(c.k_s, c.keys, c.dim_s);
  }

  // Phase 3, forward: losses, statistics and, where kGrad, the gradients of the scores, in head.t.
  template <Kind kKind, bool kGrad>
  void forward(int64_t first, int64_t rows) const {
    constexpr bool kKeep = kKind == Kind::kKl && kGrad;
    // where exponentials alone are wanted, scores may as well count in powers of two
    constexpr float kUnit = kKeep ? kLog2E : 1;
    const float factor_t = c.factor_t * kUnit, factor_s = c.factor_s * kUnit;
    const int64_t n = head.columns, row0 = row_of(first);
    const int64_t stride = whole(head.block);
    float *const max_s = numbers, *const max_t = max_s + stride, *const sum_s = max_t + stride;
    float *const sum_t = sum_s + stride, *const loss = sum_t + stride, *const log_s = loss + stride;
    constexpr int64_t kTogether = 16;  // rows that stay in L1, whose reductions overlap
    for (int64_t begin = 0; begin < rows; begin += kTogether) {
      const int64_t end = std::min(begin + kTogether, rows);
      for (int64_t i = begin; i < end; ++i) {
        max_t[i] = largest(head.t + i * n, head.bias, factor_t, n);
        max_s[i] = largest(head.s + i * n, head.bias, factor_s, n);
      }
      for (int64_t i = begin; i < end; ++i) {
        const RowSums sums = sums_of<kKeep>(head.bias, head.t + i * n, factor_t, max_t[i],
                                            head.s + i * n, factor_s, max_s[i], n);
        sum_s[i] = sums.s, sum_t[i] = sums.t, loss[i] = sums.dot;
      }
      for (int64_t i = begin; i < end; i += kLanes) {
        const Vec e_s = Vec::load(sum_s + i), e_t = Vec::load(sum_t + i);
        const Vec l_s = log(e_s), l_t = log(e_t);
        (Vec::load(loss + i) / e_t + l_s - l_t).store(loss + i);
        l_s.store(log_s + i);
        if constexpr (!kKeep) l_t.store(sum_t + i);
      }
      for (int64_t i = begin; i < end; ++i) {
        float *const t = head.t + i * n, *const s = head.s + i * n;
        RowTerms terms{loss[i], 0};
        if constexpr (kKind != Kind::kKl) {
          terms = terms_of<kKind>(c, head.bias, t, s, max_t[i], max_s[i], sum_t[i], log_s[i], n);
        }
        if (c.loss != nullptr) c.loss[row0 + i] = terms.loss * c.loss_factor;
        if (!kKeep && c.stats != nullptr) {
          c.stats[row0 + i] = max_s[i] + log_s[i];
          c.stats[c.rows() + row0 + i] = max_t[i] + sum_t[i];
          c.stats[2 * c.rows() + row0 + i] = terms.centre;
        }
        if constexpr (kKeep) {
          combine(t, -c.grad_factor / sum_t[i], s, -c.grad_factor / sum_s[i], n);
        } else if constexpr (kGrad) {
          combine(t, c.grad_factor, s, c.grad_factor * terms.centre, n);
        }
      }
    }
  }

  // phase 3, backward
  template <Kind kKind>
  void backward(int64_t first, int64_t rows) const {
    const int64_t n = head.columns, row0 = row_of(first);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = row0 + i;
      float *const t = head.t + i * n, *const s = head.s + i * n;
      terms_of<kKind>(c, head.bias, t, s, c.stats[c.rows() + row], c.stats[row], 0, 0, n);
      const float grad = c.row_grad(row);
      combine(t, grad, s, grad * c.stats[2 * c.rows() + row], n);
    }
  }

  int64_t row_of(int64_t query) const {
    return (head.batch * c.heads + head.head) * c.queries + query;
  }

  template <Kind kKind, Pass kPass>
  void run(int64_t index) {
    head.batch = index / c.heads, head.head = index % c.heads, head.ahead = {};
    for (int64_t key = 0; key < head.columns; ++key) {
      const bool keep = key < c.keys && (!c.key_mask || c.key_mask[head.batch * c.keys + key]);
      head.bias[key] = keep ? 0.0f : kMasked;
    }
    products.load_keys(head);
    expect_next();
    for (int64_t first = 0; first < c.queries; first += head.block) {
      const int64_t rows = std::min(head.block, c.queries - first);
      products.score(head, first, rows);
      if constexpr (kPass == Pass::kBackward) {
        backward<kKind>(first, rows);
      } else {
        forward<kKind, kPass == Pass::kForwardGrad>(first, rows);
      }
      if constexpr (kPass != Pass::kForward) products.spread(head, first, rows);
    }
  }
};

template <class Products>
int64_t scratch(const Call& c) {
  Memory memory{nullptr, 0};
  Worker<Products> worker(c, memory);
  return memory.floats;
}

// heads [begin, end) of batch * heads
template <class Products, Kind kKind, Pass kPass>
void run_heads(const Call& c, int64_t begin, int64_t end, float* scratch) {
  Memory memory{scratch, 0};
  Worker<Products> worker(c, memory);
  for (int64_t i = begin; i < end; ++i) worker.template run<kKind, kPass>(i);
}
