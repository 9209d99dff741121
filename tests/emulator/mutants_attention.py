"""Planted defects of attention (mutants.py)."""

SM80 = "cuda/attention/attention_sm80.h"
CONFIG = "cuda/attention/sm90_config.h"
PRODUCER = "cuda/attention/sm90_producer.h"
CONSUMER = "cuda/attention/sm90_consumer.h"
ROWS = "cuda/attention/attention_rows.h"
SHARED_ROWS = "cuda/tiles/shared_rows.h"
SCORE_TILE = "cuda/tiles/score_tile.h"
VALUE_TILE = "cuda/tiles/value_tile.h"
SOFTMAX = "cuda/tiles/online_softmax.h"

SM90_MUTANTS = [
    ("stride_of_value_panels", CONSUMER, "kBlockKeys * 128 >> 4} << 16", "64 * 128 >> 4} << 16"),
    (
        "values_released_before_they_are_read",
        CONSUMER,
        """    WgmmaWait<0>();
    PinRegisters(out_);
    if (thread_ == 0) MbarrierArrive(&s_.v_empty[before.slot]);
""",
        """    if (thread_ == 0) MbarrierArrive(&s_.v_empty[before.slot]);
    WgmmaWait<0>();
    PinRegisters(out_);
""",
    ),
    (
        "values_never_released",
        CONSUMER,
        """    if (thread_ == 0) MbarrierArrive(&s_.v_empty[before.slot]);
""",
        "",
    ),
    ("mask_off_by_one", ROWS, "key.x > position)", "key.x >= position)"),
    ("mask_of_keys_in_order_off_by_one", ROWS, "if (i * 8 > last)", "if (i * 8 >= last)"),
    (
        "turn_given_to_oneself",
        CONSUMER,
        "BarrierArrive(kTurnBarrier + NextConsumer(), 256)",
        "BarrierArrive(kTurnBarrier + index_, 256)",
    ),
    ("last_row_lost", ROWS, "row < tile.end_row;", "row < tile.end_row - 1;"),
    ("rows_of_another_sequence", ROWS, "row >= tile.begin_row && ", ""),
    ("words_of_another_lane", ROWS, "(upper ? low : high) = came", "(upper ? high : low) = came"),
    ("layout_of_another_swizzle", CONSUMER, "1u << 30 | 1024 >> 4", "2u << 30 | 1024 >> 4"),
    (
        "fence_forgotten",
        CONSUMER,
        """    PinRegisters(out_);
    WgmmaFence();
    MultiplyKeys(blocks_.slot);""",
        """    PinRegisters(out_);
    MultiplyKeys(blocks_.slot);""",
    ),
    (
        "half_the_bytes_announced",
        PRODUCER,
        "MbarrierArriveExpect(&s_.v_full[stage], Config::kBlockBytes)",
        "MbarrierArriveExpect(&s_.v_full[stage], Config::kBlockBytes / 2)",
    ),
    (
        "sums_used_under_way",
        CONSUMER,
        """    PinBeforeWait(softmax_.sum[0], softmax_.sum[1]);
    WgmmaWait<0>();""",
        """    PinBeforeWait(softmax_.sum[0], softmax_.sum[1]);
    WgmmaWait<1>();""",
    ),
    (
        "output_not_rescaled",
        CONSUMER,
        """    Round();
    softmax_.Rescale(out_);""",
        """    Round();""",
    ),
    ("sum_not_rescaled", SOFTMAX, "sum[r] * shrink[r] + added", "sum[r] + added"),
    (
        "parity_of_the_tile_slot",
        CONSUMER,
        "MbarrierWait(&s_.tile_full[slot], tiles_.round)",
        "MbarrierWait(&s_.tile_full[slot], tiles_.round ^ 1)",
    ),
    (
        "queries_overwritten",
        PRODUCER,
        "      MbarrierWait(&s_.q_empty[buffer][i], queries_.round ^ 1);\n",
        "",
    ),
    (
        "ring_stands_still_between_tiles",
        CONSUMER,
        """    if (thread_ == 0) MbarrierArrive(&s_.v_empty[blocks_.slot]);
    blocks_.Advance();
""",
        """    if (thread_ == 0) MbarrierArrive(&s_.v_empty[blocks_.slot]);
""",
    ),
    ("lse_in_base_two", ROWS, "+ Log2(sum)) * kLn2", "+ Log2(sum))"),
    ("list_from_its_begin", PRODUCER, "ListEntry(params_, list, left - 1)", "ListEntry(params_, list, step)"),
    ("first_block_unmasked", CONSUMER, "    if (masked) Mask(0);\n", ""),
    (
        "keys_not_awaited",
        CONSUMER,
        """    blocks_.Advance();
    MbarrierWait(&s_.k_full[blocks_.slot], blocks_.round);
""",
        """    blocks_.Advance();
""",
    ),
    (
        "values_not_awaited",
        CONSUMER,
        "    MbarrierWait(&s_.v_full[before.slot], before.round);\n",
        "",
    ),
    ("parts_of_the_first_consumer", CONSUMER, "entry, index_, LoadShared(&tile_->head)", "entry, 0, LoadShared(&tile_->head)"),
    ("columns_of_the_last_block", CONSUMER, "step == 0 ? LoadShared(&tile_->last_block) : next_block_", "LoadShared(&tile_->last_block)"),
    # The two rings, and the order in which they are filled.
    ("values_in_the_stage_of_keys", PRODUCER, "const int stage = values_.slot;", "const int stage = keys_.slot;"),
    ("ring_of_values_stands_still", PRODUCER, "    values_.Advance();\n", ""),
    ("keys_of_the_block_before", PRODUCER, "LoadKeys(block, step", "LoadKeys(before, step"),
    ("values_of_the_next_block", PRODUCER, "step > 0) LoadValues(before)", "step > 0) LoadValues(block)"),
    ("last_values_forgotten", PRODUCER, "!kKeysFirst || left == 0", "!kKeysFirst"),
    (
        "values_overwritten",
        PRODUCER,
        "    MbarrierWait(&s_.v_empty[stage], values_.round ^ 1);\n",
        "",
    ),
    # Positions that come with the keys.
    ("positions_not_announced", PRODUCER, "Config::kBlockBytes + kBlockKeys * 4", "Config::kBlockBytes"),
    ("positions_of_another_block", PRODUCER, "first_slot) + block * kBlockKeys", "first_slot)"),
    (
        "positions_released_before_they_are_read",
        CONSUMER,
        """      BarrierSync(kOwnBarrier + index_, 128);
    } else {""",
        """    } else {""",
    ),
    ("positions_of_other_lanes", CONSUMER, "i * 4 + lane_ % 4]", "i * 4 + lane_ / 8]"),
    # Tiles that are fetched ahead.
    ("record_in_a_slot_that_is_read", CONFIG, "constexpr int kTileSlots = 3;", "constexpr int kTileSlots = 2;"),
    ("tile_behind_the_last", PRODUCER, "index < params_.num_tiles ? index : params_.num_tiles", "index"),
    # Outputs that leave through shared memory.
    (
        "outputs_without_a_fence",
        CONSUMER,
        """    ProxyFence();
  }

  // By one thread.""",
        """  }

  // By one thread.""",
    ),
    ("outputs_not_swizzled", CONSUMER, "(i % 8 + lane_ / 16) ^ (row % 8)", "i % 8 + lane_ / 16"),
    ("outputs_of_the_other_consumer", CONSUMER, " + index_ * 64, tile.head", ", tile.head"),
    ("outputs_of_the_other_half_row", CONSUMER, "inverse[j % 2],", "inverse[1 - j % 2],"),
    (
        "queries_released_before_outputs_have_left",
        CONSUMER,
        """    StoreWaitRead();
    MbarrierArrive(&s_.q_empty[queries_.slot ^ 1][index_]);
""",
        """    MbarrierArrive(&s_.q_empty[queries_.slot ^ 1][index_]);
""",
    ),
    ("block_ends_before_outputs_have_left", CONSUMER, "    if (thread_ == 0) StoreWaitRead();\n", ""),
    ("rows_of_nobody_leave", CONSUMER, "index_ * 64 + 64;", "0;"),
    # Values of another sequence behind the end.
    ("foreign_values_kept", CONSUMER, "    ClearForeignValues();\n", ""),
    ("last_own_value_cleared", CONSUMER, "int i = own * kRowWords + thread_", "int i = (own - 1) * kRowWords + thread_"),
    ("first_foreign_value_kept", CONSUMER, "int i = own * kRowWords + thread_", "int i = (own + 1) * kRowWords + thread_"),
    ("cleared_without_a_fence", CONSUMER, """    ProxyFence();
    BarrierSync(kOwnBarrier + index_, 128);
  }""", """    BarrierSync(kOwnBarrier + index_, 128);
  }"""),
    ("cleared_before_it_came", CONSUMER, """    MbarrierWait(&s_.v_full[blocks_.slot], blocks_.round);
    // A row""", """    // A row"""),
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
    ("values_not_transposed", VALUE_TILE, "LoadMatricesTransposed(b,", "LoadMatrices(b,"),
    ("mask_forgotten", SM80, "if (!masked) return;", "if (!masked || step < 2) return;"),
    ("rows_of_the_other_half", SM80, "BlockIndex() % Config::kParts * Config::kRows", "0"),
    ("last_keys_lost", SM80, "0, tile.num_keys - slot)", "0, tile.num_keys - slot - 1)"),
    ("queries_of_nobody", SM80, "tile.begin_row - first_row_,", "tile.begin_row,"),
    ("exchange_of_other_rows", SHARED_ROWS, "piece ^ (row >> 1 & 3)", "piece ^ (row & 3)"),
    ("parts_of_the_other_half", SM80, "(kHalves - 1 - step % kHalves) * kWords + i", "step % kHalves * kWords + i"),
    ("parts_of_the_first_rows", SM80, "(first_row_ + warp_ * Config::kWarpRows) / kRowGroup", "0"),
    ("columns_of_the_first_head", ROWS, "head * params.column_stride + at", "at"),
    ("second_keys_as_the_first", ROWS, "(pair & 2) == 0", "(pair & 1) == 0"),
    ("moved_in_the_wrong_group", SHARED_ROWS, "(address ^ pieces % kGroup * 16)", "(address + pieces % kGroup * 16)"),
]
