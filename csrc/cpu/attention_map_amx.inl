// attention_map's products of 16-bit rows on AMX tiles. A tdpbf16ps does 16 x 16 x 32 multiply-adds
// of bf16, added in float32, in 16 cycles, 16 times what FMAs do. A bfloat16 number is one part of
// a product, a float16 one the sum of two, exactly, and the gradient of a score of three. (float32
// rows would need six products of parts; these draw so much power that the clock falls, and were
// no faster than FMAs.)
//
// All operands are kept as tiles, 16 rows of 16 pairs of bf16, the parts of a tile one after
// another. A pair holds entries i and i + 16 of 32 along the summed dimension, in the rows of a
// left operand and in the columns of a right one, which takes a shift and an or.

constexpr int64_t kSide = 16, kDeep = 32;      // of a tile: rows, columns and what is summed over
constexpr int64_t kTileWords = kSide * kSide;  // of 4 bytes
constexpr int kSlopeParts = 3;                 // of a gradient of a score

constexpr int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

// x as a sum of parts, each in the upper half of its word, whose lower half is 0. The first is no
// larger than the largest bf16, where rounding up would give Inf. What a part cannot hold of a rest
// that is subnormal is dropped: tiles take such numbers for 0. Inf and NaN have a part that is NaN,
// or Inf, where there is more than one.
template <int kParts>
VITKD_INLINE void split(Vec x, __m512i* part) {
  part[0] = _mm512_castps_si512(x.v);
  if constexpr (kParts > 1) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const __m512 largest = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f0000));
    constexpr int kSmaller = 2;  // of two magnitudes, with the sign of the first
    part[0] = _mm512_castps_si512(_mm512_range_ps(x.v, largest, kSmaller));
    part[0] = _mm512_and_si512(_mm512_add_epi32(part[0], _mm512_set1_epi32(0x8000)), upper);
    __m512 rest = x.v;
    for (int i = 1; i < kParts; ++i) {
      rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(part[i - 1]));
      part[i] = _mm512_and_si512(_mm512_castps_si512(rest), upper);
    }
  }
}

VITKD_INLINE __m512i pair(__m512i low, __m512i high) {
  return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
}

// the parts of pairs of x and y to row `row` of a tile
template <int kParts>
VITKD_INLINE void store_pairs(Vec x, Vec y, uint32_t* tile, int64_t row) {
  __m512i low[kParts], high[kParts];
  split<kParts>(x, low), split<kParts>(y, high);
  for (int i = 0; i < kParts; ++i) {
    _mm512_store_si512(tile + i * kTileWords + row * kSide, pair(low[i], high[i]));
  }
}

// n elements, and 0 behind them; n may be negative
template <class T>
VITKD_INLINE Vec load_some(const T* p, int64_t n) {
  return n > 0 ? load_row(p, n) : Vec{0.0f};
}

// [rows, dim] as a left operand [rows / 16][dim / 32]
template <class T, int kParts>
void left_tiles(const T* p, int64_t stride, int64_t rows, int64_t dim, uint32_t* to) {
  const int64_t deep = tiles(dim, kDeep);
  for (int64_t row = 0; row < rows; ++row, p += stride) {
    for (int64_t i = 0; i < deep; ++i) {
      const int64_t d = i * kDeep;
      store_pairs<kParts>(load_some(p + d, dim - d), load_some(p + d + kSide, dim - d - kSide),
                          to + (row / kSide * deep + i) * kParts * kTileWords, row % kSide);
    }
  }
}

// [keys, dim], transposed, as a right operand [keys / 16][dim / 32]; 0 where there is a bias
template <class T, int kParts>
void transposed_right_tiles(const T* p, int64_t stride, const float* bias, int64_t keys,
                            int64_t dim, uint32_t* to) {
  for (int64_t key = 0; key < keys; key += kSide) {
    for (int64_t d = 0; d < dim; d += kDeep, to += kParts * kTileWords) {
      Vec rows[kParts][kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        const T* const row = p + (key + i) * stride;
        const int64_t n = bias[key + i] == 0 ? dim : 0;
        __m512i low[kParts], high[kParts];
        split<kParts>(load_some(row + d, n - d), low);
        split<kParts>(load_some(row + d + kSide, n - d - kSide), high);
        for (int k = 0; k < kParts; ++k) rows[k][i] = _mm512_castsi512_ps(pair(low[k], high[k]));
      }
      for (int k = 0; k < kParts; ++k) {
        transpose(rows[k]);
        for (int64_t i = 0; i < kSide; ++i) {
          rows[k][i].store(reinterpret_cast<float*>(to + k * kTileWords + i * kSide));
        }
      }
    }
  }
}

