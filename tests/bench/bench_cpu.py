#!/usr/bin/env python3
"""Times the CPU backend beside torch, interleaved in one run, and writes JSON.

    scripts/bench.sh cpu                          everything (about 40 minutes on 2 cores)
    scripts/bench.sh cpu --only attention --lengths 4096

Every group of cases runs in rounds: each case once per round, in turn, so that a machine
whose speed drifts slows all of them alike. Figures are medians over the rounds; a ratio
is the median of the rounds' own ratios. Each section writes a file of its own under
docs/results.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from bench_common import ROOT, Case, Worker, run_group, run_header, write_results

LENGTHS = [4096, 8192, 16384, 32768]
# Query heads so that a run takes seconds at every length; groups of four per KV head.
HEADS = {4096: 16, 8192: 8, 16384: 4, 32768: 4}
PUBLISHED_DENSITY = {8192: 0.58, 16384: 0.485, 32768: 0.405}
LINEAR_SHAPES = [(512, 4096, 4096), (2048, 2048, 8192), (2048, 8192, 2048)]
AVX2_ONLY = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def attention_group(
    length: int, dtype: str, ours: Worker, torch: Worker, rounds: int, isa: str = "auto"
) -> dict:
    """Dense, pbs and mean pooling beside torch's SDPA."""
    shape = {
        "dtype": dtype,
        "len": length,
        "heads": HEADS[length],
        "kv_heads": HEADS[length] // 4,
        "head_dim": 128,
    }

    def mine(label: str, method: str, **words: object) -> Case:
        return Case(label, ours, "attention", **shape, isa=isa, method=method, **words)

    cases = [
        Case("torch SDPA", torch, "attention", **shape),
        mine("dense", "dense"),
    ]
    if isa == "auto":
        cases += [
            mine("pbs", "pbs"),
            mine("mean_pooling", "mean_pooling"),
            mine("pbs, white noise", "pbs", data="noise"),
        ]
        if length in PUBLISHED_DENSITY:
            density = PUBLISHED_DENSITY[length]
            cases.append(mine(f"pbs, lists forced to {density}", "pbs", density=density))
    group = run_group(f"attention {dtype} {length} {isa}", cases, rounds)
    return {**group, "length": length, "dtype": dtype, "isa": isa, "heads": HEADS[length]}


# The methods with their defaults, and settings with which they select every block.
METHODS = {
    "pbs": {"method": "pbs"},
    "pbs, tail of 2": {"method": "pbs", "dense_tail_blocks": 2},
    "mean_pooling": {"method": "mean_pooling"},
    "mean_pooling, corrected": {"method": "mean_pooling", "mean_correction": 1},
    "xattention": {"method": "xattention"},
    "flexprefill": {"method": "flexprefill"},
    "flexprefill, query aware": {"method": "flexprefill", "tau": 1},
    "prism": {"method": "prism"},
    "flashprefill": {"method": "flashprefill"},
    "minference": {"method": "minference"},
}
EVERY_BLOCK = {
    "pbs": {"method": "pbs", "threshold": 1},
    "mean_pooling": {"method": "mean_pooling", "threshold": 1},
    "xattention": {"method": "xattention", "threshold": 1},
    "flexprefill": {"method": "flexprefill", "gamma": 1},
    "prism": {"method": "prism", "threshold": 1},
    "flashprefill": {"method": "flashprefill", "alpha": 1e-30},
    "minference": {"method": "minference", "slash_tokens": 1 << 20},
}


def methods_group(
    title: str, settings: dict[str, dict], length: int, ours: Worker, rounds: int
) -> dict:
    """Methods beside dense attention, f32."""
    shape = {"len": length, "heads": 2, "kv_heads": 1, "head_dim": 128}
    cases = [Case("dense", ours, "attention", **shape, method="dense")] + [
        Case(label, ours, "attention", **shape, **words) for label, words in settings.items()
    ]
    group = run_group(f"{title}, {length} tokens", cases, rounds)
    dense = group["cases"]["dense"]["attend"]
    for figures in group["cases"].values():
        figures["select_share"] = figures["select"] / dense
    return {**group, "title": title, "length": length}


def linear_group(
    shape: tuple, dtype: str, threads: int, ours: Worker, torch: Worker, rounds: int
) -> dict:
    """One linear layer beside torch's."""
    rows, wide, out = shape
    words = {"rows": rows, "in": wide, "out": out, "dtype": dtype}
    title = f"linear {dtype} {rows}x{wide}x{out}, {threads} threads"
    cases = [
        Case("torch", torch, "linear", **words),
        Case("ours", ours, "linear", **words),
    ]
    group = run_group(title, cases, rounds)
    return {**group, "shape": shape, "dtype": dtype, "threads": threads}


