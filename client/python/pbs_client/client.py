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

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from pbs_client import _attend, _checksum, _health, _messages, _prefill, _wire, dtypes
from pbs_client._attend import AttendResult, ProgressCallback
from pbs_client._kv_receiver import KvReceiver, LayerCallback
from pbs_client._kv_transfer import FetchPlan, run_fetch
from pbs_client._lease_keeper import LeaseKeeper
from pbs_client._prefill import PrefillCallbacks, PrefillResult
from pbs_client._transport import Deadline, Metadata, Transport
from pbs_client.block_lists import BlockGrid, BlockLists
from pbs_client.errors import CorruptDataError
from pbs_client.kv import LAYOUTS, Array, KvCache, KvDescriptor, KvLease, KvTicket
from pbs_client.options import Method, method_of
from pbs_client.results import Admitted, LayerProgress, ModelInfo, ServerInfo

CONTROL_TIMEOUT_SECONDS = 30.0  # info, models, health, describe, renew, release
WORK_TIMEOUT_SECONDS = 3600.0  # attend, prefill, fetch
CHUNK_BYTES = 1 << 20  # uploads
CHUNK_BYTES_MAX = 4 << 20  # every server accepts it


class Client:
    """A connection to one server. It connects on first use; close it, or use `with`."""

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
        chunk_bytes: int = CHUNK_BYTES,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Prepares the connection, without network traffic.

        Args:
            target: HOST:PORT, or a gRPC target with a scheme (unix:/path, dns:///...).
            credentials: for TLS; None means plain text.
            metadata: pairs to send with every call, such as an authorization header.
            chunk_bytes: bytes of an upload's chunks, 1 .. 4 MiB.
            channel_options: gRPC channel arguments; they override this client's.

        Raises:
            ValueError: target or chunk_bytes is invalid.
        """
        if not 0 < chunk_bytes <= CHUNK_BYTES_MAX:
            raise ValueError(
                f"chunk_bytes {chunk_bytes} is outside [1, {CHUNK_BYTES_MAX}]"
            )
        _checksum.warn_if_slow()
        self._chunk_bytes = chunk_bytes
        self._transport = Transport(target, credentials, metadata, channel_options)

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
        self._transport.close()

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

        Raises:
            DeadlineExceededError: it was not healthy within `timeout` seconds.
        """
        watch = self._transport.receive(
            _health.WATCH, _health.request(""), timeout, wait_for_ready=True
        )
        with watch as states:
            for state in states:
                if _health.state(state) == "SERVING":
                    return
        raise CorruptDataError("the server ended the watch of its health")

    # ---- raw attention

    # Length: most of it documents the arguments.
    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        method: Method | str | None = None,
        *,
        cu_seqlens: Sequence[int] | Array | None = None,
        cu_seqlens_k: Sequence[int] | Array | None = None,
        order: Array | None = None,
        lists: BlockLists | None = None,
        block_mask: Any = None,
        want: Sequence[str] = ("o",),
        dense_fallback: bool | None = None,
        coverage_rows: int | None = None,
        allow_non_finite: bool = False,
        warmup: int = 0,
        repetitions: int = 0,
        request_id: str = "",
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        progress: ProgressCallback | None = None,
    ) -> AttendResult:
        """Causal attention of uploaded tensors.

        Args:
            q: [batch, heads, q_len, head_dim]; with cu_seqlens [heads, total_q,
                head_dim]. float32, float16 or ml_dtypes.bfloat16, or a torch tensor of
                these. The queries of a sequence are the last q_len of its k_len
                positions.
            k: [batch, kv_heads, k_len, head_dim] or [kv_heads, total_k, head_dim], of
                q's dtype; kv_heads divides heads.
            v: k's shape and dtype.
            method: Dense(), Pbs(...), MeanPooling(...) or the name of one with its
                defaults, such as "dense"; None is the server's default.
            cu_seqlens: [batch + 1], from 0, not falling: the bounds of each sequence's
                queries.
            cu_seqlens_k: the bounds of each sequence's keys [cu_seqlens].
            order: use this key order (method pbs): integers of AttendResult.order's
                shape that permute inside segments only.
            lists: use these block lists (pbs, mean_pooling).
            block_mask: block lists as a mask; see block_lists.lists_from_mask().
            want: results to return, of "o", "lse", "order", "lists", "block_mask".
            dense_fallback: run dense where nearly all blocks are selected [false].
            coverage_rows: query rows per sequence and head to measure coverage on [0].
            allow_non_finite: accept NaN and Inf; dense only.
            warmup: extra runs before, 0 .. 100.
            repetitions: runs to time, 0 (= 1) .. 1000.
            request_id: for the server's log, at most 128 bytes.
            timeout: seconds; None means no limit, in every call.
            progress: see ProgressCallback.
        """
        method = method_of(method)
        q, k, v = (np.ascontiguousarray(dtypes.as_array(x)) for x in (q, k, v))
        ends, ends_k = _int_list(cu_seqlens), _int_list(cu_seqlens_k)
        shape = _attend.shape_of_arrays(q, k, v, ends, ends_k)
        header = _attend.make_header(
            method,
            want,
            dense_fallback=dense_fallback,
            coverage_rows=coverage_rows,
            warmup=warmup,
            repetitions=repetitions,
            request_id=request_id,
        )
        header.cu_seqlens.extend(ends or ())
        header.cu_seqlens_k.extend(ends_k or ())
        header.allow_non_finite = allow_non_finite
        grid = self._grid(shape, method, want, block_mask is not None)
        lists = _attend.given_lists(lists, block_mask, grid)
        uploads = [("Q", q), ("K", k), ("V", v)]
        uploads += _attend.add_given(header, method, order, lists)
        call = _attend.AttendCall(
            header, tuple(uploads), shape, q.dtype, grid, tuple(want)
        )
        _attend.announce(call)
        return self._run_attend(call, timeout, progress)

    # Length: most of it documents the arguments.
    def attend_synthetic(
        self,
        method: Method | str | None = None,
        *,
        batch: int = 1,
        num_heads: int,
        num_kv_heads: int,
        seq_len: int,
        head_dim: int,
        dtype: Any = "f32",
        seed: int = 0,
        white_noise: bool = False,
        want: Sequence[str] = ("o",),
        dense_fallback: bool | None = None,
        coverage_rows: int | None = None,
        warmup: int = 0,
        repetitions: int = 0,
        request_id: str = "",
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        progress: ProgressCallback | None = None,
    ) -> AttendResult:
        """Attention of tensors that the server generates, for benchmarks.

        Args:
            method: as attend().
            batch: sequences of equal length.
            num_heads: query heads.
            num_kv_heads: divides num_heads.
            seq_len: tokens of a sequence, queries and keys.
            head_dim: width of a head.
            dtype: "f32", "f16" or "bf16".
            seed: equal seeds give equal tensors.
            white_noise: use white noise instead of the structured generator.
            want: as attend().
            dense_fallback: as attend().
            coverage_rows: as attend().
            warmup: as attend().
            repetitions: as attend().
            request_id: as attend().
            timeout: as attend().
            progress: as attend().
        """
        method, element = method_of(method), dtypes.float_dtype(dtype)
        header = _attend.make_header(
            method,
            want,
            dense_fallback=dense_fallback,
            coverage_rows=coverage_rows,
            warmup=warmup,
            repetitions=repetitions,
            request_id=request_id,
        )
        spec = header.synthetic
        spec.batch, spec.num_heads, spec.num_kv_heads = batch, num_heads, num_kv_heads
        spec.seq_len, spec.head_dim, spec.seed = seq_len, head_dim, seed
        spec.dtype, spec.white_noise = dtypes.to_wire(element), white_noise
        shape = _attend.AttendShape(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            lengths=((seq_len, seq_len),) * batch,
            q_rows=(batch, num_heads, seq_len),
            k_rows=(batch, num_kv_heads, seq_len),
        )
        grid = self._grid(shape, method, want, False)
        call = _attend.AttendCall(header, (), shape, element, grid, tuple(want))
        return self._run_attend(call, timeout, progress)

    # ---- prefill

    # Length: most of it documents the arguments.
    def prefill(
        self,
        model: str,
        tokens: Sequence[int] | Array,
        method: Method | str | None = None,
        *,
        delivery: str = "none",
        ttl_seconds: int | None = None,
        kv_dtype: Any = None,
        checksums: bool = True,
        top_logits: int = 0,
        last_token_logits: bool = False,
        logit_positions: Sequence[int] = (),
        dense_fallback: bool | None = None,
        coverage_rows: int | None = None,
        priority: int = 0,
        request_id: str = "",
        idempotency_key: str = "",
        tenant_salt: str = "",
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        on_admitted: Callable[[Admitted, KvTicket | None], None] | None = None,
        on_layer: Callable[[LayerProgress], None] | None = None,
    ) -> PrefillResult:
        """Runs a prompt through a model.

        Args:
            model: its name; "" when the server has one model.
            tokens: ids, 1 .. ModelInfo.tokens_max of them, each below vocab_size.
            method: Dense(), Pbs(...), MeanPooling(...) or the name of one with its
                defaults, such as "dense"; None is the server's default.
            delivery: "none": no cache; "inline": the cache in the result; "lease": the
                server holds it for fetch().
            ttl_seconds: time of the lease, from the end of the prefill; None is the
                server's default.
            kv_dtype: "f32", "f16" or "bf16" of an inline cache; None is the held dtype.
            checksums: check every chunk and layer of an inline cache.
            top_logits: number of best next tokens, 0 .. 100.
            last_token_logits: also return the logits of the whole vocabulary.
            logit_positions: prompt positions that also get top_logits, at most 256.
            dense_fallback: run dense where nearly all blocks are selected [true].
            coverage_rows: query rows per head to measure coverage on [0].
            priority: -100 .. 100; higher runs first.
            request_id: for the server's log, at most 128 bytes.
            idempotency_key: requests with equal keys are the same work while its lease
                lives.
            tenant_salt: mixed into sparsity_digest.
            timeout: seconds.
            on_admitted: see PrefillCallbacks.
            on_layer: see PrefillCallbacks.
        """
        request = _prefill.make_request(
            model,
            tokens,
            method_of(method),
            dense_fallback=dense_fallback,
            coverage_rows=coverage_rows,
            top_logits=top_logits,
            last_token_logits=last_token_logits,
            logit_positions=logit_positions,
            priority=priority,
            request_id=request_id,
            idempotency_key=idempotency_key,
            tenant_salt=tenant_salt,
        )
        dtype = None if kv_dtype is None else dtypes.float_dtype(kv_dtype)
        _prefill.set_delivery(request, delivery, ttl_seconds, dtype, "HND", checksums)
        deadline = Deadline(timeout)
        receiver = None
        if delivery == "inline" and request.token_ids:
            info = self.info(timeout=_control_seconds(deadline))
            models = self.models(timeout=_control_seconds(deadline))
            shape = _prefill.inline_shape(request, models, info.epoch, dtype, checksums)
            receiver = KvReceiver(shape)
        path, payload = "/pbs.v1.Prefill/Prefill", request.SerializeToString()
        with self._transport.receive(path, payload, deadline.left()) as events:
            callbacks = PrefillCallbacks(on_admitted, on_layer)
            return _prefill.read_events(events, callbacks, receiver)

    # ---- leased KV caches

    def describe(
        self, ticket: KvTicket, *, timeout: float | None = CONTROL_TIMEOUT_SECONDS
    ) -> KvDescriptor:
        """The state and sizes of the ticket's cache.

        Raises:
            NotFoundError: the ticket is unknown, foreign, expired or released.
            FailedPreconditionError: a digest in the ticket differs from the cache's.
        """
        request = ticket.to_message().SerializeToString()
        reply = self._transport.unary("/pbs.v1.KvSource/Describe", request, timeout)
        return KvDescriptor.from_message(_wire.parse(_messages.KvDescriptor, reply))

    def fetch(
        self,
        ticket: KvTicket,
        *,
        layers: tuple[int, int] | None = None,
        tokens: tuple[int, int] | None = None,
        heads: tuple[int, int] | None = None,
        dtype: Any = None,
        layout: str = "HND",
        checksums: bool = True,
        resumes: int = 3,
        timeout: float | None = WORK_TIMEOUT_SECONDS,
        on_layer: LayerCallback | None = None,
        progress: ProgressCallback | None = None,
    ) -> KvCache:
        """Copies a leased cache here. It follows a prefill that still runs.

        The lease stays. The call renews it for its own time to live, so that it does
        not end before the fetch.

        Args:
            ticket: from prefill() or its on_admitted.
            layers: (begin, count); None is all.
            tokens: (begin, count); None is all.
            heads: (begin, count) of KV heads; None is all.
            dtype: "f32", "f16" or "bf16"; None is the dtype that the server holds.
            layout: "HND" [kv_heads, tokens, head_dim] or "NHD" [tokens, kv_heads, ...].
            checksums: check every chunk and layer.
            resumes: the most reconnections after a broken connection; complete layers
                are kept.
            timeout: seconds for the whole fetch.
            on_layer: called with (layer, k, v) when a layer is complete and checked.
            progress: see ProgressCallback.

        Raises:
            CorruptDataError: with layer, kind and offset of the first wrong byte range.
            NotFoundError, FailedPreconditionError: as describe(); also when the lease
                ends during the fetch.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
        element = None if dtype is None else dtypes.float_dtype(dtype)
        deadline = Deadline(timeout)
        descriptor = self.describe(ticket, timeout=_control_seconds(deadline))
        plan = FetchPlan.of(
            descriptor, layers, tokens, heads, element, layout, checksums
        )
        with LeaseKeeper(self.describe, self.renew, descriptor, deadline):
            return run_fetch(
                self._transport, plan, resumes, deadline, on_layer, progress
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
            request.ttl_seconds = ttl_seconds
        payload = request.SerializeToString()
        reply = self._transport.unary("/pbs.v1.KvSource/Renew", payload, timeout)
        return KvLease.from_message(_wire.parse(_messages.KvLease, reply))

    def release(
        self, ticket: KvTicket, *, timeout: float | None = CONTROL_TIMEOUT_SECONDS
    ) -> None:
        """Frees the cache at once. The ticket is then NOT_FOUND."""
        request = _messages.ReleaseRequest(ticket=ticket.to_message())
        payload = request.SerializeToString()
        self._transport.unary("/pbs.v1.KvSource/Release", payload, timeout)

    # ---- parts

    def _grid(
        self,
        shape: _attend.AttendShape,
        method: Method | None,
        want: Sequence[str],
        has_mask: bool,
    ) -> BlockGrid | None:
        """The block grid of the lists; its block size may be the server's default."""
        if not has_mask and not {"lists", "block_mask"} & set(want):
            return None
        resolved = self.info().default_attention if method is None else method
        block_size = _attend.block_size_of(resolved)
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


def _control_seconds(deadline: Deadline) -> float:
    """Time-out of a control call that must end before a deadline."""
    return min(deadline.left(), CONTROL_TIMEOUT_SECONDS)


def _int_list(values: Sequence[int] | Array | None) -> list[int] | None:
    """A one-dimensional list of ints. ValueError for anything else."""
    if values is None:
        return None
    array = dtypes.as_array(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError("cu_seqlens is not a list of integers")
    return [int(value) for value in array]
