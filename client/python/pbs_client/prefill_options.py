"""Arguments of Client.prefill(): the delivery of the cache, and the logits.

Types are checked here. The server checks ranges; its errors name value and limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

from pbs_client import dtypes
from pbs_client._arguments import check_fields, int_tuple
from pbs_client._kv_receiver import LAYOUT_NUMBERS
from pbs_client.kv import LAYOUTS, Array, check_wire, page_tokens_of

INLINE_LAYOUT = "HND"


@dataclass(frozen=True)
class Inline:
    """The cache comes with the result, as PrefillResult.kv.

    Attributes:
        dtype: "f32", "f16" or "bf16"; None is the dtype that the server holds.
        checksums: check every chunk and layer.
        wire_dtype, page_tokens: as KvFormat.

    Raises:
        ValueError: dtype is not one of the three; wire_dtype or page_tokens as KvFormat.
        TypeError: as check_fields().
    """

    dtype: Any = None
    checksums: bool = True
    wire_dtype: str | None = None
    page_tokens: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_wire(self.wire_dtype, self.page_tokens)
        if self.dtype is not None:
            dtypes.float_dtype(self.dtype)

    def fill(self, delivery: Any) -> None:
        """Writes itself into a KvDelivery message."""
        delivery.inline.layout = LAYOUT_NUMBERS[INLINE_LAYOUT]
        delivery.inline.checksums = self.checksums
        delivery.inline.page_tokens = page_tokens_of(self.wire_dtype, self.page_tokens)
        if self.wire_dtype is not None:
            delivery.inline.dtype = dtypes.F8_E4M3_NUMBER
        elif self.dtype is not None:
            delivery.inline.dtype = dtypes.to_wire(dtypes.float_dtype(self.dtype))


@dataclass(frozen=True)
class Lease:
    """The server holds the cache for Client.fetch(). PrefillResult.ticket names it.

    Attributes:
        ttl_seconds: time of the lease, from the end of the prefill; None is the
            server's default.
        idempotency_key: while the lease lives, an equal request with an equal key gets
            the same ticket, without new work; at most 128 bytes, "" is no key.
        capture_query_layers: layers whose queries, after rotation, the lease also holds
            for Client.fetch_queries(); ascending.

    Raises:
        ValueError: capture_query_layers is not a list of integers.
        TypeError, ValueError: as check_fields().
    """

    ttl_seconds: int | None = None
    idempotency_key: str = ""
    capture_query_layers: Sequence[int] | Array = ()

    def __post_init__(self) -> None:
        check_fields(self)
        layers = int_tuple("capture_query_layers", self.capture_query_layers)
        object.__setattr__(self, "capture_query_layers", layers)

    def fill(self, delivery: Any) -> None:
        """Writes itself into a KvDelivery message; key and layers are the request's."""
        delivery.lease.SetInParent()
        if self.ttl_seconds is not None:
            delivery.lease.ttl_seconds = self.ttl_seconds


@dataclass(frozen=True)
class Push:
    """The server sends the cache to a KvSink while it prefills.

    The call ends when the sink has all of it. It fails when the sink fails, with the
    sink's reason.

    Attributes:
        target: HOST:PORT of the sink, as the server's push_targets has it.
        dtype: "f32", "f16" or "bf16"; None is the dtype that the server holds.
        layout: "HND" [kv_heads, tokens, head_dim] or "NHD" [tokens, kv_heads, head_dim].
        checksums: the sink checks every chunk and layer.
        chunk_bytes: the longest payload, 65536 .. 4194304; None is the server's default.
        wire_dtype, page_tokens: as KvFormat; with wire_dtype the arrays have the dtype
            that the server holds.

    Raises:
        ValueError: dtype or layout is none of these, dtype is given beside wire_dtype,
            or as KvFormat.
        TypeError, ValueError: as check_fields().
    """

    target: str
    dtype: Any = None
    layout: str = "HND"
    checksums: bool = True
    page_tokens: int | None = None
    chunk_bytes: int | None = None
    wire_dtype: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_wire(self.wire_dtype, self.page_tokens)
        if self.dtype is not None:
            if self.wire_dtype is not None:
                raise ValueError("a push with wire_dtype has no dtype of its own")
            dtypes.float_dtype(self.dtype)
        if self.layout not in LAYOUTS:
            names = ", ".join(LAYOUTS)
            raise ValueError(f"layout {self.layout!r} is not one of {names}")

    def fill(self, delivery: Any) -> None:
        """Writes itself into a KvDelivery message."""
        push = delivery.push
        push.target = self.target
        push.layout = LAYOUT_NUMBERS[self.layout]
        push.checksums = self.checksums
        push.page_tokens = page_tokens_of(self.wire_dtype, self.page_tokens)
        if self.wire_dtype is not None:
            push.dtype = dtypes.F8_E4M3_NUMBER
        elif self.dtype is not None:
            push.dtype = dtypes.to_wire(dtypes.float_dtype(self.dtype))
        if self.chunk_bytes is not None:
            push.chunk_bytes = self.chunk_bytes


@dataclass(frozen=True)
class Logits:
    """The logits that a prefill returns.

    Attributes:
        top: number of best next tokens, 0 .. 100.
        positions: prompt positions that also get their best next tokens, at most 256.
        all_of_last_token: also return the whole vocabulary's logits of the last token.

    Raises:
        ValueError: positions is not a list of integers.
        TypeError, ValueError: as check_fields().
    """

    top: int = 0
    positions: Sequence[int] | Array = ()
    all_of_last_token: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        positions = int_tuple("positions", self.positions, "Uint32")
        object.__setattr__(self, "positions", positions)

    def fill(self, request: Any) -> None:
        """Writes itself into a PrefillRequest message."""
        request.top_logits = self.top
        request.logit_positions.extend(self.positions)
        request.all_logits_last_token = self.all_of_last_token


Delivery = Union[Inline, Lease, Push]

_DELIVERIES: dict[str, type[Inline | Lease]] = {"inline": Inline, "lease": Lease}


def delivery_of(delivery: Any) -> Delivery | None:
    """A delivery from a delivery object or a name; None for None and "none".

    Raises:
        ValueError: it is no delivery.
    """
    if delivery is None or delivery == "none":
        return None
    if isinstance(delivery, (Inline, Lease, Push)):
        return delivery
    if isinstance(delivery, str) and delivery in _DELIVERIES:
        return _DELIVERIES[delivery]()
    names = ", ".join(map(repr, _DELIVERIES))
    raise ValueError(
        f"delivery {delivery!r} is not one of 'none', {names}, nor Inline(...), Lease(...) "
        "or Push(...)"
    )
