"""The scheduler's side: which requests load what, and how long their leases live.

vLLM calls on_new_request() when a request arrives, matched_tokens() whenever it could
be scheduled, allocated() when it has blocks, take_orders() at the end of each step,
loaded() with the workers' results, and finished() when the request ends in any way, an
abort included. A request that was preempted starts again at matched_tokens().

A hand-off that is refused is not loaded. With the policy "recompute" vLLM computes the
prompt. With "fail" the request asks for a load that the workers report as failed, so
that vLLM ends it as after any failed load.

Threading: one thread, vLLM's scheduler. No method waits for the network or raises.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pbs_client.kv import Span
from pbs_client.vllm.handoff import (
    Handoff,
    HandoffError,
    Request,
    check_handoff,
    read_handoff,
)
from pbs_client.vllm.leases import Leases
from pbs_client.vllm.loader import LoadOrder
from pbs_client.vllm.parts import blocks_of_tokens
from pbs_client.vllm.settings import Settings

_log = logging.getLogger("vllm.pbs_client")


@dataclass(frozen=True)
class EnginePolicy:
    """What vLLM was started with.

    Attributes:
        block_size: tokens of a block.
        prefix_caching: requests reuse blocks of others.
        fails: kv_load_failure_policy is "fail", not "recompute".
    """

    block_size: int
    prefix_caching: bool
    fails: bool


@dataclass
class _Entry:
    """A request with a hand-off."""

    handoff: Handoff | None = None  # None: it could not be read
    refusal: str = ""
    is_checked: bool = False
    holds_lease: bool = False
    is_over: bool = False  # nothing is loaded any more
    begin: int = 0  # the first token to load, of the last matched_tokens()
    blocks: frozenset[int] = frozenset()  # of the load under way


class SchedulerSide:
    """See the module."""

    def __init__(
        self, settings: Settings, policy: EnginePolicy, leases: Leases
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._leases = leases
        self._entries: dict[str, _Entry] = {}
        self._orders: list[LoadOrder] = []

    def on_new_request(self, request: Request) -> None:
        """Reads the request's hand-off, if it has one, and keeps its lease.

        vLLM also announces requests that it has refused itself, and ends them at once.
        """
        entry = _Entry()
        with self._refusing(request, entry):
            entry.handoff = read_handoff(request.kv_transfer_params, self._settings)
        if entry.handoff is None and not entry.refusal:
            return
        self._entries[request.request_id] = entry
        if entry.handoff is not None:
            self._leases.hold(entry.handoff.ticket)
            entry.holds_lease = True

    def matched_tokens(self, request: Request, num_computed: int) -> int:
        """The number of tokens to load beyond those that vLLM has."""
        entry = self._entries.get(request.request_id)
        if entry is None or entry.is_over:
            return 0
        self._check_once(request, entry)
        entry.begin = num_computed
        # vLLM computes one token at least, because it needs its logits.
        most = request.num_tokens - 1 - num_computed
        if entry.handoff is None or entry.refusal:
            return min(1, max(0, most)) if self._policy.fails else 0
        return max(0, min(entry.handoff.tokens - num_computed, most))

    def allocated(
        self, request: Request, blocks: Sequence[int], num_tokens: int
    ) -> None:
        """A request has got its blocks and waits until num_tokens are loaded."""
        entry = self._entries.get(request.request_id)
        if entry is None:
            return
        if num_tokens <= 0:
            if not entry.blocks and self._settings.release == "load":
                self._end(entry)
            return
        tokens = Span(entry.begin, num_tokens)
        order = LoadOrder(
            request.request_id,
            tokens,
            blocks_of_tokens(blocks, tokens, self._policy.block_size),
            prompt_tokens=0 if entry.handoff is None else entry.handoff.tokens,
            refusal=entry.refusal,
            ticket=None if entry.handoff is None else entry.handoff.ticket,
            prompt_digest="" if entry.handoff is None else entry.handoff.prompt_digest,
        )
        entry.blocks = frozenset(order.blocks)
        self._orders.append(order)

    def take_orders(self) -> list[LoadOrder]:
        """The orders since the last call, for the workers."""
        orders, self._orders = self._orders, []
        return orders

    def loaded(self, request_ids: Iterable[str], failed_blocks: Iterable[int]) -> None:
        """Loads have ended on every rank, or failed on any."""
        failed = frozenset(failed_blocks)
        if failed:
            for entry in self._entries.values():
                if entry.blocks & failed:
                    self._end(entry)
        for request_id in request_ids:
            ended = self._entries.get(request_id)
            if ended is not None:
                ended.blocks = frozenset()
                if self._settings.release == "load":
                    self._end(ended)

    def finished(self, request_id: str) -> None:
        """The request has ended: done, failed or aborted."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._drop_lease(entry)

    def _check_once(self, request: Request, entry: _Entry) -> None:
        if entry.is_checked or entry.handoff is None:
            return
        entry.is_checked = True
        with self._refusing(request, entry):
            check_handoff(
                entry.handoff, request, self._settings, self._policy.prefix_caching
            )

    @contextlib.contextmanager
    def _refusing(self, request: Request, entry: _Entry) -> Iterator[None]:
        """Refuses the hand-off when the block raises."""
        try:
            yield
        except HandoffError as error:
            entry.refusal = str(error)
        except Exception as error:  # the engine must go on
            entry.refusal = f"it could not be read: {type(error).__name__}"
        if entry.refusal:
            request_id = request.request_id
            _log.warning("hand-off of request %s: %s", request_id, entry.refusal)
            self._drop_lease(entry)

    def _end(self, entry: _Entry) -> None:
        entry.is_over = True
        self._drop_lease(entry)

    def _drop_lease(self, entry: _Entry) -> None:
        if entry.holds_lease and entry.handoff is not None:
            entry.holds_lease = False
            self._leases.drop(entry.handoff.ticket)


def blocks_of(kv_cache_blocks: Any) -> Sequence[int]:
    """The block ids of the one group of vLLM's KVCacheBlocks."""
    (blocks,) = kv_cache_blocks.get_block_ids()
    ids: Sequence[int] = blocks
    return ids
