"""Copies the chunks of a KV transfer to their place and checks each of them.

A transfer is the arrays (layer, K), (layer, V) of each layer in order, or (layer, Q) of
one layer, each cut into chunks that follow one another without gaps. Every chunk is
checked against what must come next before its bytes are copied - once, into their final
place - and against its checksum after. Chunks of F8_E4M3 are widened into their place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbs_client import _checksum, _fp8, _messages, dtypes
from pbs_client._wire import KvChunk
from pbs_client.errors import CorruptDataError
from pbs_client.kv import Array, KvCache, Span

LAYOUT_NUMBERS = _messages.enum_numbers("KvLayout")

KEYS_AND_VALUES = ("K", "V")
QUERIES = ("Q",)
_KIND_NUMBERS = _messages.enum_numbers("KvChunk.Kind")

# Called with (layer, k, v) when both arrays of a layer are complete and checked.
LayerCallback = Callable[[int, Array, Array], None]


@dataclass(frozen=True)
class KvPlace:
    """The first row, [head_dim], that is missing: the fields of pbs.v1.KvPlace."""

    kind: str
    head: int
    token: int


@dataclass(frozen=True)
class KvShape:
    """The requested ranges, dtype and layout.

    Attributes:
        dtype: of the arrays.
        layout: "HND" or "NHD".
        epoch: that every chunk must carry.
        checksums: every chunk must carry its CRC, every layer its digest.
        kinds: arrays of a layer, in their order of arrival.
        wire_dtype, page_tokens: of the chunks; see KvFormat.
    """

    layers: Span
    tokens: Span
    heads: Span
    head_dim: int
    dtype: np.dtype[Any]
    layout: str
    epoch: int
    checksums: bool
    kinds: tuple[str, ...] = KEYS_AND_VALUES
    wire_dtype: str | None = None
    page_tokens: int = 1

    @property
    def array_shape(self) -> tuple[int, int, int]:
        """Shape of one array."""
        if self.layout == "HND":
            return self.heads.count, self.tokens.count, self.head_dim
        return self.tokens.count, self.heads.count, self.head_dim

    @property
    def is_fp8(self) -> bool:
        """The chunks are F8_E4M3."""
        return self.wire_dtype is not None

    @property
    def wire_number(self) -> int:
        """The DType number of the chunks."""
        return dtypes.F8_E4M3_NUMBER if self.is_fp8 else dtypes.to_wire(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one head, as sent."""
        return self.head_dim * (1 if self.is_fp8 else self.dtype.itemsize)

    @property
    def array_bytes(self) -> int:
        """Bytes of one array, as sent."""
        return self.heads.count * self.tokens.count * self.row_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all arrays, as sent."""
        return len(self.kinds) * self.layers.count * self.array_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of all arrays, in dtype."""
        return self.total_bytes // self.row_bytes * self.head_dim * self.dtype.itemsize


