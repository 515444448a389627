// Every pair of bytes through the addition of each instruction set, with the multipliers given as
// numbers, and zero points: FILE m_a m_b z_a z_b ... The bytes to the file, set by set, and the
// sets' names to standard output.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "int8/kernels/kernels.h"

int main(int count, char** values) {
  using namespace vitkd::int8;
  constexpr int kPairs = 65536;
  std::vector<uint8_t> a(kPairs + kSlack), b(kPairs + kSlack), y(kPairs + kSlack);
  for (int i = 0; i < kPairs; ++i) a[i] = i / 256, b[i] = i % 256;
  std::FILE* file = count > 1 ? std::fopen(values[1], "wb") : nullptr;
  if (file == nullptr) return 1;
  for (vitkd::Isa isa : vitkd::available_isas()) {
    std::puts(vitkd::name(isa));
    for (int i = 2; i + 3 < count; i += 4) {
      const float m_a = std::strtof(values[i], nullptr), m_b = std::strtof(values[i + 1], nullptr);
      const int z_a = std::atoi(values[i + 2]), z_b = std::atoi(values[i + 3]);
      kernels(isa).add(a.data(), z_a, m_a, b.data(), z_b, m_b, {128, 0, 255, 0}, kPairs, y.data());
      std::fwrite(y.data(), 1, kPairs, file);
    }
  }
  return std::fclose(file);
}
