// The keys of a block that a group of query rows reads, in one word (docs/KERNELS.md,
// "Columns and diagonals").
#pragma once

#include <cstdint>

#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

constexpr int kPartKeys = 128;  // keys of a block

// A part is [0, head), [begin, end) and [tail, 128) of a block's keys: spans are at
// least 64 keys long and apart, so that one at most lies inside of a block. Head has
// bits 0 to 7, begin 8 to 14, end 15 to 21, tail 22 to 29.
constexpr uint32_t kNoPart = uint32_t{kPartKeys} << 22;
constexpr uint32_t kWholePart = kNoPart | kPartKeys;
// The chosen columns of the block are not read here, but in the gathered blocks.
constexpr uint32_t kColumnsApart = 1u << 30;

// Adds the keys [begin, end) of a span, counted from the block's first key.
PBS_DEVICE uint32_t WithSpan(uint32_t part, int begin, int end) {
  if (begin <= 0)
    return part | static_cast<uint32_t>(end < kPartKeys ? end : kPartKeys);
  if (end >= kPartKeys) {
    return (part & ~(0xFFu << 22)) | static_cast<uint32_t>(begin) << 22;
  }
  return part | static_cast<uint32_t>(begin) << 8 | static_cast<uint32_t>(end) << 15;
}
// The first `count` keys.
PBS_DEVICE uint32_t PrefixPart(int count) {
  if (count <= 0) return kNoPart;
  return kNoPart | static_cast<uint32_t>(count < kPartKeys ? count : kPartKeys);
}

PBS_DEVICE uint32_t BitsBelow(int count) {
  if (count <= 0) return 0;
  return count >= 32 ? 0xFFFFFFFFu : (1u << count) - 1;
}
// Bit i: key 32 `word` + i is in the part.
PBS_DEVICE uint32_t PartWord(uint32_t part, int word) {
  const int first = word * 32;
  const auto below = [&](int shift, uint32_t bits) {
    return BitsBelow(static_cast<int>(part >> shift & bits) - first);
  };
  return below(0, 0xFF) | (below(15, 0x7F) & ~below(8, 0x7F)) | ~below(22, 0xFF);
}

}  // namespace pbs::cuda
