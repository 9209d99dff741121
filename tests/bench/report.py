#!/usr/bin/env python3
"""Writes the tables and plots of docs/BENCHMARKS.md and README.md from docs/results/.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is in between is
replaced. A results file that does not exist leaves its table as it is.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from bench_common import RESULTS, ROOT  # noqa: E402

PAGE = ROOT / "docs/BENCHMARKS.md"
README = ROOT / "README.md"
plt.rcParams.update(
    {
        "svg.hashsalt": "pbs",  # the same plot is the same file
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }
)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns after the first are right-aligned."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def source(name: str, results: dict) -> str:
    """Where the figures are from."""
    cpu = results["machine"].get("model name") or results["machine"].get("cpu", "?")
    cores = results["machine"].get("cpus") or results["machine"].get("cores")
    flags = ", ".join(results["machine"].get("flags", []))
    flags = f" ({flags})" if flags else ""
    commit, plus, changes = results["commit"].partition("+")
    return (
        f"[`docs/results/{name}.json`](results/{name}.json): {cpu}, {cores} cores{flags}, commit "
        f"`{commit[:12]}{plus}{changes}`, `{results['command'].strip()}`."
    )


def goal(value: float, limit: float) -> str:
    """The ratio, and whether it reaches the goal."""
    return f"{value:.2f}x {'>=' if value >= limit else '**<**'} {limit}"


# ---- attention and linear layers


DENSE_GOALS = {("f32", "auto"): 1.2, ("bf16", "auto"): 2.2, ("f32", "avx2"): 1.1,
               ("bf16", "avx2"): 1.05}


def attention(results: dict) -> str:
    """Dense beside torch, then the sparse methods beside our dense."""
    peers, sparse = [], []
    for group in results["groups"]:
        cases, length = group["cases"], group["length"]
        isa = "AVX2" if group["isa"] == "avx2" else "best"
        dense, torch = cases["dense"], cases["torch SDPA"]
        flops = dense["dense_flops"] * 1e-9
        limit = DENSE_GOALS[group["dtype"], group["isa"]]
        peers.append(
            [f"{group['dtype']}, {isa}", f"{length}", f"{flops / torch['cpu']:.0f}",
             f"{flops / dense['cpu']:.0f}", goal(dense["speedup_cpu"], limit)]
        )
        for label, case in cases.items():
            if label in ("dense", "torch SDPA"):
                continue
            density = case["density"]
            gain = dense["cpu"] / case["cpu"]
            overhead = (case["permute"] + case["select"]) / case["wall"]
            sparse.append(
                [f"{label}, {group['dtype']}", f"{length}", f"{density:.3f}", f"{gain:.2f}x",
                 f"{gain * density:.2f}", f"{100 * overhead:.1f} %",
                 f"{case['speedup_cpu']:.2f}x"]
            )
    head = ["dtype, ISA", "L", "torch SDPA, GFLOP/s", "ours, dense", "ratio, goal"]
    sparse_head = ["method", "L", "density", "over our dense", "x density",
                   "order + select, share of time", "over torch"]
    return table(head, peers) + "\n\n" + table(sparse_head, sparse)


def plot_attention(results: dict) -> None:
    """Speed over torch by length."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
    for axis, dtype in zip(axes, ("f32", "bf16")):
        lines: dict[str, list[tuple[int, float]]] = {}
        for group in results["groups"]:
            if group["dtype"] != dtype or group["isa"] != "auto":
                continue
            for label, case in group["cases"].items():
                name = re.sub(r"lists forced to .*", "published densities", label)
                lines.setdefault(name, []).append((group["length"], case.get("speedup_cpu", 1)))
        for name, points in lines.items():
            axis.plot(*zip(*points), marker="o", markersize=3, label=name)
        axis.set(xscale="log", title=f"attention, {dtype}", xlabel="prompt tokens")
        ticks = [points[0] for points in lines["dense"]]
        axis.set_xticks(ticks, [f"{t // 1024}K" for t in ticks], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("CPU time of torch SDPA / ours")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3)
    save(figure, "cpu_attention")


