"""Recipe identity: does permuting change nothing where it must not?"""

from __future__ import annotations

from typing import Any

import numpy as np

from pbs_client.attend_options import Given
from pbs_client.options import Attention, Pbs
from pbs_client.recipes.base import Inputs, Outcome, Recipe, mean
from pbs_client.recipes.measures import Layers, Quality, batch_of, relative_error
from pbs_client.recipes.orders import identity_order, random_order

SEGMENT = 256
THRESHOLD = 0.9
EXACT_MAX = 1e-5  # f32: reordered sums of a few thousand terms
SEED = 1


def run(inputs: Inputs) -> Outcome:
    """Checks what must be equal, and measures what the order is worth."""
    layers = Layers(inputs.client, inputs.capture)
    tokens = inputs.capture.num_tokens
    rows: list[list[Any]] = []
    exact: dict[str, list[float]] = {}
    selected: dict[str, list[Quality]] = {}
    for layer in layers:
        inputs.say(f"layer {layer}")
        kv_heads = len(layers.heads(layer).k)
        given = {
            "identity order": Given(identity_order(kv_heads, tokens)),
            "random order": Given(random_order(kv_heads, tokens, SEGMENT, SEED)),
            "sorted by the method": None,
        }
        for name, order in given.items():
            whole = layers.quality(layer, Pbs(segment_size=SEGMENT, threshold=1), order)
            exact.setdefault(name, []).append(float(whole.error.max()))
            some = layers.quality(
                layer, Pbs(segment_size=SEGMENT, threshold=THRESHOLD), order
            )
            selected.setdefault(name, []).append(some)
        exact.setdefault("replay", []).append(_replay_error(inputs, layers, layer))
    for name, found in selected.items():
        rows.append(
            [
                name,
                max(exact[name]),
                mean([q.cost.mean() for q in found]),
                mean([q.coverage.mean() for q in found]),
                mean([q.error.mean() for q in found]),
            ]
        )
    rows.append(["order and blocks replayed", max(exact["replay"]), None, None, None])
    holds = all(row[1] <= EXACT_MAX for row in rows)
    return Outcome(
        ("keys", "error, threshold 1", "cost, .9", "coverage, .9", "error, .9"),
        rows,
        {"exact_max": EXACT_MAX, "holds": holds},
        (
            f"With every block selected, each order gives the output of dense attention "
            f"within {EXACT_MAX:g}: {'yes' if holds else 'NO'}.",
        ),
    )


def _replay_error(inputs: Inputs, layers: Layers, layer: int) -> float:
    """The method's own order and blocks, given back to it, against its first output."""
    q, k, v = batch_of(layers.heads(layer))
    attention = Attention(
        Pbs(segment_size=SEGMENT, threshold=THRESHOLD), dense_fallback=False
    )
    first = inputs.client.attend(q, k, v, attention, want=("o", "order", "lists"))
    again = inputs.client.attend(
        q, k, v, attention, given=Given(first.order, lists=first.lists)
    )
    assert first.o is not None
    assert again.o is not None
    return float(relative_error(again.o[0], first.o[0]).max())


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Cost and error by order."""
    rows = [row for row in result["rows"] if row[2] is not None]
    at = np.arange(len(rows))
    for axis, column, title in zip(
        figure.subplots(1, 2), (2, 4), ("cost, threshold .9", "error, threshold .9")
    ):
        axis.bar(at, [row[column] for row in rows], width=0.6)
        axis.set_xticks(at, [row[0].replace(" ", "\n", 1) for row in rows])
        axis.set_title(title)


RECIPE = Recipe(
    "identity",
    "Does permuting keys change nothing where it must not, and what is the order worth?",
    ("heads",),
    run,
    draw,
)