// [keys, dim] as a right operand [keys / 32][dim / 16]
template <class T, int kParts>
void right_tiles(const T* p, int64_t stride, const float* bias, int64_t keys, int64_t dim,
                 uint32_t* to) {
  const auto load = [&](int64_t key, int64_t d) __attribute__((always_inline)) {
    const bool counts = key < keys && bias[key] == 0;
    return load_some(p + key * stride + d, counts ? dim - d : 0);
  };
  for (int64_t key = 0; key < keys; key += kDeep) {
    for (int64_t d = 0; d < dim; d += kSide, to += kParts * kTileWords) {
      for (int64_t i = 0; i < kSide; ++i) {
        store_pairs<kParts>(load(key + i, d), load(key + kSide + i, d), to, i);
      }
    }
  }
}

// [rows, dim], transposed, as a left operand [rows / 32][dim / 16]
template <class T, int kParts>
void transposed_left_tiles(const T* p, int64_t stride, int64_t rows, int64_t dim, uint32_t* to) {
  for (int64_t row = 0; row < rows; row += kDeep) {
    for (int64_t d = 0; d < dim; d += kSide, to += kParts * kTileWords) {
      Vec low[kSide], high[kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t l = row + i, h = l + kSide;
        low[i] = load_some(p + l * stride + d, l < rows ? dim - d : 0);
        high[i] = load_some(p + h * stride + d, h < rows ? dim - d : 0);
      }
      transpose(low), transpose(high);
      for (int64_t i = 0; i < kSide; ++i) store_pairs<kParts>(low[i], high[i], to, i);
    }
  }
}

// [rows, columns] as a left operand [rows / 16][columns / 32] and as a right one
// [rows / 32][columns / 16], 0 behind its end
void both_tiles(const float* x, int64_t rows, int64_t columns, uint32_t* left, uint32_t* right) {
  const int64_t deep = tiles(columns, kDeep), wide = columns / kSide;
  constexpr int64_t kWords = kSlopeParts * kTileWords;
  for (int64_t row = 0; row < rows; row += kDeep) {
    for (int64_t i = 0; i < kSide; ++i) {
      const int64_t l = row + i, h = l + kSide;
      for (int64_t column = 0; column < columns; column += kDeep) {
        const bool more = column + kSide < columns;
        const auto load = [&](int64_t r, int64_t at, bool there) __attribute__((always_inline)) {
          return there && r < rows ? Vec::load(x + r * columns + at) : Vec{0.0f};
        };
        __m512i ll[kSlopeParts], lh[kSlopeParts], hl[kSlopeParts], hh[kSlopeParts];
        split<kSlopeParts>(load(l, column, true), ll);
        split<kSlopeParts>(load(l, column + kSide, more), lh);
        split<kSlopeParts>(load(h, column, true), hl);
        split<kSlopeParts>(load(h, column + kSide, more), hh);
        uint32_t* const to_left = left + (row / kSide * deep + column / kDeep) * kWords + i * kSide;
        uint32_t* const to_right =
            right + (row / kDeep * wide + column / kSide) * kWords + i * kSide;
        for (int k = 0; k < kSlopeParts; ++k) {
          uint32_t* const a = to_left + k * kTileWords;
          uint32_t* const b = to_right + k * kTileWords;
          _mm512_store_si512(a, pair(ll[k], lh[k]));
          _mm512_store_si512(a + deep * kWords, pair(hl[k], hh[k]));
          _mm512_store_si512(b, pair(ll[k], hl[k]));
          if (more) _mm512_store_si512(b + kWords, pair(lh[k], hh[k]));
        }
      }
    }
  }
}

// c [rows][columns] = a [rows][deep] x b [deep][columns], in tiles
struct TileProduct {
  const uint32_t* a;
  int64_t a_row, a_step;  // words from one tile to the next
  const uint32_t* b;
  int64_t b_column, b_step;
  float* c;
  int64_t c_row, c_column, c_stride;  // floats from tile to tile, and from row to row in one
  int64_t rows, columns, deep;
  bool add;  // to what c holds
  Ahead* ahead;
};

// Tiles 0 to 2: sums; 3 to 5: parts of a; 6 and 7: a part of b. The product of parts i and j is
// left out where i + j > 2: it is below 2^-24.
template <int kPart, int kPartsA, int kColumns>
VITKD_INLINE void multiply_part(const uint32_t* b, int64_t b_column) {
  constexpr bool kThird = kPartsA > 2 && kPart == 0, kSecond = kPartsA > 1 && kPart < 2;
  b += kPart * kTileWords;
  _tile_loadd(6, b, 64);
  if constexpr (kColumns > 1) _tile_loadd(7, b + b_column, 64);
  // the smallest products first
  if constexpr (kThird) _tile_dpbf16ps(0, 5, 6);
  if constexpr (kThird && kColumns > 1) _tile_dpbf16ps(1, 5, 7);
  if constexpr (kSecond) _tile_dpbf16ps(0, 4, 6);
  if constexpr (kSecond && kColumns > 1) _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(0, 3, 6);
  if constexpr (kColumns > 1) _tile_dpbf16ps(1, 3, 7);
  if constexpr (kColumns > 2) {
    _tile_loadd(6, b + 2 * b_column, 64);
    if constexpr (kThird) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kSecond) _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(2, 3, 6);
  }
}

