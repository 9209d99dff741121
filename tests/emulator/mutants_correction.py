"""Planted defects of the mean correction and of the guard (mutants.py)."""

COVERAGE = "cuda/selection/measure_coverage.h"
CORRECT = "cuda/attention/correct_by_means.h"
POOL_MEANS = "cuda/attention/pool_means.h"
GUARD = "cuda/selection/guard_heads.h"

CORRECTION_MUTANTS = [
    ("listed_blocks_count_as_means_too", CORRECT, "      if (block < blocks) StoreShared(s_.joins() + block, uint8_t{0});\n", ""),
    ("means_behind_the_last_block_join", CORRECT, "block < blocks && !HasColumns(tile, block)", "block >= blocks || !HasColumns(tile, block)"),
    ("means_of_one_key", CORRECT, "joins ? raised : -kInfinity", "joins ? 0.0f : -kInfinity"),
    ("means_of_the_first_step_join", CORRECT, "first + i / 4 * 8", "i / 4 * 8"),
    ("means_of_the_first_step_again", CORRECT, "LoadMeans(MeanOperand::kKeys, next, blocks)", "LoadMeans(MeanOperand::kKeys, 0, blocks)"),
    ("whole_sum_on_every_lane", CORRECT, "lane_ % 4 == 0 ? 1.0f : 0.0f", "1.0f"),
    ("lse_of_base_two", CORRECT, "lse * kLog2E / a.scale_log2", "lse / a.scale_log2"),
    ("outputs_of_another_lane", CORRECT, "groups = TransposeOfQuad(groups, lane_);\n", ""),
    ("means_of_the_first_head", CORRECT, "FirstMean(params_, tile.order_head, operand)", "FirstMean(params_, 0, operand)"),
    ("means_of_the_first_sequence", CORRECT, "params_.sequences[tile.sequence]", "params_.sequences[0]"),
    ("means_of_blocks_behind_the_tile", CORRECT, "OwnBegin(LoadShared(&s_.tile.first_position) / kBlockTokens,\n                                params_.blocks_per_segment)", "LoadShared(&s_.tile.num_keys) / kBlockTokens"),
    ("corrected_rows_of_the_other_half", CORRECT, "BlockIndex() % kParts * kRows", "0"),
    ("values_over_values_that_are_read", CORRECT, "    SyncThreads();  // keys are there, and nobody reads the last values\n", ""),
    ("keys_over_keys_that_are_read", CORRECT, "    SyncThreads();  // values are there, and nobody reads these keys\n", ""),
    ("means_of_keys_alone", POOL_MEANS, "operand == MeanOperand::kKeys ? params.k : params.v", "params.k"),
    ("means_of_rows_behind_the_last", POOL_MEANS, "first + row < s.k_len ?", "true ?"),
    ("means_of_sorted_keys_in_place", POOL_MEANS, "params.permuted != 0 ?", "false ?"),
    ("means_of_the_neighbouring_block", POOL_MEANS, "(place.item - s.key_block_begin) * kBlockTokens", "place.item * kBlockTokens"),
    ("guard_of_one_lane", GUARD, "SumOfWarp(sum) >=", "sum >="),
    ("every_head_guarded", GUARD, "s.sparse != 0 && !KeepsEnough(params.least, coverage, rows)", "s.sparse != 0"),
    ("guard_of_the_first_sequence", GUARD, "c.total_groups + s.coverage_begin)", "c.total_groups)"),
    ("guard_told_before_it_is_known", GUARD, "    SyncThreads();\n", ""),
    ("guarded_heads_keep_their_coverage", GUARD, "StoreGlobal(coverage + i, 1.0f)", "StoreGlobal(coverage + i, LoadGlobal(coverage + i))"),
    ("guarded_heads_keep_their_counts", GUARD, "static_cast<uint16_t>(end)", "LoadGlobal(params.counts + ListRow(s, c.num_heads, head, query_block))"),
    ("guarded_lists_of_the_first_head", GUARD, "EntryOffset(s, head, query_block,", "EntryOffset(s, 0, query_block,"),
    ("flags_of_the_first_sequence", GUARD, "place.head * c.num_sequences + place.item,", "place.head * c.num_sequences,"),
    ("coverage_measured_once_more_is_lost", COVERAGE, "if (params_.is_measured != 0) return;", "if (params_.is_measured != 0) { if (ThreadIndex() < rows_) Store(ThreadIndex(), 1.0f); return; }"),
]
