"""Recipe block-maps: the selected blocks before and after permutation, as pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from pbs_client.attend_options import Given
from pbs_client.kv import Array
from pbs_client.options import Attention, Pbs
from pbs_client.recipes.base import Inputs, Outcome, Recipe, mean
from pbs_client.recipes.measures import COVERAGE_ROWS, batch_of
from pbs_client.recipes.orders import identity_order

METHOD = Pbs(segment_size=256, threshold=0.9)
BLOCKS_MAX = 128  # of a picture, per side


def _maps(inputs: Inputs, layer: int, given: Given | None) -> tuple[Array, Any]:
    """[heads, query blocks, key blocks], and the statistics."""
    q, k, v = batch_of(inputs.capture.layers[layer])
    attention = Attention(METHOD, coverage_rows=COVERAGE_ROWS, dense_fallback=False)
    result = inputs.client.attend(q, k, v, attention, given=given, want=("block_mask",))
    assert isinstance(result.block_mask, np.ndarray)
    return result.block_mask[0], result.stats


def run(inputs: Inputs) -> Outcome:
    """The heads with the largest, the median and the smallest gain."""
    tokens = inputs.capture.num_tokens
    found: list[dict[str, Any]] = []
    for layer, heads in inputs.capture.layers.items():
        inputs.say(f"layer {layer}")
        given = Given(identity_order(len(heads.k), tokens))
        before, unsorted = _maps(inputs, layer, given)
        after, ordered = _maps(inputs, layer, None)
        scale = ordered.dense_blocks / ordered.causal_blocks
        for head in range(len(heads.q)):
            found.append(
                {
                    "layer": layer,
                    "head": head,
                    "cost_before": unsorted.head_density[head] * scale,
                    "cost_after": ordered.head_density[head] * scale,
                    "coverage_before": unsorted.head_coverage[head],
                    "coverage_after": ordered.head_coverage[head],
                    "before": before[head],
                    "after": after[head],
                }
            )
    gains = np.array([f["cost_before"] - f["cost_after"] for f in found])
    rank = np.argsort(-gains, kind="stable")
    chosen = {"largest gain": rank[0], "median": rank[len(rank) // 2],
              "smallest gain": rank[-1]}  # fmt: skip
    rows: list[list[Any]] = []
    maps = []
    for name, index in chosen.items():
        head = found[index]
        label = f"{name}: layer {head['layer']}, head {head['head']}"
        figures = ("cost_before", "cost_after", "coverage_before", "coverage_after")
        rows.append([label, *(float(head[figure]) for figure in figures)])
        maps.append(
            {"label": label, **{w: _rows(head[w]) for w in ("before", "after")}}
        )
    worse = float(np.mean(gains < 0))
    return Outcome(
        ("head", "cost before", "after", "coverage before", "after"),
        rows,
        {"maps": maps, "gain_mean": mean(gains), "heads_that_lose": worse},
        (
            f"Over {len(found)} heads sorting saves {gains.mean():+.3f} of the causal "
            f"blocks on average; {100 * worse:.0f} % of the heads compute more.",
        ),
    )


def _rows(mask: Array) -> list[str]:
    """A map as one string of 0 and 1 per query block."""
    step = -(-max(mask.shape) // BLOCKS_MAX)
    return ["".join(map(str, row)) for row in mask[::step, ::step]]


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Two pictures of each head."""
    maps = result["maps"]
    axes = figure.subplots(2, len(maps))
    for column, head in enumerate(maps):
        costs = dict(zip(("before", "after"), result["rows"][column][1:3]))
        for row, when in enumerate(("before", "after")):
            axis = axes[row][column]
            image = [[int(digit) for digit in line] for line in head[when]]
            axis.imshow(image, cmap="Blues", vmin=0, vmax=1, interpolation="none")
            title = f"{when}: {100 * costs[when]:.0f} % of the causal blocks"
            axis.set_title(
                f"{head['label']}\n{title}" if row == 0 else title, fontsize=7
            )
            axis.tick_params(labelsize=6)


RECIPE = Recipe(
    "block-maps",
    "Which blocks are selected before and after permutation?",
    ("heads",),
    run,
    draw,
)
