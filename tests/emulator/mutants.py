"""Planted defects: by program that runs the kernel, lists of (name, file under kernels/,
text, what becomes of it)."""

SM80 = "cuda/attention/attention_sm80.h"
SM90 = "cuda/attention/attention_sm90.h"
ROWS = "cuda/attention/attention_rows.h"
SHARED_ROWS = "cuda/tiles/shared_rows.h"
SCORE_TILE = "cuda/tiles/score_tile.h"
SOFTMAX = "cuda/tiles/online_softmax.h"

SM90_MUTANTS = [
    ("stride_of_value_panels", SM90, "kTileRows * 128 >> 4} << 16", "64 * 128 >> 4} << 16"),
    (
        "values_released_before_they_are_read",
        SM90,
        """    WgmmaWait<0>();
    PinRegisters(out_);
    if (thread_ == 0) MbarrierArrive(&s_.v_empty[before.stage]);
""",
        """    if (thread_ == 0) MbarrierArrive(&s_.v_empty[before.stage]);
    WgmmaWait<0>();
    PinRegisters(out_);
""",
    ),
    (
        "values_never_released",
        SM90,
        """    if (thread_ == 0) MbarrierArrive(&s_.v_empty[before.stage]);
""",
        "",
    ),
    ("mask_off_by_one", ROWS, "key.x > position)", "key.x >= position)"),
    (
        "turn_given_to_oneself",
        SM90,
        "BarrierArrive(kTurnBarrier + 1 - half_, 256)",
        "BarrierArrive(kTurnBarrier + half_, 256)",
    ),
    ("last_row_lost", ROWS, "row < tile.end_row;", "row < tile.end_row - 1;"),
    ("rows_of_another_sequence", ROWS, "row >= tile.begin_row && ", ""),
    ("words_of_another_lane", ROWS, "(upper ? low : high) = came", "(upper ? high : low) = came"),
    ("layout_of_another_swizzle", SM90, "1u << 30 | 1024 >> 4", "2u << 30 | 1024 >> 4"),
    (
        "fence_forgotten",
        SM90,
        """    PinRegisters(out_);
    WgmmaFence();
    MultiplyKeys(ring_.stage);""",
        """    PinRegisters(out_);
    MultiplyKeys(ring_.stage);""",
    ),
    (
        "half_the_bytes_announced",
        SM90,
        "MbarrierArriveExpect(&s_.v_full[stage], Config::kOperandBytes)",
        "MbarrierArriveExpect(&s_.v_full[stage], Config::kOperandBytes / 2)",
    ),
    (
        "sums_used_under_way",
        SM90,
        """    PinBeforeWait(softmax_.sum[0], softmax_.sum[1]);
    WgmmaWait<0>();""",
        """    PinBeforeWait(softmax_.sum[0], softmax_.sum[1]);
    WgmmaWait<1>();""",
    ),
    (
        "output_not_rescaled",
        SM90,
        """    Round();
    softmax_.Rescale(out_);""",
        """    Round();""",
    ),
    ("sum_not_rescaled", SOFTMAX, "sum[r] * shrink[r] + added", "sum[r] + added"),
    (
        "parity_of_the_tile_slot",
        SM90,
        "MbarrierWait(&s_.tile_full[slot], (count >> 1) & 1)",
        "MbarrierWait(&s_.tile_full[slot], count & 1)",
    ),
    (
        "queries_overwritten",
        SM90,
        "    MbarrierWait(&s_.q_empty, (count & 1) ^ 1);\n",
        "",
    ),
    (
        "ring_stands_still_between_tiles",
        SM90,
        """    if (thread_ == 0) MbarrierArrive(&s_.v_empty[ring_.stage]);
    ring_.template Advance<Config::kStages>();
""",
        """    if (thread_ == 0) MbarrierArrive(&s_.v_empty[ring_.stage]);
""",
    ),
    ("lse_in_base_two", ROWS, "+ Log2(sum)) * kLn2", "+ Log2(sum))"),
    ("list_from_its_begin", ROWS, "tile.list_count - 1 - step", "step"),
    ("first_block_unmasked", SM90, "    if (masked) Mask();\n", ""),
    (
        "positions_of_the_block_before",
        SM90,
        "    if (next_step < tile.num_masked) block_ = ListBlock(params_, tile, next_step);\n",
        "",
    ),
    (
        "values_of_another_head",
        SM90,
        """      CopyBox(s_.v[stage][panel], operands_.v, &s_.v_full[stage], panel * 64, row,
              tile.order_head, sequence);""",
        """      CopyBox(s_.v[stage][panel], operands_.v, &s_.v_full[stage], panel * 64, row,
              0, sequence);""",
    ),
    (
        "keys_not_awaited",
        SM90,
        """    ring_.template Advance<Config::kStages>();
    MbarrierWait(&s_.k_full[ring_.stage], ring_.round);
""",
        """    ring_.template Advance<Config::kStages>();
""",
    ),
    (
        "values_not_awaited",
        SM90,
        "    MbarrierWait(&s_.v_full[before.stage], before.round);\n",
        "",
    ),
]