template <int kPartsA, int kPartsB, int kColumns>
VITKD_INLINE void multiply_tile(const TileProduct& t, int64_t row, int64_t column) {
  const uint32_t* a = t.a + row * t.a_row;
  const uint32_t* b = t.b + column * t.b_column;
  float* const c = t.c + row * t.c_row + column * t.c_column;
  const int64_t c_bytes = t.c_stride * 4;
  if (t.add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColumns > 1) _tile_loadd(1, c + t.c_column, c_bytes);
    if constexpr (kColumns > 2) _tile_loadd(2, c + 2 * t.c_column, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kColumns > 1) _tile_zero(1);
    if constexpr (kColumns > 2) _tile_zero(2);
  }
  for (int64_t i = 0; i < t.deep; ++i, a += t.a_step, b += t.b_step) {
    _tile_loadd(3, a, 64);
    if constexpr (kPartsA > 1) _tile_loadd(4, a + kTileWords, 64);
    if constexpr (kPartsA > 2) _tile_loadd(5, a + 2 * kTileWords, 64);
    if constexpr (kPartsB > 2) multiply_part<2, kPartsA, kColumns>(b, t.b_column);
    if constexpr (kPartsB > 1) multiply_part<1, kPartsA, kColumns>(b, t.b_column);
    multiply_part<0, kPartsA, kColumns>(b, t.b_column);
    t.ahead->fetch(6);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kColumns > 1) _tile_stored(1, c + t.c_column, c_bytes);
  if constexpr (kColumns > 2) _tile_stored(2, c + 2 * t.c_column, c_bytes);
}

// `columns` of b stay in L1 while rows of a pass by; one column alone would wait for its sums
template <int kPartsA, int kPartsB>
void multiply_tiles(const TileProduct& t) {
  const auto pass = [&]<int kColumns>(int64_t column) __attribute__((always_inline)) {
    for (int64_t row = 0; row < t.rows; ++row) {
      multiply_tile<kPartsA, kPartsB, kColumns>(t, row, column);
    }
  };
  int64_t column = 0;
  for (; t.columns - column > 3 || t.columns - column == 2; column += 2) {
    pass.template operator()<2>(column);
  }
  if (t.columns - column == 3) pass.template operator()<3>(column);
  if (t.columns - column == 1) pass.template operator()<1>(column);
}

constexpr int parts_of(ScalarType dtype) { return dtype == ScalarType::Half ? 2 : 1; }

// f<T, parts>
template <class F>
void with_parts(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Half) f.template operator()<Half, parts_of(ScalarType::Half)>();
  if (dtype == ScalarType::BFloat16) {
    f.template operator()<Bfloat16, parts_of(ScalarType::BFloat16)>();
  }
}

struct Tiles {
  static constexpr int64_t kStep = kDeep;
  const Call& c;
  uint32_t *scores_t, *scores_s;    // right operands of scores: keys, transposed
  uint32_t *queries_t, *queries_s;  // left ones
  uint32_t *keys, *queries;         // of gradients: keys, queries transposed
  uint32_t *slopes_left, *slopes_right;
  float* d_q;  // [block, dim]
  float* d_k;  // transposed, [dim / 16][keys / 16] tiles

  Tiles(const Call& call, int64_t block, int64_t columns, Memory& memory) : c(call) {
    const auto take = [&](int64_t rows, int64_t deep, int parts) {
      return reinterpret_cast<uint32_t*>(memory.take(rows * deep * parts * kTileWords));
    };
    const int parts_s = parts_of(c.q_s.dtype), parts_t = parts_of(c.q_t.dtype);
    const int64_t wide = columns / kSide, deep = tiles(columns, kDeep);
    const int64_t dim_s = tiles(c.dim_s, kSide), deep_s = tiles(c.dim_s, kDeep);
    const int64_t high = block / kSide, deep_t = tiles(c.dim_t, kDeep);
    scores_t = take(wide, deep_t, parts_t), scores_s = take(wide, deep_s, parts_s);
    queries_t = take(high, deep_t, parts_t), queries_s = take(high, deep_s, parts_s);
    keys = take(dim_s, deep, parts_s), queries = take(dim_s, block / kDeep, parts_s);
    slopes_left = take(high, deep, kSlopeParts);
    slopes_right = take(wide, block / kDeep, kSlopeParts);
    d_q = memory.take(block * kSide * dim_s), d_k = memory.take(kTileWords * dim_s * wide);
    if (memory.data != nullptr) _tile_loadconfig(&kWholeTiles);
  }
  ~Tiles() { _tile_release(); }

