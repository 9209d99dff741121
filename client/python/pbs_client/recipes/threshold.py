"""Recipe threshold: which method is on the Pareto front of cost and quality?"""

from __future__ import annotations

from typing import Any

import numpy as np

from pbs_client.options import MeanPooling, Method, Pbs, XAttention
from pbs_client.recipes.base import Inputs, Outcome, Recipe, mean
from pbs_client.recipes.measures import Layers

THRESHOLDS = (0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99)


def methods(threshold: float) -> dict[str, Method]:
    """The compared methods at one threshold."""
    return {
        "pbs": Pbs(threshold=threshold),
        "pbs, query_head": Pbs(threshold=threshold, scope="query_head"),
        "mean_pooling": MeanPooling(threshold=threshold),
        "xattention": XAttention(threshold=threshold),
    }


def run(inputs: Inputs) -> Outcome:
    """Every method at every threshold."""
    layers = Layers(inputs.client, inputs.capture)
    found: dict[tuple[str, float], list[Any]] = {}
    for layer in layers:
        inputs.say(f"layer {layer}")
        for threshold in THRESHOLDS:
            for name, method in methods(threshold).items():
                quality = layers.quality(layer, method)
                found.setdefault((name, threshold), []).append(quality)
    rows: list[list[Any]] = []
    for name in methods(THRESHOLDS[0]):
        for threshold in THRESHOLDS:
            of = found[name, threshold]
            cost, coverage, error = (
                mean(np.concatenate([getattr(q, what) for q in of]))
                for what in ("cost", "coverage", "error")
            )
            rows.append([name, threshold, cost, coverage, error])
    front = pareto(rows)
    for index, row in enumerate(rows):
        row.append("yes" if index in front else "no")
    shares = {
        name: sum(rows[i][0] == name for i in front) for name in methods(THRESHOLDS[0])
    }
    said = ", ".join(f"{name} {count}" for name, count in shares.items())
    return Outcome(
        ("method", "threshold", "cost", "coverage", "error", "on the front"),
        rows,
        {"front": shares},
        (f"Points on the front of cost and error: {said}.",),
    )


def pareto(rows: list[list[Any]]) -> set[int]:
    """Rows of which no other has both less cost and less error."""
    return {
        i
        for i, row in enumerate(rows)
        if not any(
            other[2] <= row[2] and other[4] <= row[4] and other is not row
            for other in rows
        )
    }


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Coverage and error over cost."""
    lines: dict[str, list[list[Any]]] = {}
    for row in result["rows"]:
        lines.setdefault(row[0], []).append(row)
    axes = figure.subplots(1, 2)
    for axis, column, title in zip(axes, (3, 4), ("coverage", "error")):
        for name, points in lines.items():
            axis.plot(
                [p[2] for p in points], [p[column] for p in points], "o-",
                markersize=3, label=name,
            )  # fmt: skip
        axis.set(xlabel="cost (share of the causal blocks)", title=title)
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=7)


RECIPE = Recipe(
    "threshold",
    "What do thresholds from .7 to .99 cost, and which method is on the Pareto front?",
    ("heads",),
    run,
    draw,
)
