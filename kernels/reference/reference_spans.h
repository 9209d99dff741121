// The keys that queries read one by one (minference): columns, and spans along
// diagonals. Private to the reference.
#pragma once

#include <cstdint>
#include <vector>

#include "reference/reference_select.h"

namespace pbs::reference {

// What the queries that choose pay to a head's columns and distances; infinity for the
// first columns and distances.
LineMasses MeasureLastQueries(const SelectingHead& head);
// The largest of both.
ChosenLines ChooseLines(const SelectingHead& head);

// By key slot, [k_len]: how the query at `position` reads it.
struct LineSlots {
  std::vector<bool> in_span;
  std::vector<bool> as_column;  // outside of the spans
};
LineSlots SlotsOfLines(const ChosenLines& lines, int32_t k_len, int32_t position);

// The blocks that the spans of a query block's rows touch.
Kept KeepSpans(const SelectingHead& head, const ChosenLines& lines);

// Blocks that the columns of a head fill when they are gathered.
inline int64_t GatheredBlocks(const ChosenLines& lines, int32_t block_size) {
  return (static_cast<int64_t>(lines.columns.size()) + block_size - 1) / block_size;
}

}  // namespace pbs::reference