def density(results: dict) -> str:
    """What the two methods computed, at one threshold."""
    rows = [
        [name, f"{figures['causal_ratio']:.3f}", f"{figures['coverage']:.3f}"]
        for name, figures in results["maps"].items()
    ]
    return table(["method", "causal ratio", "coverage of the attention mass"], rows)


def plot_density(results: dict) -> None:
    """The blocks that each method computes, by the share of the heads that do."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), sharey=True)
    for axis, (name, figures) in zip(axes, results["maps"].items()):
        heads = [[int(digit) for digit in line] for line in figures["heads"]]
        image = axis.imshow(
            [[count / results["num_heads"] for count in row] for row in heads],
            cmap="Blues", vmin=0, vmax=1, interpolation="none",
        )  # fmt: skip
        axis.set(
            title=f"{name}\n{100 * figures['causal_ratio']:.0f} % of the causal blocks\n"
            f"{100 * figures['coverage']:.0f} % of the attention mass",
            xlabel="key block",
        )
    axes[0].set_ylabel("query block")
    figure.colorbar(image, ax=axes, label="share of heads that compute the block")
    save(figure, "density")


def linear(results: dict) -> str:
    """Linear layers beside torch."""
    rows = []
    for group in results["groups"]:
        ours, torch = group["cases"]["ours"], group["cases"]["torch"]
        n, wide, out = group["shape"]
        flops = 2e-9 * n * wide * out
        limit = 1.0 if group["dtype"] == "f32" else 0.9
        rows.append(
            [f"{group['dtype']}, {group['threads']} threads", f"{n} x {wide} x {out}",
             f"{flops / torch['wall']:.0f}", f"{flops / ours['wall']:.0f}",
             goal(ours["speedup_cpu"], limit)]
        )
    return table(["dtype", "rows x in x out", "torch, GFLOP/s", "ours", "ratio, goal"], rows)


# ---- prefill


def prefill(results: dict) -> str:
    """Time to first token by method."""
    rows = []
    for group in results["groups"]:
        for label, case in group["cases"].items():
            ratio = case.get("speedup_cpu", 1.0)
            share = (case["permute"] + case["select"] + case["attend"]) / case["wall"]
            rows.append(
                [f"{group['length']}", label, f"{case['ttft']:.2f} s", f"{case['density']:.3f}",
                 f"{100 * share:.0f} %",
                 goal(ratio, 0.97) if "real" in label else f"{ratio:.2f}x"]
            )
    head = ["L", "method", "TTFT", "density", "attention's share", "over dense"]
    return table(head, rows)


def memory(results: dict) -> str:
    """Planned and measured bytes."""
    rows = []
    for row in results["rows"]:
        planned, measured = row["planned_bytes"], row["measured_bytes"]
        rows.append(
            [f"{row['length']}", f"{planned / 1e6:.1f}", f"{measured / 1e6:.1f}",
             f"{100 * (measured / planned - 1):+.2f} %"]
        )
    return table(["L", "planned, MB", "measured, MB", "difference (goal: 5 %)"], rows)


# ---- quality


def quality(results: dict) -> str:
    """Accuracy and density by configuration and length."""
    lengths = list(results["results"])
    names = list(results["results"][lengths[0]])
    rows = []
    for name in names:
        cells = [results["results"][length][name] for length in lengths]
        rows.append([name] + [f"{c['accuracy']:.3f} ({c['density']:.2f})" for c in cells])
    text = table(["accuracy (density)", *[f"L = {length}" for length in lengths]], rows)
    missed = results["missed_bars"]
    verdict = "Every bar is met." if not missed else "Bars missed:\n\n" + "\n".join(
        f"* {bar}" for bar in missed
    )
    return f"{text}\n\n{verdict}"


def plot_quality(results: dict) -> None:
    """Accuracy over density, a panel per length."""
    styles = {
        "pbs": ("o", "PBS-Attn, KV-head scope"),
        "query-head": ("s", "PBS-Attn, query-head scope"),
        "identity": ("v", "identity order"),
        "random": ("x", "random blocks"),
        "mean_pooling": ("^", "mean pooling"),
    }
    lengths = list(results["results"])
    figure, axes = plt.subplots(1, len(lengths), figsize=(2.4 * len(lengths), 3), sharey=True)
    for axis, length in zip(axes, lengths):
        rows = results["results"][length]
        for key, (marker, label) in styles.items():
            points = [
                (row["density"], row["accuracy"])
                for name, row in rows.items()
                if (key in name if key != "pbs" else re.fullmatch(r"pbs [\d.]+", name))
            ]
            axis.plot(*zip(*sorted(points)), marker=marker, markersize=4, label=label)
        axis.axhline(rows["dense"]["accuracy"], color="gray", linewidth=0.8, linestyle="--")
        axis.set(title=f"L = {length}", xlabel="density")
    axes[0].set_ylabel("retrieval accuracy")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=5)
    save(figure, "quality")


# ---- data plane


PEER_NAMES = {"pbs": "ours", "tcp": "raw TCP", "protobuf": "protobuf messages",
              "flight": "Arrow Flight", "shm copy": "ours, shared memory, mapped anew",
              "shm copy kept": "ours, shared memory, mapped before",
              "shm view": "ours, shared memory, used in place"}


def data_plane(results: dict) -> str:
    """Rates and CPU time of every peer; ours also as ratios of the medians' rounds."""
    goals = results["goals"]
    limit = goals["cpu_seconds_per_gb_max"]
    peers = [peer for peer in ("tcp", "protobuf", "flight")
             if any(cell["peer"] == peer for cell in results["cells"])]
    ratios = [f"ratio_to_{peer}" for peer in peers]
    rows = []
    for cell in results["cells"]:
        rate, cpu = cell["gb_per_second"], cell["cpu_seconds_per_gb"]["median"]
        own = cell["peer"] == "pbs"
        rows.append(
            [cell["direction"], f"{cell['streams']}", PEER_NAMES[cell["peer"]] + crc(cell),
             f"{rate['median']:.2f} ({rate['min']:.2f}-{rate['max']:.2f})",
             *[ratio(cell, name, least_of(cell, name, goals)) for name in ratios],
             f"{cpu:.2f}" + (f" {'<=' if cpu <= limit else '**>**'} {limit}" if own else "")]
        )
    head = ["direction", "streams", "way", "GB/s",
            *[f"x {PEER_NAMES[peer]}" for peer in peers], "CPU-s/GB, goal"]
    return table(head, rows)


