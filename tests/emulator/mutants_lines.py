"""Planted defects of selection by columns and diagonals (mutants.py)."""

GATHER = "cuda/selection/gather_keys.h"
MASS_CUT = "cuda/selection/mass_cut.h"
BLOCK_VALUES = "cuda/tiles/block_values.h"
TILES = "cuda/selection/order_tiles.h"
COVERAGE = "cuda/selection/measure_coverage.h"
CORRECT = "cuda/attention/correct_by_means.h"
SLOTS = "cuda/selection/slot_keys.h"
LINES = "cuda/selection/measure_lines.h"
CHOOSE = "cuda/selection/choose_lines.h"
GRID = "cuda/selection/select_grid.h"
WITHIN = "cuda/selection/mass_within.h"
DIAGONALS = "cuda/selection/diagonals.h"
CHOOSE_KEYS = "cuda/selection/choose_key_lines.h"
SPANS = "cuda/selection/list_spans.h"
COLUMNS = "cuda/selection/gather_columns.h"
PART = "cuda/tiles/block_part.h"

# minference
KEY_LINE_MUTANTS = [
    ("lines_of_as_many_queries_as_blocks_have", LINES, "s.q_len < queries ? s.q_len : queries", "s.q_len < kProxies ? s.q_len : kProxies"),
    ("lines_of_the_first_order_head", SLOTS, "(int64_t{order_head} * params.copied_blocks", "(int64_t{0} * params.copied_blocks"),
    ("distances_of_one_chunk", DIAGONALS, "x >= keys && x % keys < kProxies", "false"),
    ("distances_from_the_first_diagonal", CHOOSE_KEYS, "sequence_.k_len - 1 - distance", "distance"),
    ("distances_of_others_not_awaited", CHOOSE_KEYS, "      StoreDistances();\n      SyncThreads();\n", "      StoreDistances();\n"),
    ("few_distances_forced", CHOOSE_KEYS, "forced_ = kForcedDistances;", "forced_ = kForcedColumns;"),
    ("counts_overwritten_while_read", CHOOSE_KEYS, "    turn_ ^= 1;", "    //"),
    ("one_line_less", CHOOSE_KEYS, "if (count >= wanted) {", "if (count + 1 >= wanted) {"),
    ("columns_of_warps_before_forgotten", CHOOSE_KEYS, "larger_before + told.before % kTie +", "larger_before +"),
    ("spans_joined_too_rarely", SPANS, "next > end + kRowGroup", "next > end"),
    ("spans_of_the_first_group", SPANS, "block_ * kBlockTokens + lane_ * kRowGroup", "block_ * kBlockTokens"),
    ("first_span_before_the_first_key", SPANS, "    if (end < kRowGroup) end = kRowGroup;\n", ""),
    ("last_span_forgotten", SPANS, "    MarkSpan(begin, end);\n    return begin;", "    return begin;"),
    ("columns_read_twice", SPANS, "      if (block < column_ends_[g]) part |= kColumnsApart;\n", ""),
    ("gathered_blocks_of_the_first_head", SPANS, "GatheredBlock(params_, sequence_, head_)", "GatheredBlock(params_, sequence_, 0)"),
    ("columns_of_the_first_group", SPANS, "(a > b ? a : b)", "a"),
    ("parts_of_the_first_group", SPANS, "LoadShared(parts_ + g * own_end_ + block)", "LoadShared(parts_ + block)"),
    ("sinks_read_in_part", SPANS, "return block < params_.sink_blocks ||\n", "return false ||\n"),
    ("values_of_columns_are_keys", COLUMNS, "Copy(slots, params.permuted_v,", "Copy(slots, params.permuted_k,"),
    ("columns_of_the_first_order_head", COLUMNS, "int64_t{place.head / Members(params)} *", "int64_t{0} *"),
    ("slots_of_others_not_awaited", COLUMNS, "    SyncThreads();\n    Copy(", "    Copy("),
    ("end_of_a_span_is_a_begin", PART, "static_cast<uint32_t>(begin) << 22", "static_cast<uint32_t>(end) << 22"),
    ("gathered_blocks_unread", TILES, "      tile.list_begin -= Gathered(row, at);\n", ""),
    ("parts_unmasked", TILES, "      tile.num_masked = tile.list_count;  // all may be read in part\n", ""),
    ("gathered_keys_behind_the_sequence", TILES, "params_.gathered != nullptr ? INT32_MAX : at.s.k_len", "at.s.k_len"),
    ("means_of_blocks_with_columns", CORRECT, "block < blocks && !HasColumns(tile, block)", "block < blocks"),
    ("means_without_those_of_the_first_head", CORRECT, "params_.attention.column_bits + tile.head *", "params_.attention.column_bits + 0 *"),
    ("means_of_the_next_block_with_columns", CORRECT, "KeyBlockBegin(tile) + block", "KeyBlockBegin(tile) + block + 1"),
    ("columns_not_covered", COVERAGE, "bool reads = is_column && block <", "bool reads = is_column && 0 >"),
    ("parts_of_the_first_group_covered", COVERAGE, "Position(row) / kRowGroup % kGroupsOfTile", "0"),
]

