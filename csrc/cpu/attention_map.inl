// The vector kernel of attention_map.cpp, included once per instruction set, inside its namespace
// and region. Matrices have rows of whole vectors: what lies behind dim is 0, scores of keys that
// are masked or not there are kMasked.

constexpr int64_t kLanes = Vec::kLanes;
// Registers: kVectors of a row of b, and as many sums for each row of a. The wider, the fewer rows.
constexpr int kMaxVectors = kLanes == 16 ? 4 : 2;
constexpr int rows_of(int vectors) {
  if (kLanes == 16) return vectors <= 2 ? 12 : vectors == 3 ? 8 : 6;
  return vectors == 1 ? 12 : 6;
}

// Rows that are wanted later, fetched into L2 a few lines at a time beside the arithmetic.
class Ahead {
 public:
  void add(const char* first, int64_t stride, int64_t rows, int64_t bytes) {
    parts_[count_++] = {first, stride, rows, bytes};
  }
  VITKD_INLINE void fetch() {
    for (int i = 0; i < 8 && count_ > 0; ++i) {
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

constexpr int64_t kPanels = -1;

// [rows, steps] x [steps, columns], with any steps through a and b
struct Product {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step;  // kPanels: panels of kMaxVectors columns or fewer, one after another
  float* c;
  int64_t c_row;
  int64_t rows, vectors, steps;
  bool add;  // to what c holds
  bool far;  // c is not in cache
  Ahead* ahead;
};

template <int kRows, int kVectors>
VITKD_INLINE void tile(const Product& t, const float* a, const float* b, int64_t b_step, float* c) {
  Vec sums[kRows][kVectors];
  t.ahead->fetch();
  if (t.far) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c + r * t.c_row + v * kLanes, 1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = Vec{0.0f};
    }
  }
  for (int64_t step = t.steps; step > 0; --step, a += t.a_step, b += b_step) {
    Vec row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = Vec::load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x{a[r * t.a_row]};
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(x, row[v], sums[r][v]);
    }
  }
  // c is added last: one long chain of additions would lose digits
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* const to = c + r * t.c_row + v * kLanes;
      (t.add ? Vec::load(to) + sums[r][v] : sums[r][v]).store(to);
    }
  }
}

template <int kVectors>
__attribute__((noinline)) void panel(const Product& t, const float* b, int64_t b_step, float* c) {
  constexpr int kRows = rows_of(kVectors);
  const float* a = t.a;
  int64_t row = 0;
  for (; row + kRows <= t.rows; row += kRows, a += kRows * t.a_row, c += kRows * t.c_row) {
    tile<kRows, kVectors>(t, a, b, b_step, c);
  }
  if (row + kRows / 2 <= t.rows) {
    tile<kRows / 2, kVectors>(t, a, b, b_step, c);
    row += kRows / 2, a += kRows / 2 * t.a_row, c += kRows / 2 * t.c_row;
  }
  for (; row < t.rows; ++row, a += t.a_row, c += t.c_row) tile<1, kVectors>(t, a, b, b_step, c);
}

// panels of nearly the same width
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t n) : vectors(n), count((n + kMaxVectors - 1) / kMaxVectors) {}
  int64_t first(int64_t panel) const { return vectors * panel / count; }
};

void multiply(const Product& t) {
  const Panels panels(t.vectors);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.first(p), width = panels.first(p + 1) - first;
    const bool packed = t.b_step == kPanels;
    const int64_t b_step = packed ? width * kLanes : t.b_step;
    const float* b = t.b + first * kLanes * (packed ? t.steps : 1);
    float* c = t.c + first * kLanes;
    if constexpr (kMaxVectors == 4) {
      if (width == 4) panel<4>(t, b, b_step, c);
      if (width == 3) panel<3>(t, b, b_step, c);
    }
    if (width == 2) panel<2>(t, b, b_step, c);
    if (width == 1) panel<1>(t, b, b_step, c);
  }
}

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

