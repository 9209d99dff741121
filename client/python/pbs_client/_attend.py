"""Attend: the upload, the expected reply, and its assembly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbs_client import _messages, _wire, dtypes
from pbs_client.attend_options import Given, Packed, Synthetic, Timing
from pbs_client.block_lists import (
    BlockGrid,
    BlockLists,
    BlockMask,
    check_lists,
    lists_from_mask,
    mask_from_lists,
)
from pbs_client.errors import CorruptDataError
from pbs_client.options import (
    BLOCK_SIZE_DEFAULT,
    METHODS,
    Attention,
    Method,
    method_of,
)
from pbs_client.results import AttendStats

Array = np.ndarray[Any, np.dtype[Any]]
# Called with ("upload" or "download", bytes done, bytes in total). Uploads call it from
# another thread.
ProgressCallback = Callable[[str, int, int], None]

WANTS = ("o", "lse", "order", "lists", "block_mask")

_TENSORS = _messages.enum_numbers("TensorName")
_TENSOR_NAMES = {number: name for name, number in _TENSORS.items()}
_WANTED_TENSORS = {
    "o": ("O",),
    "lse": ("LSE",),
    "order": ("ORDER",),
    "lists": ("LIST_OFFSETS", "LIST_INDICES"),
    "block_mask": ("LIST_OFFSETS", "LIST_INDICES"),
}
_HEADER, _CHUNK, _STATS = 1, 2, 3  # AttendResponse


@dataclass(frozen=True, eq=False)
class AttendResult:
    """Results of an attention call; None for results that were not requested.

    Attributes:
        o: shape and dtype of q.
        lse: float32, q's shape without head_dim; natural log of the softmax
            denominator, -inf where a query sees nothing.
        order: int32 [batch, order heads, k_len] or [order heads, total_k]: the original
            position of the key in each slot. Order heads are the query heads in scope
            "query_head", else the KV heads.
        lists: the blocks that ran. MInference reads parts of these, those of its
            diagonals, and the keys of its columns in other blocks.
        block_mask: these blocks as uint8 [batch, heads, query blocks, key blocks]; a
            tuple of one array per sequence when their blocks differ.
        stats: density, times, backend.
    """

    stats: AttendStats
    o: Array | None = None
    lse: Array | None = None
    order: Array | None = None
    lists: BlockLists | None = None
    block_mask: BlockMask | None = None


@dataclass(frozen=True)
class AttendShape:
    """Shapes of an attention problem.

    Attributes:
        lengths: (q_len, k_len) per sequence.
        q_rows: shape of lse: [batch, heads, q_len] or [heads, total_q].
        k_rows: [batch, kv_heads, k_len] or [kv_heads, total_k].
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    lengths: tuple[tuple[int, int], ...]
    q_rows: tuple[int, ...]
    k_rows: tuple[int, ...]

    def order_shapes(self) -> set[tuple[int, ...]]:
        """The valid shapes of an order, one per scope."""
        return {
            (*self.k_rows[:-2], heads, self.k_rows[-1])
            for heads in (self.num_heads, self.num_kv_heads)
        }


@dataclass(frozen=True, eq=False)
class AttendCall:
    """A request that is ready to send, and the expected form of its reply."""

    header: Any  # AttendHeader
    uploads: tuple[tuple[str, Array], ...]
    shape: AttendShape
    dtype: np.dtype[Any]
    grid: BlockGrid | None  # set when lists are sent or returned
    want: tuple[str, ...]

    @property
    def upload_bytes(self) -> int:
        """Bytes of all tensors to send."""
        return sum(array.nbytes for _, array in self.uploads)