def least_of(cell: dict, name: str, goals: dict) -> float | None:
    """The goal of a ratio: of the network's, or of shared memory's."""
    if cell["peer"] == "pbs":
        return goals.get(f"{name}_min")
    return goals["shared_memory_ratio_to_tcp_min"] if name == "ratio_to_tcp" else None


def ratio(cell: dict, name: str, least: float | None) -> str:
    """A ratio, with its goal if it has one; "" where the peer was not measured."""
    if name not in cell:
        return ""
    median = cell[name]["median"]
    return f"{median:.2f}x" if least is None else goal(median, least)


def crc(cell: dict) -> str:
    """Whether a download was checked; uploads have no checksums."""
    if "checksums" not in cell:
        return ""
    return ", checksums on" if cell["checksums"] else ", checksums off"


def data_plane_profile(results: dict) -> str:
    """CPU seconds of a GB by what the code did."""
    sides = results["cpu_seconds_per_gb"]
    names = list(sides["server"])
    rows = [[name, f"{sides['server'][name]:.3f}", f"{sides['client'][name]:.3f}"]
            for name in names]
    sums = [f"{sum(sides[side].values()):.3f}" for side in ("server", "client")]
    return table(["CPU-s/GB", "server", "client"], [*rows, ["all", *sums]])


def kv_overlap(results: dict) -> str:
    """What of a transfer the consumer waits for."""
    rows = [
        [f"{row['prefill_seconds']:.1f}", f"{row['density']:.2f}",
         f"{row['cache_bytes'] / 1e6:.0f}", f"{1e3 * row['fetch_alone_seconds']:.0f}",
         f"{1e3 * row['exposed_seconds']:.0f}", goal_share(row["hidden"], results["goal"])]
        for row in results["rounds"]
    ]
    head = ["prefill, s", "density", "cache, MB", "fetch alone, ms", "after `done`, ms",
            "hidden, goal"]
    return table(head, rows)


