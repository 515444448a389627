// The loops of jitter.cpp, which the compiler makes vectors of, included once per instruction set.

constexpr int kBlock = 64;  // pixels whose greys stay in registers and L1

VITKD_INLINE uint8_t cut(float value) {
  const float inside = value < 0.0F ? 0.0F : value > 255.0F ? 255.0F : value;
  return static_cast<uint8_t>(static_cast<int>(inside));
}

// image [pixels, 3] = from + factor * (image - from)
void blend(uint8_t* image, int64_t pixels, int from, float factor) {
  const auto start = static_cast<float>(from);
  for (int64_t i = 0; i < 3 * pixels; ++i) {
    image[i] = cut(start + factor * static_cast<float>(image[i] - from));
  }
}

VITKD_INLINE void greys(const uint8_t* image, int count, int32_t* out) {
  for (int i = 0; i < count; ++i) {
    const uint8_t* pixel = image + 3 * i;
    out[i] = (kRed * pixel[0] + kGreen * pixel[1] + kBlue * pixel[2] + kHalf) >> 16;
  }
}

int64_t sum_of_greys(const uint8_t* image, int64_t pixels) {
  int64_t sum = 0;
  for (int64_t i = 0; i < pixels; i += kBlock) {
    int32_t grey[kBlock], part = 0;
    const int count = static_cast<int>(pixels - i < kBlock ? pixels - i : kBlock);
    greys(image + 3 * i, count, grey);
    for (int k = 0; k < count; ++k) part += grey[k];
    sum += part;
  }
  return sum;
}

void saturate(uint8_t* image, int64_t pixels, float factor) {
  for (int64_t i = 0; i < pixels; i += kBlock) {
    int32_t grey[kBlock], from[3 * kBlock];
    const int count = static_cast<int>(pixels - i < kBlock ? pixels - i : kBlock);
    uint8_t* block = image + 3 * i;
    greys(block, count, grey);
    for (int k = 0; k < count; ++k) from[3 * k] = from[3 * k + 1] = from[3 * k + 2] = grey[k];
    for (int k = 0; k < 3 * count; ++k) {
      block[k] = cut(static_cast<float>(from[k]) + factor * static_cast<float>(block[k] - from[k]));
    }
  }
}

constexpr Loops kLoops{blend, sum_of_greys, saturate};
