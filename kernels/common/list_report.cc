#include "common/list_report.h"

#include <algorithm>
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

int64_t CausalBlocksOfAHead(const AttentionGeometry& g) {
  int64_t blocks = 0;
  for (const SequenceGeometry& s : g.sequences) {
    for (int32_t i = 0; i < s.num_query_blocks; ++i) {
      blocks += s.first_query_block + i + 1;
    }
  }
  return blocks;
}

}  // namespace

std::vector<BlockCounts> CountBlocks(const AttentionGeometry& g,
                                     const RanRowOf& row_of) {
  std::vector<BlockCounts> heads(static_cast<size_t>(g.num_heads));
  ForEachRow(g, [&](int32_t n, int32_t head, int32_t i) {
    const RanRow row = row_of(n, head, i);
    heads[head].executed += row.count;
    heads[head].lower += CountBelow(row, g.sequences[n].first_query_block + i + 1);
  });
  return heads;
}

std::vector<BlockCounts> CausalBlocks(const AttentionGeometry& g) {
  const int64_t blocks = CausalBlocksOfAHead(g);
  return {static_cast<size_t>(g.num_heads), BlockCounts{blocks, blocks}};
}

void TellBlocks(const AttentionGeometry& g, std::span<const BlockCounts> heads,
                AttentionReport* report) {
  AttentionStats& stats = report->stats;
  for (const SequenceGeometry& s : g.sequences) {
    stats.dense_flops += 4.0 * g.head_dim * g.num_heads * s.q_len *
                         (s.query_offset + (s.q_len + 1) / 2.0);
  }
  const int64_t head_causal = CausalBlocksOfAHead(g);
  stats.causal_blocks = head_causal * g.num_heads;
  for (const BlockCounts& head : heads) {
    stats.executed_blocks += head.executed;
    stats.lower_blocks += head.lower;
    report->head_density.push_back(head_causal == 0
                                       ? 1.0
                                       : static_cast<double>(head.executed) /
                                             static_cast<double>(head_causal));
  }
  stats.executed_flops = 4.0 * g.block_size * g.block_size * g.head_dim *
                         static_cast<double>(stats.executed_blocks);
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
