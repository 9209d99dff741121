"""Recipe ttft: time to first token over the length of the prompt.

Times are the least of the rounds: what else the machine does can only add to them.
"""

from __future__ import annotations

import statistics
from typing import Any

from pbs_client.options import Attention, Dense, MeanPooling, Pbs
from pbs_client.recipes.base import Inputs, Outcome, Recipe

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
DEFAULT = "the server's default"
SETTINGS: dict[str, Attention | None] = {
    "dense": Attention(Dense()),
    "mean_pooling": Attention(MeanPooling(), dense_fallback=False),
    "pbs": Attention(Pbs(), dense_fallback=False),
    "pbs with fallback": Attention(Pbs(), dense_fallback=True),
    DEFAULT: None,
}


def run(inputs: Inputs) -> Outcome:
    """All settings in turn, round after round, after one round that is not counted."""
    lengths = [n for n in LENGTHS if n < len(inputs.tokens)] + [len(inputs.tokens)]
    rows: list[list[Any]] = []
    for length in lengths:
        inputs.say(f"{length} tokens")
        seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
        density: dict[str, float] = {}
        for turn in range(inputs.rounds + 1):
            for name, attention in SETTINGS.items():
                stats = inputs.client.prefill(
                    inputs.served_model, inputs.tokens[:length], attention
                ).stats
                density[name] = stats.density
                if turn > 0:
                    seconds[name].append(stats.total_seconds)
        for name, times in seconds.items():
            rows.append(
                [
                    length,
                    name,
                    min(times),
                    statistics.median(times),
                    max(times),
                    min(seconds["dense"]) / min(times),
                    density[name],
                ]
            )
    longest = {row[1]: row[5] for row in rows if row[0] == lengths[-1]}
    return Outcome(
        ("tokens", "setting", "seconds", "median", "most", "dense / it", "density"),
        rows,
        {"rounds": inputs.rounds},
        (
            f"At {lengths[-1]} tokens pbs takes dense's time divided by "
            f"{longest['pbs']:.2f}, mean_pooling by {longest['mean_pooling']:.2f}, the "
            f"server's default by {longest[DEFAULT]:.2f}.",
        ),
    )


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Time and its ratio to dense over the length."""
    left, right = figure.subplots(1, 2)
    for name in SETTINGS:
        rows = [row for row in result["rows"] if row[1] == name]
        lengths = [row[0] for row in rows]
        left.plot(lengths, [row[2] for row in rows], "o-", markersize=3, label=name)
        right.plot(lengths, [row[5] for row in rows], "o-", markersize=3, label=name)
    left.set(
        xscale="log", yscale="log", xlabel="tokens", title="seconds to first token"
    )
    right.set(xscale="log", xlabel="tokens", title="dense / setting")
    right.legend(frameon=False, fontsize=7)


RECIPE = Recipe(
    "ttft",
    "How does the time to first token depend on the length of the prompt?",
    ("model", "tokens"),
    run,
    draw,
)
