#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "pbs/block_mask.h"

namespace pbs {
namespace {

// Calls visit(sequence, head, query block index, mask offset of its row) in row order.
template <class Visitor>
void ForEachRow(const AttentionGeometry& g, Visitor&& visit) {
  int64_t mask_offset = 0;
  for (const SequenceGeometry& s : g.sequences) {
    for (int32_t head = 0; head < g.num_heads; ++head) {
      for (int32_t i = 0; i < s.num_query_blocks; ++i) {
        visit(s, s.first_query_block + i, mask_offset);
        mask_offset += s.num_key_blocks;
      }
    }
  }
}

void FinishRow(const AttentionGeometry& g, int32_t query_block, int64_t begin,
               BlockLists& lists) {
  const int32_t own_begin = query_block / g.blocks_per_segment * g.blocks_per_segment;
  const auto first = lists.indices.begin() + begin;
  const auto own =
      std::lower_bound(first, lists.indices.end(), static_cast<uint16_t>(own_begin));
  lists.begin.push_back(begin);
  lists.count.push_back(static_cast<uint16_t>(lists.indices.end() - first));
  lists.num_masked.push_back(static_cast<uint16_t>(lists.indices.end() - own));
}

}  // namespace

int64_t MaskBytes(const AttentionGeometry& geometry) {
  int64_t bytes = 0;
  for (const SequenceGeometry& s : geometry.sequences) {
    bytes += static_cast<int64_t>(geometry.num_heads) * s.num_query_blocks *
             s.num_key_blocks;
  }
  return bytes;
}

std::vector<uint8_t> ExpandMask(const AttentionGeometry& geometry,
                                const BlockListsView& lists) {
  std::vector<uint8_t> mask(static_cast<size_t>(MaskBytes(geometry)));
  int64_t row = 0;
  ForEachRow(geometry, [&](const SequenceGeometry&, int32_t, int64_t mask_offset) {
    for (uint16_t block : lists.Row(row)) mask[mask_offset + block] = 1;
    ++row;
  });
  return mask;
}

StatusOr<BlockLists> ListsFromMask(const AttentionGeometry& geometry,
                                   std::span<const uint8_t> mask) {
  if (static_cast<int64_t>(mask.size()) != MaskBytes(geometry)) {
    return InvalidArgument("block_mask has " + std::to_string(mask.size()) +
                           " bytes; heads x query blocks x key blocks are " +
                           std::to_string(MaskBytes(geometry)));
  }
  const auto odd =
      std::find_if(mask.begin(), mask.end(), [](uint8_t b) { return b > 1; });
  if (odd != mask.end()) {
    return InvalidArgument("block_mask holds " + std::to_string(*odd) + " at byte " +
                           std::to_string(odd - mask.begin()) +
                           "; only 0 and 1 are valid");
  }
  BlockLists lists;
  ForEachRow(geometry,
             [&](const SequenceGeometry& s, int32_t query_block, int64_t mask_offset) {
               const auto begin = static_cast<int64_t>(lists.indices.size());
               for (int32_t block = 0; block < s.num_key_blocks; ++block) {
                 if (mask[mask_offset + block] != 0) {
                   lists.indices.push_back(static_cast<uint16_t>(block));
                 }
               }
               FinishRow(geometry, query_block, begin, lists);
             });
  return lists;
}

BlockLists CausalLists(const AttentionGeometry& geometry) {
  BlockLists lists;
  ForEachRow(geometry, [&](const SequenceGeometry&, int32_t query_block, int64_t) {
    const auto begin = static_cast<int64_t>(lists.indices.size());
    for (int32_t block = 0; block <= query_block; ++block) {
      lists.indices.push_back(static_cast<uint16_t>(block));
    }
    FinishRow(geometry, query_block, begin, lists);
  });
  return lists;
}

}  // namespace pbs