// rows of floats: the tensor's own where they are whole vectors, else a copy
struct Rows {
  float* data;
  int64_t stride;
};

// [keys, dim] as panels of [dim][keys of the panel]; 0 for keys that are masked or not there
void to_panels(Rows from, const float* bias, int64_t keys, int64_t dim, float* to) {
  const Panels panels((keys + kLanes - 1) / kLanes);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.first(p), width = panels.first(p + 1) - first;
    for (int64_t v = 0; v < width; ++v) {
      const int64_t key = (first + v) * kLanes;
      float* out = to + first * kLanes * dim + v * kLanes;
      for (int64_t d = 0; d < dim; d += kLanes) {
        Vec rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          rows[i] =
              bias[key + i] == 0 ? Vec::load(from.data + (key + i) * from.stride + d) : Vec{0.0f};
        }
        transpose(rows);
        for (int64_t i = 0; i < std::min(kLanes, dim - d); ++i) {
          rows[i].store(out + (d + i) * width * kLanes);
        }
      }
    }
  }
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

bool in_place(const Operand& x, int64_t dim) {
  return x.dtype == ScalarType::Float && dim % kLanes == 0;
}

// A thread's memory for one head at a time.
struct Workspace {
  int64_t stride_s, stride_t;  // of rows of queries and keys
  int64_t columns;             // keys, in whole vectors
  int64_t block;               // queries at once
  int64_t floats = 0;          // of memory
  float *panels_s, *panels_t;  // keys, transposed
  float *s, *t;                // products, then what they become, [block, columns]
  // rows that are not read and written where they are: [keys, stride], [block, stride]
  float *k_s, *k_t, *q_s, *q_t, *d_q, *d_k;
  float* bias;     // [columns]: kMasked where a key does not count
  float* numbers;  // [6, block]: of each row

  Workspace(const Call& c, float* memory) {
    const auto whole = [](int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; };
    stride_s = whole(c.dim_s), stride_t = whole(c.dim_t), columns = whole(c.keys);
    // blocks of nearly the same size, in whole register tiles, whose scores stay in L2
    const int64_t most = std::clamp<int64_t>(kScoreBytes / (8 * columns), 24, 96);
    const int64_t blocks = std::max<int64_t>((c.queries + most - 1) / most, 1);
    block = ((c.queries + blocks - 1) / blocks + 11) / 12 * 12;
    const bool copies_s = !in_place(c.q_s, c.dim_s), copies_t = !in_place(c.q_t, c.dim_t);
    const int64_t keys_s = copies_s * c.keys * stride_s, keys_t = copies_t * c.keys * stride_t;
    const int64_t block_s = copies_s * block * stride_s, block_t = copies_t * block * stride_t;
    const int64_t sizes[] = {columns * stride_s,
                             columns * stride_t,
                             block * columns,
                             block * columns,
                             keys_s,
                             keys_t,
                             block_s,
                             block_t,
                             block_s,
                             keys_s,
                             columns,
                             6 * whole(block)};
    float** const parts[] = {&panels_s, &panels_t, &s,   &t,   &k_s,  &k_t,
                             &q_s,      &q_t,      &d_q, &d_k, &bias, &numbers};
    for (size_t i = 0; i < std::size(sizes); floats += whole(sizes[i++])) {
      *parts[i] = memory == nullptr ? nullptr : memory + floats;
    }
  }
};

int64_t scratch(const Call& c) { return Workspace(c, nullptr).floats; }

struct Head {
  const Call& c;
  Workspace& w;
  int64_t batch, head;
  Rows k_s = {}, q_s = {};
  mutable Ahead ahead = {};

