"""Fetcher: runs the fetches of a Client, over the network or from shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from pbs_client._homes import Homes
from pbs_client._kv_receiver import QUERIES, KvReceiver, LayerCallback
from pbs_client._kv_transfer import FetchPlan, Progress, run_fetch
from pbs_client._lease_keeper import LeaseKeeper
from pbs_client._shared_memory import map_region
from pbs_client._transport import Deadline
from pbs_client.errors import CorruptDataError
from pbs_client.kv import KvDescriptor, KvLease, KvTicket


class Leases(Protocol):
    """What a Client says of its leases."""

    def describe(self, ticket: KvTicket, *, timeout: float | None) -> KvDescriptor:
        """As Client.describe()."""

    def renew(
        self, ticket: KvTicket, ttl_seconds: int | None, *, timeout: float | None
    ) -> KvLease:
        """As Client.renew()."""


class Fetcher:
    """Threading: safe from many threads."""

    def __init__(self, client: Leases, homes: Homes, socket_path: str) -> None:
        """Makes the fetches of one client.

        Args:
            client: the Client.
            homes: of the tickets.
            socket_path: of the server's shared_memory_socket; "": over the network.
        """
        self._client = client
        self._homes = homes
        self._socket_path = socket_path

    def run(
        self,
        plan: FetchPlan,
        resumes: int,
        deadline: Deadline,
        on_layer: LayerCallback | None = None,
        progress: Progress | None = None,
    ) -> KvReceiver:
        """Fetches by the plan; see Client.fetch(). The receiver has received all."""
        client, descriptor = self._client, plan.descriptor
        home = self._homes.of(descriptor.ticket)
        with LeaseKeeper(client.describe, client.renew, descriptor, deadline):
            # Captured queries are not in shared memory.
            if not self._socket_path or plan.shape.kinds == QUERIES:
                return run_fetch(home, plan, resumes, deadline, on_layer, progress)
            region = map_region(
                self._socket_path, descriptor.ticket, descriptor.bytes, deadline.left()
            )
            plan = dataclasses.replace(plan, region=region)

            def confirm(layer: int, *arrays: Any) -> None:
                client.describe(descriptor.ticket, timeout=deadline.left())
                if on_layer is not None:
                    on_layer(layer, *arrays)

            # Checksums would notice that the memory was taken away.
            callback = on_layer if plan.shape.checksums else confirm
            try:
                return run_fetch(home, plan, resumes, deadline, callback, progress)
            except CorruptDataError:
                # Wrong bytes are zeros where the lease has ended: then that is raised.
                client.describe(descriptor.ticket, timeout=deadline.left())
                raise
            finally:
                region.close()
