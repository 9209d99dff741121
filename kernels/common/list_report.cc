#include "common/list_report.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
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

// What dense attention would compute for `head` on the tiles that ran.
int64_t DenseBlocksOfHead(const AttentionGeometry& g, int32_t head,
                          const HasOwnOrder& has_own_order) {
  int64_t blocks = 0;
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    if (s.num_query_blocks == 0) continue;
    const bool causal = has_own_order(n, g.OrderHead(head));
    for (int32_t i = 0; i < s.num_query_blocks; ++i) {
      const int32_t block = s.first_query_block + i;
      blocks += causal ? block + 1 : g.RowCapacity(s, block);
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
    const int32_t causal = g.sequences[n].first_query_block + i + 1;
    // With gathered keys a row may compute more than all blocks: a share stops at 1.
    const int32_t most = g.RowCapacity(g.sequences[n], causal - 1);
    heads[head].executed += std::min(row.count + row.gathered, most);
    heads[head].lower += std::min(CountBelow(row, causal) + row.gathered, causal);
  });
  return heads;
}

std::vector<BlockCounts> CausalBlocks(const AttentionGeometry& g) {
  const int64_t blocks = CausalBlocksOfAHead(g);
  return {static_cast<size_t>(g.num_heads),
          BlockCounts{.executed = blocks, .lower = blocks}};
}

void TellBlocks(const AttentionGeometry& g, std::span<const BlockCounts> heads,
                const HasOwnOrder& has_own_order, AttentionReport* report) {
  AttentionStats& stats = report->stats;
  stats.causal_blocks = CausalBlocksOfAHead(g) * g.num_heads;
  for (int32_t head = 0; head < g.num_heads; ++head) {
    const BlockCounts& blocks = heads[static_cast<size_t>(head)];
    AttentionStats of_head;
    of_head.executed_blocks = blocks.executed;
    of_head.dense_blocks = DenseBlocksOfHead(g, head, has_own_order);
    report->heads.density.push_back(of_head.Density());
    stats.executed_blocks += of_head.executed_blocks;
    stats.dense_blocks += of_head.dense_blocks;
    stats.lower_blocks += blocks.lower;
  }
  const double block_flops = 4.0 * g.block_size * g.block_size * g.head_dim;
  stats.executed_flops = block_flops * static_cast<double>(stats.executed_blocks);
  stats.dense_flops = block_flops * static_cast<double>(stats.dense_blocks);
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