  char* at(const Operand& x, int64_t token) const {
    const int64_t size = x.dtype == ScalarType::Float ? 4 : 2;
    return x.data + (batch * x.batch_stride + head * x.head_stride + token * x.token_stride) * size;
  }
  Rows read(const Operand& x, int64_t token, int64_t rows, int64_t dim, float* copy,
            int64_t stride) const {
    if (in_place(x, dim)) return {reinterpret_cast<float*>(at(x, token)), x.token_stride};
    with_type(x.dtype,
              [&]<class T>() { widen<T>(at(x, token), x.token_stride, rows, dim, copy, stride); });
    return {copy, stride};
  }
  // where a gradient is formed; `write` brings it to where it belongs
  Rows target(const Operand& x, int64_t token, int64_t dim, float* copy, int64_t stride) const {
    return read(x, token, 0, dim, copy, stride);
  }
  void write(const float* from, int64_t stride, int64_t token, int64_t rows, int64_t dim,
             const Operand& x) const {
    if (in_place(x, dim)) return;
    with_type(x.dtype,
              [&]<class T>() { narrow<T>(from, stride, rows, dim, at(x, token), x.token_stride); });
  }

  void expect_next() {
    const Head next{c, w, head + 1 < c.heads ? batch : batch + 1, (head + 1) % c.heads};
    if (next.batch == c.batch) return;
    const auto expect = [&](const Operand& x, int64_t rows, int64_t dim) {
      const int64_t size = x.dtype == ScalarType::Float ? 4 : 2;
      ahead.add(next.at(x, 0), x.token_stride * size, rows, dim * size);
    };
    // the last is fetched first
    expect(c.q_s, c.queries, c.dim_s), expect(c.q_t, c.queries, c.dim_t);
    expect(c.k_t, c.keys, c.dim_t), expect(c.k_s, c.keys, c.dim_s);
  }

  // phase 1: keys as the products of scores want them, and which of them count
  void load_keys() {
    for (int64_t key = 0; key < w.columns; ++key) {
      const bool keep = key < c.keys && (!c.key_mask || c.key_mask[batch * c.keys + key]);
      w.bias[key] = keep ? 0.0f : kMasked;
    }
    k_s = read(c.k_s, 0, c.keys, c.dim_s, w.k_s, w.stride_s);
    to_panels(k_s, w.bias, c.keys, c.dim_s, w.panels_s);
    const Rows k_t = read(c.k_t, 0, c.keys, c.dim_t, w.k_t, w.stride_t);
    to_panels(k_t, w.bias, c.keys, c.dim_t, w.panels_t);
  }

  // phase 2: products of `rows` queries, from the first on, with all keys
  void score(int64_t first, int64_t rows) {
    const int64_t vectors = w.columns / kLanes;
    const Rows q_t = read(c.q_t, first, rows, c.dim_t, w.q_t, w.stride_t);
    q_s = read(c.q_s, first, rows, c.dim_s, w.q_s, w.stride_s);
    multiply({q_t.data, q_t.stride, 1, w.panels_t, kPanels, w.t, w.columns, rows, vectors, c.dim_t,
              false, false, &ahead});
    multiply({q_s.data, q_s.stride, 1, w.panels_s, kPanels, w.s, w.columns, rows, vectors, c.dim_s,
              false, false, &ahead});
  }