# flexprefill
BLOCK_LINE_MUTANTS = [
    ("values_of_blocks_overwritten_while_read", BLOCK_VALUES, "    turn_ ^= 1;\n", ""),
    ("keys_behind_the_query_seen", LINES, "position > first_position + ProxyRow(t, r)", "position > first_position + kProxies"),
    ("segment_of_the_first_query_unmasked", LINES, "if (segment_end <= first_position) {", "if (segment_end <= sequence_.k_len) {"),
    ("keys_overwritten_by_shares", LINES, "      SyncThreads();  // nobody reads the keys, in whose place the shares are\n", ""),
    ("shares_of_others_not_awaited", LINES, "      StoreShares(scores);\n      SyncThreads();\n", "      StoreShares(scores);\n"),
    ("line_keys_overwritten_while_multiplied", LINES, "      SyncThreads();  // nobody reads the last keys, or the shares in their place\n", ""),
    ("queries_that_are_missing_weigh", LINES, ".begin_row = first_row,", ".begin_row = 0,"),
    ("diagonals_of_the_first_tile", LINES, "AddDiagonal(key, ThreadIndex());", "AddDiagonal(0, ThreadIndex());"),
    ("long_diagonals_alone", LINES, "ThreadIndex() + kScoredKeys < kTileDiagonals", "false"),
    ("diagonals_of_the_chunk_before_lost", DIAGONALS, "    mass += RestOfChunk(params, sequence, head, x / keys - 1, x % keys);\n", ""),
    ("estimate_of_the_first_queries", CHOOSE, "head_, sequence_.q_len - rows)", "head_, 0)"),
    ("one_line_less_than_blocks", CHOOSE, "(count + 1) / kBlockTokens) + 1", "(count + 1) / kBlockTokens)"),
    ("diagonals_taken_for_distances", CHOOSE, "blocks_ - 1 - j", "j"),
    ("short_block_of_keys_as_a_whole_one", GATHER, "params_.pools_by_length != 0 ?", "false ?"),
    ("distances_of_the_first_query_block", GRID, "sequence_.first_query_block + row - block", "row > block ? row - block : 0"),
    ("grid_of_the_first_row", GRID, "this->first_row_ + row,", "this->first_row_,"),
    ("gaps_of_the_grid_unwritten", GRID, "j < end; j += 32", "j < candidates; j += 32"),
    ("rows_without_candidates_have_mass", GRID, "return sequence_.num_query_blocks - rows;", "return sequence_.num_query_blocks;"),
    ("probabilities_that_do_not_sum_to_one", GRID, "LoadShared(weights + j) / sum", "LoadShared(weights + j)"),
    ("cut_of_the_first_head", GRID, "params_.lines.cuts + head_ * params_.num_sequences +", "params_.lines.cuts +"),
    ("digit_of_two_for_three", WITHIN, "sums[2] > mass ? 3", "sums[2] > mass ? 2"),
    ("values_of_other_threads", WITHIN, "first + i * kThreads", "first + i"),
    ("values_of_other_warps_not_awaited", BLOCK_VALUES, "    SyncThreads();\n", ""),
    ("values_of_one_warp", BLOCK_VALUES, "warp < kWarps; ++warp", "warp < 1; ++warp"),
    ("counts_of_one_lane", MASS_CUT, "return SumOfWarp(found);", "return found;"),
]
