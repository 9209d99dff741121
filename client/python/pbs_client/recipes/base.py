"""What a recipe is: a question, what it needs, and a function that answers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pbs_client.capture import Capture
from pbs_client.client import Client
from pbs_client.kv import Array
from pbs_client.recipes.tasks import Task


class RecipeError(ValueError):
    """The recipe is unknown, or it lacks something that it needs."""


@dataclass(frozen=True)
class Inputs:
    """What a recipe works on.

    Attributes:
        client: of the server that runs the experiments.
        heads: captured heads; None unless the recipe needs them.
        model: name of a served model; None unless needed.
        tokens: a prompt for the model; empty unless needed.
        tasks: prompts with known answers; empty unless needed.
        rounds: repetitions of what is timed.
        say: takes a line of progress.
    """

    client: Client
    heads: Capture | None = None
    model: str | None = None
    tokens: Sequence[int] = ()
    tasks: Sequence[Task] = ()
    rounds: int = 3
    say: Callable[[str], None] = lambda line: None

    @property
    def capture(self) -> Capture:
        """The captured heads of a recipe that needs them."""
        assert self.heads is not None
        return self.heads

    @property
    def served_model(self) -> str:
        """The model of a recipe that needs one."""
        assert self.model is not None
        return self.model


Cell = Any  # str, int, float or None


@dataclass(frozen=True)
class Outcome:
    """The answer of a recipe.

    Attributes:
        columns: heads of the table.
        rows: the table, one list per row.
        figures: what else was measured, as JSON; plots are drawn from it.
        found: sentences that follow from the figures.
    """

    columns: tuple[str, ...]
    rows: list[list[Cell]]
    figures: dict[str, Any] = field(default_factory=dict)
    found: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        name: on the command line.
        question: what it answers.
        needs: of "heads", "model", "tokens" and "tasks".
        run: measures.
        draw: draws the results, read back from JSON, on a matplotlib figure.
    """

    name: str
    question: str
    needs: tuple[str, ...]
    run: Callable[[Inputs], Outcome]
    draw: Callable[[Any, dict[str, Any]], None]

    @property
    def result_name(self) -> str:
        """Name of the result's files, without a suffix."""
        return "experiment_" + self.name.replace("-", "_")


def mean(values: Sequence[float] | Array) -> float:
    """The mean, for JSON."""
    return float(np.mean(np.asarray(values, np.float64)))
