"""Client: the calls of a pbs-prefill server as Python methods.

    with Client("127.0.0.1:50051") as client:
        result = client.prefill("llama", tokens, Pbs(threshold=0.9), delivery="lease")
        kv = client.fetch(result.ticket)

Threading: a Client may be used from many threads at once.
Memory: an uploaded tensor is copied once, chunk by chunk. A downloaded tensor is copied
once, into the returned array.
Errors: every call raises a PbsError (errors.py) when the server refuses or cannot be
reached, CorruptDataError when received bytes are wrong, and ValueError or TypeError,
before any traffic, when its arguments cannot be sent.
Time: a call ends after `timeout` seconds with DeadlineExceededError. The server knows
the deadline and refuses a request at once when it cannot meet it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from pbs_client import _attend, _checksum, _health, _messages, _prefill, _wire, dtypes
from pbs_client._arguments import checked, expect
from pbs_client._attend import AttendResult, ProgressCallback
from pbs_client._capture import capture_heads
from pbs_client._fetcher import Fetcher
from pbs_client._homes import Homes
from pbs_client._kv_receiver import LayerCallback
from pbs_client._kv_transfer import FetchPlan
from pbs_client._prefill import PrefillCallbacks, PrefillResult
from pbs_client._transport import Deadline, Metadata, Transport
from pbs_client.attend_options import Given, Packed, Synthetic, Timing
from pbs_client.block_lists import BlockGrid
from pbs_client.capture import Capture
from pbs_client.errors import (
    CorruptDataError,
    DeadlineExceededError,
    UnavailableError,
)
from pbs_client.kv import (
    Array,
    KvCache,
    KvDescriptor,
    KvFormat,
    KvLease,
    KvPart,
    KvTicket,
)
from pbs_client.options import Attention, Method, attention_of, method_of
from pbs_client.prefill_options import Delivery, Logits, delivery_of
from pbs_client.results import Admitted, LayerProgress, ModelInfo, ServerInfo

CONTROL_TIMEOUT_SECONDS = 30.0  # info, models, health, describe, renew, release
WORK_TIMEOUT_SECONDS = 3600.0  # attend, prefill, fetch
WATCH_PAUSE_SECONDS = 0.2  # after a broken watch of the health
RESUMES = 3  # of a broken fetch
CHUNK_BYTES = 1 << 20  # uploads
CHUNK_BYTES_MAX = 4 << 20  # every server accepts it


class Client:
    """A connection to one server. It connects on first use; close it, or use `with`.

    Calls about a leased cache go to its ticket's endpoint, on the same terms.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
        chunk_bytes: int = CHUNK_BYTES,
        channel_options: Sequence[tuple[str, Any]] = (),
        follow_endpoints: bool = True,
        shared_memory_socket: str = "",
    ) -> None:
        """Prepares the connection, without network traffic.

        Args:
            target: HOST:PORT, or a gRPC target with a scheme (unix:/path, dns:///...).
            credentials: for TLS; None means plain text.
            metadata: pairs to send with every call, such as an authorization header.
            chunk_bytes: bytes of an upload's chunks, 1 .. 4 MiB.
            channel_options: gRPC channel arguments; they override this client's.
            follow_endpoints: False: all calls go to target, as through a port forward.
            shared_memory_socket: of the server, on this host. fetch() then takes caches
                from shared memory, as they are held, and never over the network.

        Raises:
            ValueError: target or chunk_bytes is invalid.
        """
        if not 0 < chunk_bytes <= CHUNK_BYTES_MAX:
            raise ValueError(
                f"chunk_bytes {chunk_bytes} is outside [1, {CHUNK_BYTES_MAX}]"
            )
        _checksum.warn_if_slow()
        self._chunk_bytes = chunk_bytes

        def connect(address: str) -> Transport:
            return Transport(address, credentials, metadata, channel_options)

        self._transport = connect(target)
        self._homes = Homes(self._transport, connect if follow_endpoints else None)
        self._fetcher = Fetcher(self, self._homes, shared_memory_socket)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels calls under way and closes the connection."""
        self._homes.close()

    # ---- about the server

    def info(self, *, timeout: float | None = CONTROL_TIMEOUT_SECONDS) -> ServerInfo:
        """Version, backends, methods and limits."""
        reply = self._transport.unary("/pbs.v1.Prefill/GetServerInfo", b"", timeout)
        return ServerInfo.from_message(_wire.parse(_messages.ServerInfo, reply))

    def models(
        self, *, timeout: float | None = CONTROL_TIMEOUT_SECONDS
    ) -> tuple[ModelInfo, ...]:
        """The models of the server; empty when it serves raw attention only."""
        reply = self._transport.unary("/pbs.v1.Prefill/ListModels", b"", timeout)
        models = _wire.parse(_messages.ListModelsResponse, reply).models
        return tuple(ModelInfo.from_message(model) for model in models)

    def health(
        self, service: str = "", *, timeout: float | None = CONTROL_TIMEOUT_SECONDS
    ) -> str:
        """Health: "SERVING", "NOT_SERVING" (loading, draining) or "UNKNOWN".

        Args:
            service: "" is the whole server; "liveness" is SERVING from the start.
            timeout: seconds.

        Raises:
            NotFoundError: no such service.
        """
        request = _health.request(service)
        return _health.state(self._transport.unary(_health.CHECK, request, timeout))

    def wait_until_serving(self, *, timeout: float | None) -> None:
        """Waits until the server is healthy. The server may start after this call.

        While the server is unavailable, the client asks again.

        Raises:
            DeadlineExceededError: it was not healthy within `timeout` seconds. Its cause
                is the last UnavailableError, if there was one.
        """
        deadline = Deadline(timeout)
        reason: UnavailableError | None = None
        while True:
            watch = self._transport.receive(
                _health.WATCH, _health.request(""), deadline.left(), wait_for_ready=True
            )
            try:
                with watch as states:
                    for state in states:
                        if _health.state(state) == "SERVING":
                            return
                raise CorruptDataError("the server ended the watch of its health")
            except UnavailableError as error:
                reason = error
                time.sleep(min(WATCH_PAUSE_SECONDS, deadline.left()))
            except DeadlineExceededError as error:
                raise error from reason

    # ---- raw attention

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        method: Method | str | Attention | None = None,
        *,
        want: Sequence[str] = ("o",),
        packed: Packed | None = None,
        given: Given | None = None,
        allow_non_finite: bool = False,
        timing: Timing | None = None,
        request_id: str = "",
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        progress: ProgressCallback | None = None,
    ) -> AttendResult:
        """Causal attention of uploaded tensors.

        Args:
            q: [batch, heads, q_len, head_dim]; packed [heads, total_q, head_dim].
                float32, float16 or ml_dtypes.bfloat16, or a torch tensor of these. The
                queries of a sequence are the last q_len of its k_len positions.
            k: [batch, kv_heads, k_len, head_dim] or [kv_heads, total_k, head_dim], of
                q's dtype; kv_heads divides heads.
            v: k's shape and dtype.
            method: Dense(), Pbs(...), another method of options.py, the name of one
                with its defaults, such as "dense", or Attention(...) for further
                options; None is pbs, as is an Attention without a method.
            want: results to return, of "o", "lse", "order", "lists", "block_mask".
            packed: bounds of the sequences in packed tensors.
            given: key order and blocks to use instead of the method's own.
            allow_non_finite: accept NaN and Inf; dense only.
            timing: number of runs; None is one run.
            request_id: for the server's log, at most 128 bytes.
            timeout: seconds; None means no limit, in every call.
            progress: see ProgressCallback.
        """
        expect(Packed, "packed", packed)
        expect(Given, "given", given)
        expect(Timing, "timing", timing)
        attention, given = attention_of(method), given or Given()
        q, k, v = (np.ascontiguousarray(dtypes.as_array(x)) for x in (q, k, v))
        shape = _attend.shape_of_arrays(q, k, v, packed)
        header = _attend.make_header(attention, want, timing or Timing(), request_id)
        header.allow_non_finite = allow_non_finite
        if packed is not None:
            packed.fill(header)
        has_mask = given.block_mask is not None
        grid = self._grid(shape, method_of(attention.method), want, has_mask)
        uploads = [("Q", q), ("K", k), ("V", v)]
        uploads += _attend.add_given(header, attention, given, grid)
        call = _attend.AttendCall(
            header, tuple(uploads), shape, q.dtype, grid, tuple(want)
        )
        _attend.announce(call)
        return self._run_attend(call, timeout, progress)

    def attend_synthetic(
        self,
        tensors: Synthetic,
        method: Method | str | Attention | None = None,
        *,
        want: Sequence[str] = ("o",),
        timing: Timing | None = None,
        request_id: str = "",
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        progress: ProgressCallback | None = None,
    ) -> AttendResult:
        """Attention of tensors that the server generates, for benchmarks.

        Args:
            tensors: shape, dtype and seed.
            method: as attend().
            want: as attend().
            timing: as attend().
            request_id: as attend().
            timeout: as attend().
            progress: as attend().
        """
        if not isinstance(tensors, Synthetic):
            raise TypeError(f"tensors {tensors!r} is not Synthetic(...)")
        expect(Timing, "timing", timing)
        attention = attention_of(method)
        header = _attend.make_header(attention, want, timing or Timing(), request_id)
        tensors.fill(header)
        shape = _attend.shape_of_synthetic(tensors)
        grid = self._grid(shape, method_of(attention.method), want, False)
        element = dtypes.float_dtype(tensors.dtype)
        call = _attend.AttendCall(header, (), shape, element, grid, tuple(want))
        return self._run_attend(call, timeout, progress)

    # ---- prefill

    def prefill(
        self,
        model: str,
        tokens: Sequence[int] | Array,
        method: Method | str | Attention | None = None,
        *,
        delivery: Delivery | str | None = None,
        logits: Logits | None = None,
        priority: int = 0,
        tenant_salt: str = "",
        request_id: str = "",
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        on_admitted: Callable[[Admitted, KvTicket | None], None] | None = None,
        on_layer: Callable[[LayerProgress], None] | None = None,
    ) -> PrefillResult:
        """Runs a prompt through a model.

        Args:
            model: its name; "" when the server has one model.
            tokens: ids, 1 .. ModelInfo.tokens_max of them, each below vocab_size.
            method: as attend(), but None is the server's default profile.
            delivery: Inline(...): the cache in the result; Lease(...): the server holds
                it for fetch(); "inline" or "lease": one of these with its defaults;
                None or "none": no cache.
            logits: logits to return; None is none.
            priority: -100 .. 100; higher runs first.
            tenant_salt: mixed into sparsity_digest, at most 128 bytes.
            request_id: for the server's log, at most 128 bytes.
            timeout: seconds.
            on_admitted: see PrefillCallbacks.
            on_layer: see PrefillCallbacks.
        """
        expect(Logits, "logits", logits)
        delivery = delivery_of(delivery)
        request = _prefill.make_request(
            model,
            tokens,
            attention_of(method),
            delivery,
            logits or Logits(),
            priority=priority,
            tenant_salt=tenant_salt,
            request_id=request_id,
        )
        deadline = Deadline(timeout)
        path, payload = "/pbs.v1.Prefill/Prefill", request.SerializeToString()
        with self._transport.receive(path, payload, deadline.left()) as events:
            callbacks = PrefillCallbacks(on_admitted, on_layer)
            num_tokens = len(request.token_ids)
            return _prefill.read_events(events, callbacks, num_tokens, delivery)

    # ---- leased KV caches

    def describe(
        self, ticket: KvTicket, *, timeout: float | None = CONTROL_TIMEOUT_SECONDS
    ) -> KvDescriptor:
        """The state and sizes of the ticket's cache.

        Raises:
            NotFoundError: the ticket is unknown, foreign, expired or released.
            FailedPreconditionError: a digest in the ticket differs from the cache's.
        """
        request = ticket.to_message()
        reply = self._ask(ticket, "Describe", request, timeout)
        return KvDescriptor.from_message(_wire.parse(_messages.KvDescriptor, reply))

    def fetch(
        self,
        ticket: KvTicket,
        *,
        part: KvPart | None = None,
        kv_format: KvFormat | None = None,
        resumes: int = RESUMES,
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        on_layer: LayerCallback | None = None,
        progress: ProgressCallback | None = None,
    ) -> KvCache:
        """Copies a leased cache here. It follows a prefill that still runs.

        The lease stays. The call renews it, so that it does not end before the fetch.

        Args:
            ticket: from prefill() or its on_admitted.
            part: layers, tokens and heads to copy; None is all.
            kv_format: dtype, layout, checksums, wire_dtype; None is KvFormat().
            resumes: the most reconnections after a broken connection; the chunks that
                have come are kept.
            timeout: seconds for the whole fetch.
            on_layer: called with (layer, k, v) when a layer is complete and checked.
            progress: see ProgressCallback.

        Raises:
            CorruptDataError: with layer, kind and offset of the first wrong byte range.
            NotFoundError, FailedPreconditionError: as describe(); also when the lease
                ends during the fetch.
        """
        expect(KvPart, "part", part)
        expect(KvFormat, "kv_format", kv_format)
        deadline = Deadline(timeout)
        descriptor = self.describe(ticket, timeout=deadline.left(CONTROL_TIMEOUT_SECONDS))
        plan = FetchPlan.of(descriptor, part or KvPart(), kv_format or KvFormat())
        got = self._fetcher.run(plan, resumes, deadline, on_layer, progress)
        return plan.cache(got)

    def fetch_queries(
        self,
        ticket: KvTicket,
        layer: int,
        *,
        kv_format: KvFormat | None = None,
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        progress: ProgressCallback | None = None,
    ) -> Array:
        """Copies the queries of a layer that Lease(capture_query_layers=...) named.

        Args:
            ticket: as fetch().
            layer: index of the layer.
            kv_format: as fetch(), with query heads.
            timeout: as fetch().
            progress: as fetch().

        Returns:
            [heads, tokens, head_dim]; [tokens, heads, head_dim] in layout "NHD".

        Raises:
            ValueError: the layer was not captured.
            CorruptDataError, NotFoundError, FailedPreconditionError: as fetch().
        """
        expect(KvFormat, "kv_format", kv_format)
        deadline = Deadline(timeout)
        descriptor = self.describe(ticket, timeout=deadline.left(CONTROL_TIMEOUT_SECONDS))
        plan = FetchPlan.of_queries(descriptor, layer, kv_format or KvFormat())
        fetched = self._fetcher.run(plan, RESUMES, deadline, None, progress)
        ((queries,),) = fetched.finish()
        return queries

    def capture(
        self,
        model: str,
        tokens: Sequence[int] | Array,
        layers: Sequence[int] | Array,
        method: Method | str | Attention | None = "dense",
        *,
        dtype: Any = None,
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        progress: ProgressCallback | None = None,
    ) -> Capture:
        """Runs a prompt and returns queries, keys and values of the heads of layers.

        Args:
            model: as prefill().
            tokens: as prefill().
            layers: their indices, ascending.
            method: as prefill(), of all layers; with "dense" the heads are the model's own.
            dtype: as KvFormat.
            timeout: seconds, for all of it.
            progress: see ProgressCallback.

        Raises:
            ValueError: no layers.
        """
        return capture_heads(
            self, model, tokens, layers, method, dtype, Deadline(timeout), progress
        )

    def renew(
        self,
        ticket: KvTicket,
        ttl_seconds: int | None = None,
        *,
        timeout: float | None = CONTROL_TIMEOUT_SECONDS,
    ) -> KvLease:
        """Extends the lease to `ttl_seconds` (None: the server's default) from now."""
        request = _messages.RenewRequest(ticket=ticket.to_message())
        if ttl_seconds is not None:
            request.ttl_seconds = checked("int", "ttl_seconds", ttl_seconds)
        reply = self._ask(ticket, "Renew", request, timeout)
        return KvLease.from_message(_wire.parse(_messages.KvLease, reply))

    def release(
        self, ticket: KvTicket, *, timeout: float | None = CONTROL_TIMEOUT_SECONDS
    ) -> None:
        """Frees the cache at once. The ticket is then NOT_FOUND."""
        request = _messages.ReleaseRequest(ticket=ticket.to_message())
        self._ask(ticket, "Release", request, timeout)

    # ---- parts

    def _ask(
        self, ticket: KvTicket, method: str, request: Any, timeout: float | None
    ) -> bytes:
        """The reply of the ticket's server to a call of KvSource."""
        home, path = self._homes.of(ticket), f"/pbs.v1.KvSource/{method}"
        return home.unary(path, request.SerializeToString(), timeout)

    def _grid(
        self,
        shape: _attend.AttendShape,
        method: Method | None,
        want: Sequence[str],
        has_mask: bool,
    ) -> BlockGrid | None:
        """The block grid of the lists. An Attend without a method runs pbs."""
        if not has_mask and not {"lists", "block_mask"} & set(want):
            return None
        block_size = _attend.block_size_of(method)
        return BlockGrid.of(shape.num_heads, shape.lengths, block_size)

    def _run_attend(
        self,
        call: _attend.AttendCall,
        timeout: float | None,
        progress: ProgressCallback | None,
    ) -> AttendResult:
        uploads = _attend.requests(call, self._chunk_bytes, progress)
        reply = _attend.AttendReply(call, progress)
        path = "/pbs.v1.Attention/Attend"
        with self._transport.exchange(path, uploads, timeout) as messages:
            for message in messages:
                reply.add(message)
        return reply.result()
