"""Recipe cost-share: which share of the time goes to ordering and selection?

Times are the least of the rounds: what else the machine does can only add to them.
"""

from __future__ import annotations

from typing import Any

from pbs_client.attend_options import Timing
from pbs_client.capture import HeadsOfLayer
from pbs_client.options import Attention, Dense, Method, Pbs
from pbs_client.recipes.base import Inputs, Outcome, Recipe
from pbs_client.recipes.measures import batch_of

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
STAGES = ("permute_seconds", "select_seconds", "attend_seconds")


def _seconds(inputs: Inputs, heads: HeadsOfLayer, method: Method) -> list[float]:
    """Order, selection and attention of one layer."""
    q, k, v = batch_of(heads)
    attention = Attention(method, dense_fallback=False)
    stats = inputs.client.attend(
        q, k, v, attention, timing=Timing(1, inputs.rounds)
    ).stats
    return [min(getattr(run, stage) for run in stats.iterations) for stage in STAGES]


def run(inputs: Inputs) -> Outcome:
    """All captured layers, their beginnings of several lengths."""
    tokens = inputs.capture.num_tokens
    rows: list[list[Any]] = []
    for length in [n for n in LENGTHS if n < tokens] + [tokens]:
        inputs.say(f"{length} tokens")
        order = select = attend = dense = 0.0
        for heads in inputs.capture.layers.values():
            cut = HeadsOfLayer(*(x[:, :length] for x in (heads.q, heads.k, heads.v)))
            own = _seconds(inputs, cut, Pbs())
            order, select, attend = order + own[0], select + own[1], attend + own[2]
            dense += _seconds(inputs, cut, Dense())[2]
        whole = order + select + attend
        milliseconds = [1000 * x for x in (order, select, attend, dense)]
        rows.append(
            [length, *milliseconds, order / whole, select / whole, dense / whole]
        )
    last = rows[-1]
    return Outcome(
        (
            "tokens",
            "order, ms",
            "selection, ms",
            "attention, ms",
            "dense, ms",
            "share of order",
            "share of selection",
            "dense / pbs",
        ),
        rows,
        {"layers": list(inputs.capture.layers), "rounds": inputs.rounds},
        (
            f"At {last[0]} tokens ordering takes {100 * last[5]:.0f} % and selection "
            f"{100 * last[6]:.0f} % of the time of pbs attention; dense takes "
            f"{last[7]:.2f} of that time.",
        ),
    )


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Shares of the time over the length."""
    rows = result["rows"]
    axis = figure.subplots()
    names = [str(row[0]) for row in rows]
    bottom = [0.0] * len(rows)
    for column, name in ((1, "order"), (2, "selection"), (3, "attention")):
        shares = [row[column] / row[4] for row in rows]
        axis.bar(names, shares, bottom=bottom, width=0.6, label=name)
        bottom = [b + s for b, s in zip(bottom, shares)]
    axis.axhline(1, color="gray", linestyle=":")
    axis.set(xlabel="tokens", title="time, in units of dense attention")
    axis.legend(frameon=False)


RECIPE = Recipe(
    "cost-share",
    "Which share of the time of attention goes to ordering and selection?",
    ("heads",),
    run,
    draw,
)
