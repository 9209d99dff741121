#!/usr/bin/env python3
"""Writes the tables and plot of the real model's quality from docs/results/quality_*.json.

    scripts/bench.sh report

The README gets a row per method. Without the file the pages stay as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from report import PAGE, README, RESULTS, ROOT, fill, save, source, table

sys.path.insert(0, str(ROOT / "tests/quality"))
from rule import PROMPTS_MIN  # noqa: E402
from summary import PAPER, best_of_methods  # noqa: E402

NAME = "quality_model"
HARNESS = "quality_lm_eval"
# Of a setting's name: what it adds to its method, and the marker of that.
ADDED = (("block 64", "^"), ("window", "D"), ("tail", "s"))
PLAIN = ("as the method is", "o")
TOO_FEW = f"fewer than {PROMPTS_MIN}"  # ends a reason of rule.failures()
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


def holds(reasons: list[str]) -> str:
    """Whether the rule accepts what has these reasons against it."""
    if not reasons:
        return "yes"
    too_few = all(x.endswith(("not measured", TOO_FEW)) for x in reasons)
    return "too few prompts" if too_few else "no"


def quality_table(results: dict[str, Any]) -> str:
    """A row per setting and length, and what the rule says."""
    failed = (results["choice"] or {}).get("failed", {})
    rows = []
    for name, setting in results["settings"].items():
        for length, figures in setting["lengths"].items():
            reasons = [x for x in failed.get(name, []) if x.startswith(f"{length}:")]
            shown = [show(figures) for show in COLUMNS.values()]
            rows.append([name, length, *shown, holds(reasons)])
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
        len(costs), len(lengths), figsize=(max(7, 1 + 3 * len(lengths)), 6.5), squeeze=False
    )
    methods = list(dict.fromkeys(s["method"] for s in results["settings"].values()))
    for row, (cost_name, cost) in zip(axes, costs.items()):
        for axis, length in zip(row, lengths):
            _draw_panel(axis, results["settings"], length, cost, methods)
            axis.set(title=f"L = {length}", xlabel=cost_name)
        row[0].set_ylabel("NLL of text above dense, %")
    figure.legend(handles=_keys(methods), frameon=False, loc="outside lower center", ncols=4)
    save(figure, NAME)


def _kind(name: str) -> tuple[str, str]:
    """What a setting adds to its method, and its marker."""
    return next((added for added in ADDED if added[0] in name), PLAIN)


def _keys(methods: list[str]) -> list[Line2D]:
    keys = [Line2D([], [], color=f"C{i}", marker="o", linestyle="", label=method)
            for i, method in enumerate(methods)]  # fmt: skip
    keys += [
        Line2D([], [], color="gray", marker=marker, linestyle="", label=label)
        for label, marker in (PLAIN, *reversed(ADDED))
    ]
    return keys + [
        Line2D([], [], color="gray", marker="o", fillstyle="none", linestyle="",
               label="hollow: not corrected"),
        Line2D([], [], color="gray", linestyle="--", label="no setting is better"),
        Line2D([], [], color="black", linestyle=":", label="limit of the rule"),
    ]  # fmt: skip


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
        filled = setting["corrected"] or setting["method"] == "dense"
        axis.errorbar(
            x, y, yerr=100 * (excess["standard_error"] or 0), markersize=5,
            fmt=_kind(name)[1], fillstyle="full" if filled else "none",
            color=f"C{methods.index(setting['method'])}", linewidth=0.8,
        )  # fmt: skip
    if points:
        front = pareto(points)
        axis.step(*zip(*front), where="post", color="gray", linewidth=0.8, linestyle="--")
    axis.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
    axis.set_yscale("symlog", linthresh=1)
    axis.yaxis.set_major_formatter("{x:g}")


def readme_table(results: dict[str, Any]) -> str:
    """A row per method: losses, density and time at the two longest lengths.

    n is that of the longest.
    """
    lengths = [str(length) for length in results["lengths"][-2:]]
    choice = results["choice"]
    rows = []
    for name in best_of_methods(results):
        label = name
        if name == choice["setting"]:
            label = f"**{name}** (the default)"
        elif name == PAPER:
            label = f"{name} (the paper's)"
        last = results["settings"][name]["lengths"].get(lengths[-1])
        row = [label, COLUMNS["n"](last) if last else ""]
        for length in lengths:
            figures = results["settings"][name]["lengths"].get(length)
            row += _short(figures) if figures else ["", "", ""]
        rows.append([*row, holds(choice["failed"].get(name, []))])
    columns = [f"{what}, {n}" for n in lengths for what in ("NLL", "density", "CPU time")]
    return table(["setting", "n", *columns, "holds"], rows)


def _short(figures: Figures) -> list[str]:
    return [f"{100 * figures['text']['nll_excess']['mean']:+.2f} %",
            f"{figures['text']['density']['mean']:.2f}",
            f"{figures['time']['cpu_ratio']:.2f}x"]  # fmt: skip


def harness_table(results: dict[str, Any]) -> str:
    """A row per setting: scores of foreign tasks, and their differences from dense."""
    tasks = list(next(iter(results["settings"].values()))["tasks"])
    rows = []
    for name, figures in results["settings"].items():
        cells = [figures["tasks"][task] for task in tasks]
        rows.append(
            [name]
            + [f"{plain(c['score'], 2)} ({plain(c['against_dense'], 2, '+')})" for c in cells]
            + [plain(figures["density"], 2)]
        )
    return table(["score (against dense)", *tasks, "density"], rows)


def main() -> int:
    """Rewrites the tables and the plot."""
    harness = RESULTS / f"{HARNESS}.json"
    if harness.exists():
        results = json.loads(harness.read_text())
        fill(PAGE, HARNESS, f"{harness_table(results)}\n\n{source(HARNESS, results)}")
    path = RESULTS / f"{NAME}.json"
    if not path.exists():
        print(f"docs/results/{NAME}.json does not exist; its table stays", file=sys.stderr)
        return 0
    results = json.loads(path.read_text())
    plot(results)
    image = f"![Loss over density and over time](results/{NAME}.svg)"
    parts = [quality_table(results), verdict(results), image, task_table(results)]
    fill(PAGE, NAME, "\n\n".join([*parts, source(NAME, results)]))
    fill(README, NAME, readme_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
