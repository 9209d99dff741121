"""Prefill: makes the request and reads its stream of events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from pbs_client import _messages, _wire, dtypes
from pbs_client._arguments import checked
from pbs_client._kv_receiver import KvReceiver, KvShape
from pbs_client.errors import CorruptDataError, NotFoundError
from pbs_client.kv import Array, KvCache, KvTicket, Span, page_tokens_of
from pbs_client.options import Attention
from pbs_client.prefill_options import INLINE_LAYOUT, Delivery, Inline, Lease, Logits
from pbs_client.results import (
    Admitted,
    LayerProgress,
    ModelInfo,
    PositionLogits,
    PrefillStats,
    TokenLogit,
    token_logits,
)

_ADMITTED, _LAYER, _KV, _DONE = 1, 2, 3, 4  # PrefillEvent


@dataclass(frozen=True, eq=False)
class PrefillResult:
    """Results of a prefill.

    Attributes:
        first_token: greedy next token.
        top_logits: the best next tokens, best first; empty unless requested.
        positions: the best next tokens after the requested prompt positions.
        last_token_logits: float32 [vocab_size]; None unless requested.
        ticket: names the cache; only with delivery Lease().
        lease_expires_unix_seconds: None without a ticket.
        kv: the cache; only with delivery Inline().
        model_digest, sparsity_digest: see KvTicket.
    """

    first_token: int
    top_logits: tuple[TokenLogit, ...]
    positions: tuple[PositionLogits, ...]
    last_token_logits: Array | None
    ticket: KvTicket | None
    lease_expires_unix_seconds: float | None
    kv: KvCache | None
    stats: PrefillStats
    model_digest: str
    sparsity_digest: str


@dataclass(frozen=True)
class PrefillCallbacks:
    """Callbacks of progress, from the thread that called prefill().

    Attributes:
        on_admitted: called with the ticket (None unless leased), so that another thread
            can start a fetch.
        on_layer: called when a layer's KV is ready.
    """

    on_admitted: Callable[[Admitted, KvTicket | None], None] | None = None
    on_layer: Callable[[LayerProgress], None] | None = None


def token_ids(tokens: Sequence[int] | Array) -> list[int]:
    """Token ids in the form of a request.

    Raises:
        ValueError: not one-dimensional, or an id outside uint32.
        TypeError: not integers.
    """
    array = dtypes.as_array(tokens)
    if array.ndim != 1:
        raise ValueError(f"tokens have {array.ndim} dimensions, not 1")
    if array.size == 0:
        return []
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"tokens have dtype {array.dtype}, which is not an integer")
    outside = np.flatnonzero((array < 0) | (array > np.iinfo(np.uint32).max))
    if outside.size:
        where = int(outside[0])
        raise ValueError(f"token {array[where]} at position {where} is no token id")
    ids: list[int] = array.tolist()
    return ids


def make_request(
    model: str,
    tokens: Sequence[int] | Array,
    attention: Attention,
    delivery: Delivery | None,
    logits: Logits,
    *,
    priority: int,
    tenant_salt: str,
    request_id: str,
) -> Any:
    """The PrefillRequest message. Errors as token_ids() and checked()."""
    request = _messages.PrefillRequest(
        model=model,
        token_ids=token_ids(tokens),
        priority=checked("int", "priority", priority),
        tenant_salt=tenant_salt,
        request_id=request_id,
    )
    attention.fill_prefill(request)
    logits.fill(request)
    if delivery is None:
        request.delivery.none.SetInParent()
    else:
        delivery.fill(request.delivery)
    if isinstance(delivery, Lease):
        request.idempotency_key = delivery.idempotency_key
        request.capture_query_layers.extend(delivery.capture_query_layers)
    return request


def find_model(models: Sequence[ModelInfo], name: str) -> ModelInfo:
    """The model of that name; "" is the only model. NotFoundError without one."""
    for model in models:
        if model.name == name or (not name and len(models) == 1):
            return model
    names = ", ".join(model.name for model in models) or "none"
    raise NotFoundError(
        f"model {name!r} is not served; these are: {names}", grpc.StatusCode.NOT_FOUND
    )


def _inline_shape(admitted: Any, num_tokens: int, inline: Inline) -> KvShape:
    """The shape of an inline cache. CorruptDataError when `admitted` has none."""
    shape = admitted.shape
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        if getattr(shape, name) < 1:
            raise CorruptDataError(f"`admitted` has {name} {getattr(shape, name)}")
    held = dtypes.from_wire(shape.dtype)
    dtype = held if inline.dtype is None else dtypes.float_dtype(inline.dtype)
    if dtype not in dtypes.FLOAT_DTYPES.values():
        raise CorruptDataError(f"`admitted` has unknown dtype {shape.dtype}")
    return KvShape(
        layers=Span(0, shape.num_layers),
        tokens=Span(0, num_tokens),
        heads=Span(0, shape.num_kv_heads),
        head_dim=shape.head_dim,
        dtype=dtype,
        layout=INLINE_LAYOUT,
        epoch=admitted.epoch,
        checksums=inline.checksums,
        wire_dtype=inline.wire_dtype,
        page_tokens=page_tokens_of(inline.wire_dtype, inline.page_tokens),
    )


def read_events(
    events: Iterator[bytes],
    callbacks: PrefillCallbacks,
    num_tokens: int,
    delivery: Delivery | None,
) -> PrefillResult:
    """Reads the stream to its end.

    Args:
        events: serialized PrefillEvents.
        callbacks: callbacks of progress.
        num_tokens: of the prompt.
        delivery: of the request. KV chunks are an error unless it is Inline().

    Raises:
        CorruptDataError: an event must not come now, or bytes are missing or wrong.
        PbsError: the stream failed.
    """
    done: Any = None
    receiver: KvReceiver | None = None
    for event in events:
        member, body = _wire.decode_oneof(event, "PrefillEvent")
        if done is not None:
            raise CorruptDataError("the stream goes on after `done`")
        if member == _KV and receiver is not None:
            receiver.add(_wire.decode_kv_chunk(body))
        elif member == _LAYER:
            _report_layer(_wire.parse(_messages.LayerDone, body), callbacks)
        elif member == _ADMITTED and receiver is None:
            admitted = _wire.parse(_messages.Admitted, body)
            if isinstance(delivery, Inline):
                receiver = KvReceiver(_inline_shape(admitted, num_tokens, delivery))
            _report_admitted(admitted, callbacks)
        elif member == _DONE:
            done = _wire.parse(_messages.Done, body)
        else:
            raise CorruptDataError(f"unexpected member {member} of PrefillEvent")
    if done is None:
        raise CorruptDataError("the stream ended without `done`")
    if isinstance(delivery, Inline) and receiver is None:
        raise CorruptDataError("`done` came without `admitted`")
    return _result(done, None if receiver is None else _cache(receiver, done))


def _report_layer(message: Any, callbacks: PrefillCallbacks) -> None:
    if callbacks.on_layer is not None:
        progress = LayerProgress(message.index, message.density, message.seconds)
        callbacks.on_layer(progress)


def _report_admitted(message: Any, callbacks: PrefillCallbacks) -> None:
    if callbacks.on_admitted is not None:
        ticket = _ticket_of(message)
        admitted = Admitted(message.queue_position, message.predicted_seconds)
        callbacks.on_admitted(admitted, ticket)


def _ticket_of(message: Any) -> KvTicket | None:
    if not message.HasField("ticket"):
        return None
    return KvTicket.from_message(message.ticket)


def _cache(receiver: KvReceiver, done: Any) -> KvCache:
    return receiver.cache(
        prompt_tokens=receiver.shape.tokens.count,
        model_digest=done.model_digest,
        sparsity_digest=done.sparsity_digest,
        first_token=done.first_token_id,
    )


def _result(done: Any, kv: KvCache | None) -> PrefillResult:
    logits = done.last_token_logits
    if len(logits) % 4:
        raise CorruptDataError(f"last_token_logits has {len(logits)} bytes")
    return PrefillResult(
        first_token=done.first_token_id,
        top_logits=token_logits(done.top_logits),
        positions=tuple(
            PositionLogits(p.position, token_logits(p.top)) for p in done.positions
        ),
        last_token_logits=np.frombuffer(logits, np.float32) if logits else None,
        ticket=_ticket_of(done),
        lease_expires_unix_seconds=done.lease_expires_unix_ms / 1000 or None,
        kv=kv,
        stats=PrefillStats.from_message(done.stats),
        model_digest=done.model_digest,
        sparsity_digest=done.sparsity_digest,
    )
