"""Recipe adaptive-segment: does it pay to choose the segment size for each KV head?

A choice takes the cheapest size whose sampled coverage is at most SLACK below that of the
default size. It is made from a few rows of the same prompt, from the first half of it (as
a setting that was chosen earlier), and, as the best possible one, from the rows that
measure the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pbs_client.capture import HeadsOfLayer
from pbs_client.kv import Array
from pbs_client.options import Attention, Pbs
from pbs_client.recipes.base import Inputs, Outcome, Recipe, mean
from pbs_client.recipes.measures import Layers, batch_of
from pbs_client.recipes.segment_size import segments_that_fit

DEFAULT = 256
SAMPLE_ROWS = 16
SLACK = 0.005
THRESHOLD = 0.9


@dataclass(frozen=True)
class Measured:
    """Sizes x heads of one layer; `seconds` is order and selection of each size."""

    cost: Array
    coverage: Array
    error: Array
    seconds: Array


def _sample(inputs: Inputs, heads: HeadsOfLayer, sizes: tuple[int, ...]) -> Measured:
    """What can be known without dense attention."""
    q, k, v = batch_of(heads)
    costs, coverages, seconds = [], [], []
    for size in sizes:
        attention = Attention(
            Pbs(segment_size=size, threshold=THRESHOLD),
            coverage_rows=SAMPLE_ROWS,
            dense_fallback=False,
        )
        stats = inputs.client.attend(q, k, v, attention).stats
        scale = stats.dense_blocks / stats.causal_blocks
        costs.append(np.array(stats.head_density) * scale)
        coverages.append(np.array(stats.head_coverage))
        seconds.append(
            [stats.stages.permute + stats.stages.select, stats.stages.attend]
        )
    cost = np.stack(costs)
    return Measured(cost, np.stack(coverages), np.zeros_like(cost), np.array(seconds))


def _truth(layers: Layers, layer: int, sizes: tuple[int, ...]) -> Measured:
    found = [
        layers.quality(layer, Pbs(segment_size=size, threshold=THRESHOLD))
        for size in sizes
    ]
    return Measured(
        np.stack([q.cost for q in found]),
        np.stack([q.coverage for q in found]),
        np.stack([q.error for q in found]),
        np.zeros((len(sizes), 2)),
    )


def choose(measured: Measured, default: int, group: int) -> Array:
    """[heads]: index of the size for each query head, equal inside a KV head.

    Args:
        measured: what the choice is made from.
        default: index of the default size.
        group: query heads of a KV head, which share a key order.
    """
    cost, coverage = (
        x.reshape(len(x), -1, group).mean(2) for x in (measured.cost, measured.coverage)
    )
    allowed = coverage >= coverage[default] - SLACK
    best = np.where(allowed, cost, np.inf).argmin(0)
    found: Array = np.repeat(best, group)
    return found


def _pick(table: Array, chosen: Array) -> Array:
    found: Array = table[chosen, np.arange(table.shape[1])]
    return found


def run(inputs: Inputs) -> Outcome:
    """Fixed sizes and three ways to choose."""
    layers = Layers(inputs.client, inputs.capture)
    sizes = segments_that_fit(inputs.capture.num_tokens // 2)
    default = sizes.index(DEFAULT) if DEFAULT in sizes else 0
    names = [f"fixed {size}" for size in sizes]
    names += ["chosen by a sample", "chosen on the first half", "best possible"]
    found: dict[str, list[tuple[Array, Array, Array]]] = {name: [] for name in names}
    counts = np.zeros(len(sizes), int)
    spent = saved = 0.0
    for layer in layers:
        inputs.say(f"layer {layer}")
        heads, truth = layers.heads(layer), _truth(layers, layer, sizes)
        half = inputs.capture.num_tokens // 2
        first = HeadsOfLayer(*(x[:, :half] for x in (heads.q, heads.k, heads.v)))
        sample = _sample(inputs, heads, sizes)
        choices = [np.full(len(heads.q), i) for i in range(len(sizes))]
        choices.append(choose(sample, default, heads.group))
        choices.append(choose(_sample(inputs, first, sizes), default, heads.group))
        choices.append(choose(truth, default, heads.group))
        for name, chosen in zip(names, choices):
            found[name].append(
                tuple(  # type: ignore[arg-type]
                    _pick(x, chosen) for x in (truth.cost, truth.coverage, truth.error)
                )
            )
        counts += np.bincount(choices[len(sizes)], minlength=len(sizes))
        extra = np.delete(sample.seconds[:, 0], default).sum()
        gain = 1 - _pick(truth.cost, choices[len(sizes)]).mean() / (
            truth.cost[default].mean()
        )
        spent, saved = spent + extra, saved + gain * sample.seconds[default, 1]
    rows = [
        [name, *(mean(np.concatenate([x[i] for x in found[name]])) for i in range(3))]
        for name in names
    ]
    return _outcome(rows, sizes, default, counts, (float(spent), float(saved)))


def _outcome(
    rows: list[list[Any]],
    sizes: tuple[int, ...],
    default: int,
    counts: Array,
    seconds: tuple[float, float],
) -> Outcome:
    costs = {row[0]: row[1] for row in rows}
    fixed = costs[f"fixed {sizes[default]}"]
    gains = {name: 1 - cost / fixed for name, cost in costs.items()}
    spent, saved = seconds
    earlier = gains["chosen on the first half"]
    return Outcome(
        ("segment", "cost", "coverage", "error"),
        rows,
        {
            "sizes": sizes,
            "default": sizes[default],
            "chosen_by_sample": counts.tolist(),
            "trial_seconds": spent,
            "saved_seconds": saved,
        },
        (
            f"Against a fixed segment of {sizes[default]} a choice by a sample saves "
            f"{100 * gains['chosen by a sample']:.1f} % of the blocks, one made on the "
            f"first half {100 * earlier:.1f} %, the best possible "
            f"{100 * gains['best possible']:.1f} %.",
            f"Trying the other sizes takes {1000 * spent:.0f} ms of ordering and "
            f"selection; the choice saves about {1000 * saved:.0f} ms of attention: at "
            f"this length it {'pays' if saved > spent else 'does NOT pay'} per request.",
        ),
    )


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Cost over error, and the chosen sizes."""
    left, right = figure.subplots(1, 2)
    for row in result["rows"]:
        left.plot(
            row[1], row[3], "o" if row[0].startswith("fixed") else "D", label=row[0]
        )
    left.set(xlabel="cost", ylabel="error")
    left.legend(frameon=False, fontsize=7)
    right.bar([str(size) for size in result["sizes"]], result["chosen_by_sample"])
    right.set(xlabel="segment size", title="heads that chose it, by a sample")


RECIPE = Recipe(
    "adaptive-segment",
    "Does it pay to choose the segment size for each KV head?",
    ("heads",),
    run,
    draw,
)
