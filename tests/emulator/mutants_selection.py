"""Planted defects of ordering and selection (mutants.py)."""

SCORE_KEYS = "cuda/selection/score_keys.h"
SORT = "cuda/selection/sort_segments.h"
BLOCK_ROWS = "cuda/selection/block_rows.h"
GATHER = "cuda/selection/gather_keys.h"
SELECT = "cuda/selection/select_blocks.h"
WRITE = "cuda/selection/write_list.h"
MASS_CUT = "cuda/selection/mass_cut.h"
STORE_THRESHOLDS = "cuda/selection/store_thresholds.h"
ANTIDIAGONALS = "cuda/selection/select_antidiagonals.h"
SLOT_KEYS = "cuda/selection/slot_keys.h"
BANDS = "cuda/selection/measure_bands.h"
ROW_SCORES = "cuda/selection/select_rows.h"
STORE = "cuda/selection/store_sequences.h"
TILES = "cuda/selection/order_tiles.h"
PARAMS = "cuda/selection/selection_params.h"
WARP_SUMS = "cuda/tiles/warp_sums.h"
COVERAGE = "cuda/selection/measure_coverage.h"
PARAMS_OF_COVERAGE = "cuda/selection/coverage_params.h"

SELECTION_MUTANTS = [
    ("sorted_upwards", SORT, "greater != rising", "greater == rising"),
    ("keys_overwritten_while_scored", SCORE_KEYS, "        SyncThreads();  // the next keys may come\n", ""),
    (
        "keys_of_others_not_awaited",
        SCORE_KEYS,
        "      SyncThreads();  // keys are there, and nobody reads the last ones\n",
        "",
    ),
    (
        "keys_of_the_other_buffer",
        SCORE_KEYS,
        "32 * 32, Buffer(key),",
        "32 * 32, Buffer(key + kScoredKeys),",
    ),
    (
        "shares_read_too_early",
        SCORE_KEYS,
        """      SyncThreads();
      if (ThreadIndex() < kScoredKeys) {""",
        """      if (ThreadIndex() < kScoredKeys) {""",
    ),
    (
        "other_warps_not_awaited",
        SCORE_KEYS,
        """    StoreShared(shared + ThreadIndex(), value);
    SyncThreads();
""",
        """    StoreShared(shared + ThreadIndex(), value);
""",
    ),
    ("proxies_of_another_row", SCORE_KEYS, "ThreadIndex() % 32 / 4 + r * 8", "ThreadIndex() % 32 / 4 + r * 4"),
    ("values_of_the_keys", GATHER, "HeadOf(params_.v)", "HeadOf(params_.k)"),
    ("padding_is_a_key", GATHER, "slot >= sequence_.k_len", "slot > sequence_.k_len"),
    ("queries_of_nobody_pooled", GATHER, "query < 0 || query >= s.q_len", "query >= s.q_len"),
    ("rows_under_way_skipped", BLOCK_ROWS, "first += kRowsUnderWay * kRowsAtOnce", "first += 2 * kRowsUnderWay * kRowsAtOnce"),
    ("one_row_for_all_under_way", BLOCK_ROWS, "source(first + r * kRowsAtOnce)", "source(first)"),
    ("pieces_of_the_first_row_under_way", BLOCK_ROWS, "Piece(group), values[r][group]", "Piece(group), values[0][group]"),
    ("keys_of_the_first_kv_head", GATHER, "KvHeadOfOrder(params_, head_)", "0"),
    ("first_block_not_forced", WRITE, "(is_earlier && (block == forced || ", "(is_earlier && ("),
    ("last_sink_block_not_forced", WRITE, "block < params.sink_blocks", "block + 1 < params.sink_blocks"),
    ("window_of_one_block_more", WRITE, "query_block + 1 - params.window_blocks", "query_block - params.window_blocks"),
    ("dense_tail_one_block_short", WRITE, "query_block <= params.dense_tail_blocks", "query_block < params.dense_tail_blocks"),
    ("dense_tail_counted_from_the_keys", WRITE, "sequence.num_query_blocks - query_block", "sequence.num_key_blocks - query_block"),
    ("list_of_the_first_head", WRITE, "EntryOffset(sequence, place.head,", "EntryOffset(sequence, 0,"),
    ("candidates_of_the_first_row", SELECT, "NumCandidatesOf(rows - 1)", "NumCandidatesOf(0)"),
    ("threshold_of_the_first_head", MASS_CUT, "params.head_thresholds + head", "params.head_thresholds"),
    ("threshold_of_the_head_for_the_fast_band", MASS_CUT, "band < params.bands_by_head", "params.bands_by_head > 0"),
    ("thresholds_in_one_place", STORE_THRESHOLDS, "stored.target + i", "stored.target"),
    ("mass_of_too_many", MASS_CUT, "FloatBits(weight) >= bits", "FloatBits(weight) > 0"),
    ("one_half_of_the_pairs", SELECT, "half < params_.head_dim;", "half < params_.head_dim / 2;"),
    ("slow_pairs_for_both_bands", SELECT, "const PairBand pairs = params_.bands[band]", "const PairBand pairs = params_.bands[0]"),
    ("blocks_of_the_slow_band_forgotten", SELECT, "keeps || (marks >>", "keeps && (marks >>"),
    ("threshold_of_the_slow_band", SELECT, "ThresholdOf(params_, head_, band)", "ThresholdOf(params_, head_, 0)"),
    ("divisors_of_the_first_sequence", SELECT, "(head_ * params_.num_sequences + sequence_index_) * kNumBands", "head_ * params_.num_sequences * kNumBands"),
    ("marks_not_awaited", SELECT, "      SyncThreads();  // queries are there, and nobody reads the last band's weights\n", "      if (band == 0) SyncThreads();\n"),
    ("strided_queries_in_rising_order", ANTIDIAGONALS, "(first_row_ + 1) * stride - 1 - token - sequence_.query_offset", "first_row_ * stride + token - sequence_.query_offset"),
    ("strided_keys_of_the_first_token", ANTIDIAGONALS, "const int key = column * stride + token;", "const int key = column * stride;"),
    ("columns_behind_the_row_seen", ANTIDIAGONALS, "row + 1 < candidates ? row + 1 : candidates", "candidates"),
    ("strided_rows_before_the_first_query", ANTIDIAGONALS, "(row + 1) * params_.stride > sequence_.query_offset &&", "true &&"),
    ("strided_rows_without_a_key", ANTIDIAGONALS, "row * params_.stride < sequence_.k_len", "true"),
    ("keys_in_place_though_sorted", SLOT_KEYS, "if (params.permutes == 0) {", "if (true) {"),
    ("tiles_overwritten_while_multiplied", ANTIDIAGONALS, "      SyncThreads();  // nobody reads the last tiles, or the pairs in their place\n", ""),
    ("tokens_of_others_not_awaited", ANTIDIAGONALS, "      CopyAsyncWait<0>();\n      SyncThreads();\n", "      CopyAsyncWait<0>();\n"),
    ("pairs_of_others_not_awaited", ANTIDIAGONALS, "    SyncThreads();\n    SumPairs(", "    SumPairs("),
    ("masses_of_others_not_awaited", ANTIDIAGONALS, "    SyncThreads();\n    for (int i = ThreadIndex() / 32; i < blocks;", "    for (int i = ThreadIndex() / 32; i < blocks;"),
    ("pairs_of_another_row", ANTIDIAGONALS, "at / key_blocks * per_block_;", "at / key_blocks;"),
    ("masses_of_one_thread", ANTIDIAGONALS, "mask < threads; mask *= 2", "mask < 1; mask *= 2"),
    ("rows_of_equal_weight", ANTIDIAGONALS, "pair * weight_[t][r]", "pair"),
    ("mass_of_the_own_block_not_counted", ANTIDIAGONALS, "wanted -= TakeOut(masses, block);", "TakeOut(masses, block);"),
    ("mass_of_the_first_block_not_counted", ANTIDIAGONALS, "wanted -= TakeOut(masses, first);", "TakeOut(masses, first);"),
    ("first_block_counts_first_as_published", ANTIDIAGONALS, " && first != block && !lags", " && first != block"),
    ("one_block_more_forgotten", ANTIDIAGONALS, "return lags ? WithNext(", "return false ? WithNext("),
    ("squares_of_one_warp_of_bands", BANDS, "warp < kWarps; ++warp", "warp < 1; ++warp"),
    ("squares_of_bands_not_awaited", BANDS, "    SyncThreads();\n", ""),
    ("squares_of_the_fast_pairs_for_both", BANDS, "const PairBand& pairs = params_.bands[band]", "const PairBand& pairs = params_.bands[1]"),
    ("temperature_of_the_keys_alone", BANDS, "        Share(queries, width, sequence_.num_query_blocks) *\n", ""),
    ("keys_of_the_query_head", BANDS, "head_ / Members(params_)", "head_ % params_.num_order_heads"),
    ("rounded_means_twice", ROW_SCORES, "step % kMeanParts,", "0,"),
    ("means_of_the_first_order_head", ROW_SCORES, "params_, head_ / Members(params_),", "params_, 0,"),
    ("columns_of_means_exchanged", ROW_SCORES, "Element::Pack(a, b)", "Element::Pack(b, a)"),
    ("rows_of_nobody_scored", ROW_SCORES, "row < begin || ", ""),
    ("rows_behind_the_end_scored", ROW_SCORES, " || row >= end", ""),
    ("diagonal_block_seen_by_every_row", ROW_SCORES, "block < block_ || row == kBlockTokens - 1", "true"),
    ("diagonal_block_seen_by_no_row", ROW_SCORES, "row == kBlockTokens - 1", "row == kBlockTokens"),
    ("energies_of_one_warp", ROW_SCORES, "LoadShared(&s_.sums[warp][at])", "LoadShared(&s_.sums[0][at])"),
    ("energies_merged_as_they_are", ROW_SCORES, "LoadShared(&s_.tops[warp][at]) - shift)", "0.0f)"),
    ("zero_rows_forgotten", ROW_SCORES, "params_.zero_rows != 0 ?", "false ?"),
    ("largest_score_of_one_lane", ROW_SCORES, "    for (int mask = 1; mask < 32; mask *= 2) top = Max(top, ShuffleXor(top, mask));\n", ""),
    ("only_the_largest_kept", ROW_SCORES, "top + params_.share_log2", "top"),
    ("means_overwritten_while_scored", ROW_SCORES, "          SyncThreads();  // the next means may come\n", ""),
    ("means_of_others_not_awaited", ROW_SCORES, "        SyncThreads();  // means are there, and nobody reads the last ones\n", ""),
    ("sums_of_other_warps_not_awaited", ROW_SCORES, "      SumRows(scale_log2, scores);\n      SyncThreads();\n", "      SumRows(scale_log2, scores);\n"),
    ("scores_not_awaited", ROW_SCORES, "    }\n    SyncThreads();\n  }", "    }\n  }"),
    ("mask_of_too_few", TILES, "- 1) >= block)", "- 1) > block)"),
    ("first_block_of_the_row_itself", TILES, "tile.last_block = OwnEndOf(at) - 1", "tile.last_block = at.block"),
    ("first_block_of_the_given_list_unread", TILES, "    tile.last_block = LoadGlobal(end - 1);\n", ""),
    ("no_end_behind_the_last_tile", TILES, "      StoreGlobal(params_.tiles + params_.total_tiles, AttentionTile{});\n", ""),
    ("wide_tile_of_one_masked_block", TILES, "at.last_block + 1 - at.block,", "1,"),
    ("wide_tiles_on_the_grid_of_blocks", TILES, "if (OnGridOfBlocks()) found.first -=", "found.first -="),
    ("tiles_of_another_place", TILES, "params_.tiles + begin_ + place", "params_.tiles + place"),
    ("blocks_above_the_diagonal_unmasked", TILES, "tile.num_masked = OwnEndOf(at) - own", "tile.num_masked = at.block + 1 - own"),
    ("places_of_the_shortest_first", TILES, "sum += LoadShared(counts_ + i);\n    auto", "sum += 1;\n    auto"),
    ("own_warp_before_itself", TILES, "SumToldBy(ThreadIndex() / 32)", "SumToldBy(ThreadIndex() / 32 + 1)"),
    (
        "sums_of_warps_not_awaited",
        TILES,
        """    if (ThreadIndex() % 32 == 0) StoreShared(sums_ + ThreadIndex() / 32, sum);
    SyncThreads();
""",
        """    if (ThreadIndex() % 32 == 0) StoreShared(sums_ + ThreadIndex() / 32, sum);
""",
    ),
    ("causal_blocks_of_one_head", TILES, "(end_ - begin_) * twice_a_row", "s.num_query_blocks * twice_a_row"),
    ("blocks_of_one_lane", TILES, "SumOfWarp(blocks.executed)", "blocks.executed"),
    ("warps_of_one_head_each", TILES, "if (Ballot(same) == 0xFFFFFFFFu) {", "{"),
    ("counts_of_another_section", TILES, "params_.heads + first_head_ + head", "params_.heads + head"),
    ("blocks_above_the_diagonal_below", TILES, "blocks.executed - blocks.above", "blocks.executed"),
    ("given_blocks_on_the_diagonal_above", TILES, "EntriesFrom(at.block + 1,", "EntriesFrom(at.block,"),
    (
        "counts_told_before_they_are_there",
        TILES,
        """    SyncThreads();
    TellBlocks();
""",
        """    TellBlocks();
""",
    ),
    ("counts_of_the_run_before", STORE, "StoreGlobal(stored.heads + head, BlockCounts{})", ""),
    ("row_without_its_own_key", COVERAGE, "position > seen_up_to[row]", "position >= seen_up_to[row]"),
    ("mass_of_the_last_row_only", COVERAGE, "LoadShared(bits) | 1 << row", "1 << row"),
    ("blocks_of_every_row_executed", COVERAGE, "(executed >> row & 1) != 0", "executed != 0"),
    (
        "marks_of_others_not_awaited",
        COVERAGE,
        """      SyncThreads();  // rows have blocks in common
""",
        "",
    ),
    ("masses_merged_as_they_are", COVERAGE, "    other.Shrink(Exp2(other.max - top));\n", ""),
    ("mass_not_shrunk", COVERAGE, "      Shrink(Exp2(max - score));\n", ""),
    ("warps_not_awaited", COVERAGE, "    SyncThreads();\n    if (ThreadIndex() >= rows_) return;", "    if (ThreadIndex() >= rows_) return;"),
    ("keys_of_the_first_head", COVERAGE, "Offset(sequence_index_, first_slot, read_head, 0)", "Offset(sequence_index_, first_slot, 0, 0)"),
    ("second_half_of_a_piece_twice", COVERAGE, "column + 4 * half", "column + 4"),
    ("rows_from_the_first_on", PARAMS_OF_COVERAGE, "(2 * int64_t{i} + 1) * q_len", "2 * int64_t{i} * q_len"),
    ("lane_without_the_one_before", WARP_SUMS, "if (lane >= distance)", "if (lane > distance)"),
    ("lists_overlap", PARAMS, "segments * (segments + 1) / 2", "segments * segments / 2"),
]
