"""Planted defects: (name, file under kernels/, text, what becomes of it)."""

SM90 = "cuda/attention/attention_sm90.h"

MUTANTS = [
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
    ("mask_off_by_one", SM90, "key.x > position)", "key.x >= position)"),
    (
        "turn_given_to_oneself",
        SM90,
        "BarrierArrive(kTurnBarrier + 1 - half_, 256)",
        "BarrierArrive(kTurnBarrier + half_, 256)",
    ),
    ("last_row_lost", SM90, "row >= tile_.end_row)", "row >= tile_.end_row - 1)"),
    ("rows_of_another_sequence", SM90, "row < tile_.begin_row || ", ""),
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
        """    PinBeforeWait(sum_[0], sum_[1]);
    WgmmaWait<0>();""",
        """    PinBeforeWait(sum_[0], sum_[1]);
    WgmmaWait<1>();""",
    ),
    (
        "output_not_rescaled",
        SM90,
        """    Round();
    Rescale();""",
        """    Round();""",
    ),
    ("sum_not_rescaled", SM90, "sum_[r] * shrink_[r] + sum", "sum_[r] + sum"),
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
    ("lse_in_base_two", SM90, "+ Log2(sum)) * kLn2", "+ Log2(sum))"),
    ("list_from_its_begin", SM90, "tile.list_count - 1 - step", "step"),
    ("first_block_unmasked", SM90, "    if (masked) Mask(0);\n", ""),
    (
        "values_of_another_head",
        SM90,
        """      CopyBox(s_.v[stage][panel], operands_.v, &s_.v_full[stage], panel * 64, row,
              tile.order_head);""",
        """      CopyBox(s_.v[stage][panel], operands_.v, &s_.v_full[stage], panel * 64, row,
              0);""",
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
