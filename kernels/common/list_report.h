// What the lists that ran say: block counts, densities, the lists themselves. Shared by
// the backends' reports.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "common/block_counts.h"
#include "pbs/attention.h"

namespace pbs {

// One row of the lists that ran.
struct RanRow {
  const uint16_t* entries = nullptr;  // ascending; null: every block below `count`
  int32_t count = 0;
};
// Of (sequence, query head, query block of the sequence).
using RanRowOf = std::function<RanRow(int32_t, int32_t, int32_t)>;

// By query head.
std::vector<BlockCounts> CountBlocks(const AttentionGeometry& geometry,
                                     const RanRowOf& row_of);
// Of rows that hold every causal block.
std::vector<BlockCounts> CausalBlocks(const AttentionGeometry& geometry);

// Of (sequence, order head): whether keys were read in their own order, so that tiles
// ended at the diagonal.
using HasOwnOrder = std::function<bool(int32_t, int32_t)>;

// Fills the counts and flops of report->stats, and head_density.
void TellBlocks(const AttentionGeometry& geometry, std::span<const BlockCounts> heads,
                const HasOwnOrder& has_own_order, AttentionReport* report);

// Compact lists, `num_masked` set.
BlockLists RanLists(const AttentionGeometry& geometry, const RanRowOf& row_of);

}  // namespace pbs
