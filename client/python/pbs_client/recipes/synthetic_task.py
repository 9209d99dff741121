"""Recipe synthetic-task: what does selection lose on retrieval, and what helps?

The paper loses most on synthetic tasks. Here tasks with known answers run through a model,
and the logits of the last token are compared with the answer and with those of dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbs_client.kv import Array
from pbs_client.options import Attention, Dense, MeanPooling, Method, Pbs
from pbs_client.prefill_options import Logits
from pbs_client.recipes.base import Inputs, Outcome, Recipe, mean

COVERAGE_ROWS = 16


def _only(method: Method, **options: Any) -> Attention:
    """The method with these options alone: a prefill has a dense tail by default."""
    return Attention(
        method, **{"dense_tail_blocks": 0, "dense_fallback": False, **options}
    )


SETTINGS: dict[str, Attention | None] = {
    "dense": Attention(Dense()),
    "pbs": _only(Pbs()),
    "pbs, threshold .95": _only(Pbs(threshold=0.95)),
    "pbs, query_head": _only(Pbs(scope="query_head")),
    "pbs, tail 2": _only(Pbs(), dense_tail_blocks=2),
    "pbs, corrected": _only(Pbs(), mean_correction=True),
    "pbs, sink 1, window 2": _only(Pbs(), sink_blocks=1, window_blocks=2),
    "pbs, guarded heads": _only(Pbs(), coverage_rows=COVERAGE_ROWS, coverage_min=0.9),
    "pbs, tail 2, corrected": _only(Pbs(), dense_tail_blocks=2, mean_correction=True),
    "mean_pooling": _only(MeanPooling()),
    "mean_pooling, tail 2": _only(MeanPooling(), dense_tail_blocks=2),
    "the server's default": None,
}


@dataclass(frozen=True)
class Answer:
    """One task in one setting."""

    is_right: bool
    loss: float  # of the best of the right tokens, nats
    divergence: float  # KL from dense to the setting, nats
    density: float


def log_softmax(logits: Array) -> Array:
    """Log-probabilities in f64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    found: Array = shifted - np.log(np.exp(shifted).sum())
    return found


def _ask(inputs: Inputs, index: int) -> dict[str, Answer]:
    task = inputs.tasks[index]
    answers: dict[str, Answer] = {}
    dense: Array | None = None
    for name, attention in SETTINGS.items():
        result = inputs.client.prefill(
            inputs.served_model,
            task.tokens,
            attention,
            logits=Logits(all_of_last_token=True),
        )
        assert result.last_token_logits is not None
        logs = log_softmax(result.last_token_logits)
        dense = logs if dense is None else dense  # the first setting is dense
        answers[name] = Answer(
            int(np.argmax(logs)) in task.answer,
            -float(max(logs[token] for token in task.answer)),
            float(np.exp(dense) @ (dense - logs)),
            result.stats.density,
        )
    return answers


def run(inputs: Inputs) -> Outcome:
    """Every task in every setting, dense first."""
    answered = []
    for index in range(len(inputs.tasks)):
        inputs.say(f"task {index + 1} of {len(inputs.tasks)}")
        answered.append(_ask(inputs, index))
    rows: list[list[Any]] = []
    for name in SETTINGS:
        own = [answers[name] for answers in answered]
        lost = [
            answers["dense"].is_right and not answers[name].is_right
            for answers in answered
        ]
        won = [
            answers[name].is_right and not answers["dense"].is_right
            for answers in answered
        ]
        excess = [a[name].loss - a["dense"].loss for a in answered]
        rows.append(
            [
                name,
                mean([a.is_right for a in own]),
                sum(lost),
                sum(won),
                mean(excess),
                float(np.std(excess, ddof=1) / np.sqrt(len(excess)))
                if len(excess) > 1
                else None,
                mean([a.divergence for a in own]),
                mean([a.density for a in own]),
            ]
        )
    best = min(rows[1:], key=lambda row: row[6])
    pbs = rows[1]
    return Outcome(
        (
            "setting",
            "accuracy",
            "lost",
            "won",
            "loss over dense",
            "standard error",
            "KL from dense",
            "density",
        ),
        rows,
        {"tasks": len(answered), "by_kind": _by_kind(inputs, answered)},
        (
            f"Of {len(answered)} tasks dense answers {rows[0][1]:.0%} right, pbs "
            f"{pbs[1]:.0%}; pbs's loss is {pbs[4]:+.3f} nats over dense's.",
            f"Nearest to dense is {best[0]}: KL {best[6]:.4f}, with density {best[7]:.2f} "
            f"(pbs: {pbs[6]:.4f}, {pbs[7]:.2f}).",
        ),
    )


def _by_kind(
    inputs: Inputs, answered: Sequence[dict[str, Answer]]
) -> dict[str, dict[str, list[float]]]:
    """For each kind and setting: accuracy, loss over dense, number of tasks."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind in sorted({task.kind for task in inputs.tasks}):
        own = [a for task, a in zip(inputs.tasks, answered) if task.kind == kind]
        found[kind] = {
            name: [
                mean([a[name].is_right for a in own]),
                mean([a[name].loss - a["dense"].loss for a in own]),
                len(own),
            ]
            for name in SETTINGS
        }
    return found


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Divergence over density, and loss over dense."""
    left, right = figure.subplots(1, 2)
    rows = result["rows"][1:]
    for row in rows:
        left.plot(row[7], max(row[6], 1e-7), "o", label=row[0])
    left.set(xlabel="density", title="KL from dense", yscale="log")
    left.legend(frameon=False, fontsize=6)
    at = np.arange(len(rows))
    spread = [row[5] or 0 for row in rows]
    right.barh(at, [row[4] for row in rows], xerr=spread)
    right.set_yticks(at, [row[0] for row in rows], fontsize=6)
    right.invert_yaxis()
    right.set_title("loss over dense, nats")


RECIPE = Recipe(
    "synthetic-task",
    "What does selection lose on retrieval tasks, and what do tail, scope, correction and "
    "guarded heads do about it?",
    ("model", "tasks"),
    run,
    draw,
)
