#!/usr/bin/env python3
"""Writes the GPU tables and plots of docs/BENCHMARKS.md from docs/results.

    .venv/bin/python scripts/gpu_report.py

Needs matplotlib (scripts/bench_report.sh makes the environment). The results come from
a machine with a GPU: gpu_attention.json of scripts/gpu_suite.sh, gpu_server.json of
scripts/gpu_server_suite.sh. Results of anything else are refused.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/bench"))

import matplotlib.pyplot as plt  # noqa: E402
from gpu_server_tables import cell, not_of_a_gpu, plot_server, server_tables  # noqa: E402
from report import PAGE, RESULTS, fill, save, table  # noqa: E402

PEERS = ("cudnn", "flash")
# Attention against the fastest dense peer, overhead included (docs/KERNELS.md).
GOALS = {("pbs", 32768): 2.0, ("pbs", 131072): 2.1, ("pbs_s512", 131072): 3.6,
         ("pbs_replay", 32768): 2.1, ("pbs_replay", 131072): 4.0, ("pbs_dense", 0): 0.95}
NOT_SLOWER = 0.97


def groups(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Measured rows of each (head dim, inputs, tokens), by name."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (row["head_dim"], row["inputs"], row["tokens"])
        found.setdefault(key, {})[row["name"]] = row
    return found


def fastest_peer(group: dict[str, dict]) -> float | None:
    """Milliseconds of the fastest dense peer."""
    times = [group[name]["ms"] for name in PEERS if group.get(name, {}).get("ms")]
    return min(times, default=None)


def goal_of(name: str, kind: str, tokens: int) -> float:
    """What its ratio to the fastest dense peer should reach."""
    if kind == "white_noise" and name != "pbs_dense":
        return NOT_SLOWER
    return GOALS.get((name, tokens)) or GOALS.get((name, 0)) or NOT_SLOWER


def figures(row: dict, peer: float | None, goal: float) -> list[str]:
    """Density, time, speed, overhead and ratio; what is not known is a question mark."""
    ms, attend = row.get("ms"), row.get("attend_ms")
    if not ms:
        return [cell(row.get("error", "?")), *[""] * 4]
    density, executed, overhead, ratio = "?", "?", "?", "?"
    if attend:
        density = f"{row['density']:.3f}"
        executed = f"{row['dense_tflops'] * row['density'] * ms / attend:.0f}"
        overhead = f"{(row['permute_ms'] + row['select_ms']) / attend:.1%}"
    if peer is not None:
        ratio = f"{peer / ms:.2f}x {'>=' if peer / ms >= goal else '**<**'} {goal}"
    return [density, f"{ms:.2f}", executed, overhead, ratio]


def not_right(results: dict) -> list[str]:
    """What a reader of the table must know: checks, wrong outputs, what is missing."""
    golden = results.get("golden", [])
    wrong = [case["case"] for case in golden if not case["right"]]
    right = f"{len(golden) - len(wrong)} of {len(golden)} cases right"
    said = [f"authors' outputs: {right}" + (f", not {', '.join(wrong)}" if wrong else "")]
    said += results.get("checks", [])
    for row in results["timings"]:
        where = f"{row['name'] or 'inputs'}, {row['inputs']}, {row['tokens']}, {row['head_dim']}"
        if row.get("right") is False:
            said.append(f"**wrong**: {where} differs from {row['from']}")
        if "error" in row and not (row["name"] or "").startswith("pbs"):
            said.append(f"not measured: {where}: {cell(row['error'])}")
    if not results.get("done", True):
        said.append("the run was cut short")
    return said


def attention_table(results: dict) -> str:
    """Ours beside the fastest dense peer, with the goals."""
    rows = []
    for (head_dim, kind, tokens), group in sorted(groups(results["timings"]).items()):
        peer = fastest_peer(group)
        for name, row in group.items():
            if name is None or not name.startswith("pbs"):
                continue
            label = f"{name} ({row['kernels']})" if "kernels" in row else name
            rows.append([label, kind, f"{tokens // 1024}K", str(head_dim),
                         *figures(row, peer, goal_of(name, kind, tokens))])
    head = ["run", "inputs", "tokens", "head dim", "density", "ms", "executed TFLOP/s",
            "order + lists / attention", "fastest dense peer / ours"]
    gpu = results["gpu"]
    said = (
        f"[`docs/results/gpu_attention.json`](results/gpu_attention.json): {gpu.get('name', '?')}, "
        f"driver {gpu.get('driver_version', '?')}, torch {results['torch']}, commit "
        f"`{results['commit']}`, `{results['command']}`."
    )
    checks = "\n".join(f"* {line}" for line in not_right(results))
    return f"{table(head, rows)}\n\n![speed by length](results/gpu_attention.svg)\n\n{said}\n\n{checks}"


def plot(results: dict) -> None:
    """Dense-equivalent speed by length, one line per run."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, head_dim in zip(axes, (128, 64)):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in results["timings"]:
            if row["head_dim"] == head_dim and row["inputs"] == "structured" and row.get("ms"):
                lines.setdefault(row["name"], []).append((row["tokens"], row["dense_tflops"]))
        for name, points in sorted(lines.items()):
            points.sort()
            style = "-" if name.startswith("pbs") else "--"
            axis.plot(*zip(*points), style, marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_title(f"head dim {head_dim}")
        axis.set_xlabel("tokens")
        if lines:
            axis.legend(fontsize=7)
    axes[0].set_ylabel("TFLOP/s of the dense work")
    save(figure, "gpu_attention")


# Results file: the section of the page, its tables, its plot, and what makes the results.
SECTIONS = {
    "gpu_attention": ("Attention on a GPU", attention_table, plot, "scripts/gpu_suite.sh"),
    "gpu_server": ("A served model on a GPU", server_tables, plot_server,
                   "scripts/gpu_server_suite.sh"),
}


def make_place(page: pathlib.Path, name: str, title: str) -> None:
    """Puts the marks of a table at the end of its section, where they are not there."""
    text = page.read_text()
    if f"<!-- table: {name} -->" in text:
        return
    section = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.M | re.S)
    if section is None:
        raise SystemExit(f"{page}: there is no section {title}")
    behind = text[section.end() :]
    marks = f"{section[0].rstrip()}\n\n<!-- table: {name} -->\n<!-- end -->\n"
    page.write_text(text[: section.start()] + marks + (f"\n{behind}" if behind else ""))


def main() -> int:
    """Rewrites the page."""
    written = 0
    for name, (title, make, draw, script) in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            print(f"there is no {path.name}: run {script} on a machine with a GPU",
                  file=sys.stderr)
            continue
        results = json.loads(path.read_text())
        if name == "gpu_server" and (reason := not_of_a_gpu(results)):
            print(f"{path.name} is refused: {reason}", file=sys.stderr)
            return 1
        make_place(PAGE, name, title)
        fill(PAGE, name, make(results))
        draw(results)
        written += 1
        print(f"wrote {title} of {PAGE.name}", file=sys.stderr)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
