"""Block lists and masks (kernels/include/pbs/block_lists.h says what they mean)."""

from __future__ import annotations

import numpy as np
import pytest
from pbs_client.block_lists import (
    BlockGrid,
    BlockLists,
    check_lists,
    flat_mask,
    lists_from_mask,
    mask_from_lists,
)


def lists_by_hand(mask_parts) -> tuple[list[int], list[int]]:
    """CSR of masks, one loop per word of the definition."""
    offsets, indices = [0], []
    for part in mask_parts:
        for head in part:
            for row in head:
                indices += [block for block, bit in enumerate(row) if bit]
                offsets.append(len(indices))
    return offsets, indices


@pytest.mark.parametrize(
    ("lengths", "block_size", "query_blocks", "key_blocks"),
    [
        pytest.param([(256, 256)], 128, (2,), (2,), id="whole blocks"),
        pytest.param([(300, 300)], 128, (3,), (3,), id="short last block"),
        pytest.param([(1, 1)], 128, (1,), (1,), id="one token"),
        pytest.param([(1, 129)], 128, (1,), (2,), id="decode step behind a block"),
        pytest.param([(2, 129)], 128, (2,), (2,), id="offset inside a block"),
        pytest.param([(128, 256)], 128, (1,), (2,), id="offset on the grid"),
        pytest.param([(0, 300)], 128, (0,), (3,), id="no queries"),
        pytest.param([(0, 0)], 128, (0,), (0,), id="empty"),
        pytest.param([(64, 64), (200, 500)], 64, (1, 4), (1, 8), id="two sequences"),
    ],
)
def test_blocks_lie_on_the_absolute_key_grid(
    lengths, block_size, query_blocks, key_blocks
):
    grid = BlockGrid.of(3, lengths, block_size)
    assert (grid.query_blocks, grid.key_blocks) == (query_blocks, key_blocks)
    assert grid.num_rows == 3 * sum(query_blocks)


@pytest.mark.parametrize("seed", range(20))
def test_mask_to_lists_to_mask_is_the_same_mask(seed):
    rng = np.random.default_rng(seed)
    lengths = [(int(rng.integers(0, k + 1)), int(k)) for k in rng.integers(0, 900, 3)]
    grid = BlockGrid.of(int(rng.integers(1, 4)), lengths, 64)
    masks = tuple((rng.random(s) < 0.4).astype(np.uint8) for s in grid.shapes())
    lists = lists_from_mask(masks, grid)
    offsets, indices = lists_by_hand(masks)
    assert lists.offsets.tolist() == offsets
    assert lists.indices.tolist() == indices
    assert (lists.offsets.dtype, lists.indices.dtype) == (np.int64, np.uint16)
    back = mask_from_lists(lists, grid)
    np.testing.assert_array_equal(
        flat_mask(back), np.concatenate([m.ravel() for m in masks])
    )


def test_equal_sequences_stack_and_others_do_not():
    equal = BlockGrid.of(2, [(200, 200)] * 3, 100)
    lists = BlockLists(np.zeros(13, np.int64), np.zeros(0, np.uint16))
    assert mask_from_lists(lists, equal).shape == (3, 2, 2, 2)
    unequal = BlockGrid.of(2, [(200, 200), (100, 100)], 100)
    lists = BlockLists(np.zeros(7, np.int64), np.zeros(0, np.uint16))
    assert [m.shape for m in mask_from_lists(lists, unequal)] == [(2, 2, 2), (2, 1, 1)]


def test_a_mask_may_be_stacked_listed_flat_or_bool():
    grid = BlockGrid.of(2, [(200, 200)] * 2, 100)
    mask = np.tril(np.ones((2, 2, 2, 2), np.uint8))
    expected = lists_from_mask(mask, grid)
    for form in (list(mask), mask.ravel(), mask.astype(bool), mask[..., ::1].copy("F")):
        lists = lists_from_mask(form, grid)
        np.testing.assert_array_equal(lists.offsets, expected.offsets)
        np.testing.assert_array_equal(lists.indices, expected.indices)
    assert expected.row(1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param(np.zeros((1, 2, 3, 3), np.uint8), r"\[2, 3, 3\]", id="blocks"),
        pytest.param(np.zeros((2, 2, 2, 2), np.uint8), "batch 2", id="batch"),
        pytest.param(np.zeros((1, 1, 2, 2), np.uint8), r"\[1, 2, 2\]", id="heads"),
        pytest.param(np.zeros((2, 2, 2), np.uint8), "3 dimensions", id="3-d"),
        pytest.param(np.zeros(7, np.uint8), "7 bytes, not 8", id="flat size"),
        pytest.param(np.full((1, 2, 2, 2), 2, np.uint8), "holds 2", id="value 2"),
        pytest.param(np.zeros((1, 2, 2, 2)), "float64", id="dtype"),
        pytest.param([], "nor 1 arrays", id="no arrays"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        lists_from_mask(mask, BlockGrid.of(2, [(200, 200)], 100))


@pytest.mark.parametrize(
    ("offsets", "indices", "message"),
    [
        pytest.param([0, 1], [0], "1 rows, not 2", id="too few rows"),
        pytest.param([0, 1, 3], [0, 0], "climb", id="end past the entries"),
        pytest.param([1, 1, 2], [0, 0], "climb", id="start not 0"),
        pytest.param([0, 2, 1], [0], "climb", id="falling"),
        pytest.param([0, 1, 2], [0, 2], "block 2 of 2", id="block past the keys"),
    ],
)
def test_lists_that_do_not_fit_are_refused(offsets, indices, message):
    lists = BlockLists(np.array(offsets, np.int64), np.array(indices, np.uint16))
    with pytest.raises(ValueError, match=message):
        check_lists(lists, BlockGrid.of(1, [(200, 200)], 100))


@pytest.mark.parametrize(
    ("lengths", "block_size"),
    [
        pytest.param([(2, 1)], 16, id="more queries than keys"),
        pytest.param([(-1, 1)], 16, id="negative"),
        pytest.param([(1, 1)], 0, id="block of 0"),
    ],
)
def test_lengths_that_are_no_sequence_are_refused(lengths, block_size):
    with pytest.raises(ValueError, match=r"below 1|outside"):
        BlockGrid.of(1, lengths, block_size)
