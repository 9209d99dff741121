// Key order: the permutation half of PBS-Attn (arXiv 2510.21270, section 3.2).
//
// Threading: stateless. Memory: allocates nothing.
#pragma once

#include <cstdint>
#include <span>

namespace pbs {

// Sorts the keys of every whole segment by falling importance; of equal importance the
// lower position comes first. Keys after the last whole segment stay in place.
//
//   importance [k_len / segment_size * segment_size]  finite, >= 0
//   scratch    [segment_size]
//   order      [k_len]  out: original position of the key in each slot
void SortSegments(std::span<const float> importance, int32_t segment_size,
                  std::span<uint64_t> scratch, std::span<int32_t> order);

}  // namespace pbs
