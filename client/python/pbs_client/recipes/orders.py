"""Key orders that the recipes give to the server."""

from __future__ import annotations

import numpy as np

from pbs_client.kv import Array


def identity_order(num_heads: int, tokens: int) -> Array:
    """Keys in their places: int32 [1, heads, tokens]."""
    order = np.arange(tokens, dtype=np.int32)
    return np.ascontiguousarray(np.broadcast_to(order, (1, num_heads, tokens)))


def random_order(num_heads: int, tokens: int, segment_size: int, seed: int) -> Array:
    """Keys in random order inside each whole segment: int32 [1, heads, tokens]."""
    rng = np.random.default_rng(seed)
    order = identity_order(num_heads, tokens)
    body = tokens // segment_size * segment_size
    shape = (num_heads, body // segment_size, segment_size)
    order[0, :, :body] = rng.permuted(
        order[0, :, :body].reshape(shape), axis=2
    ).reshape(num_heads, body)
    return order
