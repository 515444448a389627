// attention_map's products by FMAs on register tiles, included once per instruction set.

// Registers: kVectors of a row of b, and as many sums for each row of a. The wider, the fewer rows.
constexpr int kMaxVectors = kLanes == 16 ? 4 : 2;
constexpr int rows_of(int vectors) {
  if (kLanes == 16) return vectors <= 2 ? 12 : vectors == 3 ? 8 : 6;
  return vectors == 1 ? 12 : 6;
}

constexpr int64_t kPanels = -1;

// steps whose products are added up before they are added to c: one long chain of additions loses
// digits
constexpr int64_t kChain = 64;

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
  t.ahead->fetch(8);
  if (t.far) {
    // of the tile after the next: one may be done before memory answers
    float* const later = c + 2 * kRows * t.c_row;
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(later + r * t.c_row + v * kLanes, 1);
    }
  }
  bool add = t.add;
  for (int64_t left = t.steps; left > 0; left -= kChain, add = true) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = Vec{0.0f};
      }
    }
    for (int64_t step = std::min(left, kChain); step > 0; --step, a += t.a_step, b += b_step) {
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
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* const to = c + r * t.c_row + v * kLanes;
        (add ? Vec::load(to) + sums[r][v] : sums[r][v]).store(to);
      }
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

bool in_place(const Operand& x, int64_t dim) {
  return x.dtype == ScalarType::Float && dim % kLanes == 0;
}

struct Fma {
  static constexpr int64_t kStep = 12;
  const Call& c;
  int64_t stride_s, stride_t;  // of rows of queries and keys
  float *panels_s, *panels_t;  // keys, transposed
  // rows that are not read and written where they are: [keys, stride], [block, stride]
  float *k_s, *k_t, *q_s, *q_t, *d_q, *d_k;
  Rows keys_s = {}, queries_s = {};

  Fma(const Call& call, int64_t block, int64_t columns, Memory& memory)
      : c(call), stride_s(whole(c.dim_s)), stride_t(whole(c.dim_t)) {
    panels_s = memory.take(columns * stride_s), panels_t = memory.take(columns * stride_t);
    const bool copies_s = !in_place(c.q_s, c.dim_s), copies_t = !in_place(c.q_t, c.dim_t);
    k_s = memory.take(copies_s * c.keys * stride_s),
    k_t = memory.take(copies_t * c.keys * stride_t);
    q_s = memory.take(copies_s * block * stride_s), q_t = memory.take(copies_t * block * stride_t);
    d_q = memory.take(copies_s * block * stride_s), d_k = memory.take(copies_s * c.keys * stride_s);
  }

  static Rows read(const Head& head, const Operand& x, int64_t token, int64_t rows, int64_t dim,
                   float* copy, int64_t stride) {
    if (in_place(x, dim)) return {reinterpret_cast<float*>(head.at(x, token)), x.token_stride};
    with_type(x.dtype, [&]<class T>() {
      widen<T>(head.at(x, token), x.token_stride, rows, dim, copy, stride);
    });
    return {copy, stride};
  }
  // where a gradient is formed; `write` brings it to where it belongs
  static Rows target(const Head& head, const Operand& x, int64_t token, int64_t dim, float* copy,
                     int64_t stride) {
    return read(head, x, token, 0, dim, copy, stride);
  }
  static void write(const Head& head, Rows from, int64_t token, int64_t rows, int64_t dim,
                    const Operand& x) {
    if (in_place(x, dim)) return;
    with_type(x.dtype, [&]<class T>() {
      narrow<T>(from.data, from.stride, rows, dim, head.at(x, token), x.token_stride);
    });
  }

  void load_keys(const Head& head) {
    keys_s = read(head, c.k_s, 0, c.keys, c.dim_s, k_s, stride_s);
    to_panels(keys_s, head.bias, c.keys, c.dim_s, panels_s);
    to_panels(read(head, c.k_t, 0, c.keys, c.dim_t, k_t, stride_t), head.bias, c.keys, c.dim_t,
              panels_t);
  }

  void score(Head& head, int64_t first, int64_t rows) {
    const int64_t n = head.columns, vectors = n / kLanes;
    const Rows queries_t = read(head, c.q_t, first, rows, c.dim_t, q_t, stride_t);
    queries_s = read(head, c.q_s, first, rows, c.dim_s, q_s, stride_s);
    multiply({queries_t.data, queries_t.stride, 1, panels_t, kPanels, head.t, n, rows, vectors,
              c.dim_t, false, false, &head.ahead});
    multiply({queries_s.data, queries_s.stride, 1, panels_s, kPanels, head.s, n, rows, vectors,
              c.dim_s, false, false, &head.ahead});
  }

  void spread(Head& head, int64_t first, int64_t rows) const {
    constexpr int64_t kNear = 256;  // keys that stay near
    const int64_t n = head.columns, vectors = stride_s / kLanes;
    const Rows to_q = target(head, c.d_q, first, c.dim_s, d_q, stride_s);
    for (int64_t key = 0; key < c.keys; key += kNear) {
      multiply({head.t + key, n, 1, keys_s.data + key * keys_s.stride, keys_s.stride, to_q.data,
                to_q.stride, rows, vectors, std::min(kNear, c.keys - key), key > 0, key == 0,
                &head.ahead});
    }
    write(head, to_q, first, rows, c.dim_s, c.d_q);
    const Rows to_k = target(head, c.d_k, 0, c.dim_s, d_k, stride_s);
    multiply({head.t, 1, n, queries_s.data, queries_s.stride, to_k.data, to_k.stride, c.keys,
              vectors, rows, first > 0, first == 0, &head.ahead});
    if (first + rows == c.queries) write(head, to_k, 0, c.keys, c.dim_s, c.d_k);
  }
};
