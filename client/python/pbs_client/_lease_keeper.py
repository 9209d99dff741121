"""Renews a lease while its cache is fetched, because a fetch may outlast the lease.

Every renewal is for the lease's own time to live, also when another holder renews it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pbs_client._transport import Deadline
from pbs_client.errors import NotFoundError, PbsError
from pbs_client.kv import KvDescriptor, KvLease

_CALL_SECONDS_MAX = 10.0  # leaving the block may wait for a reply

Describe = Callable[..., KvDescriptor]  # Client.describe
Renew = Callable[..., KvLease]  # Client.renew


class LeaseKeeper:
    """For a `with` block: renews at its begin and after each half of its time."""

    def __init__(
        self,
        describe: Describe,
        renew: Renew,
        descriptor: KvDescriptor,
        deadline: Deadline,
    ) -> None:
        """Prepares; see Client.fetch().

        Args:
            describe: Client.describe.
            renew: Client.renew.
            descriptor: a new description of the lease.
            deadline: the deadline of the block.
        """
        self._describe, self._renew = describe, renew
        self._descriptor = descriptor
        self._deadline = deadline
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        kv, is_fresh = self._descriptor, True
        while kv.ttl_seconds > 0:
            half = kv.ttl_seconds / 2
            seconds = min(half, _CALL_SECONDS_MAX, self._deadline.left())
            try:
                if not is_fresh:
                    kv = self._describe(kv.ticket, timeout=seconds)
                if kv.complete:  # while the prefill runs, the lease's time does not
                    self._renew(kv.ticket, kv.ttl_seconds, timeout=seconds)
                pause = kv.ttl_seconds / 2
            except (NotFoundError, ValueError):  # the lease is gone; the client closed
                return
            except PbsError:
                pause = half / 4
            is_fresh = False
            if self._end.wait(pause):
                return
