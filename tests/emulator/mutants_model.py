"""Planted defects of the kernels of a model (mutants.py)."""

BLOCK_ROWS = "cuda/selection/block_rows.h"
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
