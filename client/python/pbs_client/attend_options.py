"""Arguments of Client.attend() and Client.attend_synthetic().

Types are checked here. The server checks ranges; its errors name value and limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pbs_client import dtypes
from pbs_client._arguments import Uint64, check_fields, int_tuple
from pbs_client.block_lists import BlockLists
from pbs_client.kv import Array


@dataclass(frozen=True)
class Packed:
    """Bounds of sequences that follow one another in tensors [heads, total, head_dim].

    Attributes:
        cu_seqlens: [batch + 1] integers, from 0, not falling: the bounds of each
            sequence's queries.
        cu_seqlens_k: the bounds of each sequence's keys [cu_seqlens].

    Raises:
        ValueError: cu_seqlens is empty, one of the two is not a list of integers, or
            they differ in length.
    """

    cu_seqlens: Sequence[int] | Array
    cu_seqlens_k: Sequence[int] | Array | None = None

    def __post_init__(self) -> None:
        for name in ("cu_seqlens", "cu_seqlens_k"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, int_tuple(name, values))
        if not self.cu_seqlens:
            raise ValueError("cu_seqlens has 0 entries, fewer than 1")
        if self.cu_seqlens_k is not None:
            entries, entries_k = len(self.cu_seqlens), len(self.cu_seqlens_k)
            if entries != entries_k:
                raise ValueError(
                    f"cu_seqlens_k has {entries_k} entries, cu_seqlens {entries}"
                )

    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(q_len, k_len) of each sequence."""
        ends_k = self.cu_seqlens if self.cu_seqlens_k is None else self.cu_seqlens_k
        return tuple(zip(_diff(self.cu_seqlens), _diff(ends_k)))

    def fill(self, header: Any) -> None:
        """Writes the bounds into an AttendHeader message."""
        header.cu_seqlens.extend(self.cu_seqlens)
        header.cu_seqlens_k.extend(self.cu_seqlens_k or ())


@dataclass(frozen=True, eq=False)
class Given:
    """A key order and blocks that the method uses instead of its own.

    Attributes:
        order: key order (Pbs, or Attention.permute): integers of AttendResult.order's
            shape that permute inside segments only.
        lists: block lists (every method except Dense).
        block_mask: block lists as a mask; see block_lists.lists_from_mask().

    Raises:
        ValueError: both lists and block_mask are given.
    """

    order: Array | None = None
    lists: BlockLists | None = None
    block_mask: Any = None

    def __post_init__(self) -> None:
        if self.lists is not None and self.block_mask is not None:
            raise ValueError("give lists or a block_mask, not both")


@dataclass(frozen=True)
class Timing:
    """Number of runs of the same attention. AttendStats has the time of each.

    Attributes:
        warmup: extra runs before, which are not timed, 0 .. 100.
        repetitions: runs to time, 0 (= 1) .. 1000.

    Raises:
        TypeError, ValueError: as check_fields().
    """

    warmup: int = 0
    repetitions: int = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Synthetic:
    """Tensors that the server generates.

    Attributes:
        num_heads: query heads.
        num_kv_heads: divides num_heads.
        seq_len: tokens of a sequence, queries and keys.
        head_dim: width of a head.
        batch: number of sequences, at least 1.
        dtype: "f32", "f16" or "bf16".
        seed: equal seeds give equal tensors, 0 .. 2^64 - 1.
        white_noise: use white noise instead of the structured generator.

    Raises:
        ValueError: dtype is not one of the three.
        TypeError, ValueError: as check_fields().
    """

    num_heads: int
    num_kv_heads: int
    seq_len: int
    head_dim: int
    batch: int = 1
    dtype: Any = "f32"
    seed: Uint64 = 0
    white_noise: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        dtypes.float_dtype(self.dtype)

    def fill(self, header: Any) -> None:
        """Writes the tensors into an AttendHeader message."""
        spec = header.synthetic
        spec.num_heads, spec.num_kv_heads = self.num_heads, self.num_kv_heads
        spec.batch, spec.seq_len = self.batch, self.seq_len
        spec.head_dim = self.head_dim
        spec.dtype = dtypes.to_wire(dtypes.float_dtype(self.dtype))
        spec.seed, spec.white_noise = self.seed, self.white_noise


def _diff(ends: Any) -> list[int]:
    return [end - begin for begin, end in zip(ends, ends[1:])]
