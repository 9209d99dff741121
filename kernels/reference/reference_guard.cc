// The guard of coverage_min: a head whose blocks keep too little reads every block.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/reference_select.h"

namespace pbs::reference {
namespace {

// Share of the softmax mass of the query at `position` that the marked blocks hold.
double RowCoverage(const SelectingHead& head, int32_t position, const uint8_t* marks) {
  std::vector<double> mass(static_cast<size_t>(head.s().k_len), -INFINITY);
  for (int32_t slot = 0; slot < head.s().k_len; ++slot) {
    if (head.order[slot] > position) continue;
    double dot = 0;
    for (int32_t d = 0; d < head.g.head_dim; ++d) {
      dot += head.Q(position, d) * head.K(slot, d);
    }
    mass[slot] = dot / std::sqrt(head.g.head_dim);
  }
  Softmax(mass);
  double kept = 0;
  for (int32_t slot = 0; slot < head.s().k_len; ++slot) {
    if (marks[slot / head.g.block_size] != 0) kept += mass[slot];
  }
  return kept;
}

}  // namespace

bool GuardHead(const SelectingHead& head, uint8_t* mask) {
  const SequenceGeometry& s = head.s();
  const int32_t rows = std::min(head.options().coverage_rows, s.q_len);
  double coverage = 0;
  for (int32_t i = 0; i < rows; ++i) {
    const int32_t position = s.query_offset + CoverageRow(i, rows, s.q_len);
    const int32_t query_block = position / head.g.block_size - s.first_query_block;
    coverage += RowCoverage(head, position, mask + query_block * s.num_key_blocks);
  }
  if (coverage / rows >= head.options().coverage_min) return false;
  for (int32_t i = 0; i < s.num_query_blocks; ++i) {
    std::fill_n(mask + i * s.num_key_blocks, head.g.RowCapacity(s, head.Block(i)), 1);
  }
  return true;
}

}  // namespace pbs::reference
