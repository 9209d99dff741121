"""KvSink: receives the caches that prefill servers push.

    with KvSink("127.0.0.1:50070") as sink:
        # elsewhere: client.prefill(..., delivery=Push(sink.target))
        pushed = sink.take(timeout=60)
        pushed.cache  # as Client.fetch() returns it

Every cache is checked as a fetched one: order, place and checksum of each chunk, digest
of each layer, and sizes that agree with the announced bytes. A cache with a fault is
refused with DATA_LOSS, and its prefill then fails with that code.

Threading: a KvSink may be used from many threads. Memory: bytes_max for all caches under
way and not yet taken, and a few chunks for each push under way.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from pbs_client import _checksum, _messages, _wire
from pbs_client._arguments import checked
from pbs_client._kv_receiver import KvReceiver
from pbs_client._push_header import PushHeader, shape_of
from pbs_client._transport import channel_options, seconds_of
from pbs_client.errors import (
    CallCancelledError,
    CorruptDataError,
    DeadlineExceededError,
    FailedPreconditionError,
    PbsError,
    ResourceExhaustedError,
)
from pbs_client.kv import Array, KvCache

BYTES_MAX = 8 << 30
CREDIT_BYTES = 16 << 20  # the longest chunk of a server has less than 4 MiB
PUSHES_MAX = 16
STALL_SECONDS_MAX = 600.0  # a push is silent while its prompt waits or a layer runs

_REFUSALS_AT_ONCE = 16  # calls beyond pushes_max that get our answer, not gRPC's
_LEAVE_SECONDS = 0.5  # between the end of a stream and the news that its call is gone
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PushedCache:
    """A whole cache that was pushed.

    Attributes:
        header: what the push said of it.
        cache: as Client.fetch() returns it; its first_token is None.
    """

    header: PushHeader
    cache: KvCache


# Called with (header, layer, k, v) when both arrays of a layer are complete and checked.
PushLayerCallback = Callable[[PushHeader, int, Array, Array], None]
# Called with the header, None when there was none, and the error of a failed push.
PushFailureCallback = Callable[["PushHeader | None", PbsError], None]


class KvSink:
    """Listens for pushes from its construction on. Close it, or use `with`."""

    def __init__(
        self,
        listen: str,
        *,
        bytes_max: int = BYTES_MAX,
        credit_bytes: int = CREDIT_BYTES,
        pushes_max: int = PUSHES_MAX,
        stall_seconds_max: float = STALL_SECONDS_MAX,
        model_digest: str = "",
        on_layer: PushLayerCallback | None = None,
        on_failure: PushFailureCallback | None = None,
    ) -> None:
        """Listens, without encryption or authentication.

        Args:
            listen: HOST:PORT; port 0 takes a free one.
            bytes_max: bytes of all caches that are under way or not yet taken; a push
                beyond it is refused with RESOURCE_EXHAUSTED.
            credit_bytes: bytes that a server may send before they are checked and
                on_layer has returned. A server sends a chunk only when all of it fits.
            pushes_max: pushes under way at once; more are refused.
            stall_seconds_max: a push of which nothing comes for so long is ended with
                DEADLINE_EXCEEDED. It is silent while its prompt waits in the server's
                queue and while a layer runs.
            model_digest: pushes of another model are refused with FAILED_PRECONDITION;
                "" takes every model.
            on_layer: see PushLayerCallback; called from the thread of the push, which
                sends no more credit until it returns. When it raises, the push fails.
            on_failure: see PushFailureCallback; called from the thread of the push.

        Raises:
            ValueError: listen is not HOST:PORT, or a number is below 1.
            OSError: the address cannot be listened at.
        """
        numbers = {
            "bytes_max": checked("Uint64", "bytes_max", bytes_max),
            "credit_bytes": checked("Uint64", "credit_bytes", credit_bytes),
            "pushes_max": checked("int", "pushes_max", pushes_max),
        }
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name} {number} is below 1")
        host, _, port = listen.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65_535:
            raise ValueError(f"listen {listen!r} is not HOST:PORT, such as 127.0.0.1:0")
        _checksum.warn_if_slow()
        self._bytes_max, self._credit_bytes = bytes_max, credit_bytes
        self._pushes_max, self._model_digest = pushes_max, model_digest
        self._stall_seconds_max = seconds_of(stall_seconds_max)
        self._on_layer, self._on_failure = on_layer, on_failure
        self._lock = threading.Lock()
        self._bytes = self._pushes = 0
        self._closed = False
        self._received: queue.Queue[PushedCache | None] = queue.Queue()
        self._server, bound = self._listen(listen)
        self.target = f"{host}:{bound}"  # for the prefill server's push_targets

    def __enter__(self) -> KvSink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends pushes under way, and every take() that waits."""
        if not self._closed:
            self._closed = True
            self._server.stop(None).wait()
            self._received.put(None)

    def take(self, timeout: float | None = None) -> PushedCache:
        """The next whole cache, in the order in which they became whole.

        Args:
            timeout: seconds; None means no limit.

        Raises:
            DeadlineExceededError: none came in time.
            CallCancelledError: the sink was closed, and there are no more.
        """
        limit = seconds_of(timeout)
        try:
            pushed = self._received.get(timeout=min(limit, threading.TIMEOUT_MAX))
        except queue.Empty:
            raise DeadlineExceededError(
                f"no cache was pushed within {timeout} s",
                grpc.StatusCode.DEADLINE_EXCEEDED,
            ) from None
        if pushed is None:
            self._received.put(None)  # for the others that wait
            raise CallCancelledError("the sink is closed", grpc.StatusCode.CANCELLED)
        self._give_back(pushed.header.bytes)
        return pushed

    def __iter__(self) -> Iterator[PushedCache]:
        """The caches as they come, until the sink is closed."""
        with contextlib.suppress(CallCancelledError):
            while True:
                yield self.take()

    # ---- the server

    def _listen(self, listen: str) -> tuple[Any, int]:
        workers = self._pushes_max + _REFUSALS_AT_ONCE
        server = grpc.server(
            futures.ThreadPoolExecutor(workers, thread_name_prefix="kv-sink"),
            maximum_concurrent_rpcs=workers,
            options=list(_server_options(listen).items()),
        )
        method = grpc.stream_stream_rpc_method_handler(self._receive)
        handler = grpc.method_handlers_generic_handler(
            "pbs.v1.KvSink", {"Receive": method}
        )
        server.add_generic_rpc_handlers((handler,))
        try:
            port = server.add_insecure_port(listen)
        except RuntimeError as error:
            raise OSError(f"cannot listen at {listen}: {error}") from None
        if port == 0:
            raise OSError(f"cannot listen at {listen}")
        server.start()
        return server, port

    def _receive(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Receive: acknowledgements, one for each chunk that was checked."""
        push = _Push(requests, context, self._stall_seconds_max)
        failure: PbsError | None = None
        try:
            with self._slot():
                yield from self._acks(push)
        except PbsError as error:
            failure = error
        except GeneratorExit:  # the call has ended
            failure = _LEFT
            raise
        except Exception as error:  # of on_layer
            _log.exception("on_layer of a KvSink failed")
            failure = PbsError(f"on_layer failed: {type(error).__name__}")
        finally:
            if failure is not None and self._on_failure is not None:
                self._on_failure(push.header, failure)
        if failure is not None:
            context.abort(failure.code, failure.message)

    def _acks(self, push: _Push) -> Iterator[bytes]:
        header, shape = shape_of(push.next())
        push.header = header
        if self._model_digest not in ("", header.model_digest):
            raise FailedPreconditionError(
                f"model_digest {header.model_digest} is not {self._model_digest}",
                grpc.StatusCode.FAILED_PRECONDITION,
            )
        self._take_in(header.bytes)
        kept = False
        try:
            receiver = KvReceiver(shape, self._layer_callback(header))
            received = 0
            yield self._ack(header, received)
            while (message := push.next_or_end()) is not None:
                chunk = _wire.decode_kv_chunk(message)
                receiver.add(chunk)
                received += chunk.payload.nbytes
                del message, chunk
                yield self._ack(header, received)
            if not receiver.is_complete:
                push.raise_if_left()
            cache = receiver.cache(
                prompt_tokens=header.num_tokens,
                model_digest=header.model_digest,
                sparsity_digest=header.sparsity_digest,
            )
            kept = True
        finally:
            if not kept:
                self._give_back(header.bytes)
        self._received.put(PushedCache(header, cache))

    def _ack(self, header: PushHeader, received: int) -> bytes:
        ack = _messages.KvAck(
            handle=header.transfer_id,
            bytes_received=received,
            credit_bytes=self._credit_bytes,
        )
        return bytes(ack.SerializeToString())

    def _layer_callback(
        self, header: PushHeader
    ) -> Callable[[int, Array, Array], None] | None:
        on_layer = self._on_layer
        if on_layer is None:
            return None
        return lambda layer, k, v: on_layer(header, layer, k, v)

    # ---- limits

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        with self._lock:
            if self._pushes >= self._pushes_max:
                raise _exhausted(
                    f"{self._pushes} pushes are under way, pushes_max {self._pushes_max}"
                )
            self._pushes += 1
        try:
            yield
        finally:
            with self._lock:
                self._pushes -= 1

    def _take_in(self, size: int) -> None:
        with self._lock:
            if self._bytes + size > self._bytes_max:
                raise _exhausted(
                    f"bytes {size} beside {self._bytes} of other caches exceed "
                    f"bytes_max {self._bytes_max}"
                )
            self._bytes += size

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._bytes -= size


_LEFT = CallCancelledError("the prefill server left", grpc.StatusCode.CANCELLED)


class _Push:
    """The messages of one call, which a thread of its own reads ahead by one.

    gRPC's iterator has no time limit.
    """

    def __init__(self, requests: Iterator[bytes], context: Any, seconds: float) -> None:
        self.header: PushHeader | None = None
        self._seconds = seconds
        self._messages: queue.Queue[bytes | PbsError | None] = queue.Queue(1)
        self._ended = threading.Event()
        context.add_callback(self._ended.set)
        thread = threading.Thread(target=self._read, args=(requests,), daemon=True)
        thread.start()

    def next(self) -> bytes:
        """The next message. PbsError when there is none."""
        message = self.next_or_end()
        if message is None:
            self.raise_if_left()
            raise CorruptDataError("the push has no push_header")
        return message

    def raise_if_left(self) -> None:
        """CallCancelledError when the call has ended: gRPC first says end of stream."""
        if self._ended.wait(_LEAVE_SECONDS):
            raise _LEFT

    def next_or_end(self) -> bytes | None:
        """The next message; None at the end. Raises PbsError."""
        limit = min(self._seconds, threading.TIMEOUT_MAX)
        try:
            message = self._messages.get(timeout=limit)
        except queue.Empty:
            raise DeadlineExceededError(
                f"nothing came for stall_seconds_max {self._seconds:g} s",
                grpc.StatusCode.DEADLINE_EXCEEDED,
            ) from None
        if isinstance(message, PbsError):
            raise message
        return message

    def _read(self, requests: Iterator[bytes]) -> None:
        try:
            for message in requests:
                if not self._put(message):
                    return
            self._put(None)
        except Exception:  # gRPC has no class for it; the call has ended
            self._put(_LEFT)

    def _put(self, message: bytes | PbsError | None) -> bool:
        """False when the call has ended."""
        while True:
            try:
                self._messages.put(message, timeout=0.1)
                return True
            except queue.Full:
                if self._ended.is_set():
                    return False


def _exhausted(message: str) -> ResourceExhaustedError:
    return ResourceExhaustedError(message, grpc.StatusCode.RESOURCE_EXHAUSTED)


def _server_options(listen: str) -> dict[str, Any]:
    """As those of the client's channel, which is the other side."""
    names = ("bdp_probe", "lookahead_bytes", "max_receive", "keepalive", "ping_timeout")
    options = {
        name: value
        for name, value in channel_options(listen).items()
        if any(part in name for part in names)
    }
    return {
        **options,
        # The prefill server pings while a layer runs: never a reason to close.
        "grpc.http2.max_ping_strikes": 0,
        "grpc.so_reuseport": 0,  # an address that is taken is an error
    }
