"""Fetches a cache into the engine's blocks, layer by layer, and checks it."""

from __future__ import annotations

from typing import Protocol

from pbs_client._prefill import find_model
from pbs_client._transport import Deadline
from pbs_client.client import Client
from pbs_client.kv import Array, KvFormat, KvPart, KvTicket
from pbs_client.vllm.handoff import HandoffError
from pbs_client.vllm.loader import Cancellation, LoadOrder
from pbs_client.vllm.parts import (
    EngineShape,
    check_descriptor,
    check_rotary,
    groups_of_layers,
    slots_of_tokens,
)
from pbs_client.vllm.settings import Settings

KNOWN_SERVERS_MAX = 1024  # whose factor of rotary positions is remembered


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

    def __init__(self, settings: Settings, engine: EngineShape, blocks: Blocks) -> None:
        self._settings = settings
        self._engine = engine
        self._blocks = blocks
        self._same_rotary: set[tuple[str, int, str]] = set()  # endpoint, epoch, model

    def load(self, order: LoadOrder, cancellation: Cancellation) -> None:
        """Loads an order. A prefill that still runs is followed.

        The blocks hold nothing valid until this returns. The load has a connection of
        its own, so that a cancellation ends it whatever the server does.

        Raises:
            HandoffError: the cache is not of this model or not as announced.
            LoadCancelledError: the load was cancelled.
            PbsError: as Client.fetch().
        """
        assert order.ticket is not None
        # The ticket's endpoint was checked; the client follows no other.
        with Client(order.ticket.endpoint, follow_endpoints=False) as client:
            cancellation.on_cancel(client.close)
            self._load(client, order.ticket, order, cancellation)

    def _load(
        self,
        client: Client,
        ticket: KvTicket,
        order: LoadOrder,
        cancellation: Cancellation,
    ) -> None:
        deadline = Deadline(self._settings.load_seconds_max)
        seconds = min(deadline.left(), self._settings.call_seconds_max)
        kv = client.describe(ticket, timeout=seconds)
        check_descriptor(kv, self._engine, order.prompt_tokens, order.prompt_digest)
        for name in ("model_digest", "sparsity_digest"):
            if getattr(kv.ticket, name) != getattr(ticket, name):
                raise HandoffError(f"the cache's {name} is not that of the ticket")
        self._check_rotary(client, ticket, kv.model, seconds)
        slots = slots_of_tokens(order.blocks, order.tokens, self._blocks.block_size)

        def write(layer: int, k: Array, v: Array) -> None:
            cancellation.check()
            self._blocks.write(layer, k, v, slots)

        heads, tokens = self._engine.heads, order.tokens
        for layers in groups_of_layers(
            self._engine, tokens.count, self._settings.load_bytes_max
        ):
            client.fetch(
                ticket,
                part=KvPart(
                    layers,
                    (tokens.begin, tokens.count),
                    (heads.begin, heads.count),
                ),
                kv_format=KvFormat(
                    self._engine.dtype, wire_dtype=self._settings.wire_dtype or None
                ),
                timeout=deadline.left(),
                on_layer=write,
            )

    def _check_rotary(
        self, client: Client, ticket: KvTicket, model: str, seconds: float
    ) -> None:
        """Compares the factor of rotary positions, once for each server process."""
        factor = self._engine.rope_factor
        key = (ticket.endpoint, ticket.epoch, model)
        if factor is None or key in self._same_rotary:
            return
        check_rotary(find_model(client.models(timeout=seconds), model), factor)
        if len(self._same_rotary) >= KNOWN_SERVERS_MAX:
            self._same_rotary.clear()
        self._same_rotary.add(key)
