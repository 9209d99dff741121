"""Connections to prefill servers: a bounded number, shared by threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from pbs_client.client import Client
from pbs_client.vllm.handoff import HandoffError

CONNECTIONS_MAX = 64


class Connections:
    """One client for every server that is in use or was lately.

    Threading: safe from many threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[str, Client] = {}  # the least recently used first
        self._users: dict[str, int] = {}

    @contextlib.contextmanager
    def client(self, endpoint: str) -> Iterator[Client]:
        """A client of the server, for a `with` block.

        Raises:
            HandoffError: CONNECTIONS_MAX other servers are in use.
        """
        with self._lock:
            client = self._clients.pop(endpoint, None) or self._connect(endpoint)
            self._clients[endpoint] = client
            self._users[endpoint] = self._users.get(endpoint, 0) + 1
        try:
            yield client
        finally:
            with self._lock:
                self._users[endpoint] -= 1

    def close(self) -> None:
        """Ends all calls and connections."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def _connect(self, endpoint: str) -> Client:
        if len(self._clients) >= CONNECTIONS_MAX:
            unused = (name for name in self._clients if not self._users.get(name))
            oldest = next(unused, None)
            if oldest is None:
                raise HandoffError(
                    f"{CONNECTIONS_MAX} prefill servers are in use at a time, which is "
                    "the limit; try again later"
                )
            self._clients.pop(oldest).close()
            self._users.pop(oldest, None)
        # The ticket's endpoint was checked; the client follows no other.
        return Client(endpoint, follow_endpoints=False)
