"""Leases: kept while requests need them, then released.

A request may wait in vLLM's queue for longer than its lease lives, and several requests
may have one ticket (a request for n answers is n requests to the scheduler). A lease is
renewed after each half of its time, and released when the last request drops it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from pbs_client.errors import NotFoundError, PbsError
from pbs_client.kv import KvTicket
from pbs_client.vllm.connections import Connections

CALLS_AT_ONCE = 16
CALLS_PER_SERVER = 2  # one that hangs must not hold up the leases of others
RELEASE_TRIES = 3
PAUSE_SECONDS_MIN = 0.25  # between renewals
RETRY_SECONDS = 1.0  # after a failed call
IDLE_SECONDS_MAX = 60.0  # of the thread; calls wake it
NEVER = float("inf")

_log = logging.getLogger("vllm.pbs_client")

_Key = tuple[str, int, str]


@dataclass
class _Lease:
    ticket: KvTicket
    users: int
    due: float  # of the next call, on the monotonic clock
    tries_left: int = RELEASE_TRIES
    is_called: bool = False  # a call about it is under way or queued
    is_gone: bool = False  # the server has no such lease


class Leases:
    """The leases of all requests that vLLM has.

    Threading: safe from many threads; no method waits for the network, except close().
    Memory: one entry for each ticket of a request that vLLM has.
    """

    def __init__(self, connections: Connections, call_seconds_max: float) -> None:
        """Starts the thread that keeps leases.

        Args:
            connections: to the servers.
            call_seconds_max: time of a call.
        """
        self._connections = connections
        self._seconds = call_seconds_max
        self._leases: dict[_Key, _Lease] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._calls = ThreadPoolExecutor(CALLS_AT_ONCE, "pbs-lease")
        self._thread = threading.Thread(
            target=self._run, name="pbs-leases", daemon=True
        )
        self._thread.start()

    def hold(self, ticket: KvTicket) -> None:
        """Keeps the lease for one more request."""
        with self._changed:
            lease = self._leases.get(_key(ticket))
            if lease is None:
                lease = _Lease(ticket, 0, time.monotonic())
                self._leases[_key(ticket)] = lease
            lease.users += 1
            self._changed.notify()

    def drop(self, ticket: KvTicket) -> None:
        """One request needs it no more. The last drop releases the lease."""
        with self._changed:
            lease = self._leases.get(_key(ticket))
            if lease is None:
                return
            lease.users -= 1
            if lease.users <= 0:
                lease.due = 0.0
                self._changed.notify()

    def close(self) -> None:
        """Releases all leases, in at most the time of two calls."""
        with self._changed:
            self._closed = True
            leases = [lease for lease in self._leases.values() if not lease.is_gone]
            self._leases.clear()
            self._changed.notify()
        self._thread.join()
        wait(
            [self._calls.submit(self._release_once, lease.ticket) for lease in leases],
            timeout=2 * self._seconds,
        )
        self._calls.shutdown(wait=False, cancel_futures=True)

    # ---- the thread and its calls

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                due = self._start_calls(now)
                self._changed.wait(max(0.0, min(due, now + IDLE_SECONDS_MAX) - now))

    def _start_calls(self, now: float) -> float:
        """Starts the calls that are due; gives the time of the next."""
        calls = Counter(x.ticket.endpoint for x in self._leases.values() if x.is_called)
        next_due = NEVER
        for lease in self._leases.values():
            # The end of a call wakes the thread for what waits for its server.
            if lease.is_called or calls[lease.ticket.endpoint] >= CALLS_PER_SERVER:
                continue
            if lease.due <= now:
                lease.is_called = True
                calls[lease.ticket.endpoint] += 1
                self._calls.submit(self._call, lease)
            else:
                next_due = min(next_due, lease.due)
        return next_due

    def _call(self, lease: _Lease) -> None:
        """Releases a lease without users, renews any other."""
        is_last = lease.users <= 0
        try:
            pause = self._release(lease) if is_last else self._renew(lease)
        except Exception as error:  # the lease then runs out by itself
            _log.warning("a lease could not be kept: %s", type(error).__name__)
            pause, lease.is_gone = NEVER, True
        with self._changed:
            lease.is_called = False
            lease.due = time.monotonic() + pause
            if lease.users <= 0:
                if is_last and pause == NEVER:
                    self._leases.pop(_key(lease.ticket), None)
                elif not is_last:
                    lease.due = 0.0
            self._changed.notify()

    def _renew(self, lease: _Lease) -> float:
        """Seconds until the next call."""
        if lease.is_gone:
            return NEVER
        ticket = lease.ticket
        try:
            with self._connections.client(ticket.endpoint) as client:
                kv = client.describe(ticket, timeout=self._seconds)
                if kv.complete:  # the lease's time starts when the prefill is done
                    client.renew(ticket, kv.ttl_seconds, timeout=self._seconds)
            return max(kv.ttl_seconds / 2, PAUSE_SECONDS_MIN)
        except NotFoundError:
            lease.is_gone = True
            return NEVER
        except PbsError:
            return RETRY_SECONDS

    def _release(self, lease: _Lease) -> float:
        """Seconds until the next try; infinite when there is none."""
        lease.tries_left -= 1
        is_over = lease.is_gone or self._release_once(lease.ticket)
        return NEVER if is_over or lease.tries_left <= 0 else RETRY_SECONDS

    def _release_once(self, ticket: KvTicket) -> bool:
        """True when the server answered that it holds the lease no more."""
        try:
            with self._connections.client(ticket.endpoint) as client:
                client.release(ticket, timeout=self._seconds)
            return True
        except NotFoundError:
            return True
        except PbsError:
            return False


def _key(ticket: KvTicket) -> _Key:
    return ticket.endpoint, ticket.epoch, ticket.handle
