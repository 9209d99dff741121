"""KV caches and the tickets that name them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbs_client import _messages, dtypes
from pbs_client._arguments import check_fields
from pbs_client.errors import CorruptDataError

Array = np.ndarray[Any, np.dtype[Any]]

LAYOUTS = ("HND", "NHD")
_FP8_PAGE_TOKENS = 16  # of f8_e4m3, unless asked otherwise


@dataclass(frozen=True)
class KvTicket:
    """Names a KV cache that a server holds. Its holder may fetch and release the cache.

    Attributes:
        handle: 32 hex digits, unguessable.
        epoch: identifies the server process; a restarted server refuses old tickets.
        model_digest: weights, architecture, rotary embedding and dtype.
        sparsity_digest: "exact", or a digest of the method and options that made the
            cache and of the request's tenant salt, if any.
        endpoint: HOST:PORT of the server that holds the cache; "" is the server that
            the client is connected to.
    """

    handle: str
    epoch: int
    model_digest: str = ""
    sparsity_digest: str = ""
    endpoint: str = ""

    @classmethod
    def from_message(cls, message: Any) -> KvTicket:
        """From a KvTicket message."""
        return cls(
            message.handle,
            message.epoch,
            message.model_digest,
            message.sparsity_digest,
            message.endpoint,
        )

    def to_message(self) -> Any:
        """As a KvTicket message."""
        return _messages.KvTicket(**self.__dict__)

    def to_json(self) -> str:
        """One line of JSON, to pass the ticket to a decode tier.

        The epoch is a string, because readers that know only doubles would round it.
        """
        return json.dumps({**self.__dict__, "epoch": str(self.epoch)})

    @classmethod
    def from_json(cls, text: str) -> KvTicket:
        """From to_json(), or the `ticket` object that `pbs-client prefill` prints.

        Raises:
            ValueError: `text` is not a ticket.
        """
        value = json.loads(text)
        names = ("handle", "epoch", "model_digest", "sparsity_digest")
        if not isinstance(value, Mapping) or set(value) - {"endpoint"} != set(names):
            raise ValueError(
                f"a ticket is a JSON object of {', '.join(names)} and, optionally, "
                "endpoint"
            )
        for name in value:
            if not isinstance(value[name], str):
                raise ValueError(f"ticket field {name} is not a string")
        if not value["epoch"].isdecimal() or int(value["epoch"]) >= 1 << 64:
            raise ValueError("ticket field epoch is not a decimal 64-bit number")
        return cls(**{**value, "epoch": int(value["epoch"])})


@dataclass(frozen=True)
class KvDescriptor:
    """The state and sizes of a ticket's cache.

    Attributes:
        ticket: with its digests filled in.
        expires_unix_seconds: None while the prefill runs; the time starts at its end.
        ttl_seconds: time to live of the lease.
        complete: the prefill has ended; until then layers_ready layers are ready.
        num_tokens: prompt tokens, each with a key and a value in every layer and head.
        dtype: float32, float16 or ml_dtypes.bfloat16, as the server holds the cache.
        bytes: bytes of the cache at the server.
        first_token: greedy next token; None until complete.
        query_layers: layers whose queries were captured.
        num_query_heads: heads of these; 0 without any.
        query_bytes: bytes of these at the server.
        prompt_digest: kv_params.prompt_digest() of the prompt's ids.
    """

    ticket: KvTicket
    expires_unix_seconds: float | None
    ttl_seconds: int
    model: str
    complete: bool
    num_layers: int
    layers_ready: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    dtype: np.dtype[Any]
    bytes: int
    first_token: int | None
    query_layers: tuple[int, ...] = ()
    num_query_heads: int = 0
    query_bytes: int = 0
    prompt_digest: str = ""

    @classmethod
    def from_message(cls, message: Any) -> KvDescriptor:
        """From a KvDescriptor message. CorruptDataError when its sizes are invalid.

        The description has no checksum. But a cache has as many bytes as its sizes say,
        so a changed size shows, and nobody fetches a part for the whole.
        """
        dtype = dtypes.from_wire(message.dtype)
        if dtype is None or dtype not in dtypes.FLOAT_DTYPES.values():
            raise CorruptDataError(f"descriptor has unknown dtype {message.dtype}")
        sizes = ("num_layers", "num_kv_heads", "head_dim", "num_tokens")
        for name in sizes:
            size = getattr(message, name)
            if size < 1:
                raise CorruptDataError(f"descriptor has {name} {size}")
        rows = message.num_layers * message.num_kv_heads * message.num_tokens
        size = 2 * rows * message.head_dim * dtype.itemsize
        if message.bytes != size:
            raise CorruptDataError(
                f"descriptor has bytes {message.bytes}, but its sizes make {size}"
            )
        layers = tuple(message.query_layers)
        if layers and message.num_query_heads < 1:
            raise CorruptDataError(
                f"descriptor has num_query_heads {message.num_query_heads}"
            )
        lease = message.lease
        return cls(
            ticket=KvTicket.from_message(lease.ticket),
            expires_unix_seconds=lease.expires_unix_ms / 1000 or None,
            ttl_seconds=lease.ttl_seconds,
            model=message.model,
            complete=message.state == _COMPLETE,
            layers_ready=message.layers_ready,
            dtype=dtype,
            bytes=message.bytes,
            first_token=(
                message.first_token_id if message.HasField("first_token_id") else None
            ),
            query_layers=layers,
            num_query_heads=message.num_query_heads,
            query_bytes=message.query_bytes,
            prompt_digest=message.prompt_digest,
            **{name: getattr(message, name) for name in sizes},
        )


_COMPLETE = _messages.enum_numbers("KvState")["COMPLETE"]


@dataclass(frozen=True)
class KvLease:
    """A renewed lease.

    Attributes:
        expires_unix_seconds: None while the prefill runs.
    """

    ticket: KvTicket
    expires_unix_seconds: float | None
    ttl_seconds: int

    @classmethod
    def from_message(cls, message: Any) -> KvLease:
        """From a KvLease message."""
        return cls(
            KvTicket.from_message(message.ticket),
            message.expires_unix_ms / 1000 or None,
            message.ttl_seconds,
        )


@dataclass(frozen=True)
class Span:
    """The half-open range [begin, begin + count)."""

    begin: int
    count: int

    @property
    def end(self) -> int:
        """One past the last."""
        return self.begin + self.count


@dataclass(frozen=True)
class KvPart:
    """A part of a cache. Each range is (begin, count); None is all.

    Attributes:
        layers: range of the model's layers.
        tokens: range of the prompt.
        heads: range of the KV heads.

    Raises:
        TypeError: a range is not two integers.
    """

    layers: tuple[int, int] | None = None
    tokens: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, given in self.__dict__.items():
            if given is not None and not _is_int_pair(given):
                raise TypeError(f"{name} {given!r} is not (begin, count)")


def _is_int_pair(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and len(given) == 2
        and all(isinstance(number, (int, np.integer)) for number in given)
    )


@dataclass(frozen=True)
class KvFormat:
    """The form in which a cache is fetched.

    Attributes:
        dtype: "f32", "f16" or "bf16"; None is the dtype that the server holds.
        layout: "HND" [kv_heads, tokens, head_dim] or "NHD" [tokens, kv_heads, head_dim].
        checksums: check every chunk and layer.
        wire_dtype: "f8_e4m3": the cache travels as one byte an element and a scale for
            each page, and is widened to dtype on arrival: about half the bytes of bf16,
            and an approximation (docs/PROTOCOL.md). None: it travels as dtype.
        page_tokens: tokens of a page, counted from token 0: chunks end at pages. None
            is 16 with wire_dtype, else 1.

    Raises:
        ValueError: dtype, layout, wire_dtype or page_tokens is none of these.
        TypeError: as check_fields().
    """

    dtype: Any = None
    layout: str = "HND"
    checksums: bool = True
    wire_dtype: str | None = None
    page_tokens: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_wire(self.wire_dtype, self.page_tokens)
        if self.dtype is not None:
            dtypes.float_dtype(self.dtype)
        if self.layout not in LAYOUTS:
            names = ", ".join(LAYOUTS)
            raise ValueError(f"layout {self.layout!r} is not one of {names}")


def check_wire(wire_dtype: str | None, page_tokens: int | None) -> None:
    """ValueError unless a cache can travel so; see KvFormat."""
    if wire_dtype not in (None, dtypes.F8_E4M3):
        raise ValueError(f"wire_dtype {wire_dtype!r} is not {dtypes.F8_E4M3}")
    if page_tokens is not None and page_tokens < 1:
        raise ValueError(f"page_tokens {page_tokens} is below 1")


def page_tokens_of(wire_dtype: str | None, page_tokens: int | None) -> int:
    """The tokens of a page; see KvFormat."""
    if page_tokens is not None:
        return page_tokens
    return 1 if wire_dtype is None else _FP8_PAGE_TOKENS


@dataclass(frozen=True, eq=False)
class KvCache:
    """Keys and values of a prompt, or of ranges of it.

    Keys include the rotary embedding. Keys and values are in token order and not
    repeated for grouped queries.

    Attributes:
        k, v: one array per layer, [kv_heads, tokens, head_dim] in layout "HND",
            [tokens, kv_heads, head_dim] in "NHD".
        layers, tokens, heads: the ranges that the arrays cover.
        prompt_tokens: tokens of the whole prompt.
        model_digest, sparsity_digest: see KvTicket.
        first_token: greedy next token; None when unknown.
        wire_dtype: of KvFormat or Inline: set when the arrays are approximate because
            of how they travelled.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    layers: Span
    tokens: Span
    heads: Span
    prompt_tokens: int
    layout: str = "HND"
    model_digest: str = ""
    sparsity_digest: str = ""
    first_token: int | None = None
    wire_dtype: str | None = None

    @property
    def num_layers(self) -> int:
        """Layers in the cache."""
        return len(self.k)

    @property
    def head_dim(self) -> int:
        """Width of a key."""
        return int(self.k[0].shape[2])

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the elements."""
        return self.k[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.k + self.v)

    def tensors(self) -> dict[str, Array]:
        """The arrays by their names in files: layers.N.k, layers.N.v."""
        named: dict[str, Array] = {}
        for index, (k, v) in enumerate(zip(self.k, self.v), self.layers.begin):
            named[f"layers.{index}.k"] = k
            named[f"layers.{index}.v"] = v
        return named
