"""Calibration: a threshold for every query head, from a user's own prompts.

A head's curve says how much attention mass it loses at which density. allocate() gives
each head a point of its curve, so that all heads together have the least mean density
whose mean lost mass keeps a budget. Calibrator measures the curves with a server, and
then the outcome on prompts that the choice has not seen. to_message() is the file that
pbs-prefilld takes with --profile.

Threading: one caller at a time. Memory: a few numbers per head, threshold and prompt.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbs_client import _messages
from pbs_client.client import Client
from pbs_client.options import Attention, method_of
from pbs_client.prefill_options import Logits
from pbs_client.results import ModelInfo, PrefillStats

Array = np.ndarray[Any, np.dtype[Any]]

DENSE_THRESHOLD = 1.0  # reads every block: density 1, nothing lost
THRESHOLDS_DEFAULT = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
COVERAGE_ROWS_DEFAULT = 64
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PAPER = "paper"  # built into the server


@dataclass(frozen=True)
class HeadCurves:
    """Density and lost attention mass of query heads by threshold.

    Attributes:
        thresholds: [points], rising, in (0, 1). Threshold 1 is known without measuring.
        density: [points, heads], share of the blocks that was executed, 0 .. 1.
        lost_mass: [points, heads], share of the attention mass that was lost, 0 .. 1.
    """

    thresholds: tuple[float, ...]
    density: Array
    lost_mass: Array


@dataclass(frozen=True)
class Allocation:
    """A threshold for every head, and what the curves promise of it.

    Attributes:
        thresholds: [heads], each of the curves' thresholds or 1.
        density: mean over the heads, 0 .. 1.
        lost_mass: mean over the heads, 0 .. 1.
    """

    thresholds: tuple[float, ...]
    density: float
    lost_mass: float


@dataclass(frozen=True)
class Check:
    """Measurements of an allocation on prompts that it was not made from.

    Attributes:
        prompts: their number.
        density: mean over prompts, layers and heads.
        lost_mass: the same mean.
        kl: mean Kullback-Leibler divergence of the last token's distribution from that
            of dense attention, in nats.
    """

    prompts: int
    density: float
    lost_mass: float
    kl: float


def allocate(curves: HeadCurves, budget: float) -> Allocation:
    """The thresholds of least mean density whose mean lost mass is at most `budget`.

    Each head starts at the least dense point of the lower convex hull of its curve. Then
    the steps along the hulls are taken that save the most mass for their density, steps
    that save equally much together, until the budget is kept. The last step may save
    more than was needed; so best_uniform() is taken where it costs less.

    Args:
        curves: of the heads.
        budget: mean share of the attention mass that may be lost, 0 .. 1.

    Raises:
        ValueError: budget is outside [0, 1].
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"budget {budget} is outside [0, 1]")
    thresholds = np.append(curves.thresholds, DENSE_THRESHOLD)
    heads = curves.density.shape[1]
    density = np.vstack([curves.density, np.ones(heads)])
    lost = np.vstack([np.clip(curves.lost_mass, 0, 1), np.zeros(heads)])
    hulls = [_hull(thresholds, density[:, h], lost[:, h]) for h in range(heads)]
    chosen = np.array([hull[0] for hull in hulls])
    steps = sorted(
        (
            (-_saving(density[:, head], lost[:, head], before, after), head, after)
            for head, hull in enumerate(hulls)
            for before, after in zip(hull, hull[1:])
        ),
        key=lambda step: step[0],
    )
    taken = 0
    every = np.arange(heads)
    while lost[chosen, every].mean() > budget:
        saving = steps[taken][0]
        while taken < len(steps) and steps[taken][0] == saving:
            _, head, after = steps[taken]
            chosen[head] = after
            taken += 1
    greedy = Allocation(
        tuple(float(threshold) for threshold in thresholds[chosen]),
        float(density[chosen, every].mean()),
        float(lost[chosen, every].mean()),
    )
    uniform = best_uniform(curves, budget)
    return uniform if uniform.density < greedy.density else greedy


