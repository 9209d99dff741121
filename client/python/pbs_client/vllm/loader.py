"""Threads that load caches beside the engine's steps.

The worker submits orders and, at each step, takes the results. Every order has exactly
one result, also when its request has ended: until then vLLM keeps the request's blocks.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pbs_client.errors import PbsError
from pbs_client.kv import KvTicket, Span
from pbs_client.vllm.handoff import HandoffError, LoadCancelledError

_log = logging.getLogger("vllm.pbs_client")


@dataclass(frozen=True)
class LoadOrder:
    """What a rank loads for a request.

    Attributes:
        request_id: vLLM's.
        tokens: of the prompt, to load.
        blocks: that hold these tokens, in order.
        prompt_tokens: of the whole cache.
        refusal: why it must fail without any traffic; "" to load.
        ticket: of the cache; None with a refusal. Not shown: who knows it can fetch.
        prompt_digest: of the ids that the cache must be of.
    """

    request_id: str
    tokens: Span
    blocks: tuple[int, ...]
    prompt_tokens: int = 0
    refusal: str = ""
    ticket: KvTicket | None = field(default=None, repr=False)
    prompt_digest: str = ""


@dataclass(frozen=True)
class Results:
    """Loads that ended.

    Attributes:
        request_ids: of all of them.
        failed_blocks: of those that failed.
    """

    request_ids: frozenset[str]
    failed_blocks: frozenset[int]


class Cancellation:
    """Tells a load that its request has ended. Threading: safe from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._stop: Callable[[], None] = lambda: None

    def check(self) -> None:
        """LoadCancelledError once cancel() was called."""
        if self._is_set:
            raise LoadCancelledError

    def cancel(self) -> None:
        """Ends the load."""
        with self._lock:
            self._is_set = True
            self._stop()

    def on_cancel(self, stop: Callable[[], None]) -> None:
        """Has cancel() also call `stop`, which ends what the load waits for."""
        with self._lock:
            self._stop = stop
            if self._is_set:
                stop()


# Loads an order; raises when it cannot.
Load = Callable[[LoadOrder, Cancellation], None]


class Loader:
    """A bounded number of threads.

    Threading: submit(), cancel(), take() and close() are for one thread.
    Memory: one entry for each request to which vLLM has given blocks.
    """

    def __init__(
        self,
        load: Load,
        num_threads: int,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the threads.

        Args:
            load: loads one order, in one of the threads.
            num_threads: loads at a time.
            prepare: called at the start of each thread.
        """
        self._load = load
        self._prepare = prepare
        self._orders: queue.SimpleQueue[LoadOrder | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._cancellations: dict[str, Cancellation] = {}  # of loads under way
        self._ended: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._threads = [
            threading.Thread(target=self._run, name=f"pbs-load-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, order: LoadOrder) -> None:
        """Queues an order."""
        with self._lock:
            self._cancellations[order.request_id] = Cancellation()
        self._orders.put(order)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends the loads of requests that have ended; their results still come."""
        with self._lock:
            found = [self._cancellations.get(request_id) for request_id in request_ids]
        for cancellation in found:
            if cancellation is not None:
                cancellation.cancel()

    def take(self) -> Results:
        """The results since the last call."""
        with self._lock:
            results = Results(frozenset(self._ended), frozenset(self._failed_blocks))
            self._ended.clear()
            self._failed_blocks.clear()
        return results

    def close(self, seconds_max: float) -> None:
        """Cancels all loads and waits for the threads, each for at most the time."""
        with self._lock:
            request_ids = list(self._cancellations)
        self.cancel(request_ids)
        for _ in self._threads:
            self._orders.put(None)
        for thread in self._threads:
            thread.join(seconds_max)

    def _run(self) -> None:
        self._prepare()
        while True:
            order = self._orders.get()
            if order is None:
                return
            with self._lock:
                cancellation = self._cancellations[order.request_id]
            is_loaded = False
            try:
                cancellation.check()
                if order.refusal:
                    raise HandoffError(order.refusal)
                self._load(order, cancellation)
                is_loaded = True
            except Exception as error:  # the engine must go on
                _report(order, cancellation, error)
            finally:
                self._end(order, is_loaded)

    def _end(self, order: LoadOrder, is_loaded: bool) -> None:
        with self._lock:
            del self._cancellations[order.request_id]
            self._ended.add(order.request_id)
            if not is_loaded:
                self._failed_blocks.update(order.blocks)


def _report(order: LoadOrder, cancellation: Cancellation, error: Exception) -> None:
    try:
        cancellation.check()
    except LoadCancelledError:
        _log.info("load of request %s: the request has ended", order.request_id)
        return
    is_expected = isinstance(error, (HandoffError, PbsError))
    _log.warning(
        "load of request %s failed: %s",
        order.request_id,
        error if is_expected else type(error).__name__,
        exc_info=None if is_expected else error,
    )
