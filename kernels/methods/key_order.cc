#include "methods/key_order.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <span>

namespace pbs {

void SortSegments(std::span<const float> importance, int32_t segment_size,
                  std::span<uint64_t> scratch, std::span<int32_t> order) {
  const auto body = static_cast<int32_t>(importance.size());
  for (int32_t begin = 0; begin < body; begin += segment_size) {
    for (int32_t i = 0; i < segment_size; ++i) {
      // Bits of a non-negative float grow with it: complement them to sort downwards.
      const uint32_t falling = ~std::bit_cast<uint32_t>(importance[begin + i]);
      scratch[i] = (static_cast<uint64_t>(falling) << 32) | static_cast<uint32_t>(i);
    }
    std::sort(scratch.begin(), scratch.begin() + segment_size);
    for (int32_t i = 0; i < segment_size; ++i) {
      order[begin + i] = begin + static_cast<int32_t>(scratch[i] & 0xFFFFFFFFu);
    }
  }
  std::iota(order.begin() + body, order.end(), body);
}

}  // namespace pbs
