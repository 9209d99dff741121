#!/usr/bin/env python3
"""Writes the GPU tables and plots of docs/BENCHMARKS.md from docs/results/gpu_*.json.

    scripts/bench.sh report --take gpu_run.tar.gz   first takes these in
    scripts/bench.sh report

Needs matplotlib, for which the script makes an environment. A results file is one
call of tests/gpu/run.py; of several the later one counts, row by row. Results that are not
of a GPU are refused.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import tarfile

import matplotlib.pyplot as plt
from report import PAGE, RESULTS, fill, goal, save, table

PEERS = ("cudnn", "flash")
# Attention against the fastest dense peer, overhead included (docs/KERNELS.md).
GOALS = {("pbs", 32768): 2.0, ("pbs", 131072): 2.1, ("pbs_s512", 131072): 3.6,
         ("pbs_replay", 32768): 2.1, ("pbs_replay", 131072): 4.0, ("pbs_dense", 0): 0.95}
NOT_SLOWER, LINEAR_GOAL, DENSE_GOAL, HIDDEN_GOAL = 0.97, 0.95, 1.05, 0.95
REPLAY_GOALS = {32768: 1.26, 131072: 2.2}
STAGES = ("queue", "embed", "qkv", "permute", "select", "attend", "mlp", "copy")
NAMED_BY = ("kind", "family", "case", "head_dim", "inputs", "tokens", "layers", "name", "variant")
LABELS = {"torch": "plain torch model", "dense": "ours, dense", "pbs": "pbs, real selection"}


def cell(text: object) -> str:
    """On one line, without what ends a cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def length(tokens: int) -> str:
    """Such as 32K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def refuse(name: object, run: dict) -> None:
    """Ends the program where results may not stand for a GPU's."""
    gpu, model = (run.get("gpu") or {}).get("name"), run["facts"].get("model")
    if run["rehearsal"]:
        raise SystemExit(f"{name} is refused: it is of a rehearsal")
    if not gpu:
        raise SystemExit(f"{name} is refused: no driver named a GPU")
    if model and (model["backend"] != "cuda" or not model["device"].startswith(gpu)):
        raise SystemExit(f"{name} is refused: the server ran on {model['device']}, not on {gpu}")


class Results:
    """Runs by file name, and the rows of all of them: the latest of each, but an error
    does not stand for a figure."""

    def __init__(self, runs: dict[str, dict]):
        self.runs = dict(sorted(runs.items(), key=lambda item: item[1]["written"]))
        rows: dict[tuple, dict] = {}
        for row in (row for run in self.runs.values() for row in run["rows"]):
            key = tuple(row.get(name) for name in NAMED_BY)
            if "error" not in row or "error" in rows.get(key, row):
                rows[key] = row
        self.rows = list(rows.values())

    def of(self, kind: str) -> list[dict]:
        """Rows of a kind, by length."""
        rows = [row for row in self.rows if row["kind"] == kind]
        return sorted(rows, key=lambda row: (row.get("head_dim", 0), row.get("tokens") or 0))

    def close(self, tables: list[str], said: list[str], *kinds: str) -> str:
        """A section: its tables, what they are from, and what is wrong or missing."""
        for row in (row for row in self.rows if row["kind"] in kinds):
            where = [row.get(n) for n in ("name", "case", "inputs", "tokens", "head_dim")]
            where = cell(", ".join(str(n) for n in where if n))
            if row.get("right") is False:
                why = row.get("why") or row.get("error") or f"differs from {row.get('from', 'what it must be')}"
                said.append(f"**wrong**: {where}: {cell(why)}")
            elif "error" in row:
                said.append(f"not measured: {where}: {cell(row['error'])}")
        sources = []
        for name, run in self.runs.items():
            gpu, facts, modules = run["gpu"], run["facts"], run["facts"].get("modules", {})
            sources.append(
                f"[`docs/results/{name}`](results/{name}): {gpu['name']}, driver "
                f"{gpu.get('driver_version')}, {facts.get('matmul_tflops', 0):.0f} TFLOP/s of torch's "
                f"product, {facts.get('copy_gb_per_s', 0):.0f} GB/s of its copy, torch "
                f"{modules.get('torch')}, commit `{run['commit']}`, `{run['command']}`."
            )
            clocks = [f"{step['name']} {step['clocks']['min']}, {step['clocks']['median']}"
                      for step in run["steps"] if step.get("clocks")]  # fmt: skip
            said += [f"{name}: SM clock at work, least and median: {'; '.join(clocks)}"] if clocks else []
            bad = [f"{step['name']} {step['status']}" for step in run["steps"]
                   if step["status"] not in ("right", "skipped", "left out")]  # fmt: skip
            bad += [] if run["done"] else ["it was cut short"]
            said += [f"{name}: {', '.join(bad)}"] if bad else []
        return "\n\n".join([*tables, "\n".join(sources), "\n".join(f"* {line}" for line in said)])


