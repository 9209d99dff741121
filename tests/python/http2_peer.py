"""An HTTP/2 client of our own making: it does what no gRPC client does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events

SECONDS_MAX = 30  # of any wait; only a failure takes so long
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"


def connect(target: str) -> socket.socket:
    host, _, port = target.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), SECONDS_MAX)


def framed(message: bytes, compressed: bool = False) -> bytes:
    """A gRPC message as it stands in the data of a stream."""
    return bytes([compressed]) + len(message).to_bytes(4, "big") + message


@dataclass
class Call:
    """What has come of one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    ended: bool = False

    @property
    def status(self) -> int | None:
        """The gRPC status; None while there is none, or when the stream was reset."""
        value = self.headers.get("grpc-status")
        return None if value is None else int(value)

    @property
    def message(self) -> str:
        return self.headers.get("grpc-message", "")


class Http2Peer:
    """One connection. Nothing is read but inside a wait."""

    def __init__(self, target: str) -> None:
        self._socket = connect(target)
        config = h2.config.H2Configuration(
            header_encoding="utf-8", validate_outbound_headers=False
        )
        self._h2 = h2.connection.H2Connection(config)
        self._h2.initiate_connection()
        self.calls: dict[int, Call] = {}
        self.acknowledged_pings = 0  # of ours
        self.answered_pings = 0  # of the server's
        self.ended_by: str | None = None  # why no more comes
        self.settings_seen = False
        self._send()
        self.wait(lambda: self.settings_seen)

    def close(self) -> None:
        self._socket.close()

    def call(
        self,
        path: str,
        body: bytes = framed(b""),
        metadata: tuple[tuple[str, str], ...] = (),
        end: bool = True,
        **replaced: str,
    ) -> Call:
        """Begins a call; `replaced` are headers, "_" for "-" in their names."""
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "test",
            "content-type": "application/grpc",
            "te": "trailers",
            **{name.replace("_", "-"): value for name, value in replaced.items()},
        }
        number = self._h2.get_next_available_stream_id()
        self._h2.send_headers(number, [*headers.items(), *metadata])
        self.calls[number] = Call()
        self._send()
        self._send_data(number, body, end)
        return self.calls[number]

    def finish(self, *arguments, **keywords) -> Call:
        """A call, waited for."""
        call = self.call(*arguments, **keywords)
        self.wait(lambda: call.ended)
        return call

    def reset(self, call: Call) -> None:
        number = next(n for n, known in self.calls.items() if known is call)
        self._h2.reset_stream(number, 8)  # CANCEL
        call.ended = True
        self._send()

    def ping(self, count: int) -> None:
        for number in range(count):
            self._h2.ping(number.to_bytes(8, "big"))
        self._send()
        self.wait(lambda: self.acknowledged_pings >= count)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Reads until `condition` holds."""
        while not condition():
            assert self.ended_by is None, f"the connection ended: {self.ended_by}"
            self._receive()

    def receive_nothing_until_closed(self) -> None:
        """Waits for the server to close without answering anything it sends."""
        with contextlib.suppress(ConnectionError):
            while self._socket.recv(65536):
                pass

    def _send(self) -> None:
        self._socket.sendall(self._h2.data_to_send())

    def _send_data(self, number: int, body: bytes, end: bool) -> None:
        call = self.calls[number]
        view = memoryview(body)
        while len(view) and not call.ended:
            room = self._h2.local_flow_control_window(number)
            size = min(room, self._h2.max_outbound_frame_size, len(view))
            if size == 0:
                self._receive()
                continue
            self._h2.send_data(number, bytes(view[:size]))
            view = view[size:]
            self._send()
        if end and not call.ended:
            self._h2.end_stream(number)
            self._send()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(65536)
        except ConnectionError as error:
            self.ended_by = str(error)
            return
        if not data:
            self.ended_by = self.ended_by or "closed"
            return
        for event in self._h2.receive_data(data):
            self._take(event)
        self._send()

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RemoteSettingsChanged):
            self.settings_seen = True
        elif isinstance(event, h2.events.PingAckReceived):
            self.acknowledged_pings += 1
        elif isinstance(event, h2.events.PingReceived):
            self.answered_pings += 1
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.ended_by = f"GOAWAY {event.error_code} {event.additional_data!r}"
        elif isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            self.calls[event.stream_id].headers.update(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            self.calls[event.stream_id].data += event.data
            self._h2.acknowledge_received_data(
                event.flow_controlled_length, event.stream_id
            )
        elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
            self.calls[event.stream_id].ended = True


@contextlib.contextmanager
def http2_peer(target: str) -> Iterator[Http2Peer]:
    peer = Http2Peer(target)
    try:
        yield peer
    finally:
        peer.close()
