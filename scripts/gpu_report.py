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
    times = [group[name]["ms"] for name in PEERS if "ms" in group.get(name, {})]
    return min(times, default=None)


def goal_of(name: str, kind: str, tokens: int) -> float:
    """What its ratio to the fastest dense peer should reach."""
    if kind == "white_noise" and name != "pbs_dense":
        return NOT_SLOWER
    return GOALS.get((name, tokens)) or GOALS.get((name, 0)) or NOT_SLOWER


def attention_table(results: dict) -> str:
    """Ours beside the fastest dense peer, with the goals."""
    rows = []
    for (head_dim, kind, tokens), group in sorted(groups(results["timings"]).items()):
        peer = fastest_peer(group)
        for name, row in group.items():
            if not name.startswith("pbs"):
                continue
            if "ms" not in row or peer is None:
                rows.append([name, kind, f"{tokens // 1024}K", str(head_dim), row.get("error", "?")]
                            + [""] * 4)
                continue
            ratio, goal = peer / row["ms"], goal_of(name, kind, tokens)
            overhead = (row["permute_ms"] + row["select_ms"]) / row["attend_ms"]
            executed = row["dense_tflops"] * row["density"] * row["ms"] / row["attend_ms"]
            mark = ">=" if ratio >= goal else "**<**"
            rows.append([
                name, kind, f"{tokens // 1024}K", str(head_dim), f"{row['density']:.3f}",
                f"{row['ms']:.2f}", f"{executed:.0f}", f"{overhead:.1%}",
                f"{ratio:.2f}x {mark} {goal}",
            ])  # fmt: skip
    head = ["run", "inputs", "tokens", "head dim", "density", "ms", "executed TFLOP/s",
            "order + lists / attention", "fastest dense peer / ours"]
    gpu = results["gpu"]
    wrong = [case["case"] for case in results["golden"] if not case["right"]]
    parity = f"wrong: {', '.join(wrong)}" if wrong else f"{len(results['golden'])} cases right"
    said = (
        f"[`docs/results/gpu_attention.json`](results/gpu_attention.json): {gpu['name']}, driver "
        f"{gpu['driver_version']}, torch {results['torch']}, commit `{results['commit']}`, "
        f"`{results['command']}`. Authors' outputs: {parity}."
    )
    return f"{table(head, rows)}\n\n![speed by length](results/gpu_attention.svg)\n\n{said}"


def plot(results: dict) -> None:
    """Dense-equivalent speed by length, one line per run."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, head_dim in zip(axes, (128, 64)):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in results["timings"]:
            if row["head_dim"] == head_dim and row["inputs"] == "structured" and "ms" in row:
                lines.setdefault(row["name"], []).append((row["tokens"], row["dense_tflops"]))
        for name, points in sorted(lines.items()):
            points.sort()
            style = "-" if name.startswith("pbs") else "--"
            axis.plot(*zip(*points), style, marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_title(f"head dim {head_dim}")
        axis.set_xlabel("tokens")
    axes[0].set_ylabel("TFLOP/s of the dense work")
    axes[0].legend(fontsize=7)
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
