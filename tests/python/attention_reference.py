"""Attention in float64 by its definition: no blocks, no tricks."""

from __future__ import annotations

import numpy as np


def attention(q, k, v, allowed=None):
    """One sequence.

    Args:
        q: [heads, q_len, dim]; the last q_len of the k_len positions.
        k: [kv_heads, k_len, dim].
        v: like k.
        allowed: bool [heads, q_len, k_len] besides causality; None allows all.

    Returns:
        (o [heads, q_len, dim], lse [heads, q_len]) in float64.
    """
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    group = len(q) // len(k)
    k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    q_len, k_len = q.shape[1], k.shape[1]
    positions = np.arange(k_len - q_len, k_len)
    seen = np.arange(k_len)[None, :] <= positions[:, None]
    seen = np.broadcast_to(seen, (len(q), q_len, k_len))
    if allowed is not None:
        seen = seen & allowed
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[2])
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(2, initial=-1e30, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(2, keepdims=True)
    return weights @ v / total, (np.log(total) + top)[..., 0]


def allowed_by(mask, order, q_len, k_len, block_size):
    """Which keys a block mask lets each query read, after a key order.

    Args:
        mask: [heads, query blocks, key blocks] of 0 and 1.
        order: [heads, k_len]: the key in each slot; None is the identity.
        q_len: queries; the last of the k_len positions.
        k_len: keys.
        block_size: tokens.

    Returns:
        bool [heads, q_len, k_len].
    """
    heads = len(mask)
    offset = k_len - q_len
    query_block = np.arange(offset, k_len) // block_size - offset // block_size
    slot_block = np.arange(k_len) // block_size
    by_slot = mask[:, query_block][:, :, slot_block].astype(bool)
    if order is None:
        return by_slot
    allowed = np.empty_like(by_slot)
    for head in range(heads):
        allowed[head][:, order[head]] = by_slot[head]
    return allowed
