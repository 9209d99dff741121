"""Measures of attention on captured heads: against dense, and of single heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pbs_client.attend_options import Given
from pbs_client.capture import Capture, HeadsOfLayer
from pbs_client.client import Client
from pbs_client.kv import Array
from pbs_client.options import Attention, Dense, Method

COVERAGE_ROWS = 256


@dataclass(frozen=True)
class Quality:
    """Attention of one layer beside dense attention; arrays are [heads].

    Attributes:
        cost: computed blocks, as a share of the blocks on or below the diagonal.
        coverage: attention mass that the computed blocks keep, over sampled rows.
        error: norm of the difference of the outputs over the norm of dense's.
    """

    cost: Array
    coverage: Array
    error: Array


class Layers:
    """The layers of a capture with their dense outputs, which are computed once."""

    def __init__(self, client: Client, capture: Capture) -> None:
        self._client = client
        self._heads = capture.layers
        self._dense: dict[int, Array] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(self._heads)

    def heads(self, layer: int) -> HeadsOfLayer:
        """The captured heads."""
        return self._heads[layer]

    def dense(self, layer: int) -> Array:
        """Dense output, f32 [heads, tokens, head_dim]."""
        if layer not in self._dense:
            q, k, v = batch_of(self._heads[layer])
            self._dense[layer] = self._client.attend(q, k, v, Dense()).o[0]
        return self._dense[layer]

    def quality(
        self,
        layer: int,
        method: Method,
        given: Given | None = None,
        rows: int = COVERAGE_ROWS,
    ) -> Quality:
        """Runs a method on a layer."""
        q, k, v = batch_of(self._heads[layer])
        attention = Attention(method, coverage_rows=rows, dense_fallback=False)
        result = self._client.attend(q, k, v, attention, given=given)
        stats = result.stats
        scale = stats.dense_blocks / stats.causal_blocks
        return Quality(
            cost=np.array(stats.head_density) * scale,
            coverage=np.array(stats.head_coverage),
            error=relative_error(result.o[0], self.dense(layer)),
        )


def batch_of(heads: HeadsOfLayer) -> tuple[Array, Array, Array]:
    """A layer as a batch of one, f32: errors are then those of the selection."""
    q, k, v = (x[np.newaxis].astype(np.float32) for x in (heads.q, heads.k, heads.v))
    return q, k, v


def relative_error(actual: Array, expected: Array) -> Array:
    """[heads]: norm of the difference over the norm of what is expected."""
    difference = np.linalg.norm(actual - expected, axis=(1, 2))
    found: Array = difference / np.linalg.norm(expected, axis=(1, 2))
    return found


def attention_rows(q: Array, k: Array, rows: Array) -> Array:
    """Causal attention of query rows of one head: f32 [rows, tokens]; rows sum to 1.

    Args:
        q: [tokens, head_dim].
        k: [tokens, head_dim].
        rows: indices of the queries.
    """
    logits = q[rows].astype(np.float32) @ k.astype(np.float32).T
    logits /= np.float32(np.sqrt(q.shape[1]))
    logits[np.arange(len(k))[None, :] > rows[:, None]] = -np.inf
    logits -= logits.max(1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(1, keepdims=True)
    return logits


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's correlation of two vectors; 0 when one of them is constant."""
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable") for x in (a, b)]
    centred = [r - r.mean() for r in ranks]
    norm = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / norm) if norm > 0 else 0.0