def prefill_group(length: int, ours: Worker, rounds: int) -> dict:
    """Whole prefill: dense, pbs with real selection, density replay."""
    words = {"len": length, "warmup": int(length <= 4096)}
    cases = [
        Case("dense", ours, "prefill", **words, method="dense"),
        Case("pbs, real selection", ours, "prefill", **words, method="pbs"),
    ]
    if length in PUBLISHED_DENSITY:
        words |= {"method": "pbs", "density": PUBLISHED_DENSITY[length]}
        cases.append(Case(f"density replay {words['density']}", ours, "prefill", **words))
    return {**run_group(f"prefill {length}", cases, rounds), "length": length}


def memory_row(length: int, worker: Worker) -> dict:
    """What a prefill was planned to take, and what it took."""
    worker.ask("prefill", name="warm", len=1, method="pbs")
    worker.ask("drop", name="warm")
    before = worker.ask("memory")
    worker.ask("prefill", name="p", len=length, method="pbs", warmup=0)
    planned = worker.ask("run", name="p")["planned_bytes"]
    after = worker.ask("memory")
    worker.ask("drop", name="p")
    measured = after["peak_bytes"] - before["resident_bytes"]
    print(f"    {length:6} tokens  planned {planned / 1e6:8.1f} MB  measured "
          f"{measured / 1e6:8.1f} MB  {100 * (measured / planned - 1):+.2f} %", file=sys.stderr)
    return {"length": length, "planned_bytes": planned, "measured_bytes": measured}


class Sections:
    """One method per section of the benchmark; each returns its figures."""

    def __init__(self, arguments: argparse.Namespace, header: dict):
        self.arguments, self.header = arguments, header

    def ours(self, threads: int) -> Worker:
        """A worker of the backend under test."""
        binary = self.arguments.build / "bin/bench_worker"
        return Worker([str(binary), "--threads", str(threads)])

    def torch(self, threads: int, environment: dict[str, str] | None = None) -> Worker:
        """A worker of the peer."""
        script = pathlib.Path(__file__).with_name("torch_worker.py")
        return Worker([sys.executable, str(script), "--threads", str(threads)], environment)

    def model(self) -> Worker:
        """A worker with the model loaded and every CPU."""
        worker = self.ours(os.cpu_count() or 1)
        worker.ask("model", path=str(self.arguments.model))
        return worker

    def attention(self) -> dict:
        """Attention, one thread each."""
        ours, torch = self.ours(1), self.torch(1)
        rounds = self.arguments.rounds
        groups = [
            attention_group(length, dtype, ours, torch, rounds if length < 16384 else 3)
            for dtype in ("f32", "bf16")
            for length in self.arguments.lengths
        ]
        ours.close(), torch.close()
        torch = self.torch(1, AVX2_ONLY)
        ours = self.ours(1)
        groups += [
            attention_group(length, dtype, ours, torch, rounds, isa="avx2")
            for dtype in ("f32", "bf16")
            for length in self.arguments.lengths[:1]
        ]
        ours.close(), torch.close()
        return {"groups": groups}

    def methods(self) -> dict:
        """Every method beside dense attention, one thread."""
        ours, length = self.ours(1), max(self.arguments.lengths)
        groups = [
            methods_group("defaults", METHODS, length, ours, 3),
            methods_group("every block selected", EVERY_BLOCK, length // 4, ours, 5),
        ]
        ours.close()
        return {"groups": groups}

    def linear(self) -> dict:
        """Linear layers, one thread and two."""
        groups = []
        for threads in (1, 2):
            ours, torch = self.ours(threads), self.torch(threads)
            groups += [
                linear_group(shape, dtype, threads, ours, torch, 2 * self.arguments.rounds + 1)
                for dtype in ("f32", "bf16")
                for shape in LINEAR_SHAPES
            ]
            ours.close(), torch.close()
        return {"groups": groups}

    def prefill(self) -> dict:
        """Time to first token of the model, all CPUs. Long prompts take minutes each."""
        ours = self.model()
        figures = {"model": self.arguments.model.name, "groups": []}
        for length in self.arguments.lengths:
            rounds = self.arguments.rounds if length <= 4096 else 1
            figures["groups"].append(prefill_group(length, ours, rounds))
            write_results("cpu_prefill", self.header, figures)  # what is measured is kept
        ours.close()
        return figures

    def memory(self) -> dict:
        """Planned and measured bytes of a prefill, each in a process of its own."""
        rows = []
        for length in self.arguments.lengths:
            worker = self.model()
            rows.append(memory_row(length, worker))
            worker.close()
        return {"model": self.arguments.model.name, "rows": rows}


def main() -> None:
    """Runs the chosen sections and writes their results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--model", type=pathlib.Path, help="for prefill and memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    names = ["attention", "methods", "linear", "prefill", "memory"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    if arguments.model is None and {"prefill", "memory"} & set(arguments.only):
        parser.error("--model is needed for the sections prefill and memory")
    header = run_header()
    sections = Sections(arguments, header)
    for name in arguments.only:
        write_results(f"cpu_{name}", header, getattr(sections, name)())


if __name__ == "__main__":
    main()
