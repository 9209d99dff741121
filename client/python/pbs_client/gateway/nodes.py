"""The nodes behind one gateway: the first, and those that take over where it cannot.

A request goes to the next node only when a node is not available: unreachable, draining,
or lost before the prefill was done. A ticket names its node, so each may hold the cache.

Threading: of the event loop in which it was made.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

import grpc

from pbs_client.errors import PbsError, UnavailableError
from pbs_client.gateway import log
from pbs_client.gateway.node import Node, ServedModel

DOWN_SECONDS = 5.0  # for which a node that was not available is tried last


class Nodes:
    """One node or several, in the order of preference."""

    def __init__(
        self,
        targets: Sequence[str],
        model: str,
        aliases: tuple[str, ...],
        calls_max: int,
    ) -> None:
        """As Node; at least one target."""
        self._nodes = [Node(target, model, aliases, calls_max) for target in targets]
        # Of the first node, once it has told, and until it tells of another.
        self._known: ServedModel | None = None
        self._down: dict[str, float] = {}  # by target, when it was last not available

    async def close(self) -> None:
        """Cancels calls under way."""
        for node in self._nodes:
            await node.close()

    def _in_order(self) -> list[Node]:
        """The nodes, those last that were not available a moment ago."""
        since = time.monotonic() - DOWN_SECONDS
        return sorted(
            self._nodes, key=lambda n: self._down.get(n.target, since) > since
        )

    def _note_down(self, node: Node) -> None:
        self._down[node.target] = time.monotonic()

    async def served(self) -> ServedModel:
        """The model, of the first node that tells. PbsError: the first one's error."""
        first: PbsError | None = None
        for node in self._in_order():
            try:
                served = await node.served()
            except PbsError as error:
                self._note_down(node)
                first = first or error
                continue
            if node is self._nodes[0] or self._known is None:
                self._known = served
            if _are_same(node, served, self._known):
                return served
        raise first or UnavailableError(
            "the nodes that are available serve another model",
            grpc.StatusCode.UNAVAILABLE,
        )

    async def why_not_ready(self) -> str:
        """Why no node takes a prefill; "" when one does."""
        reasons = []
        for node in self._nodes:
            try:
                state = await node.health()
                if state == "SERVING":
                    await self.served()
                    return ""
                reasons.append(f"the health of node {node.target} is {state}")
            except PbsError as error:
                reasons.append(f"node {node.target}: {error.message}")
        return "; ".join(reasons)

    async def first_available(
        self,
        served: ServedModel,
        attempt: Callable[[Node], Awaitable[None]],
        on_failover: Callable[[], None],
    ) -> None:
        """Runs `attempt` with the first node that is available.

        Args:
            served: the model of the request; a later node must have its very weights.
            attempt: raises UnavailableError when the next node shall be tried.
            on_failover: called before each further attempt.

        Raises:
            UnavailableError: of the first node, when none is available.
            PbsError: of an attempt.
        """
        first: UnavailableError | None = None
        for node in self._in_order():
            try:
                if first is not None:
                    if not _are_same(node, await node.served(), served):
                        continue
                    on_failover()
                await attempt(node)
                return
            except UnavailableError as error:
                self._note_down(node)
                first = first or error
        assert first is not None
        raise first


def _are_same(node: Node, own: ServedModel, wanted: ServedModel) -> bool:
    """Whether a node's model has the weights and the name of another's."""
    same = own.info.model_digest == wanted.info.model_digest
    if not same or own.info.name != wanted.info.name:
        log.event("node_differs", "warning", node=node.target, model=own.info.name)
        return False
    return True