def goal_share(value: float, least: float) -> str:
    """A share, and whether it reaches the goal."""
    return f"{value:.3f} {'>=' if value >= least else '**<**'} {least}"


# ---- scheduling


def scheduling_simulation(results: dict) -> str:
    """Short and long prompts by mix and yield share, alone and in shared runs."""
    rows = []
    for name, mix in results["mixes"].items():
        for row in mix["rows"]:
            short, long = row["short"], row["long"]
            rows.append(
                [name, f"{row['yield_share']:g}", "no" if row["batch_tokens_max"] == 1 else "yes",
                 f"{short['p50_seconds']:.3f} s", f"{short['p99_seconds']:.2f} s",
                 f"{long['p50_seconds']:.2f} s", f"{long['max_seconds']:.2f} s",
                 f"{long['delay_share_max']:.3f}", f"{row['prompts_per_run']:.2f}",
                 f"{100 * row['busy_share']:.0f} %"]
            )
    head = ["short prompts", "yield share", "shared runs", "short p50", "short p99", "long p50",
            "long max", "longest delay by later prompts, share", "prompts per run",
            "device busy"]
    return table(head, rows)


def plot_scheduling(results: dict) -> None:
    """What a yield share gives short prompts and takes from long ones, a panel each."""
    panels = {"short prompts, p99": ("short", "p99_seconds"),
              "long prompts, p50": ("long", "p50_seconds")}
    figure, axes = plt.subplots(1, len(panels), figsize=(8, 3.2))
    for axis, (title, (kind, key)) in zip(axes, panels.items()):
        for color, (name, mix) in zip(("C0", "C1"), results["mixes"].items()):
            for shared in (False, True):
                points = [(row["yield_share"], row[kind][key]) for row in mix["rows"]
                          if (row["batch_tokens_max"] > 1) == shared]
                axis.plot(*zip(*points), color=color, marker="o", markersize=3,
                          linestyle="-" if shared else "--",
                          label=name + (", shared runs" if shared else ""))
        axis.set(title=title, xlabel="yield share", ylim=(0, None))
    axes[0].set_ylabel("arrival to end, s")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=2)
    save(figure, "scheduling_simulation")


def scheduling_cpu(results: dict) -> str:
    """Medians on this machine's CPU, and the rounds' own ratios."""
    rows = []
    for case, of_case in results["cases"].items():
        for server, figures in of_case.items():
            cells = [f"{figures[key]['median']:.2f} s" if key in figures else ""
                     for key in ("short", "short_max", "long", "all")]
            rows.append([case, server, *cells])
    head = ["case", "server", "short", "slowest short", "long", "all eight"]
    spread = [[name, f"{r['median']:.2f}x", f"{r['min']:.2f}x .. {r['max']:.2f}x"]
              for name, r in results["ratios"].items()]
    return table(head, rows) + "\n\n" + table(["ratio", "median", "range over the rounds"], spread)


# ---- the README's table