SM80_MUTANTS = [
    ("keys_read_before_they_came", SM80, """    CopyAsyncWait<0>();
    SyncThreads();  // keys are there""", """    SyncThreads();  // keys are there"""),
    (
        "values_overwritten_while_read",
        SM80,
        """    CopyAsyncWait<0>();
    SyncThreads();  // keys are there, and nobody reads the last values
    LoadKeys(operands_.v, s_.v, step);
    CopyAsyncCommit();
""",
        """    LoadKeys(operands_.v, s_.v, step);
    CopyAsyncCommit();
    CopyAsyncWait<0>();
    SyncThreads();
""",
    ),
    (
        "next_keys_too_early",
        SM80,
        """    CopyAsyncWait<0>();
    SyncThreads();  // values are there, and nobody reads these keys
    if (step + 1 < steps) LoadKeys(operands_.k, s_.k, step + 1);
""",
        """    if (step + 1 < steps) LoadKeys(operands_.k, s_.k, step + 1);
    CopyAsyncWait<0>();
    SyncThreads();
""",
    ),
    (
        "group_left_open",
        SM80,
        """    LoadKeys(operands_.v, s_.v, step);
    CopyAsyncCommit();
""",
        """    LoadKeys(operands_.v, s_.v, step);
""",
    ),
    (
        "keys_of_half_a_fragment",
        SCORE_TILE,
        "lane / 16 * 8 + lane % 8, lane / 8 % 2",
        "lane % 16, lane / 16",
    ),
    ("values_not_transposed", SM80, "LoadMatricesTransposed(b,", "LoadMatrices(b,"),
    ("mask_forgotten", SM80, "if (!masked) return;", "if (!masked || step < 2) return;"),
    ("rows_of_the_other_half", SM80, "BlockIndex() % Config::kParts * Config::kRows", "0"),
    ("last_keys_lost", SM80, "0, tile.num_keys - slot)", "0, tile.num_keys - slot - 1)"),
    ("queries_of_nobody", SM80, "tile.begin_row - first_row_,", "tile.begin_row,"),
    ("exchange_of_other_rows", SHARED_ROWS, "piece ^ (row >> 1 & 3)", "piece ^ (row & 3)"),
    ("moved_in_the_wrong_group", SHARED_ROWS, "(address ^ pieces % kGroup * 16)", "(address + pieces % kGroup * 16)"),
]

SCORE_KEYS = "cuda/selection/score_keys.h"
SORT = "cuda/selection/sort_segments.h"
BLOCK_ROWS = "cuda/selection/block_rows.h"
GATHER = "cuda/selection/gather_keys.h"
SELECT = "cuda/selection/select_blocks.h"
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
    ("first_block_not_forced", SELECT, "keep || (past && block == forced)", "keep"),
    ("candidates_of_the_first_row", SELECT, "NumCandidates(rows - 1)", "NumCandidates(0)"),
    ("mass_of_too_many", SELECT, "FloatBits(weight) >= bits", "FloatBits(weight) > 0"),
    ("mask_of_too_few", TILES, "- 1) >= block)", "- 1) > block)"),
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