  // Phase 3, forward: losses, statistics and, where kGrad, the gradients of the scores, in w.t.
  template <Kind kKind, bool kGrad>
  void forward(int64_t first, int64_t rows) const {
    constexpr bool kKeep = kKind == Kind::kKl && kGrad;
    // where exponentials alone are wanted, scores may as well count in powers of two
    constexpr float kUnit = kKeep ? kLog2E : 1;
    const float factor_t = c.factor_t * kUnit, factor_s = c.factor_s * kUnit;
    const int64_t n = w.columns, row0 = (batch * c.heads + head) * c.queries + first;
    const int64_t stride = (w.block + kLanes - 1) / kLanes * kLanes;
    float *const max_s = w.numbers, *const max_t = max_s + stride, *const sum_s = max_t + stride;
    float *const sum_t = sum_s + stride, *const loss = sum_t + stride, *const log_s = loss + stride;
    constexpr int64_t kTogether = 8;  // rows that stay in L1, whose reductions overlap
    for (int64_t begin = 0; begin < rows; begin += kTogether) {
      const int64_t end = std::min(begin + kTogether, rows);
      for (int64_t i = begin; i < end; ++i) {
        max_t[i] = largest(w.t + i * n, w.bias, factor_t, n);
        max_s[i] = largest(w.s + i * n, w.bias, factor_s, n);
      }
      for (int64_t i = begin; i < end; ++i) {
        const RowSums sums = sums_of<kKeep>(w.bias, w.t + i * n, factor_t, max_t[i], w.s + i * n,
                                            factor_s, max_s[i], n);
        sum_s[i] = sums.s, sum_t[i] = sums.t, loss[i] = sums.dot;
      }
    }
    for (int64_t i = 0; i < rows; i += kLanes) {
      const Vec e_s = Vec::load(sum_s + i), e_t = Vec::load(sum_t + i);
      const Vec l_s = log(e_s), l_t = log(e_t);
      (Vec::load(loss + i) / e_t + l_s - l_t).store(loss + i);
      l_s.store(log_s + i);
      if constexpr (!kKeep) l_t.store(sum_t + i);
    }
    for (int64_t i = 0; i < rows; ++i) {
      float *const t = w.t + i * n, *const s = w.s + i * n;
      RowTerms terms{loss[i], 0};
      if constexpr (kKind != Kind::kKl) {
        terms = terms_of<kKind>(c, w.bias, t, s, max_t[i], max_s[i], sum_t[i], log_s[i], n);
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

  // phase 3, backward
  template <Kind kKind>
  void backward(int64_t first, int64_t rows) const {
    const int64_t n = w.columns, row0 = (batch * c.heads + head) * c.queries + first;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = row0 + i;
      float *const t = w.t + i * n, *const s = w.s + i * n;
      terms_of<kKind>(c, w.bias, t, s, c.stats[c.rows() + row], c.stats[row], 0, 0, n);
      const float grad = c.row_grad(row);
      combine(t, grad, s, grad * c.stats[2 * c.rows() + row], n);
    }
  }

  // phase 4: both gradients from those of the scores
  void spread(int64_t first, int64_t rows) const {
    constexpr int64_t kNear = 256;  // keys that stay near
    const int64_t vectors = w.stride_s / kLanes;
    const Rows d_q = target(c.d_q, first, c.dim_s, w.d_q, w.stride_s);
    for (int64_t key = 0; key < c.keys; key += kNear) {
      multiply({w.t + key, w.columns, 1, k_s.data + key * k_s.stride, k_s.stride, d_q.data,
                d_q.stride, rows, vectors, std::min(kNear, c.keys - key), key > 0, key == 0,
                &ahead});
    }
    write(d_q.data, d_q.stride, first, rows, c.dim_s, c.d_q);
    const Rows d_k = target(c.d_k, 0, c.dim_s, w.d_k, w.stride_s);
    multiply({w.t, 1, w.columns, q_s.data, q_s.stride, d_k.data, d_k.stride, c.keys, vectors, rows,
              first > 0, first == 0, &ahead});
    if (first + rows == c.queries) write(d_k.data, d_k.stride, 0, c.keys, c.dim_s, c.d_k);
  }

  template <Kind kKind, Pass kPass>
  void run() {
    load_keys();
    expect_next();
    for (int64_t first = 0; first < c.queries; first += w.block) {
      const int64_t rows = std::min(w.block, c.queries - first);
      score(first, rows);
      if constexpr (kPass == Pass::kBackward) {
        backward<kKind>(first, rows);
      } else {
        forward<kKind, kPass == Pass::kForwardGrad>(first, rows);
      }
      if constexpr (kPass != Pass::kForward) spread(first, rows);
    }
  }
};

// heads [begin, end) of batch * heads
template <Kind kKind, Pass kPass>
void run_heads(const Call& c, int64_t begin, int64_t end, float* memory) {
  Workspace workspace(c, memory);
  for (int64_t i = begin; i < end; ++i) {
    Head head{c, workspace, i / c.heads, i % c.heads};
    head.template run<kKind, kPass>();
  }
}
