"""Fetches a cache into the engine's blocks, layer by layer, and checks it."""

from __future__ import annotations

import threading
from typing import Protocol

from pbs_client._transport import Deadline
from pbs_client.client import Client
from pbs_client.kv import Array, KvFormat, KvPart, KvTicket
from pbs_client.vllm.connections import Connections
from pbs_client.vllm.handoff import HandoffError, LoadCancelledError
from pbs_client.vllm.loader import LoadOrder
from pbs_client.vllm.parts import (
    EngineShape,
    check_descriptor,
    groups_of_layers,
    slots_of_tokens,
)
from pbs_client.vllm.settings import Settings


class Blocks(Protocol):
    """vLLM's cache on this rank."""

    block_size: int

    def write(self, layer: int, k: Array, v: Array, slots: Array) -> None:
        """Writes keys and values of tokens.

        Args:
            layer: of the model.
            k: [heads, tokens, head_dim] of this rank's heads.
            v: as k.
            slots: the place of each token: block * block_size + offset.
        """


class Fetcher:
    """Loads orders of one rank. Threading: safe from many threads."""

    def __init__(
        self,
        connections: Connections,
        settings: Settings,
        engine: EngineShape,
        blocks: Blocks,
    ) -> None:
        self._connections = connections
        self._settings = settings
        self._engine = engine
        self._blocks = blocks

    def load(self, order: LoadOrder, cancelled: threading.Event) -> None:
        """Loads an order. A prefill that still runs is followed.

        The blocks hold nothing valid until this returns.

        Raises:
            HandoffError: the cache is not of this model or not as announced.
            LoadCancelledError: `cancelled` was set.
            PbsError: as Client.fetch().
        """
        assert order.ticket is not None
        with self._connections.client(order.ticket.endpoint) as client:
            self._load(client, order.ticket, order, cancelled)

    def _load(
        self,
        client: Client,
        ticket: KvTicket,
        order: LoadOrder,
        cancelled: threading.Event,
    ) -> None:
        deadline = Deadline(self._settings.load_seconds_max)
        seconds = min(deadline.left(), self._settings.call_seconds_max)
        kv = client.describe(ticket, timeout=seconds)
        check_descriptor(kv, self._engine, order.prompt_tokens)
        for name in ("model_digest", "sparsity_digest"):
            if getattr(kv.ticket, name) != getattr(ticket, name):
                raise HandoffError(f"the cache's {name} is not that of the ticket")
        slots = slots_of_tokens(order.blocks, order.tokens, self._blocks.block_size)

        def check_cancelled(*_: object) -> None:
            if cancelled.is_set():
                raise LoadCancelledError

        def write(layer: int, k: Array, v: Array) -> None:
            check_cancelled()
            self._blocks.write(layer, k, v, slots)

        heads, tokens = self._engine.heads, order.tokens
        for layers in groups_of_layers(
            self._engine, tokens.count, self._settings.load_bytes_max
        ):
            check_cancelled()
            client.fetch(
                ticket,
                part=KvPart(
                    layers,
                    (tokens.begin, tokens.count),
                    (heads.begin, heads.count),
                ),
                kv_format=KvFormat(self._engine.dtype),
                timeout=deadline.left(),
                on_layer=write,
                progress=check_cancelled,
            )
