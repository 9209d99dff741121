#!/usr/bin/env python3
"""Writes the GPU table and plot of docs/BENCHMARKS.md from docs/results/gpu_attention.json.

    .venv/bin/python scripts/gpu_report.py

Needs matplotlib (scripts/bench_report.sh makes the environment). The results come from
scripts/gpu_suite.sh on a machine with a GPU.
"""

from __future__ import annotations

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/bench"))

import matplotlib.pyplot as plt  # noqa: E402
from report import PAGE, fill, save, table  # noqa: E402

RESULTS = ROOT / "docs/results/gpu_attention.json"
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


def cell(text: object) -> str:
    """On one line, without what ends a cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


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


def main() -> int:
    """Rewrites the page."""
    if not RESULTS.exists():
        print(f"{RESULTS.relative_to(ROOT)} does not exist: run scripts/gpu_suite.sh on a machine "
              "with a GPU first", file=sys.stderr)
        return 1
    results = json.loads(RESULTS.read_text())
    page = PAGE.read_text()
    if "<!-- table: gpu_attention -->" not in page:
        PAGE.write_text(f"{page.rstrip()}\n\n<!-- table: gpu_attention -->\n<!-- end -->\n")
    fill(PAGE, "gpu_attention", attention_table(results))
    plot(results)
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
