"""One gRPC channel, with calls of raw bytes that raise PbsError.

grpcio handles messages as bytes in both directions. The caller serializes requests and
parses replies.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import grpc

from pbs_client.errors import from_rpc_error

# A chunk is at most 4 MiB; the largest other reply is the logits of a whole vocabulary.
RECEIVE_BYTES_MAX = 16 << 20
# Bytes that the server may send ahead of the reader, per call.
_LOOKAHEAD_BYTES = 4 << 20
_KEEPALIVE_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 20_000
_RECONNECT_BACKOFF_MS_MIN = 100
_CONNECT_MS_MAX = 5_000
_RECONNECT_BACKOFF_MS_MAX = 2_000
_JOIN_SECONDS_MAX = 5.0  # of a thread that reads requests

Metadata = Sequence[tuple[str, str]]


# gRPC adds a time-out to the date; the sum overflows far beyond this.
_TIMEOUT_SECONDS_MAX = 1e9


def seconds_of(timeout: Any) -> float:
    """A time-out as a float; None and values beyond any date are infinite.

    Raises:
        ValueError: it is no number, NaN or negative.
    """
    if timeout is None:
        return math.inf
    try:
        seconds = float(timeout)
    except (TypeError, ValueError):
        seconds = math.nan
    if isinstance(timeout, (str, bytes, bool)) or not seconds >= 0:
        raise ValueError(
            f"timeout {timeout!r} is not a number of seconds of at least 0; "
            "None means no limit"
        )
    return seconds if seconds <= _TIMEOUT_SECONDS_MAX else math.inf


def _grpc_timeout(timeout: Any) -> float | None:
    seconds = seconds_of(timeout)
    return None if math.isinf(seconds) else seconds


class Deadline:
    """A point in time that several calls share."""

    def __init__(self, timeout: Any) -> None:
        """Starts now; `timeout` as for seconds_of()."""
        self._end = time.monotonic() + seconds_of(timeout)

    def left(self, at_most: float = math.inf) -> float:
        """Seconds left, 0 .. at_most; infinite without a limit."""
        return max(0.0, min(self._end - time.monotonic(), at_most))


class Transport:
    """A channel to `target`. Thread-safe, as grpc channels are."""

    def __init__(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None,
        metadata: Metadata,
        options: Sequence[tuple[str, Any]],
    ) -> None:
        check_target(target)
        merged = list({**channel_options(target), **dict(options)}.items())
        self.target = target
        self._metadata = tuple(metadata)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=merged)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=merged)

    def close(self) -> None:
        """Cancels calls under way and closes the connection."""
        self._channel.close()

    def unary(
        self,
        path: str,
        request: bytes,
        timeout: float | None,
        wait_for_ready: bool = False,
    ) -> bytes:
        """One request, one reply. Raises PbsError.

        With wait_for_ready it waits for an unreachable server, up to `timeout`.
        """
        call = self._channel.unary_unary(path)
        try:
            reply = call(
                request,
                timeout=_grpc_timeout(timeout),
                metadata=self._metadata,
                wait_for_ready=wait_for_ready,
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, path, timeout) from None
        return bytes(reply)

    def receive(
        self,
        path: str,
        request: bytes,
        timeout: float | None,
        wait_for_ready: bool = False,
    ) -> Stream:
        """One request and a stream of replies."""
        call = self._channel.unary_stream(path)(
            request,
            timeout=_grpc_timeout(timeout),
            metadata=self._metadata,
            wait_for_ready=wait_for_ready,
        )
        return Stream(call, path, timeout)

    def exchange(
        self, path: str, requests: Iterator[bytes], timeout: float | None
    ) -> Stream:
        """A stream of requests, which another thread reads, and a stream of replies."""
        uploads = _Uploads(requests)
        call = self._channel.stream_stream(path)(
            uploads, timeout=_grpc_timeout(timeout), metadata=self._metadata
        )
        return Stream(call, path, timeout, uploads)


class Stream:
    """A call under way, for a `with` block over its replies. Its end ends the call.

    Nothing refers to gRPC's call after that, not even a raised PbsError. gRPC's call
    takes a lock when it is collected. At the exit of the interpreter that could wait
    forever, because a thread that was stopped there may hold the lock.
    """

    def __init__(
        self,
        call: Any,
        path: str,
        timeout: float | None,
        uploads: _Uploads | None = None,
    ) -> None:
        self._call, self._uploads = call, uploads
        self._messages = _messages_of(call, path, timeout)
        scope: CallScope | None = getattr(_thread, "scope", None)
        if scope is not None:
            scope.add(self)

    def cancel(self) -> None:
        """Cancels the call, from any thread; of no effect once it has ended."""
        call = self._call
        if call is not None:
            call.cancel()

    def __enter__(self) -> Iterator[bytes]:
        return self._messages

    def __exit__(self, *_: object) -> None:
        call, self._call = self._call, None
        call.cancel()  # of no effect once the call has ended
        self._messages.close()
        if self._uploads is not None:
            self._uploads.end()


_thread = threading.local()  # .scope: of the streams that the thread begins


class CallScope:
    """Streams of many threads that are cancelled together.

    Threading: safe from many threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._cancelled = threading.Event()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Streams that this thread begins in the block are of this scope."""
        _thread.scope = self
        try:
            yield
        finally:
            _thread.scope = None

    def add(self, stream: Stream) -> None:
        """Takes a stream; cancels it at once when cancel() was called."""
        with self._lock:
            self._streams.add(stream)
        if self._cancelled.is_set():
            stream.cancel()

    def cancel(self) -> None:
        """Cancels the streams of this scope, and every later one when it begins."""
        self._cancelled.set()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()

    def wait_cancelled(self, seconds: float) -> bool:
        """Waits for cancel(); False when it did not come in time."""
        return self._cancelled.wait(seconds)


class _Uploads:
    """The requests of one call, for the thread of gRPC that reads them."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self._requests = requests
        self._thread: threading.Thread | None = None
        self._begun = threading.Event()
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._thread is None:
            self._thread = threading.current_thread()
            self._begun.set()
        if self._ended:
            raise StopIteration
        return next(self._requests)

    def end(self) -> None:
        """Ends the requests and the thread; to call when the call has ended.

        A callback of the caller may keep the thread. Then this gives up after
        _JOIN_SECONDS_MAX.
        """
        self._ended = True
        if self._begun.wait(_JOIN_SECONDS_MAX) and self._thread is not None:
            self._thread.join(_JOIN_SECONDS_MAX)


