// How the logits of rows are read and written, included once per instruction set, inside its
// namespace and region, which name a Vec of Reals: as [steps][kLanes] Reals, of one row (lanes are
// classes) or of kLanes rows at once (lanes are rows).

constexpr int64_t kLanes = Vec::kLanes;

template <class S>
VITKD_INLINE Vec load_part(const S* p, int64_t n) {
  if constexpr (std::is_same_v<S, Real>) {
    return Vec::load_part(p, n, Vec{-INFINITY});
  } else {
    S staged[kLanes] = {};
    std::memcpy(staged, p, n * sizeof(S));
    return select(Vec::first(n), Vec::load(staged), Vec{-INFINITY});
  }
}

struct Extent {
  Vec top, bottom;
};

VITKD_INLINE Extent no_extent() {
  return {Vec{std::numeric_limits<Real>::lowest()}, Vec{std::numeric_limits<Real>::max()}};
}

// The extent of `steps` vectors `stride` apart, and of `rest` more lanes. They are widened into
// `out`, unless they are Reals next to one another and not to be copied: those are read in place.
template <class S, bool kCopy>
Extent load_block(const void* from, int64_t stride, int64_t steps, int64_t rest, Real* out) {
  const S* p = static_cast<const S*>(from);
  Extent extent = no_extent();
  for (int64_t i = 0; i < steps; ++i) {
    const Vec x = Vec::load(p + i * stride);
    if (stride != kLanes) {
      // the next strip of strided classes is one line further in each class's page
      __builtin_prefetch(p + i * stride + kLanes);
    }
    if (kCopy || !std::is_same_v<S, Real> || stride != kLanes) x.store(out + i * kLanes);
    extent.top = max(x, extent.top);
    extent.bottom = min(x, extent.bottom);
  }
  if (rest) {
    const Vec x = load_part(p + steps * stride, rest);
    x.store(out + steps * kLanes);
    extent.top = max(x, extent.top);
    extent.bottom = min(select(Vec::first(rest), x, extent.bottom), extent.bottom);
  }
  return extent;
}

template <class S>
void store_block(const Real* from, void* to, int64_t stride, int64_t steps, int64_t rest) {
  S* p = static_cast<S*>(to);
  for (int64_t i = 0; i < steps; ++i) Vec::load(from + i * kLanes).store(p + i * stride);
  if (!rest) return;
  const Vec last = Vec::load(from + steps * kLanes);
  if constexpr (std::is_same_v<S, Real>) {
    last.store_part(p + steps * stride, rest);
  } else {
    S staged[kLanes];
    last.store(staged);
    std::memcpy(p + steps * stride, staged, rest * sizeof(S));
  }
}

// The same for the first `lanes` lanes, `lane_stride` apart.
template <class S>
Extent gather_block(const void* from, int64_t lane_stride, int64_t class_stride, int64_t steps,
                    int64_t lanes, Real* out) {
  const S* p = static_cast<const S*>(from);
  Extent extent = no_extent();
  for (int64_t i = 0; i < steps; ++i) {
    S staged[kLanes] = {};
    for (int64_t l = 0; l < lanes; ++l) staged[l] = p[l * lane_stride + i * class_stride];
    const Vec x = load_part(staged, lanes);
    x.store(out + i * kLanes);
    extent.top = max(x, extent.top);
    extent.bottom = min(select(Vec::first(lanes), x, extent.bottom), extent.bottom);
  }
  return extent;
}

template <class S>
void scatter_block(const Real* from, void* to, int64_t lane_stride, int64_t class_stride,
                   int64_t steps, int64_t lanes) {
  S* p = static_cast<S*>(to);
  for (int64_t i = 0; i < steps; ++i) {
    S staged[kLanes];
    Vec::load(from + i * kLanes).store(staged);
    for (int64_t l = 0; l < lanes; ++l) p[l * lane_stride + i * class_stride] = staged[l];
  }
}

struct Memory {  // how a dtype is read and written
  Extent (*load)(const void*, int64_t, int64_t, int64_t, Real*);
  void (*store)(const Real*, void*, int64_t, int64_t, int64_t);
  Extent (*gather)(const void*, int64_t, int64_t, int64_t, int64_t, Real*);
  void (*scatter)(const Real*, void*, int64_t, int64_t, int64_t, int64_t);
};

template <class S, bool kCopy>
constexpr Memory kMemory{load_block<S, kCopy>, store_block<S>, gather_block<S>, scatter_block<S>};

template <bool kCopy = false>
Memory memory([[maybe_unused]] ScalarType dtype) {
  if constexpr (std::is_same_v<Real, double>) {
    return kMemory<double, kCopy>;
  } else {
    switch (dtype) {
      case ScalarType::Half:
        return kMemory<Half, kCopy>;
      case ScalarType::BFloat16:
        return kMemory<Bfloat16, kCopy>;
      default:
        return kMemory<float, kCopy>;
    }
  }
}
