"""A TCP relay that cuts connections after a number of bytes, as a broken network does."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator, Sequence


class CuttingRelay:
    """Relays to `target`. Connection i ends when cuts[i] bytes came from the server.

    Connections after the last entry are not cut. One connection at a time.
    """

    def __init__(self, target: str, cuts: Sequence[int]) -> None:
        host, port = target.rsplit(":", 1)
        self._server = (host, int(port))
        self._cuts = list(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.connections = 0
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        """Ends all connections."""
        self._stop.close()
        self._thread.join()
        self._listener.close()
        self._stopped.close()

    def _serve(self) -> None:
        while self._listener in select.select([self._listener, self._stopped], [], [])[0]:
            near, _ = self._listener.accept()
            index, self.connections = self.connections, self.connections + 1
            left = self._cuts[index] if index < len(self._cuts) else 1 << 62
            with near, socket.create_connection(self._server) as far:
                with contextlib.suppress(OSError):
                    self._relay(near, far, left)

    def _relay(self, near: socket.socket, far: socket.socket, left: int) -> None:
        while left > 0:
            ready = select.select([near, far, self._stopped], [], [])[0]
            if self._stopped in ready:
                return
            for source in ready:
                data = source.recv(65536 if source is near else min(65536, left))
                if not data:
                    return
                if source is far:
                    left -= len(data)
                (near if source is far else far).sendall(data)


@contextlib.contextmanager
def cutting_relay(target: str, cuts: Sequence[int]) -> Iterator[CuttingRelay]:
    """A relay that is closed in the end."""
    relay = CuttingRelay(target, cuts)
    try:
        yield relay
    finally:
        relay.close()