def _hull(thresholds: Array, density: Array, lost: Array) -> list[int]:
    """Points of the lower convex hull: density rises, lost mass falls ever slower.

    Of equal points the one with the highest threshold is taken.
    """
    hull: list[int] = []
    for point in np.lexsort((-thresholds, lost, density)):
        if hull and lost[point] >= lost[hull[-1]]:
            continue
        while len(hull) > 1 and (
            _saving(density, lost, hull[-2], hull[-1])
            <= _saving(density, lost, hull[-1], point)
        ):
            hull.pop()
        hull.append(int(point))
    return hull


def _saving(density: Array, lost: Array, before: int, after: int) -> float:
    """Lost mass that a step saves, over the density that it costs."""
    return float((lost[before] - lost[after]) / (density[after] - density[before]))


def divergence(reference: Array, logits: Array) -> float:
    """Kullback-Leibler divergence of two distributions, from their logits, in nats."""
    p, q = _log_probabilities(reference), _log_probabilities(logits)
    return float(np.sum(np.exp(p) * (p - q)))


def _log_probabilities(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


class Calibrator:
    """Measures heads of one model with a server.

    Attributes:
        model: the model.
        num_heads: query heads of all layers.
    """

    def __init__(
        self,
        client: Client,
        model: ModelInfo,
        attention: Attention,
        *,
        coverage_rows: int = COVERAGE_ROWS_DEFAULT,
        timeout: float | None = None,
        on_measured: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Prepares the measurements, without network traffic.

        Args:
            client: of the server.
            model: of the server.
            attention: the method, which has a threshold that is None, and its options.
            coverage_rows: query rows of each head and prompt whose coverage is measured,
                1 .. 1024; more are slower and more exact.
            timeout: seconds for each prefill; None means no limit.
            on_measured: called after each prefill with a dict of its figures.

        Raises:
            ValueError: the method has no threshold or sets it, or coverage_rows is out
                of range.
        """
        method = method_of(attention.method)
        if method is None or not hasattr(method, "threshold"):
            name = "none" if method is None else method.name
            raise ValueError(f"method {name} has no threshold to calibrate")
        if method.threshold is not None:
            raise ValueError(f"threshold {method.threshold} is what calibration chooses")
        if not 1 <= coverage_rows <= 1024:
            raise ValueError(f"coverage_rows {coverage_rows} is outside [1, 1024]")
        self.model = model
        self.num_heads = model.num_layers * model.num_heads
        self._client, self._timeout = client, timeout
        self._attention, self._method = attention, method
        # Heads are measured as they are, not as a fallback makes them.
        self._measuring = dataclasses.replace(
            attention, dense_fallback=False, coverage_rows=coverage_rows
        )
        self._on_measured = on_measured or (lambda figures: None)

    def curves(
        self, prompts: Sequence[Sequence[int]], thresholds: Sequence[float]
    ) -> HeadCurves:
        """Measures every prompt at every threshold; curves are means over the prompts.

        Args:
            prompts: token ids, at least one prompt.
            thresholds: rising, in (0, 1), at least one.

        Raises:
            ValueError: no prompts, thresholds that do not rise inside (0, 1), or a
                prompt so short that the method runs dense.
        """
        _check_thresholds(thresholds)
        if not prompts:
            raise ValueError("there are no prompts to calibrate with")
        shape = (len(thresholds), self.num_heads)
        density, lost = np.zeros(shape), np.zeros(shape)
        for number, tokens in enumerate(prompts):
            for point, threshold in enumerate(thresholds):
                method = dataclasses.replace(self._method, threshold=threshold)  # type: ignore[type-var]
                stats = self._measure(tokens, method=method).stats
                if all(ran == "dense" for ran in stats.layer_method):
                    raise ValueError(
                        f"prompt {number + 1} of {len(tokens)} tokens is too short: "
                        f"{self._method.name} runs dense on it"
                    )
                of_heads = _of_heads(stats)
                density[point] += of_heads[0] / len(prompts)
                lost[point] += of_heads[1] / len(prompts)
                self._report("curve", number, stats, threshold=threshold)
        return HeadCurves(tuple(thresholds), density, lost)

    def check(self, prompts: Sequence[Sequence[int]], thresholds: Sequence[float]) -> Check:
        """Measures prompts with a threshold for every head, beside dense attention.

        Args:
            prompts: token ids, at least one prompt.
            thresholds: [num_heads], of all layers in order.
        """
        rows = self.by_layer(thresholds)
        density, lost, kl = [], [], []
        for number, tokens in enumerate(prompts):
            dense = self._prefill(tokens, Attention("dense"))
            sparse = self._measure(tokens, head_thresholds=rows)
            of_heads = _of_heads(sparse.stats)
            density.append(of_heads[0].mean())
            lost.append(of_heads[1].mean())
            kl.append(divergence(dense.last_token_logits, sparse.last_token_logits))
            self._report("check", number, sparse.stats, kl=kl[-1])
        means = (float(np.mean(values)) for values in (density, lost, kl))
        return Check(len(prompts), *means)

    def by_layer(self, thresholds: Sequence[float]) -> list[list[float]]:
        """The thresholds as [num_layers][num_heads]."""
        shape = (self.model.num_layers, self.model.num_heads)
        rows: list[list[float]] = np.reshape(thresholds, shape).tolist()
        return rows

    def to_message(
        self, name: str, allocation: Allocation, calibration: dict[str, Any]
    ) -> Any:
        """The Profile message.

        Args:
            name: of the profile.
            allocation: of the heads.
            calibration: fields of the message Calibration.

        Raises:
            ValueError: name is not 1 to 64 of [A-Za-z0-9._-], or is built in.
        """
        check_name(name)
        profile = _messages.Profile(
            name=name,
            model_digest=self.model.model_digest,
            attention=self._attention.to_message(),
            calibration=calibration,
        )
        for row in self.by_layer(allocation.thresholds):
            profile.layers.add().thresholds.extend(row)
        return profile

    def _measure(self, tokens: Sequence[int], **changes: Any) -> Any:
        return self._prefill(tokens, dataclasses.replace(self._measuring, **changes))

    def _prefill(self, tokens: Sequence[int], attention: Attention) -> Any:
        return self._client.prefill(
            self.model.name,
            tokens,
            attention,
            logits=Logits(all_of_last_token=True),
            timeout=self._timeout,
        )

    def _report(
        self, step: str, number: int, stats: PrefillStats, **more: float
    ) -> None:
        density, lost = _of_heads(stats)
        self._on_measured(
            {
                "step": step,
                "prompt": number + 1,
                "prompt_tokens": stats.prompt_tokens,
                **more,
                "density": float(density.mean()),
                "lost_mass": float(lost.mean()),
                "seconds": stats.total_seconds,
            }
        )


def best_uniform(curves: HeadCurves, budget: float) -> Allocation:
    """The one threshold for all heads of least mean density that keeps the budget."""
    heads = curves.density.shape[1]
    best = Allocation((DENSE_THRESHOLD,) * heads, 1.0, 0.0)
    for threshold, density, lost in zip(
        curves.thresholds, curves.density, np.clip(curves.lost_mass, 0, 1)
    ):
        if lost.mean() <= budget and density.mean() < best.density:
            same = (threshold,) * heads
            best = Allocation(same, float(density.mean()), float(lost.mean()))
    return best


def check_name(name: str) -> None:
    """ValueError unless a profile may have this name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"profile name {name!r} is not 1 to 64 of [A-Za-z0-9._-]")
    if name == _PAPER:
        raise ValueError(f"profile name {name!r} is built into the server")


def _check_thresholds(thresholds: Sequence[float]) -> None:
    rise = all(a < b for a, b in zip(thresholds, thresholds[1:]))
    if not thresholds or not rise or not 0 < thresholds[0] or not thresholds[-1] < 1:
        text = ", ".join(map(str, thresholds)) or "none"
        raise ValueError(f"thresholds {text} do not rise inside (0, 1)")


def _of_heads(stats: PrefillStats) -> tuple[Array, Array]:
    """Density and lost mass of the query heads of all layers, [num_heads] each."""
    density = np.concatenate([layer.density for layer in stats.layer_heads])
    coverage = np.concatenate([layer.coverage for layer in stats.layer_heads])
    return density, np.clip(1 - coverage, 0, 1)
