"""Recipe segment-size: what do larger segments give, and what do they cost?"""

from __future__ import annotations

from typing import Any

import numpy as np

from pbs_client.options import MeanPooling, Pbs
from pbs_client.recipes.base import Inputs, Outcome, Recipe, mean
from pbs_client.recipes.measures import Layers, Quality

SEGMENTS = (128, 256, 512, 1024)
THRESHOLD = 0.9
BLOCK = 128


def segments_that_fit(tokens: int) -> tuple[int, ...]:
    """Those of which the prompt has at least two."""
    return tuple(size for size in SEGMENTS if 2 * size <= tokens) or SEGMENTS[:1]


def elbow(sizes: tuple[int, ...], costs: list[float]) -> int:
    """The size that lies furthest below the chord of the curve over log2(size)."""
    if len(sizes) < 3:
        return sizes[int(np.argmin(costs))]
    x = np.log2(sizes)
    chord = np.interp(x, x[[0, -1]], [costs[0], costs[-1]])
    return sizes[int(np.argmax(chord - np.asarray(costs)))]


def run(inputs: Inputs) -> Outcome:
    """One threshold over segment sizes, beside the same selection of unsorted keys."""
    layers = Layers(inputs.client, inputs.capture)
    sizes = segments_that_fit(inputs.capture.num_tokens)
    found: dict[str, list[Quality]] = {"unsorted (mean_pooling)": []}
    found.update({f"{size}": [] for size in sizes})
    for layer in layers:
        inputs.say(f"layer {layer}")
        plain = layers.quality(
            layer, MeanPooling(threshold=THRESHOLD, block_size=BLOCK)
        )
        found["unsorted (mean_pooling)"].append(plain)
        for size in sizes:
            method = Pbs(segment_size=size, threshold=THRESHOLD, block_size=BLOCK)
            found[f"{size}"].append(layers.quality(layer, method))
    rows: list[list[Any]] = []
    for name, qualities in found.items():
        cost = np.concatenate([q.cost for q in qualities])
        rows.append(
            [
                name,
                mean(cost),
                float(cost.min()),
                float(cost.max()),
                mean(np.concatenate([q.coverage for q in qualities])),
                mean(np.concatenate([q.error for q in qualities])),
            ]
        )
    costs = [row[1] for row in rows[1:]]
    best, bend = sizes[int(np.argmin(costs))], elbow(sizes, costs)
    better = costs[sizes.index(best)] < rows[0][1]
    by_layer = {
        str(layer): [mean(found[f"{size}"][i].cost) for size in sizes]
        for i, layer in enumerate(layers)
    }
    return Outcome(
        ("segment", "cost", "least head", "most head", "coverage", "error"),
        rows,
        {"sizes": sizes, "cheapest": best, "elbow": bend, "cost_by_layer": by_layer},
        (
            f"The cheapest segment size is {best}; the elbow is at {bend}.",
            f"Sorting {'computes fewer' if better else 'does NOT compute fewer'} blocks "
            f"than the same threshold on unsorted keys ({costs[sizes.index(best)]:.3f} "
            f"against {rows[0][1]:.3f} of the causal blocks).",
        ),
    )


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Cost and error over the segment size, cost by layer."""
    rows, sizes = result["rows"], result["sizes"]
    left, right = figure.subplots(1, 2)
    left.plot(sizes, [row[1] for row in rows[1:]], "o-", label="cost")
    left.plot(sizes, [row[4] for row in rows[1:]], "s-", label="coverage")
    left.plot(sizes, [row[5] for row in rows[1:]], "^-", label="error")
    left.axhline(rows[0][1], color="gray", linestyle=":", label="cost, unsorted")
    left.axvline(result["elbow"], color="lightgray")
    for layer, costs in result["cost_by_layer"].items():
        right.plot(sizes, costs, "o-", markersize=3, label=f"layer {layer}")
    right.set_title("cost by layer")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, sizes)
        axis.set_xlabel("segment size")
        axis.legend(frameon=False, fontsize=7)


RECIPE = Recipe(
    "segment-size",
    "How do cost and quality depend on the segment size, and where is the elbow?",
    ("heads",),
    run,
    draw,
)