def check_target(target: str) -> None:
    """ValueError unless `target` is host:port or has a gRPC scheme (unix:, dns:)."""
    if _has_scheme(target):
        return
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError(f"server {target!r} is not HOST:PORT, such as 127.0.0.1:50051")


def is_loopback(target: str) -> bool:
    """True when `target` is this machine, so that no proxy is needed."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    address = target.rpartition("/")[2] if _has_scheme(target) else target
    host = address.rpartition(":")[0].removeprefix("ipv4:").removeprefix("ipv6:")
    host = host.removeprefix("dns:").strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _has_scheme(target: str) -> bool:
    return target.startswith(
        ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "xds:")
    )


def channel_options(target: str) -> dict[str, Any]:
    """The channel options of this client for `target`."""
    options: dict[str, Any] = {
        # Pings that probe the bandwidth double the CPU time of a transfer; windows of a
        # known size make them needless.
        "grpc.http2.bdp_probe": 0,
        "grpc.http2.lookahead_bytes": _LOOKAHEAD_BYTES,
        "grpc.max_receive_message_length": RECEIVE_BYTES_MAX,
        "grpc.max_send_message_length": -1,  # the server's limit applies
        # A long prefill is silent: pings tell a slow server from a dead one.
        "grpc.keepalive_time_ms": _KEEPALIVE_MS,
        "grpc.keepalive_timeout_ms": _KEEPALIVE_TIMEOUT_MS,
        # The option for pings in newer releases (seen with 1.85).
        "grpc.http2.ping_timeout_ms": _KEEPALIVE_TIMEOUT_MS,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
        "grpc.enable_retries": 0,  # send nothing twice; this client resumes fetches
        "grpc.initial_reconnect_backoff_ms": _RECONNECT_BACKOFF_MS_MIN,
        # The time of one attempt to connect; a refused one is tried again earlier.
        "grpc.min_reconnect_backoff_ms": _CONNECT_MS_MAX,
        "grpc.max_reconnect_backoff_ms": _RECONNECT_BACKOFF_MS_MAX,
        # Each client has its own connection and its own backoff.
        "grpc.use_local_subchannel_pool": 1,
    }
    if is_loopback(target):
        options["grpc.enable_http_proxy"] = 0  # http_proxy is for other machines
    return options


def _messages_of(
    call: Any, path: str, timeout: float | None
) -> Generator[bytes, None, None]:
    try:
        yield from call
        return
    except grpc.RpcError as error:  # this is the call itself
        failure = from_rpc_error(error, path, timeout)
        error.__traceback__ = None  # its frames refer to the call
    del call  # the traceback of the failure refers to this frame
    raise failure
