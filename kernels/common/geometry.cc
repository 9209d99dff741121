#include <cstdint>
#include "pbs/attention.h"

namespace pbs {
namespace {

int32_t BlocksOf(int32_t tokens, int32_t block_size) {
  return (tokens + block_size - 1) / block_size;
}

}  // namespace

BandWidths BandWidthsOf(const AttentionProblem& problem) {
  const AttentionOptions& options = problem.options;
  const int32_t head_dim = problem.shape.head_dim;
  return {options.slow_dims > 0 ? options.slow_dims : head_dim / 4 * 3,
          options.fast_dims > 0 ? options.fast_dims : head_dim / 2};
}

AttentionGeometry MakeGeometry(const AttentionProblem& problem) {
  const AttentionShape& shape = problem.shape;
  const AttentionOptions& options = problem.options;
  const bool permutes = Permutes(options);

  AttentionGeometry g;
  g.num_heads = shape.num_heads;
  g.num_kv_heads = shape.num_kv_heads;
  g.group_size = shape.num_heads / shape.num_kv_heads;
  g.num_order_heads = permutes && options.scope == Scope::kQueryHead
                          ? shape.num_heads
                          : shape.num_kv_heads;
  g.head_dim = shape.head_dim;
  g.block_size = options.block_size;
  g.segment_size = permutes ? options.segment_size : options.block_size;
  g.blocks_per_segment = g.segment_size / g.block_size;

  g.sequences.reserve(shape.sequences.size());
  for (const SequenceShape& lengths : shape.sequences) {
    SequenceGeometry s;
    s.q_len = lengths.q_len;
    s.k_len = lengths.k_len;
    s.query_offset = lengths.k_len - lengths.q_len;
    s.q_begin = g.total_q;
    s.k_begin = g.total_k;
    s.num_key_blocks = BlocksOf(s.k_len, g.block_size);
    s.first_query_block = s.query_offset / g.block_size;
    s.num_query_blocks = s.q_len == 0 ? 0 : s.num_key_blocks - s.first_query_block;
    s.slot_begin = g.total_slots;
    s.query_block_begin = g.total_query_blocks;
    s.entries_begin = g.total_entries;
    s.dense = RunsDense(options, s.k_len);
    for (int32_t i = 0; i < s.num_query_blocks; ++i) {
      s.entries_per_head += g.RowCapacity(s, s.first_query_block + i);
    }
    g.total_q += s.q_len;
    g.total_k += s.k_len;
    g.total_slots += static_cast<int64_t>(s.num_key_blocks) * g.block_size;
    g.total_query_blocks += s.num_query_blocks;
    g.total_entries += s.entries_per_head * g.num_heads;
    g.sequences.push_back(s);
  }
  return g;
}

}  // namespace pbs