  template <class T>
  static T* row(const Head& head, const Operand& x, int64_t token) {
    return reinterpret_cast<T*>(head.at(x, token));
  }

  void load_keys(const Head& head) {
    with_parts(c.k_t.dtype, [&]<class T, int kParts>() {
      transposed_right_tiles<T, kParts>(row<T>(head, c.k_t, 0), c.k_t.token_stride, head.bias,
                                        head.columns, c.dim_t, scores_t);
    });
    with_parts(c.k_s.dtype, [&]<class T, int kParts>() {
      const T* const k_s = row<T>(head, c.k_s, 0);
      const int64_t stride = c.k_s.token_stride;
      transposed_right_tiles<T, kParts>(k_s, stride, head.bias, head.columns, c.dim_s, scores_s);
      right_tiles<T, kParts>(k_s, stride, head.bias, head.columns, c.dim_s, keys);
    });
  }

  void score(Head& head, int64_t first, int64_t rows) const {
    left(head, c.q_t, c.dim_t, first, rows, queries_t);
    left(head, c.q_s, c.dim_s, first, rows, queries_s);
    // one after another: after a pause tiles take a microsecond to be at full speed
    multiply(head, c.q_t, c.dim_t, rows, queries_t, scores_t, head.t);
    multiply(head, c.q_s, c.dim_s, rows, queries_s, scores_s, head.s);
  }

  void left(const Head& head, const Operand& x, int64_t dim, int64_t first, int64_t rows,
            uint32_t* to) const {
    with_parts(x.dtype, [&]<class T, int kParts>() {
      left_tiles<T, kParts>(row<T>(head, x, first), x.token_stride, rows, dim, to);
    });
  }

  void multiply(Head& head, const Operand& x, int64_t dim, int64_t rows, const uint32_t* left,
                const uint32_t* right, float* to) const {
    const int64_t n = head.columns, deep = tiles(dim, kDeep);
    with_parts(x.dtype, [&]<class T, int kParts>() {
      constexpr int64_t kWords = kParts * kTileWords;
      multiply_tiles<kParts, kParts>({left, deep * kWords, kWords, right, deep * kWords, kWords, to,
                                      kSide * n, kSide, n, tiles(rows, kSide), n / kSide, deep,
                                      false, &head.ahead});
    });
  }

  void spread(Head& head, int64_t first, int64_t rows) const {
    const int64_t n = head.columns, wide = n / kSide, deep = tiles(n, kDeep);
    const int64_t dim = tiles(c.dim_s, kSide);
    constexpr int64_t kAll = kSlopeParts * kTileWords;
    both_tiles(head.t, rows, n, slopes_left, slopes_right);
    with_parts(c.q_s.dtype, [&]<class T, int kParts>() {
      constexpr int64_t kWords = kParts * kTileWords;
      transposed_left_tiles<T, kParts>(row<T>(head, c.q_s, first), c.q_s.token_stride, rows,
                                       c.dim_s, queries);
      multiply_tiles<kSlopeParts, kParts>(
          {slopes_left, deep * kAll, kAll, keys, kWords, dim * kWords, d_q, kSide * dim * kSide,
           kSide, dim * kSide, tiles(rows, kSide), dim, deep, false, &head.ahead});
      multiply_tiles<kParts, kSlopeParts>({queries, kWords, dim * kWords, slopes_right, kAll,
                                           wide * kAll, d_k, wide * kTileWords, kTileWords, kSide,
                                           dim, wide, tiles(rows, kDeep), first > 0, &head.ahead});
      narrow<T>(d_q, dim * kSide, rows, c.dim_s, row<T>(head, c.d_q, first), c.d_q.token_stride);
      if (first + rows == c.queries) {
        for (int64_t key = 0; key < c.keys; key += kSide) write_keys<T>(head, key);
      }
    });
  }

  // d_k of 16 keys, transposed again; by now d_q has been written
  template <class T>
  void write_keys(const Head& head, int64_t key) const {
    const int64_t rows = std::min(kSide, c.keys - key);
    for (int64_t d = 0; d < c.dim_s; d += kSide) {
      const float* const tile = d_k + (d / kSide * head.columns + key) * kSide;
      Vec lines[kSide];
      for (int64_t i = 0; i < kSide; ++i) lines[i] = Vec::load(tile + i * kSide);
      transpose(lines);
      for (int64_t i = 0; i < kSide; ++i) lines[i].store(d_q + i * kSide);
      narrow<T>(d_q, kSide, rows, std::min(kSide, c.dim_s - d), row<T>(head, c.d_k, key) + d,
                c.d_k.token_stride);
    }
  }
};
