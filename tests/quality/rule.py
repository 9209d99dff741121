"""The rule that chooses the default setting, as a function over the results.

It was written before the run: "the fastest setting with NLL within 0.5 % of dense on
text, retrieval within one standard error of dense, continuation NLL within 0.5 %. Goal:
density <= .45 at 4K, <= .30 at 8K (stretch .22), and falling with length."

What it leaves open is settled here:

* A setting must hold at every length that was measured, with at least PROMPTS_MIN prompts
  of each kind there.
* "Within 0.5 %": the mean loss is at most 1.005 times that of dense on the same prompts.
* "Within one standard error": the mean score is not lower than that of dense on the same
  prompts by more than the standard error of the prompts' differences.
* "Fastest": the least median ratio to the CPU time of dense, whole prefills, at the
  longest length; of equals the one with fewer blocks.
* Dense always holds. It is the default when nothing that holds is faster.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

LOSS_EXCESS_MAX = 0.005
PROMPTS_MIN = 2
HOPELESS_FACTOR = 3  # times LOSS_EXCESS_MAX: measured no further
DENSITY_GOALS = ((4096, 0.45), (7900, 0.30))  # from this length on, at most
DENSITY_STRETCH = (7900, 0.22)
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean with its standard error (None for fewer than two values)."""

    mean: float
    standard_error: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least one value."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))


@dataclasses.dataclass(frozen=True)
class Cell:
    """What the rule reads of one setting at one length, against dense.

    Attributes:
        text_excess: mean loss of text over that of dense, minus 1, over text prompts.
        continuation_excess: the same of the continuation, decoded dense.
        score_difference: retrieval score minus that of dense, per prompt.
        time_ratio: median ratio to the CPU time of dense.
        density: computed blocks over causal blocks, on text.
    """

    text_excess: Mean
    continuation_excess: Mean
    score_difference: Mean
    time_ratio: float
    density: float


Cells = Mapping[str, Mapping[int, Cell]]  # setting -> length -> cell


@dataclasses.dataclass(frozen=True)
class Choice:
    """The default by the rule; `failed` says of each other setting why it does not hold."""

    setting: str
    failed: dict[str, list[str]]
    goals: dict[str, bool]


def failures(cells: Mapping[int, Cell], lengths: Sequence[int]) -> list[str]:
    """Why a setting does not hold; empty when it does."""
    found = []
    for length in lengths:
        cell = cells.get(length)
        if cell is None:
            found.append(f"{length}: not measured")
            continue
        prompts = min(cell.text_excess.n, cell.score_difference.n)
        if prompts < PROMPTS_MIN:
            found.append(f"{length}: {prompts} prompts, fewer than {PROMPTS_MIN}")
            continue
        for name, excess in (
            ("text", cell.text_excess), ("continuation", cell.continuation_excess)
        ):  # fmt: skip
            if excess.mean > LOSS_EXCESS_MAX:
                found.append(f"{length}: {name} NLL {100 * excess.mean:+.2f} %")
        loss = -cell.score_difference.mean
        allowed = cell.score_difference.standard_error or 0.0
        if loss > allowed and not math.isclose(loss, allowed):
            found.append(f"{length}: retrieval {-loss:+.3f}, standard error {allowed:.3f}")
    return found


def is_hopeless(cells: Mapping[int, Cell]) -> bool:
    """Whether more prompts would hardly make a setting hold: its losses are far out."""
    return any(
        excess.n >= PROMPTS_MIN and excess.mean > HOPELESS_FACTOR * LOSS_EXCESS_MAX
        for cell in cells.values()
        for excess in (cell.text_excess, cell.continuation_excess)
    )


def density_goals(cells: Mapping[int, Cell]) -> dict[str, bool]:
    """Which goals for density a setting reaches; of lengths that were measured only."""
    density = {length: cells[length].density for length in sorted(cells)}
    goals = {}
    for name, goal in [
        *(("goal", goal) for goal in DENSITY_GOALS), ("stretch", DENSITY_STRETCH)
    ]:  # fmt: skip
        length, most = goal
        reached = [value <= most for at, value in density.items() if _is_length(at, length)]
        if reached:
            goals[f"{name}: density <= {most:g} at {length}"] = all(reached)
    values = list(density.values())
    if len(values) > 1:
        falls = all(a > b for a, b in zip(values, values[1:]))
        goals["goal: density falls with length"] = falls
    return goals


def _is_length(measured: int, named: int) -> bool:
    """8K prompts are some 7,900 tokens; others have their length exactly."""
    return abs(measured - named) <= 300


def choose_default(cells: Cells, lengths: Sequence[int]) -> Choice:
    """The rule. `cells` has DENSE at every length; lengths ascend."""
    failed = {
        name: reasons
        for name, own in cells.items()
        if name != DENSE and (reasons := failures(own, lengths))
    }
    longest = lengths[-1]

    def cost(name: str) -> tuple[float, float]:
        cell = cells[name][longest]
        return cell.time_ratio, cell.density

    chosen = min((name for name in cells if name not in failed), key=cost)
    return Choice(chosen, failed, density_goals(cells[chosen]))
