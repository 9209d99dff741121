#include "common/list_report.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace pbs {
namespace {

// Entries of a row that lie before block `end`.
int32_t CountBelow(const RanRow& row, int32_t end) {
  if (row.entries == nullptr) return std::min(row.count, end);
  return static_cast<int32_t>(
      std::lower_bound(row.entries, row.entries + row.count, end) - row.entries);
}

template <class Body>
void ForEachRow(const AttentionGeometry& g, Body&& body) {
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    for (int32_t head = 0; head < g.num_heads; ++head) {
      for (int32_t i = 0; i < g.sequences[n].num_query_blocks; ++i) body(n, head, i);
    }
  }
}

}  // namespace

void CountBlocks(const AttentionGeometry& g, const RanRowOf& row_of,
                 AttentionReport* report) {
  AttentionStats& stats = report->stats;
  std::vector<int64_t> executed(static_cast<size_t>(g.num_heads));
  int64_t head_causal = 0;
  for (const SequenceGeometry& s : g.sequences) {
    stats.dense_flops += 4.0 * g.head_dim * g.num_heads * s.q_len *
                         (s.query_offset + (s.q_len + 1) / 2.0);
    for (int32_t i = 0; i < s.num_query_blocks; ++i) {
      head_causal += s.first_query_block + i + 1;
    }
  }
  ForEachRow(g, [&](int32_t n, int32_t head, int32_t i) {
    const RanRow row = row_of(n, head, i);
    executed[head] += row.count;
    const int32_t diagonal = g.sequences[n].first_query_block + i;
    stats.lower_blocks += row.lower >= 0 ? row.lower : CountBelow(row, diagonal + 1);
  });
  stats.causal_blocks = head_causal * g.num_heads;
  stats.executed_blocks = std::accumulate(executed.begin(), executed.end(), int64_t{0});
  stats.executed_flops = 4.0 * g.block_size * g.block_size * g.head_dim *
                         static_cast<double>(stats.executed_blocks);
  for (int64_t blocks : executed) {
    report->head_density.push_back(head_causal == 0
                                       ? 1.0
                                       : static_cast<double>(blocks) /
                                             static_cast<double>(head_causal));
  }
}

BlockLists RanLists(const AttentionGeometry& g, const RanRowOf& row_of) {
  BlockLists lists;
  ForEachRow(g, [&](int32_t n, int32_t head, int32_t i) {
    const RanRow row = row_of(n, head, i);
    const int32_t block = g.sequences[n].first_query_block + i;
    const int32_t own = block / g.blocks_per_segment * g.blocks_per_segment;
    lists.begin.push_back(static_cast<int64_t>(lists.indices.size()));
    lists.count.push_back(static_cast<uint16_t>(row.count));
    lists.num_masked.push_back(static_cast<uint16_t>(row.count - CountBelow(row, own)));
    for (int32_t entry = 0; entry < row.count; ++entry) {
      lists.indices.push_back(row.entries != nullptr ? row.entries[entry]
                                                     : static_cast<uint16_t>(entry));
    }
  });
  return lists;
}

}  // namespace pbs
