// Rows of logits to and from scratch memory, for the kernels that keep one there; included once per
// instruction set. A row in scratch memory has padded(n) numbers: it ends on whole registers,
// filled up with -inf.

constexpr int64_t kLanes = Vec::kLanes;

template <class S>
bool load_as(const void* from, int64_t n, float* to) {
  const S* const p = static_cast<const S*>(from);
  const Vec masked{-INFINITY};
  Vec bottom{FLT_MAX};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec x = Vec::load(p + i);
    x.store(to + i);
    bottom = min(x, bottom);
  }
  if (i < n) {
    S staged[kLanes] = {};
    std::memcpy(staged, p + i, (n - i) * sizeof(S));
    const Vec x = Vec::load(staged);
    bottom = min(select(Vec::first(n - i), x, bottom), bottom);
    select(Vec::first(n - i), x, masked).store(to + i);
    i += kLanes;
  }
  for (; i < padded(n); i += kLanes) masked.store(to + i);
  return any_equal(bottom, masked);
}

inline bool load(const void* from, ScalarType dtype, int64_t n, float* to) {
  switch (dtype) {
    case ScalarType::Half:
      return load_as<Half>(from, n, to);
    case ScalarType::BFloat16:
      return load_as<Bfloat16>(from, n, to);
    default:
      return load_as<float>(from, n, to);
  }
}

inline float largest(const float* x, int64_t n) {
  Vec top{-FLT_MAX}, other = top;
  for (int64_t i = 0; i < padded(n); i += 2 * kLanes) {
    top = max(Vec::load(x + i), top);
    if (kLanes < kPadding || i + kLanes < padded(n)) other = max(Vec::load(x + i + kLanes), other);
  }
  return reduce_max(max(top, other));
}

template <class S>
void store_as(const float* from, void* to, int64_t n) {
  S* const p = static_cast<S*>(to);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Vec::load(from + i).store(p + i);
  if (i == n) return;
  S staged[kLanes];
  Vec::load(from + i).store(staged);
  std::memcpy(p + i, staged, (n - i) * sizeof(S));
}

inline void store(const float* from, void* to, ScalarType dtype, int64_t n) {
  dtype == ScalarType::Half ? store_as<Half>(from, to, n) : store_as<Bfloat16>(from, to, n);
}
