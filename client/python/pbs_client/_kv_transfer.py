"""Fetch: the requested ranges, and resuming after a broken connection."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from pbs_client import _messages, _wire, dtypes
from pbs_client._kv_receiver import (
    LAYOUT_NUMBERS,
    QUERIES,
    KvPlace,
    KvReceiver,
    KvShape,
    LayerCallback,
)
from pbs_client._shared_memory import SharedRegion
from pbs_client._transport import Deadline, Transport
from pbs_client.errors import DeadlineExceededError, UnavailableError
from pbs_client.kv import (
    KvCache,
    KvDescriptor,
    KvFormat,
    KvPart,
    Span,
    page_tokens_of,
)

_RECONNECT_SECONDS_MAX = 10.0
_RECONNECT_TRIES = 6
_RECONNECT_PAUSE_SECONDS = 0.005  # after the first; each is twice as long

# As _attend.ProgressCallback: ("download", bytes done, bytes in total).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FetchPlan:
    """A described cache and the ranges to fetch."""

    descriptor: KvDescriptor
    shape: KvShape
    region: SharedRegion | None = None  # where the bytes are taken from shared memory

    @classmethod
    def of(
        cls,
        descriptor: KvDescriptor,
        part: KvPart,
        kv_format: KvFormat,
    ) -> FetchPlan:
        """The plan. ValueError when a range is empty or outside the cache."""
        dtype = kv_format.dtype
        shape = KvShape(
            layers=_span("layers", part.layers, descriptor.num_layers),
            tokens=_span("tokens", part.tokens, descriptor.num_tokens),
            heads=_span("heads", part.heads, descriptor.num_kv_heads),
            head_dim=descriptor.head_dim,
            dtype=descriptor.dtype if dtype is None else dtypes.float_dtype(dtype),
            layout=kv_format.layout,
            epoch=descriptor.ticket.epoch,
            checksums=kv_format.checksums,
            wire_dtype=kv_format.wire_dtype,
            page_tokens=page_tokens_of(kv_format.wire_dtype, kv_format.page_tokens),
        )
        return cls(descriptor, shape)

    @classmethod
    def of_queries(
        cls, descriptor: KvDescriptor, layer: int, kv_format: KvFormat
    ) -> FetchPlan:
        """The plan of one layer's queries.

        Raises:
            ValueError: it was not captured, or queries cannot travel so.
        """
        if kv_format.wire_dtype is not None:
            raise ValueError(f"queries do not travel as {kv_format.wire_dtype}")
        if layer not in descriptor.query_layers:
            names = ", ".join(map(str, descriptor.query_layers)) or "none"
            raise ValueError(
                f"the queries of layer {layer} were not captured; those of layers "
                f"{names} were"
            )
        whole = cls.of(descriptor, KvPart(layers=(layer, 1)), kv_format).shape
        heads = Span(0, descriptor.num_query_heads)
        return cls(descriptor, dataclasses.replace(whole, heads=heads, kinds=QUERIES))

    def request(self, layer_begin: int, place: KvPlace | None) -> bytes:
        """The FetchRequest for what is missing: from `place` of `layer_begin` on."""
        shape = self.shape
        request = _messages.FetchRequest(
            ticket=self.descriptor.ticket.to_message(),
            layer_begin=layer_begin,
            layer_count=shape.layers.end - layer_begin,
            token_begin=shape.tokens.begin,
            token_count=shape.tokens.count,
            head_begin=shape.heads.begin,
            head_count=shape.heads.count,
            dtype=shape.wire_number,
            layout=LAYOUT_NUMBERS[shape.layout],
            checksums=shape.checksums,
            page_tokens=shape.page_tokens,
            resume=None if place is None else place.__dict__,
        )
        if shape.kinds == QUERIES:
            request.queries = True
        if self.region is not None:
            request.shared_memory = True
        return bytes(request.SerializeToString())

    def cache(self, receiver: KvReceiver) -> KvCache:
        """The whole cache. CorruptDataError when bytes are missing."""
        ticket = self.descriptor.ticket
        return receiver.cache(
            prompt_tokens=self.descriptor.num_tokens,
            model_digest=ticket.model_digest,
            sparsity_digest=ticket.sparsity_digest,
            first_token=self.descriptor.first_token,
        )


def run_fetch(
    transport: Transport,
    plan: FetchPlan,
    resumes: int,
    deadline: Deadline,
    on_layer: LayerCallback | None,
    progress: Progress | None,
) -> KvReceiver:
    """Fetches by the plan; see Client.fetch(). The receiver has received all."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("download", done, total)

    receiver = KvReceiver(plan.shape, on_layer, report)
    while True:
        try:
            _fetch_from(transport, plan, receiver, deadline)
            receiver.finish()
            return receiver
        except UnavailableError:
            if receiver.is_complete:
                return receiver
            if resumes <= 0 or not _reconnect(transport, plan, deadline):
                raise
            resumes -= 1
        receiver.resume()


def _reconnect(transport: Transport, plan: FetchPlan, deadline: Deadline) -> bool:
    """True when the server is back and has the cache. Errors as Client.describe()."""
    ticket = plan.descriptor.ticket.to_message().SerializeToString()
    end = Deadline(min(deadline.left(), _RECONNECT_SECONDS_MAX))
    for attempt in range(_RECONNECT_TRIES):
        try:
            transport.unary("/pbs.v1.KvSource/Describe", ticket, end.left(), True)
            return True
        except UnavailableError:
            # It fell with the broken connection, which is still being taken down.
            time.sleep(min(_RECONNECT_PAUSE_SECONDS * 2**attempt, end.left()))
        except DeadlineExceededError:
            return False
    return False


def _fetch_from(
    transport: Transport, plan: FetchPlan, receiver: KvReceiver, deadline: Deadline
) -> None:
    request = plan.request(receiver.next_layer, receiver.place)
    path = "/pbs.v1.KvSource/Fetch"
    with transport.receive(path, request, deadline.left()) as chunks:
        for message in chunks:
            chunk = _wire.decode_kv_chunk(message)
            if plan.region is not None:
                chunk = plan.region.with_payload(chunk, plan.shape.row_bytes)
            receiver.add(chunk)


def _span(name: str, given: tuple[int, int] | None, size: int) -> Span:
    if given is None:
        return Span(0, size)
    begin, count = given
    if begin < 0 or count < 1 or begin + count > size:
        raise ValueError(f"{name} [{begin}, +{count}) are not inside [0, {size})")
    return Span(begin, count)