MOVE = "cuda/model/move_rows.h"
NORMALIZE = "cuda/model/normalize_rows.h"
ROTATIONS = "cuda/model/make_rotations.h"
SPLIT = "cuda/model/split_heads.h"
POOL = "cuda/model/pool_heads.h"
GATE = "cuda/model/gate_rows.h"
DOT = "cuda/model/dot_rows.h"
QUADS = "cuda/model/quads.h"

MODEL_MUTANTS = [
    ("index_of_rows_unread", MOVE, "from * params.quads + quad", "row * params.quads + quad"),
    ("columns_behind_the_threads_lost", MOVE, "quad += kThreads", "quad += params.quads"),
    ("pair_of_elements_exchanged", QUADS, "Bf16Element::Low(high),\n            Bf16Element::High(high)", "Bf16Element::High(high),\n            Bf16Element::Low(high)"),
    ("lanes_of_half_a_head", QUADS, "mask < width; mask *= 2", "2 * mask < width; mask *= 2"),
    ("squares_of_one_warp", NORMALIZE, "warp < kThreads / 32", "warp < 1"),
    (
        "squares_of_others_not_awaited",
        NORMALIZE,
        "    SyncThreads();\n",
        "",
    ),
    ("mean_of_quads", NORMALIZE, "kQuad * params.quads", "params.quads"),
    ("half_pi_too_short", ROTATIONS, " - quarters * kHalfPiLow", ""),
    ("quarters_of_half_a_turn", ROTATIONS, "(quarters) & 3", "(quarters) & 1"),
    ("position_of_the_first_row", ROTATIONS, "params.first_position + row", "params.first_position"),
    ("turned_the_other_way", SPLIT, "y * cosine.x[i] + x * sine.x[i]", "y * cosine.x[i] - x * sine.x[i]"),
    ("values_rotated", SPLIT, "if (!is_value) Rotate(x)", "Rotate(x)"),
    ("keys_weighted_as_queries", SPLIT, "params_.q_norm : params_.k_norm;", "params_.q_norm : params_.q_norm;"),
    ("rows_of_the_cache_one_head_apart", SPLIT, "params_.kv_head_stride / kQuad", "params_.rows * 2 * half_"),
    ("lanes_without_a_quad", SPLIT, " && lane < half_)", ")"),
    ("bias_of_the_gate_for_both", GATE, "DType::kF32, params.quads + quad", "DType::kF32, quad"),
    ("rows_without_their_stride", GATE, "row * params.y_stride_quads", "row * params.quads"),
    ("first_rows_for_all", DOT, "int64_t{first + row} * params.quads", "int64_t{row} * params.quads"),
    ("sum_of_half_the_lanes", DOT, "SumLanes(sums[row], 32)", "SumLanes(sums[row], 16)"),
    ("means_before_rounding", POOL, "Rounded(x, params_.split.kv_dtype)", "x"),
    ("block_begins_with_the_first_row", POOL, " - params_.row_in_block", ""),
    ("second_row_under_way_skipped", POOL, "row += kRowsUnderWay * step", "row += 2 * kRowsUnderWay * step"),
    ("partial_sums_not_awaited", POOL, "    SyncThreads();\n", ""),
    ("means_of_the_keys", POOL, "left < kHeads ? left : kHeads", "kHeads"),
    ("short_block_over_its_sums", BLOCK_ROWS, "sum / static_cast<float>(kBlockTokens)", "sum / static_cast<float>(count)"),
]

PROGRAMS = {
    "mutant_sm80.cc": SM80_MUTANTS,
    "mutant_sm90.cc": SM90_MUTANTS,
    "mutant_selection.cc": SELECTION_MUTANTS,
    "mutant_model.cc": MODEL_MUTANTS,
}
