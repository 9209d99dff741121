"""Recipe proxy-correlation: does the proxy of the last queries know the important keys?

The proxy of a key is its share of the attention of the last block of queries, as pbs
computes it. Its true mass is its attention from all later segments, without these
queries. Both are compared inside segments, because keys move only there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pbs_client.capture import HeadsOfLayer
from pbs_client.kv import Array
from pbs_client.options import Attention, Pbs
from pbs_client.recipes.base import Inputs, Outcome, Recipe, RecipeError, mean
from pbs_client.recipes.measures import attention_rows, batch_of, rank_correlation

SEGMENT = 256
BLOCK = 128
QUERY_STRIDE = 4  # every fourth query stands for all
DISTANCES = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63))  # in segments


@dataclass(frozen=True)
class HeadFigures:
    """Of one query head; correlations are Spearman's, means over segments."""

    own: float  # with the proxy of this head
    shared: float  # with the mean proxy of the KV head, which pbs uses
    by_distance: dict[str, float]  # of the shared proxy
    top_half: float  # mass in the half of the keys that the shared proxy puts first
    best_half: float  # mass in the half that has most


def proxies(heads: HeadsOfLayer) -> Array:
    """[heads, body]: share of each key in the attention of the last block of queries."""
    tokens = heads.q.shape[1]
    body = tokens // SEGMENT * SEGMENT
    scores = []
    for head, q in enumerate(heads.q):
        k = heads.k[head // heads.group][:body].astype(np.float32)
        logits = q[-BLOCK:].astype(np.float32) @ k.T / np.float32(np.sqrt(q.shape[1]))
        weights = np.exp(logits - logits.max(1, keepdims=True))
        scores.append((weights / weights.sum(1, keepdims=True)).mean(0))
    return np.stack(scores)


def mass_by_segment(q: Array, k: Array) -> Array:
    """[query segments, body]: attention that each key gets from a segment's queries."""
    tokens = len(q)
    segments = tokens // SEGMENT
    mass = np.zeros((segments, segments * SEGMENT))
    for segment in range(1, segments):
        end = min((segment + 1) * SEGMENT, tokens - BLOCK)
        rows = np.arange(segment * SEGMENT, end, QUERY_STRIDE)
        if len(rows):
            seen = attention_rows(q, k[: (segment + 1) * SEGMENT], rows)
            mass[segment, : seen.shape[1]] = seen.sum(0)
    return mass


def _figures(mass: Array, own: Array, shared: Array) -> HeadFigures:
    segments = len(mass)
    found: dict[str, list[float]] = {"own": [], "shared": [], "top": [], "best": []}
    distances: dict[str, list[float]] = {}
    for segment in range(segments - 1):
        keys = slice(segment * SEGMENT, (segment + 1) * SEGMENT)
        later = mass[segment + 1 :, keys].sum(0)
        if later.sum() <= 0:
            continue
        found["own"].append(rank_correlation(own[keys], later))
        found["shared"].append(rank_correlation(shared[keys], later))
        half = np.argsort(-shared[keys], kind="stable")[: SEGMENT // 2]
        found["top"].append(float(later[half].sum() / later.sum()))
        best = np.sort(later)[SEGMENT // 2 :].sum()
        found["best"].append(float(best / later.sum()))
        for low, high in DISTANCES:
            near = mass[segment + low : segment + high + 1, keys].sum(0)
            if near.sum() > 0:
                name = f"{low}" if low == high else f"{low}-{high}"
                correlation = rank_correlation(shared[keys], near)
                distances.setdefault(name, []).append(correlation)
    return HeadFigures(
        mean(found["own"]),
        mean(found["shared"]),
        {name: mean(values) for name, values in distances.items()},
        mean(found["top"]),
        mean(found["best"]),
    )


def run(inputs: Inputs) -> Outcome:
    """Every head of every captured layer."""
    tokens = inputs.capture.num_tokens
    if tokens < 3 * SEGMENT:
        raise RecipeError(
            f"proxy-correlation needs {3 * SEGMENT} tokens; the capture has {tokens}"
        )
    by_layer: dict[str, list[HeadFigures]] = {}
    agreement = []
    for layer, heads in inputs.capture.layers.items():
        inputs.say(f"layer {layer}")
        own = proxies(heads)
        group = heads.group
        shared = own.reshape(-1, group, own.shape[1]).mean(1)
        agreement.append(_order_agreement(inputs, heads, shared))
        by_layer[str(layer)] = [
            _figures(
                mass_by_segment(heads.q[head], heads.k[head // group]),
                own[head],
                shared[head // group],
            )
            for head in range(len(heads.q))
        ]
    names = list(next(iter(by_layer.values()))[0].by_distance)
    rows: list[list[Any]] = []
    for name, found in by_layer.items():
        rows.append([f"layer {name}", *_row(found, names)])
    every = [head for found in by_layer.values() for head in found]
    rows.append(["all", *_row(every, names)])
    return Outcome(
        (
            "heads of",
            "own proxy",
            "shared proxy",
            *(f"distance {name}" for name in names),
            "mass in the first half",
            "in the best half",
        ),
        rows,
        {
            "order_agreement": mean(agreement),
            "by_head": {n: [h.shared for h in found] for n, found in by_layer.items()},
            "distances": names,
        },
        (
            f"The order of the server is that of this proxy for "
            f"{100 * mean(agreement):.2f} % of the slots.",
            f"The shared proxy's rank correlation with the true mass is "
            f"{rows[-1][2]:.2f}; the half that it puts first holds "
            f"{100 * rows[-1][-2]:.0f} % of the mass, the best half "
            f"{100 * rows[-1][-1]:.0f} %.",
        ),
    )


def _row(found: list[HeadFigures], names: list[str]) -> list[float]:
    return [
        mean([h.own for h in found]),
        mean([h.shared for h in found]),
        *(mean([h.by_distance[name] for h in found]) for name in names),
        mean([h.top_half for h in found]),
        mean([h.best_half for h in found]),
    ]


def _order_agreement(inputs: Inputs, heads: HeadsOfLayer, shared: Array) -> float:
    """The share of slots in which the server has the key that the proxy puts there."""
    q, k, v = batch_of(heads)
    attention = Attention(Pbs(segment_size=SEGMENT), dense_fallback=False)
    order = inputs.client.attend(q, k, v, attention, want=("order",)).order
    assert order is not None
    body = shared.shape[1]
    parts = -shared.reshape(len(shared), -1, SEGMENT)
    expected = np.argsort(parts, axis=2, kind="stable")
    expected += np.arange(0, body, SEGMENT)[None, :, None]
    return mean(order[0, :, :body] == expected.reshape(len(shared), body))


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Correlation by layer and head, and by distance."""
    left, right = figure.subplots(1, 2)
    heads = np.array(list(result["by_head"].values()))
    image = left.imshow(heads, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    left.set_yticks(range(len(heads)), list(result["by_head"]))
    left.set(xlabel="query head", ylabel="layer", title="correlation, shared proxy")
    figure.colorbar(image, ax=left)
    names = result["distances"]
    for row in result["rows"]:
        style = "k-" if row[0] == "all" else "o-"
        values = row[3 : 3 + len(names)]
        right.plot(names, values, style, markersize=3, label=row[0])
    right.set(xlabel="distance in segments", title="correlation by distance")
    right.legend(frameon=False, fontsize=7)


RECIPE = Recipe(
    "proxy-correlation",
    "Does the proxy of the last queries rank the keys as their true attention mass does, "
    "by layer, head and distance?",
    ("heads",),
    run,
    draw,
)
