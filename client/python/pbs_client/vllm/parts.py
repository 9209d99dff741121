"""Which part of a cache a rank of the engine loads, and into which blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pbs_client.kv import Array, KvDescriptor, Span
from pbs_client.results import ModelInfo
from pbs_client.vllm.handoff import HandoffError


@dataclass(frozen=True)
class EngineShape:
    """Sizes of the engine's model, and the share of this rank.

    Attributes:
        num_layers, num_kv_heads, head_dim: of the whole model.
        layers: of this pipeline rank.
        heads: KV heads of this tensor-parallel rank.
        dtype: short name of the elements in vLLM's cache.
        rope_factor: by which cosines and sines are multiplied; None: by nothing, with
            any server.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    layers: Span
    heads: Span
    dtype: str
    rope_factor: float | None = None

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer of this rank."""
        item = {"f32": 4, "f16": 2, "bf16": 2}[self.dtype]
        return 2 * self.heads.count * self.head_dim * item


def heads_of_rank(num_kv_heads: int, num_ranks: int, rank: int) -> Span:
    """KV heads of a tensor-parallel rank.

    With more ranks than heads, consecutive ranks share a head.

    Raises:
        ValueError: neither number divides the other, or there is no such rank.
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"tensor-parallel rank {rank} is outside [0, {num_ranks})")
    if num_kv_heads % num_ranks == 0:
        count = num_kv_heads // num_ranks
        return Span(rank * count, count)
    if num_ranks % num_kv_heads == 0:
        return Span(rank // (num_ranks // num_kv_heads), 1)
    raise ValueError(
        f"{num_kv_heads} KV heads cannot be divided among {num_ranks} tensor-parallel "
        "ranks; one number must divide the other"
    )


def layers_of_rank(indices: Iterable[int], num_layers: int) -> Span:
    """The range of a rank's attention layers.

    Raises:
        ValueError: they are no range of the model's layers, as with draft layers of
            speculative decoding.
    """
    layers = sorted(indices)
    span = Span(layers[0] if layers else 0, len(layers))
    if not layers or layers != list(range(span.begin, span.end)):
        raise ValueError(f"the engine's attention layers {layers} are no range")
    if span.end > num_layers:
        raise ValueError(
            f"the engine has attention layer {span.end - 1}, the model {num_layers} "
            "layers; draft layers of speculative decoding cannot be loaded"
        )
    return span


def check_descriptor(
    kv: KvDescriptor, engine: EngineShape, tokens: int, prompt_digest: str
) -> None:
    """HandoffError when a cache is not of this model or of another prompt."""
    expected = {
        "layers": (kv.num_layers, engine.num_layers),
        "KV heads": (kv.num_kv_heads, engine.num_kv_heads),
        "head_dim": (kv.head_dim, engine.head_dim),
    }
    for name, (there, here) in expected.items():
        if there != here:
            raise HandoffError(
                f"the cache has {name} {there}, the engine's model {here}: the prefill "
                "server has another model"
            )
    if kv.num_tokens != tokens:
        raise HandoffError(
            f"the cache has {kv.num_tokens} tokens, kv_transfer_params tokens {tokens}"
        )
    if kv.prompt_digest != prompt_digest:
        raise HandoffError("the ticket is of another prompt's cache")


def check_rotary(model: ModelInfo, rope_factor: float) -> None:
    """HandoffError when the server's keys were rotated with another factor."""
    there = model.rope_attention_factor
    if abs(there - rope_factor) > 1e-6 * rope_factor:
        raise HandoffError(
            f"the prefill server multiplies rotary positions by {there:.6g}, vLLM by "
            f"{rope_factor:.6g}; if the model's config.json has attn_factor, start the "
            "server with models[].yarn_attn_factor ignored"
        )


def groups_of_layers(
    engine: EngineShape, tokens: int, bytes_max: int
) -> list[tuple[int, int]]:
    """(begin, count) of the layers of each fetch, none of more than bytes_max.

    Raises:
        HandoffError: one layer alone is larger.
    """
    layer_bytes = tokens * engine.layer_token_bytes
    if layer_bytes > bytes_max:
        raise HandoffError(
            f"a layer of the cache has {layer_bytes} bytes, more than {bytes_max}; "
            "raise kv_connector_extra_config load_bytes_max"
        )
    step = bytes_max // layer_bytes
    layers = engine.layers
    return [
        (begin, min(step, layers.end - begin))
        for begin in range(layers.begin, layers.end, step)
    ]


def blocks_of_tokens(
    blocks: Sequence[int], tokens: Span, block_size: int
) -> tuple[int, ...]:
    """The blocks that hold a range of a request's tokens.

    Args:
        blocks: of the request, from its first token on.
        tokens: the range.
        block_size: tokens of a block.

    Raises:
        ValueError: there are too few blocks.
    """
    first, end = tokens.begin // block_size, -(-tokens.end // block_size)
    if end > len(blocks):
        raise ValueError(f"{end} blocks are needed, and the request has {len(blocks)}")
    return tuple(blocks[first:end])


def slots_of_tokens(blocks: Sequence[int], tokens: Span, block_size: int) -> Array:
    """The place of each token of a range: block * block_size + offset, as int64.

    Args:
        blocks: blocks_of_tokens() of the range.
        tokens: the range.
        block_size: tokens of a block.
    """
    positions = np.arange(tokens.begin, tokens.end, dtype=np.int64)
    place = positions // block_size - tokens.begin // block_size
    slots: Array = np.asarray(blocks, np.int64)[place] * block_size
    return slots + positions % block_size
