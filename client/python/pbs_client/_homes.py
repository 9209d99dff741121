"""Connections to the servers that hold leased caches.

A load balancer may give a later call to another server than the one that ran the
prefill. A ticket therefore names the server that holds its cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pbs_client._transport import Transport
from pbs_client.kv import KvTicket


class Homes:
    """The transport of each ticket: one for every endpoint that was named.

    Threading: safe from many threads.
    """

    def __init__(
        self, transport: Transport, connect: Callable[[str], Transport] | None
    ) -> None:
        """Starts with the client's own server.

        Args:
            transport: to the client's own server; also of tickets without an endpoint.
            connect: makes a transport, without network traffic; None: all tickets are
                of the client's own server.
        """
        self._own = transport
        self._connect = connect
        self._lock = threading.Lock()
        self._transports = {transport.target: transport}

    def of(self, ticket: KvTicket) -> Transport:
        """The transport to the ticket's server. ValueError: its endpoint is none."""
        if not ticket.endpoint or self._connect is None:
            return self._own
        with self._lock:
            home = self._transports.get(ticket.endpoint)
            if home is None:
                home = self._connect(ticket.endpoint)
                self._transports[ticket.endpoint] = home
            return home

    def close(self) -> None:
        """Closes all of them."""
        with self._lock:
            for transport in self._transports.values():
                transport.close()