def headline(all_results: dict[str, dict]) -> str:
    """What a reader should know first, from every results file."""
    rows = []
    if "cpu_attention" in all_results:
        groups = all_results["cpu_attention"]["groups"]
        longest = max((g for g in groups if g["dtype"] == "f32"), key=lambda g: g["length"])
        cases, length = longest["cases"], longest["length"]
        pbs = cases["pbs"]
        rows += [
            [f"dense attention, {length} tokens, f32: speed over torch SDPA",
             f"{cases['dense']['speedup_cpu']:.2f}x"],
            [f"PBS-Attn, {length} tokens, f32, structured heads, density {pbs['density']:.2f}, "
             "selection included: speed over torch SDPA", f"{pbs['speedup_cpu']:.2f}x"],
        ]
    if "cpu_prefill" in all_results:
        group = max(all_results["cpu_prefill"]["groups"], key=lambda g: g["length"])
        label = next(name for name in group["cases"] if name.startswith("density replay"))
        rows.append([f"time to first token, {group['length']} tokens, {label}: speed over dense",
                     f"{group['cases'][label]['speedup_cpu']:.2f}x"])
    if "quality" in all_results:
        cell = all_results["quality"]["results"]["4096"]
        rows.append(["retrieval accuracy of the bundled model, 4096 tokens: dense / PBS-Attn at "
                     f"threshold 0.9 (density {cell['pbs 0.9']['density']:.2f})",
                     f"{cell['dense']['accuracy']:.3f} / {cell['pbs 0.9']['accuracy']:.3f}"])
    if "cpu_memory" in all_results:
        worst = max(abs(row["measured_bytes"] / row["planned_bytes"] - 1)
                    for row in all_results["cpu_memory"]["rows"])
        rows.append(["memory of a prefill: measured peak against the planned bytes",
                     f"within {100 * worst:.2f} %"])
    if "data_plane" in all_results:
        for cell in all_results["data_plane"]["cells"]:
            if cell["peer"] == "pbs" and cell["streams"] == 1 and cell.get("checksums", True):
                rows.append([f"{cell['direction']} over gRPC{crc(cell)}: rate, ratio to raw TCP",
                             f"{cell['gb_per_second']['median']:.2f} GB/s, "
                             f"{cell['ratio_to_tcp']['median']:.2f}x"])
    return table(["on the CPU", "result"], rows)


def save(figure: plt.Figure, name: str) -> None:
    """Writes docs/results/NAME.svg."""
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def methods(results: dict) -> str:
    """Every method beside dense attention."""
    tables = []
    for group in results["groups"]:
        rows = [
            [label, f"{case['density']:.3f}", f"{100 * case['select_share']:.1f} %",
             f"{case['speedup_cpu']:.2f}x"]
            for label, case in group["cases"].items() if label != "dense"
        ]
        head = [f"{group['length']} tokens, {group['title']}", "causal ratio",
                "selection / dense attention", "speed over dense"]
        tables.append(table(head, rows))
    return "\n\n".join(tables)


def revision(results: dict) -> str:
    """The kernels of two commits."""
    rows = [
        [method, *(f"{group['speed_over_before'][method]['cpu']:.2f}x"
                   for group in results["groups"])]
        for method in results["groups"][0]["speed_over_before"]
    ]
    head = [f"speed over commit `{results['before'][:12]}`",
            *(f"{group['length']} tokens" for group in results["groups"])]
    return table(head, rows)


TABLES = {
    "density": (density, plot_density),
    "cpu_attention": (attention, plot_attention),
    "cpu_methods": (methods, None),
    "cpu_revision": (revision, None),
    "cpu_linear": (linear, None),
    "cpu_prefill": (prefill, None),
    "cpu_memory": (memory, None),
    "quality": (quality, plot_quality),
    "data_plane": (data_plane, None),
    "data_plane_shared": (data_plane, None),
    "data_plane_profile": (data_plane_profile, None),
    "kv_overlap": (kv_overlap, None),
    "scheduling_simulation": (scheduling_simulation, plot_scheduling),
    "scheduling_cpu": (scheduling_cpu, None),
}


def fill(page: pathlib.Path, name: str, body: str) -> None:
    """Replaces the table `name` of a page."""
    block = f"<!-- table: {name} -->\n{body}\n<!-- end -->"
    pattern = rf"<!-- table: {name} -->.*?<!-- end -->"
    text, count = re.subn(pattern, lambda _: block, page.read_text(), flags=re.S)
    if count != 1:
        raise SystemExit(f"{page}: {count} places for table {name}")
    page.write_text(text)


def main() -> int:
    """Rewrites the pages."""
    read = {}
    for name, (make, plot) in TABLES.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            print(f"{path.relative_to(ROOT)} does not exist; its table stays", file=sys.stderr)
            continue
        read[name] = results = json.loads(path.read_text())
        fill(PAGE, name, f"{make(results)}\n\n{source(name, results)}")
        if plot:
            plot(results)
    fill(README, "headline", headline(read))
    print(f"wrote {PAGE.relative_to(ROOT)}, {README.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