def attention_row(row: dict, peer: float | None) -> list[str]:
    """Density, time, speed, overhead and ratio; what is not known is a question mark."""
    ms, attend = row.get("ms"), row.get("attend_ms")
    if row.get("right") is False:
        return ["wrong", *[""] * 4]
    if not ms:
        return [cell(row.get("error", "?")), *[""] * 4]
    density = executed = overhead = ratio = "?"
    if attend:
        density = f"{row['density']:.3f}"
        executed = f"{row['dense_tflops'] * row['density'] * ms / attend:.0f}"
        overhead = f"{(row['permute_ms'] + row['select_ms']) / attend:.1%}"
    if peer is not None:
        limit = GOALS.get((row["name"], row["tokens"])) or GOALS.get((row["name"], 0)) or NOT_SLOWER
        is_noise = row["inputs"] == "white_noise" and row["name"] != "pbs_dense"
        has_goal = row["name"] != "pbs_all"  # it checks the way to the blocks
        ratio = goal(peer / ms, NOT_SLOWER if is_noise else limit) if has_goal else f"{peer / ms:.2f}x"
    return [density, f"{ms:.2f}", executed, overhead, ratio]


def attention(results: Results) -> str:
    """Ours beside the fastest dense peer, with the goals; then variants of the kernels."""
    rows, variants = [], []
    measured = results.of("attention")
    keys = ("head_dim", "inputs", "tokens")
    times = {(*(row[n] for n in keys), row.get("name")): row.get("ms")
             for row in measured if row.get("right") is not False}  # fmt: skip
    for row in measured:
        group = tuple(row[n] for n in keys)
        plain, _, variant = (row.get("name") or "").partition(":")
        where = [row["inputs"], length(row["tokens"]), str(row["head_dim"])]
        if variant:
            chosen, ms = (times.get((*group, name)) for name in (f"{plain}:chosen", row["name"]))
            why = "wrong" if row.get("right") is False else row.get("error", "?")
            known = [f"{ms:.2f}", f"{chosen / ms:.3f}x"] if chosen and ms else [cell(why), ""]
            variants.append([f"{plain}, {variant}", *where, *known])
        elif plain.startswith("pbs"):
            peer = min(filter(None, (times.get((*group, name)) for name in PEERS)), default=None)
            rows.append([plain, *where, *attention_row(row, peer)])
    head = ["run", "inputs", "tokens", "head dim"]
    tables = [table([*head, "density", "ms", "executed TFLOP/s", "order + lists / attention",
                     "fastest dense peer / ours"], rows)]  # fmt: skip
    tables += [table([*head, "ms", "chosen / this"], variants)] if variants else []
    golden = results.of("golden")
    counts = [("authors' outputs", sum(row.get("right", False) for row in golden), len(golden))]
    counts += [(row["family"], row["right_cases"], row["cases"]) for row in results.of("family")]
    said = [f"{name}: {right} of {count} cases right" for name, right, count in counts]
    said.append("dense peers are torch's: flash may be FlashAttention-2; FlashAttention-3 was not run")
    tables.append("![speed by length](results/gpu_attention.svg)")
    return results.close(tables, said, "golden", "case", "attention", "gate", "part")


def prefill_row(row: dict) -> list[str]:
    """Time to first token and to the cache, with the goals."""
    begin = [length(row["tokens"]), LABELS.get(row.get("name"), row.get("name") or "nothing")]
    if "ttft_seconds" not in row:
        return [*begin, cell(row.get("error", "?")), *[""] * 6]
    stats, over, torch = row.get("stats"), row.get("dense_over_this"), row.get("torch_over_this")
    over_dense = over_torch = hidden = ""
    if over and row["name"] != "torch":
        limit = NOT_SLOWER if row["name"] == "pbs" else REPLAY_GOALS.get(row["tokens"])
        over_dense = goal(over, limit) if limit else f"{over:.2f}x"
    if torch:
        over_torch = f"{1 / torch:.2f}x"
        if row["name"] == "dense":
            over_torch += f" {'<=' if 1 / torch <= DENSE_GOAL else '**>**'} {DENSE_GOAL}"
    if stats and stats["kv_copy_seconds"] > 0:
        share = 1 - stats["stages"]["copy"] / stats["kv_copy_seconds"]
        hidden = f"{share:.1%} {'>=' if share >= HIDDEN_GOAL else '**<**'} {HIDDEN_GOAL:.0%}"
    served = [f"{stats['total_seconds']:.3f} s", f"{stats['density']:.3f}"] if stats else ["", ""]
    figures = [f"{row['ttft_seconds']:.3f} s", *served, over_dense, over_torch, hidden]
    return [*begin, *figures, str(row["rounds"])]


