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
    """

    request_id: str
    tokens: Span
    blocks: tuple[int, ...]
    prompt_tokens: int = 0
    refusal: str = ""
    ticket: KvTicket | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Results:
    """Loads that ended.

    Attributes:
        request_ids: of all of them.
        failed_blocks: of those that failed.
    """

    request_ids: frozenset[str]
    failed_blocks: frozenset[int]


# Loads an order; raises when it cannot. The event tells that the request has ended.
Load = Callable[[LoadOrder, threading.Event], None]


class Loader:
    """A bounded number of threads.

    Threading: submit(), cancel(), take() and close() are for one thread.
    Memory: one entry for each request to which vLLM has given blocks.
    """

    def __init__(self, load: Load, num_threads: int) -> None:
        """Starts the threads.

        Args:
            load: loads one order, in one of the threads.
            num_threads: loads at a time.
        """
        self._load = load
        self._orders: queue.SimpleQueue[LoadOrder | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._cancelled: dict[str, threading.Event] = {}  # of loads without a result
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
            self._cancelled[order.request_id] = threading.Event()
        self._orders.put(order)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends the loads of requests that have ended; their results still come."""
        with self._lock:
            for request_id in request_ids:
                if request_id in self._cancelled:
                    self._cancelled[request_id].set()

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
            for cancelled in self._cancelled.values():
                cancelled.set()
        for _ in self._threads:
            self._orders.put(None)
        for thread in self._threads:
            thread.join(seconds_max)

    def _run(self) -> None:
        while True:
            order = self._orders.get()
            if order is None:
                return
            with self._lock:
                cancelled = self._cancelled[order.request_id]
            is_loaded = False
            try:
                self._attempt(order, cancelled)
                is_loaded = True
            except LoadCancelledError:
                _log.info("load of request %s: it has ended", order.request_id)
            except (HandoffError, PbsError) as error:
                _log.warning("load of request %s failed: %s", order.request_id, error)
            except Exception:  # the engine must go on
                _log.exception("load of request %s failed", order.request_id)
            finally:
                self._end(order, is_loaded)

    def _attempt(self, order: LoadOrder, cancelled: threading.Event) -> None:
        if cancelled.is_set():
            raise LoadCancelledError
        if order.refusal:
            raise HandoffError(order.refusal)
        self._load(order, cancelled)

    def _end(self, order: LoadOrder, is_loaded: bool) -> None:
        with self._lock:
            del self._cancelled[order.request_id]
            self._ended.add(order.request_id)
            if not is_loaded:
                self._failed_blocks.update(order.blocks)
