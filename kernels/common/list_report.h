// Reports about the lists that ran: block counts, densities, the lists themselves. The
// backends share it.
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
  const uint16_t* entries = nullptr;  // ascending; null: all blocks below `count`
  int32_t count = 0;
  // Blocks of gathered keys that were read too. Their keys lie on or below the
  // diagonal.
  int32_t gathered = 0;
};
// Gives the row of (sequence, query head, query block of the sequence).
using RanRowOf = std::function<RanRow(int32_t, int32_t, int32_t)>;

// Counts of each query head.
std::vector<BlockCounts> CountBlocks(const AttentionGeometry& geometry,
                                     const RanRowOf& row_of);
// Counts of each query head for rows that hold every causal block.
std::vector<BlockCounts> CausalBlocks(const AttentionGeometry& geometry);

// True when keys of (sequence, order head) were read in their original order, so that
// tiles ended at the diagonal.
using HasOwnOrder = std::function<bool(int32_t, int32_t)>;

// Fills the counts and flops of report->stats, and report->heads.density.
void TellBlocks(const AttentionGeometry& geometry, std::span<const BlockCounts> heads,
                const HasOwnOrder& has_own_order, AttentionReport* report);

// Compact lists with `num_masked` set.
BlockLists RanLists(const AttentionGeometry& geometry, const RanRowOf& row_of);

}  // namespace pbs