def server(results: Results) -> str:
    """Linear layers, prefills and their stages, prompts at once."""
    prefills = results.of("prefill")
    linear = [[row["name"], f"{row['rows']} x {row['in']} x {row['out']}", f"{row['torch_tflops']:.0f}",
               f"{row['tflops']:.0f}", goal(row["ratio"], LINEAR_GOAL)]
              for row in results.of("linear")]  # fmt: skip
    stages = [[*prefill_row(row)[:2], *(f"{1e3 * row['stats']['stages'][stage]:.1f}" for stage in STAGES),
               f"{1e3 * row['stats']['kv_copy_seconds']:.1f}"]
              for row in prefills if row.get("stats")]  # fmt: skip
    tables = [table(head, rows) for head, rows in (
        (["linear layer, bf16", "rows x in x out", "torch, TFLOP/s", "ours", "ratio, goal"], linear),
        (["L", "run", "TTFT", "KV ready", "density", "our dense / this", "this / torch", "KV copies hidden",
          "rounds"], [prefill_row(row) for row in prefills]),
        (["L", "ms of each stage", *STAGES, "(all of the copies)"], stages),
    ) if rows]  # fmt: skip
    said = [f"random model, {layers} layers of the shape of Llama-3.1-8B"
            for layers in sorted({row["layers"] for row in prefills})]  # fmt: skip
    said += [f"{row['prompts']} prompts of {row['tokens']} tokens at once: "
             f"{row['alone_over_together']:.2f}x the speed of one after another"
             for row in results.of("concurrent")]  # fmt: skip
    tables.append("![time to first token](results/gpu_server.svg)")
    return results.close(tables, said, "prefill", "concurrent")


def plot(name: str, title: str, rows: list[dict], figure: str) -> None:
    """A figure of the rows that have it, by length; a line for each name."""
    drawing, axis = plt.subplots(figsize=(6, 3.4))
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.get(figure) and row.get("right", True) and ":" not in row["name"]:
            label = LABELS.get(row["name"], row["name"])
            label += f", head dim {row['head_dim']}" if row.get("head_dim", 128) != 128 else ""
            lines.setdefault(label, []).append((row["tokens"], row[figure]))
    for label, points in sorted(lines.items()):
        style = "-" if label.startswith(("pbs", "ours", "density")) else "--"
        axis.plot(*zip(*sorted(points)), style, marker="o", markersize=3, label=label)
    axis.set(xscale="log", xlabel="tokens", ylabel=title)
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
    axis.set_xticks(ticks, [length(t) for t in ticks], minor=False)
    axis.minorticks_off()
    if lines:
        axis.legend(fontsize=6)
    save(drawing, name)


def main() -> None:
    """Rewrites the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--take", type=pathlib.Path, action="append", default=[], metavar="TAR")
    for tar in parser.parse_args().take:
        with tarfile.open(tar) as opened:
            run = json.load(opened.extractfile("gpu_run/results.json"))
        refuse(tar, run)
        path = RESULTS / f"gpu_{re.sub('[^0-9]', '', run['written'])}.json"
        path.write_text(json.dumps(run, indent=1) + "\n")
    runs = {path.name: json.loads(path.read_text()) for path in RESULTS.glob("gpu_*.json")}
    for name, run in runs.items():
        refuse(name, run)
    if not runs:
        raise SystemExit("there are no results: tests/gpu/run.py makes them on a machine with a GPU")
    results = Results(runs)
    fill(PAGE, "gpu_attention", attention(results))
    structured = [row for row in results.of("attention") if row["inputs"] == "structured"]
    plot("gpu_attention", "TFLOP/s of the dense work", structured, "dense_tflops")
    fill(PAGE, "gpu_server", server(results))
    plot("gpu_server", "TTFT of ours, dense / this", results.of("prefill"), "dense_over_this")


if __name__ == "__main__":
    main()
