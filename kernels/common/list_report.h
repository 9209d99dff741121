// What the lists that ran say: block counts, densities, the lists themselves. Shared by
// the backends' reports.
#pragma once

#include <cstdint>
#include <functional>

#include "pbs/attention.h"

namespace pbs {

// One row of the lists that ran.
struct RanRow {
  const uint16_t* entries = nullptr;  // ascending; null: every block below `count`
  int32_t count = 0;
  // Of them, on or below the diagonal, where that is known without looking.
  int32_t lower = -1;
};
// Of (sequence, query head, query block of the sequence).
using RanRowOf = std::function<RanRow(int32_t, int32_t, int32_t)>;

// Fills the counts and flops of report->stats, and head_density.
void CountBlocks(const AttentionGeometry& geometry, const RanRowOf& row_of,
                 AttentionReport* report);

// Compact lists, `num_masked` set.
BlockLists RanLists(const AttentionGeometry& geometry, const RanRowOf& row_of);

}  // namespace pbs
