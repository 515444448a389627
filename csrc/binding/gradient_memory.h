// Memory of large gradients on the CPU, used again once nobody holds their storage. The C library
// maps a block of this size anew for each call, or does not, as its history has it; mapped anew,
// the kernel zeroes it page by page, which takes longer than a loss and its gradient. Two blocks
// are kept at most, each of less than kLargest.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

#include "binding/common.h"

namespace vitkd {

class GradientMemory {
 public:
  static constexpr int64_t kSmallest = 1 << 20, kLargest = 1 << 29;  // bytes

  // Uninitialised, contiguous, on the CPU.
  static Tensor empty(std::vector<int64_t> sizes, ScalarType dtype, int64_t bytes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
    return torch::stable::from_blob(take(bytes)->data(), sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    dtype, &give);
  }

 private:
  static constexpr int64_t kAlign = 64;
  struct alignas(kAlign) Block {
    int64_t bytes;
    void* data() { return this + 1; }
  };

  static Block* take(int64_t bytes) {
    for (auto& slot : kept_) {
      Block* const block = slot.exchange(nullptr);
      if (block && block->bytes >= bytes && block->bytes <= 2 * bytes) return block;
      if (block) keep(block);
    }
    const int64_t whole = (ceil_div(bytes, kAlign) + 1) * kAlign;
    void* const memory = std::aligned_alloc(kAlign, whole);
    if (!memory) throw std::bad_alloc();
    auto* const block = new (memory) Block;
    block->bytes = bytes;
    return block;
  }

  static void keep(Block* block) {
    for (auto& slot : kept_) {
      block = slot.exchange(block);
      if (!block) return;
    }
    std::free(block);  // the one that was kept for longest
  }

  static void give(void* data) { keep(static_cast<Block*>(data) - 1); }

  static inline std::atomic<Block*> kept_[2];
};

}  // namespace vitkd