class KvReceiver:
    """Assembles one transfer. Not thread-safe."""

    def __init__(
        self,
        shape: KvShape,
        on_layer: LayerCallback | None = None,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> None:
        """Allocates every array.

        Args:
            shape: the requested ranges, dtype and layout.
            on_layer: see LayerCallback.
            on_bytes: called with (bytes received, bytes in total) after each chunk.
        """
        self.shape = shape
        self._on_layer = on_layer
        self._on_bytes = on_bytes
        self._arrays = [
            {kind: np.empty(shape.array_shape, shape.dtype) for kind in shape.kinds}
            for _ in range(shape.layers.count)
        ]
        self._layer_idx = 0
        self._is_resumed = False  # and nothing has come since
        self._begin_layer()

    @property
    def next_layer(self) -> int:
        """The first incomplete layer; a broken transfer resumes there, at `place`."""
        return self.shape.layers.begin + self._layer_idx

    @property
    def place(self) -> KvPlace | None:
        """The first missing row of next_layer; None when all of the layer is."""
        shape = self.shape
        if self._offset == 0 and self._kind == shape.kinds[0]:
            return None
        row = self._offset // shape.row_bytes
        head, token = divmod(row, shape.tokens.count)
        if shape.layout == "NHD":
            token, head = divmod(row, shape.heads.count)
        return KvPlace(self._kind, shape.heads.begin + head, shape.tokens.begin + token)

    @property
    def is_complete(self) -> bool:
        """Every layer is complete and checked."""
        return self._layer_idx == self.shape.layers.count

    @property
    def received_bytes(self) -> int:
        """Bytes of complete arrays and of the current one."""
        kinds = self.shape.kinds
        whole = len(kinds) * self._layer_idx + kinds.index(self._kind)
        return whole * self.shape.array_bytes + self._offset

    def resume(self) -> None:
        """A new stream follows, which begins at `place`.

        A server that does not know FetchRequest.resume begins with next_layer instead;
        what was received of it is then discarded.
        """
        self._digest = 0
        self._is_resumed = True

    def restart_layer(self) -> None:
        """Discards the current layer, before a transfer restarts at next_layer."""
        self._begin_layer()

    def add(self, chunk: KvChunk) -> None:
        """Checks and stores one chunk.

        Raises:
            CorruptDataError: it is not the expected next chunk, or its checksum or the
                layer's digest is wrong. The layer is then unusable until
                restart_layer().
        """
        if self._is_resumed and self._begins_layer(chunk):
            self.restart_layer()
        self._is_resumed = False
        self._check_place(chunk)
        size = chunk.payload.nbytes
        target = self._target[self._offset : self._offset + size]
        if self.shape.is_fp8:
            self._check_crc(chunk, np.frombuffer(chunk.payload, np.uint8))
            is_nhd = self.shape.layout == "NHD"
            _fp8.widen(chunk, self.shape.page_tokens, is_nhd, target)
        else:
            target[:] = np.frombuffer(chunk.payload, np.uint8)
            self._check_crc(chunk, target)
        self._offset += size
        is_last = self._kind == self.shape.kinds[-1]
        layer_ends = is_last and self._offset == self.shape.array_bytes
        if self.shape.checksums and layer_ends and chunk.layer_digest != self._digest:
            raise self._corrupt(
                f"layer digest is {chunk.layer_digest}, not {self._digest}"
            )
        if self._offset == self.shape.array_bytes:
            self._end_array()
        if self._on_bytes is not None:
            self._on_bytes(self.received_bytes, self.shape.total_bytes)

    def finish(self) -> tuple[tuple[Array, ...], ...]:
        """For each kind the arrays of all layers. CorruptDataError: bytes are missing."""
        if not self.is_complete:
            raise self._corrupt("the transfer ended before this byte")
        return tuple(
            tuple(arrays[kind] for arrays in self._arrays) for kind in self.shape.kinds
        )

    def cache(
        self,
        *,
        prompt_tokens: int,
        model_digest: str,
        sparsity_digest: str,
        first_token: int | None = None,
    ) -> KvCache:
        """All keys and values. CorruptDataError when bytes are missing."""
        k, v = self.finish()
        shape = self.shape
        return KvCache(
            k=k,
            v=v,
            layers=shape.layers,
            tokens=shape.tokens,
            heads=shape.heads,
            prompt_tokens=prompt_tokens,
            layout=shape.layout,
            model_digest=model_digest,
            sparsity_digest=sparsity_digest,
            first_token=first_token,
            wire_dtype=shape.wire_dtype,
        )

    def _begin_layer(self) -> None:
        self._digest = 0
        self._begin_array(self.shape.kinds[0])

    def _begin_array(self, kind: str) -> None:
        self._kind = kind
        self._offset = 0
        if not self.is_complete:
            array = self._arrays[self._layer_idx][kind]
            flat = array.reshape(-1)
            self._target = flat if self.shape.is_fp8 else flat.view(np.uint8)

    def _end_array(self) -> None:
        kinds = self.shape.kinds
        if self._kind != kinds[-1]:
            self._begin_array(kinds[kinds.index(self._kind) + 1])
            return
        layer, arrays = self.next_layer, self._arrays[self._layer_idx]
        self._layer_idx += 1
        self._begin_layer()
        if self._on_layer is not None:
            self._on_layer(layer, arrays["K"], arrays["V"])  # never with queries

    def _begins_layer(self, chunk: KvChunk) -> bool:
        begin = (self.next_layer, _KIND_NUMBERS[self.shape.kinds[0]], 0)
        return (chunk.layer, chunk.kind, chunk.byte_offset) == begin

    def _check_place(self, chunk: KvChunk) -> None:
        shape = self.shape
        if self.is_complete:
            raise self._corrupt("a chunk came after the last one")
        expected = {
            "ticket_epoch": shape.epoch,
            "layer": self.next_layer,
            "kind": _KIND_NUMBERS[self._kind],
            "dtype": shape.wire_number,
            "layout": LAYOUT_NUMBERS[shape.layout],
            "byte_offset": self._offset,
        }
        for name, value in expected.items():
            if getattr(chunk, name) != value:
                raise self._corrupt(f"{name} is {getattr(chunk, name)}, not {value}")
        size = chunk.payload.nbytes
        if not 0 < size <= shape.array_bytes - self._offset:
            left = shape.array_bytes - self._offset
            raise self._corrupt(f"the chunk has {size} bytes where {left} are left")
        self._check_rectangle(chunk)
        if shape.is_fp8:
            if wrong := _fp8.wrong_scales(chunk, shape.page_tokens):
                raise self._corrupt(wrong)
        elif chunk.scales.nbytes:
            raise self._corrupt("the chunk has scales, which only F8_E4M3 has")

    def _check_rectangle(self, chunk: KvChunk) -> None:
        """Checks that the chunk's tokens and heads match its byte range."""
        shape = self.shape
        heads = Span(chunk.head_begin - shape.heads.begin, chunk.head_count)
        tokens = Span(chunk.token_begin - shape.tokens.begin, chunk.token_count)
        outer, inner, inner_max = heads, tokens, shape.tokens.count
        if shape.layout == "NHD":
            outer, inner, inner_max = tokens, heads, shape.heads.count
        row_bytes = shape.row_bytes
        rows_before = outer.begin * inner_max + inner.begin
        contiguous = outer.count == 1 or inner.count == inner_max
        if (
            not contiguous
            or inner.begin < 0
            or inner.end > inner_max
            or rows_before * row_bytes != chunk.byte_offset
            or outer.count * inner.count * row_bytes != chunk.payload.nbytes
        ):
            raise self._corrupt(
                f"tokens [{chunk.token_begin}, +{chunk.token_count}) of heads "
                f"[{chunk.head_begin}, +{chunk.head_count}) are not the bytes it holds"
            )

    def _check_crc(self, chunk: KvChunk, stored: Any) -> None:
        if not self.shape.checksums:
            return
        if chunk.crc32c is None:
            raise self._corrupt("the chunk has no crc32c")
        actual = _checksum.crc32c(stored)
        if chunk.scales.nbytes:
            of_scales = _checksum.crc32c(bytes(chunk.scales))
            actual = _checksum.extend_crc32c(of_scales, stored)
        if actual != chunk.crc32c:
            raise self._corrupt(f"crc32c is {actual:#010x}, not {chunk.crc32c:#010x}")
        self._digest = _checksum.extend_digest(self._digest, actual)

    def _corrupt(self, what: str) -> CorruptDataError:
        layer, kind, offset = self.next_layer, self._kind, self._offset
        return CorruptDataError(
            f"KV layer {layer} {kind} at byte {offset}: {what}", layer, kind, offset
        )
