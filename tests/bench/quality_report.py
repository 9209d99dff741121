#!/usr/bin/env python3
"""Writes the table and plots of the real model's quality from docs/results/quality_model.json.

    scripts/bench.sh report

Without the file the table of docs/BENCHMARKS.md stays as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from report import PAGE, RESULTS, fill, save, source, table

NAME = "quality_model"
SIGNS = {"tail 1": "s", "corrected": "^", "tail 1, corrected": "D"}
Figures = dict[str, Any]  # of one setting at one length


def percent(mean: Figures) -> str:
    """A share as a signed percentage with its standard error."""
    error = mean["standard_error"]
    spread = "" if error is None else f" ± {100 * error:.2f}"
    return f"{100 * mean['mean']:+.2f}{spread}"


def plain(mean: Figures, digits: int = 3, sign: str = "") -> str:
    """A mean with its standard error."""
    error = mean["standard_error"]
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{mean['mean']:{sign}.{digits}f}{spread}"


def divergence(figures: Figures) -> Figures:
    """The mean KL divergence of the last positions."""
    return next(value for name, value in figures["text"].items() if name.startswith("kl_last"))


COLUMNS: dict[str, Callable[[Figures], str]] = {
    "n": lambda f: f"{f['text']['nll']['n']} + {f['retrieval']['score']['n']}",
    "text NLL, %": lambda f: percent(f["text"]["nll_excess"]),
    "continuation NLL, %": lambda f: percent(f["text"]["continuation_excess"]),
    "retrieval": lambda f: plain(f["retrieval"]["score"]),
    "against dense": lambda f: plain(f["retrieval"]["score_difference"], sign="+"),
    "top-1": lambda f: plain(f["text"]["top1_agreement"]),
    "KL": lambda f: plain(divergence(f)),
    "density": lambda f: plain(f["text"]["density"]),
    "coverage": lambda f: f"{f['text']['coverage']['mean']:.3f}",
    "CPU time": lambda f: f"{f['time']['cpu_ratio']:.2f}",
    "attention": lambda f: f"{f['time']['attention_ratio']:.2f}",
}


def quality_table(results: dict[str, Any]) -> str:
    """A row per setting and length, and what the rule says."""
    failed = (results["choice"] or {}).get("failed", {})
    rows = []
    for name, setting in results["settings"].items():
        for length, figures in setting["lengths"].items():
            reasons = [x for x in failed.get(name, []) if x.startswith(f"{length}:")]
            holds = "no" if reasons else "yes"
            rows.append([name, length, *(show(figures) for show in COLUMNS.values()), holds])
    return table(["setting", "L", *COLUMNS, "holds"], rows)


def task_table(results: dict[str, Any]) -> str:
    """Dense retrieval by task and length: what there is to lose."""
    lengths = results["settings"]["dense"]["lengths"]
    tasks = sorted({t for f in lengths.values() for t in f["retrieval"]["by_task"]})
    rows = []
    for task in tasks:
        cells = [f["retrieval"]["by_task"].get(task) for f in lengths.values()]
        rows.append([task, *(f"{c['score']:.2f} ({c['questions']})" if c else "" for c in cells)])
    return table(["dense, score (questions)", *(f"L = {n}" for n in lengths)], rows)


def verdict(results: dict[str, Any]) -> str:
    """The default by the rule, its goals, and what was not measured."""
    choice = results["choice"]
    lines = [f"By the rule the default is **{choice['setting']}**."]
    if not results["complete"]:
        lines.append("The run was ended by its time limit; n is what there was time for.")
    lines += [f"* {goal}: {'reached' if met else '**missed**'}"
              for goal, met in choice["goals"].items()]  # fmt: skip
    lines += [f"* not measured: {name} ({why})" for name, why in results["skipped"].items()]
    if results["screened"]:
        lines.append(f"* measured no further, losses far out: {'; '.join(results['screened'])}")
    return "\n".join([lines[0], "", *lines[1:]])


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other point beats in both cost and loss, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def plot(results: dict[str, Any]) -> None:
    """Loss over density and over time, a column per length."""
    costs = {
        "density": lambda f: f["text"]["density"]["mean"],
        "CPU time / dense": lambda f: f["time"]["cpu_ratio"],
    }
    lengths = [str(length) for length in results["lengths"]]
    figure, axes = plt.subplots(
        len(costs), len(lengths), figsize=(max(7, 1 + 3 * len(lengths)), 6), squeeze=False
    )
    methods = list(dict.fromkeys(s["method"] for s in results["settings"].values()))
    for row, (cost_name, cost) in zip(axes, costs.items()):
        for axis, length in zip(row, lengths):
            _draw_panel(axis, results["settings"], length, cost, methods)
            axis.set(title=f"L = {length}", xlabel=cost_name)
        row[0].set_ylabel("NLL of text above dense, %")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles.update(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), frameon=False,
                  loc="outside lower center", ncols=4)  # fmt: skip
    save(figure, NAME)


def _draw_panel(
    axis: plt.Axes, settings: dict[str, Any], length: str, cost: Callable[[Figures], float],
    methods: list[str],
) -> None:  # fmt: skip
    points = []
    for name, setting in settings.items():
        figures = setting["lengths"].get(length)
        if figures is None:
            continue
        excess = figures["text"]["nll_excess"]
        x, y = cost(figures), 100 * excess["mean"]
        points.append((x, y))
        extras = name.partition(", ")[2]
        label = setting["method"] + (f", {extras}" if extras else "")
        axis.errorbar(
            x, y, yerr=100 * (excess["standard_error"] or 0), label=label, markersize=4,
            fmt=SIGNS.get(extras, "o"), color=f"C{methods.index(setting['method'])}",
            linewidth=0.8,
        )  # fmt: skip
    if points:
        axis.step(*zip(*pareto(points)), where="post", color="gray", linewidth=0.8,
                  linestyle="--", label="no setting is better")  # fmt: skip
    axis.axhline(0.5, color="black", linewidth=0.6, linestyle=":", label="limit of the rule")
    axis.set_yscale("symlog", linthresh=1)


def main() -> int:
    """Rewrites the table and the plot."""
    path = RESULTS / f"{NAME}.json"
    if not path.exists():
        print(f"docs/results/{NAME}.json does not exist; its table stays", file=sys.stderr)
        return 0
    results = json.loads(path.read_text())
    plot(results)
    image = f"![Loss over density and over time](results/{NAME}.svg)"
    parts = [quality_table(results), verdict(results), image, task_table(results)]
    fill(PAGE, NAME, "\n\n".join([*parts, source(NAME, results)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
