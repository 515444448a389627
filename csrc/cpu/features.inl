// Ends of rows of features, which fill no register; included once per instruction set, with Real
// and Vec.

constexpr int64_t kLanes = Vec::kLanes;

// The first n < kLanes numbers of p, then zeros.
template <class S>
Vec load_first(const S* p, int64_t n) {
  if constexpr (std::is_same_v<S, Real>) {
    return Vec::load_part(p, n, Vec{Real{0}});
  } else {
    S staged[kLanes] = {};
    std::memcpy(staged, p, n * sizeof(S));
    return Vec::load(staged);
  }
}

template <class S>
void store_first(Vec x, S* p, int64_t n) {
  if constexpr (std::is_same_v<S, Real>) {
    x.store_part(p, n);
  } else {
    S staged[kLanes];
    x.store(staged);
    std::memcpy(p, staged, n * sizeof(S));
  }
}
