"""Layers that show a model's hidden states in its KV cache.

They leave the residual stream as it is, since their output projections are zero. Their
values are rows of the final norm, a slice of its columns in each layer. So the cache
holds, for every token of a prompt, what the output head reads, and a client can compute
the logits of every prompt position. Queries and keys are those of the last real layer.

Weights have the names of transformers' Llama. Needs numpy only.
"""

from __future__ import annotations

import numpy as np

Weights = dict[str, np.ndarray]


def layer_name(layer: int, name: str) -> str:
    """The name of a layer's weight in the folder."""
    return f"model.layers.{layer}.{name}.weight"


def add_exposing_layers(weights: Weights, layers: int) -> int:
    """Appends them behind `layers` real ones; returns how many.

    The values of their heads, one after another, are the columns of the final norm, and
    zeros where the last layer has more.
    """
    last = layers - 1
    width, hidden = weights[layer_name(last, "self_attn.v_proj")].shape
    count = -(-hidden // width)
    columns = np.eye(count * width, hidden, dtype=np.float32)
    for extra in range(count):
        layer = layers + extra
        for name in ("self_attn.q_proj", "self_attn.k_proj"):
            weights[layer_name(layer, name)] = weights[layer_name(last, name)]
        for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            weights[layer_name(layer, name)] = np.zeros_like(weights[layer_name(last, name)])
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[layer_name(layer, name)] = weights["model.norm.weight"]
        own = slice(extra * width, (extra + 1) * width)
        weights[layer_name(layer, "self_attn.v_proj")] = columns[own]
    return count