def shape_of_arrays(
    q: Array,
    k: Array,
    v: Array,
    packed: Packed | None,
) -> AttendShape:
    """Shapes of uploaded tensors. ValueError when they do not match each other."""
    num_dims, layout, hint = 3, "[heads, total, head_dim]", ""
    if packed is None:
        num_dims, layout = 4, "[batch, heads, len, head_dim]"
        hint = "; packed tensors need cu_seqlens: packed=Packed(cu_seqlens)"
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != num_dims:
            raise ValueError(f"{name} has shape {[*array.shape]}, not {layout}{hint}")
    if k.shape != v.shape:
        raise ValueError(f"v has shape {list(v.shape)}, not k's {list(k.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    if packed is None:
        lengths = ((q.shape[2], k.shape[2]),) * q.shape[0]
    else:
        lengths = packed.lengths()
    return AttendShape(
        num_heads=q.shape[-3],
        num_kv_heads=k.shape[-3],
        head_dim=q.shape[-1],
        lengths=lengths,
        q_rows=q.shape[:-1],
        k_rows=k.shape[:-1],
    )


def shape_of_synthetic(tensors: Synthetic) -> AttendShape:
    """Shapes of tensors that the server generates."""
    batch, seq_len = tensors.batch, tensors.seq_len
    return AttendShape(
        num_heads=tensors.num_heads,
        num_kv_heads=tensors.num_kv_heads,
        head_dim=tensors.head_dim,
        lengths=((seq_len, seq_len),) * batch,
        q_rows=(batch, tensors.num_heads, seq_len),
        k_rows=(batch, tensors.num_kv_heads, seq_len),
    )


def make_header(
    attention: Attention, want: Sequence[str], timing: Timing, request_id: str
) -> Any:
    """The AttendHeader without tensors.

    Raises:
        ValueError: an unknown `want`, or an option that only a prefill has.
    """
    attention.check_attend()
    unknown = sorted(set(want) - set(WANTS))
    if unknown:
        raise ValueError(f"want {unknown[0]!r} is not one of {', '.join(WANTS)}")
    tensors = {name for item in want for name in _WANTED_TENSORS[item]}
    return _messages.AttendHeader(
        request_id=request_id,
        options=attention.to_message(),
        want=sorted(_TENSORS[name] for name in tensors),
        warmup=timing.warmup,
        repetitions=timing.repetitions,
    )


def add_given(
    header: Any, attention: Attention, given: Given, grid: BlockGrid | None
) -> list[tuple[str, Array]]:
    """Makes the request use the given order and blocks. Returns their tensors.

    Args:
        header: the AttendHeader to change.
        attention: the request's.
        given: order and blocks.
        grid: the block grid; a block_mask needs it.

    Raises:
        ValueError: the method takes none of them, the order has no integer dtype, or
            the mask does not match the grid.
    """
    uploads: list[tuple[str, Array]] = []
    method = method_of(attention.method)
    if given.order is not None:
        if attention.permute:
            header.options.permutation.use_given_order = True
        elif method is not None and method.permutes:
            getattr(header.options, method.name).use_given_order = True
        else:
            names = " or ".join(name for name, kind in METHODS.items() if kind.permutes)
            raise ValueError(f"an order needs the method {names}, or permute")
        uploads.append(("ORDER", _order_array(given.order)))
    lists = given.lists
    if given.block_mask is not None:
        assert grid is not None
        lists = lists_from_mask(given.block_mask, grid)
    if lists is not None:
        if method is None or not method.selects:
            names = ", ".join(name for name, kind in METHODS.items() if kind.selects)
            raise ValueError(f"lists and block_mask need a method of {names}")
        getattr(header.options, method.name).use_given_lists = True
        uploads.append(("LIST_OFFSETS", np.asarray(lists.offsets, np.int64)))
        uploads.append(("LIST_INDICES", np.asarray(lists.indices, np.uint16)))
    return uploads


def announce(call: AttendCall) -> None:
    """Lists the uploads in the header. ValueError for a dtype that cannot be sent."""
    for name, array in call.uploads:
        call.header.tensors.add(
            tensor=_TENSORS[name],
            dtype=dtypes.to_wire(array.dtype),
            shape=array.shape,
        )


def block_size_of(method: Method | None) -> int:
    """Tokens of a block of a request with `method`."""
    size = None if method is None else method.block_size
    return BLOCK_SIZE_DEFAULT if size is None else size


def requests(
    call: AttendCall, chunk_bytes: int, progress: ProgressCallback | None
) -> Iterator[bytes]:
    """The messages of the upload: the header, then each tensor in chunks."""
    yield _wire.encode_attend_header(call.header.SerializeToString())
    done, total = 0, call.upload_bytes
    for name, array in call.uploads:
        data = _bytes_of(array)
        for offset in range(0, data.nbytes, chunk_bytes):
            piece = data[offset : offset + chunk_bytes]
            yield _wire.encode_attend_chunk(_TENSORS[name], offset, piece)
            done += piece.nbytes
            if progress is not None:
                progress("upload", done, total)


class AttendReply:
    """Assembles the reply of one call."""

    def __init__(self, call: AttendCall, progress: ProgressCallback | None) -> None:
        self._call = call
        self._progress = progress
        self._arrays: dict[str, Array] | None = None
        self._targets: dict[str, Any] = {}
        self._received: dict[str, int] = {}
        self._stats: AttendStats | None = None

    def add(self, message: bytes) -> None:
        """Takes one AttendResponse. CorruptDataError when it must not come now."""
        member, body = _wire.decode_oneof(message, "AttendResponse")
        if self._stats is not None:
            raise CorruptDataError("the reply goes on after its stats")
        if member == _CHUNK:
            self._add_chunk(_wire.decode_tensor_chunk(body))
        elif member == _HEADER and self._arrays is None:
            self._open(_wire.parse(_messages.AttendResponseHeader, body))
        elif member == _STATS:
            stats = _wire.parse(_messages.AttendStats, body)
            self._stats = AttendStats.from_message(stats)
        else:
            raise CorruptDataError(f"unexpected member {member} of AttendResponse")

    def result(self) -> AttendResult:
        """The complete reply. CorruptDataError when a part of it is missing."""
        if self._arrays is None or self._stats is None:
            raise CorruptDataError("the reply ended without header or stats")
        for name, target in self._targets.items():
            if self._received[name] != target.nbytes:
                raise CorruptDataError(
                    f"{name} has {self._received[name]} of {target.nbytes} bytes",
                    kind=name,
                    offset=self._received[name],
                )
        return AttendResult(
            stats=self._stats,
            o=self._arrays.get("O"),
            lse=self._arrays.get("LSE"),
            order=self._arrays.get("ORDER"),
            **self._lists_and_mask(self._arrays),
        )

    def _open(self, header: Any) -> None:
        self._arrays = {}
        wanted = {name for item in self._call.want for name in _WANTED_TENSORS[item]}
        for spec in header.tensors:
            name = _TENSOR_NAMES.get(spec.tensor, f"tensor {spec.tensor}")
            shape, dtype = tuple(spec.shape), dtypes.from_wire(spec.dtype)
            if name not in wanted or name in self._arrays:
                raise CorruptDataError(f"the reply announces {name}, unasked or twice")
            if not self._fits(name, shape, dtype):
                raise CorruptDataError(f"{name} has shape {list(shape)}, dtype {dtype}")
            self._arrays[name] = np.empty(shape, dtype)
            self._targets[name] = self._arrays[name].reshape(-1).view(np.uint8)
            self._received[name] = 0
        missing = sorted(wanted - set(self._arrays))
        if missing:
            raise CorruptDataError(f"the reply does not announce {', '.join(missing)}")

    def _fits(self, name: str, shape: tuple[int, ...], dtype: Any) -> bool:
        problem, grid = self._call.shape, self._call.grid
        if name == "O":
            return dtype == self._call.dtype and shape == (
                *problem.q_rows,
                problem.head_dim,
            )
        if name == "LSE":
            return dtype == np.float32 and shape == problem.q_rows
        if name == "ORDER":
            return dtype == np.int32 and shape in problem.order_shapes()
        assert grid is not None
        if name == "LIST_OFFSETS":
            return dtype == np.int64 and shape == (grid.num_rows + 1,)
        return dtype == np.uint16 and len(shape) == 1 and shape[0] <= grid.entries_max

    def _add_chunk(self, chunk: _wire.TensorChunk) -> None:
        name = _TENSOR_NAMES.get(chunk.tensor, f"tensor {chunk.tensor}")
        target = self._targets.get(name)
        if target is None:
            raise CorruptDataError(f"a chunk of {name}, which was not announced")
        done, size = self._received[name], chunk.data.nbytes
        if chunk.offset != done or not 0 < size <= target.nbytes - done:
            raise CorruptDataError(
                f"{name}: {size} bytes at {chunk.offset} where byte {done} of "
                f"{target.nbytes} must follow",
                kind=name,
                offset=chunk.offset,
            )
        target[done : done + size] = np.frombuffer(chunk.data, np.uint8)
        self._received[name] = done + size
        if self._progress is not None:
            total = sum(t.nbytes for t in self._targets.values())
            self._progress("download", sum(self._received.values()), total)

    def _lists_and_mask(self, arrays: dict[str, Array]) -> dict[str, Any]:
        if "LIST_OFFSETS" not in arrays:
            return {}
        assert self._call.grid is not None
        lists = BlockLists(arrays["LIST_OFFSETS"], arrays["LIST_INDICES"])
        try:
            check_lists(lists, self._call.grid)
        except ValueError as error:
            raise CorruptDataError(f"the reply's lists are invalid: {error}") from None
        found: dict[str, Any] = {}
        if "lists" in self._call.want:
            found["lists"] = lists
        if "block_mask" in self._call.want:
            found["block_mask"] = mask_from_lists(lists, self._call.grid)
        return found


def _order_array(order: Any) -> Array:
    array = dtypes.as_array(order)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"order has dtype {array.dtype}, which is not an integer")
    limits = np.iinfo(np.int32)
    if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
        raise ValueError("order holds values outside int32")
    return np.ascontiguousarray(array, np.int32)


def _bytes_of(array: Array) -> memoryview:
    """The bytes of a C-contiguous array of any dtype."""
    return memoryview(array.reshape(-1).view(np.uint8).data)
