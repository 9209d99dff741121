"""The key blocks that each query block reads, as CSR lists and as masks.

Query and key blocks are on one absolute grid of `block_size` tokens per sequence. The
queries of a sequence are the last q_len of its k_len positions, so its query blocks are
the grid blocks from the first query's to the last; with a query offset the first may be
short.

Lists are compressed sparse rows over (sequence, query head, query block), in that
order. A mask is uint8 [num_heads, num_query_blocks, num_key_blocks] per sequence, 1
where the query block reads the key block; equal sequences stack to [batch, ...].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

from pbs_client import dtypes

U8Array = np.ndarray[Any, np.dtype[np.uint8]]
# [batch, heads, query blocks, key blocks]; or one [heads, ...] array per sequence.
BlockMask = Union[U8Array, tuple[U8Array, ...]]

KEY_BLOCKS_MAX = 65_535  # indices are uint16


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Lists of all rows, back to back.

    Attributes:
        offsets: int64 [num_rows + 1]; row r is indices[offsets[r]:offsets[r + 1]].
        indices: uint16; ascending key blocks within a row.
    """

    offsets: np.ndarray[Any, np.dtype[np.int64]]
    indices: np.ndarray[Any, np.dtype[np.uint16]]

    @property
    def num_rows(self) -> int:
        """Rows: query blocks of all heads of all sequences."""
        return len(self.offsets) - 1

    def row(self, row: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
        """The key blocks of one row; a view."""
        return self.indices[self.offsets[row] : self.offsets[row + 1]]


@dataclass(frozen=True)
class BlockGrid:
    """Numbers of query and key blocks of each sequence.

    Attributes:
        num_heads: query heads.
        query_blocks: [num_sequences].
        key_blocks: [num_sequences].
    """

    num_heads: int
    query_blocks: tuple[int, ...]
    key_blocks: tuple[int, ...]

    @classmethod
    def of(
        cls,
        num_heads: int,
        lengths: Iterable[tuple[int, int]],
        block_size: int,
    ) -> BlockGrid:
        """The grid of sequences with the (q_len, k_len) of `lengths`.

        Raises:
            ValueError: block_size < 1, or lengths that are not 0 <= q_len <= k_len.
        """
        if block_size < 1:
            raise ValueError(f"block_size {block_size} is below 1")
        query_blocks, key_blocks = [], []
        for q_len, k_len in lengths:
            if not 0 <= q_len <= k_len:
                raise ValueError(f"q_len {q_len} is outside [0, k_len {k_len}]")
            blocks = -(-k_len // block_size)
            key_blocks.append(blocks)
            query_blocks.append(blocks - (k_len - q_len) // block_size if q_len else 0)
        return cls(num_heads, tuple(query_blocks), tuple(key_blocks))

    @property
    def num_rows(self) -> int:
        """Rows of the lists."""
        return self.num_heads * sum(self.query_blocks)

    @property
    def entries_max(self) -> int:
        """Entries of the lists if every row read every block."""
        pairs = zip(self.query_blocks, self.key_blocks)
        return self.num_heads * sum(nq * nk for nq, nk in pairs)

    @property
    def is_uniform(self) -> bool:
        """All sequences have the same blocks, so that masks stack."""
        return len(set(zip(self.query_blocks, self.key_blocks))) == 1

    def shapes(self) -> list[tuple[int, int, int]]:
        """Mask shape of each sequence: (num_heads, query blocks, key blocks)."""
        pairs = zip(self.query_blocks, self.key_blocks)
        return [(self.num_heads, nq, nk) for nq, nk in pairs]


def lists_from_mask(mask: Any, grid: BlockGrid) -> BlockLists:
    """Converts a mask to lists. The server checks whether the blocks may be read.

    Args:
        mask: uint8 or bool, values 0 and 1: [batch, heads, query blocks, key blocks];
            or one [heads, query blocks, key blocks] array per sequence; or flat, all
            sequences back to back.
        grid: the grid of the same sequences.

    Raises:
        ValueError: shape, dtype or a value is invalid.
    """
    parts = _split_mask(mask, grid)
    counts, indices = [np.zeros(1, np.int64)], [np.zeros(0, np.uint16)]
    for part, (_, _, key_blocks) in zip(parts, grid.shapes()):
        if key_blocks > KEY_BLOCKS_MAX:
            raise ValueError(f"{key_blocks} key blocks exceed {KEY_BLOCKS_MAX}")
        rows = part.reshape(-1, key_blocks) if key_blocks else part.reshape(0, 0)
        counts.append(np.count_nonzero(rows, axis=1).astype(np.int64))
        indices.append(np.nonzero(rows)[1].astype(np.uint16))
    return BlockLists(np.cumsum(np.concatenate(counts)), np.concatenate(indices))


def mask_from_lists(lists: BlockLists, grid: BlockGrid) -> BlockMask:
    """Converts lists to a mask.

    Returns:
        uint8 [batch, heads, query blocks, key blocks] when all sequences have the same
        blocks, else a tuple of one [heads, query blocks, key blocks] per sequence.

    Raises:
        ValueError: the lists are not lists of this grid.
    """
    check_lists(lists, grid)
    masks = []
    row = 0
    for shape in grid.shapes():
        rows = shape[0] * shape[1]
        offsets = lists.offsets[row : row + rows + 1]
        mask = np.zeros((rows, shape[2]), np.uint8)
        counts = np.diff(offsets)
        columns = lists.indices[offsets[0] : offsets[-1]]
        mask[np.repeat(np.arange(rows), counts), columns] = 1
        masks.append(mask.reshape(shape))
        row += rows
    return np.stack(masks) if grid.is_uniform else tuple(masks)


def check_lists(lists: BlockLists, grid: BlockGrid) -> None:
    """ValueError unless `lists` have the rows of `grid` and indices inside it."""
    offsets, indices = lists.offsets, lists.indices
    if len(offsets) != grid.num_rows + 1:
        raise ValueError(f"lists have {len(offsets) - 1} rows, not {grid.num_rows}")
    if offsets[0] != 0 or offsets[-1] != len(indices) or np.any(np.diff(offsets) < 0):
        raise ValueError(f"list offsets do not climb from 0 to {len(indices)}")
    rows = [grid.num_heads * blocks for blocks in grid.query_blocks]
    limits = np.repeat(np.repeat(grid.key_blocks, rows), np.diff(offsets))
    outside = np.flatnonzero(indices >= limits)
    if outside.size:
        raise ValueError(
            f"list entry {outside[0]} names key block {indices[outside[0]]} of "
            f"{limits[outside[0]]}"
        )


def flat_mask(mask: BlockMask) -> U8Array:
    """A mask with its sequences back to back, uint8 [bytes], as in files."""
    parts = mask if isinstance(mask, tuple) else (mask,)
    return np.concatenate([part.reshape(-1) for part in parts] or [_NO_MASK])


_NO_MASK: U8Array = np.zeros(0, np.uint8)


def _split_mask(mask: Any, grid: BlockGrid) -> list[U8Array]:
    """One checked uint8 [heads, query blocks, key blocks] array per sequence."""
    shapes = grid.shapes()
    if dtypes.is_torch_tensor(mask):
        mask = dtypes.as_array(mask)
    if isinstance(mask, np.ndarray):
        parts = _split_array(mask, shapes)
    elif isinstance(mask, Sequence) and len(mask) == len(shapes):
        parts = [dtypes.as_array(part) for part in mask]
    else:
        raise ValueError(f"block_mask is not an array, nor {len(shapes)} arrays")
    for index, (part, shape) in enumerate(zip(parts, shapes)):
        if part.dtype not in (np.dtype(np.uint8), np.dtype(np.bool_)):
            raise ValueError(f"block_mask has dtype {part.dtype}, not uint8 or bool")
        if part.shape != shape:
            raise ValueError(
                f"block_mask of sequence {index} has shape {list(part.shape)}; heads x "
                f"query blocks x key blocks are {list(shape)}"
            )
        if part.size and part.max() > 1:
            raise ValueError(f"block_mask holds {part.max()}; only 0 and 1 are valid")
    return [part.view(np.uint8) for part in parts]


def _split_array(
    mask: np.ndarray[Any, Any], shapes: list[tuple[int, int, int]]
) -> list[np.ndarray[Any, Any]]:
    if mask.ndim == 4:
        if len(mask) != len(shapes):
            raise ValueError(f"block_mask has batch {len(mask)}, not {len(shapes)}")
        return list(mask)
    if mask.ndim != 1:
        raise ValueError(
            f"block_mask has {mask.ndim} dimensions; give [batch, heads, query blocks, "
            "key blocks], one array per sequence, or all sequences flat"
        )
    sizes = [heads * nq * nk for heads, nq, nk in shapes]
    if mask.size != sum(sizes):
        raise ValueError(f"block_mask has {mask.size} bytes, not {sum(sizes)}")
    ends = np.cumsum(sizes)
    return [
        mask[end - size : end].reshape(shape)
        for end, size, shape in zip(ends, sizes, shapes)
    ]
