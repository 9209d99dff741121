#!/usr/bin/env python3
"""Times the CPU backend beside torch, interleaved in one run, and writes JSON.

    scripts/bench_cpu.sh                     everything (about an hour on 2 cores)
    scripts/bench_cpu.sh --only attention --lengths 4096

Every group of cases runs in rounds: each case once per round, in turn, so that a machine
whose speed drifts slows all of them alike. Figures are medians over the rounds; a ratio
is the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
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


class Worker:
    """A process that prepares and times cases on request."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, line: str) -> dict:
        """Sends one command and returns its reply; raises on an error reply."""
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        reply = json.loads(answer) if answer else {"error": "the worker died"}
        if "error" in reply:
            raise RuntimeError(f"{line}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


class Case:
    """One line of a group: a label, its worker and how it is prepared."""

    def __init__(self, label: str, worker: Worker, command: str):
        self.label, self.worker, self.command = label, worker, command
        self.runs: list[dict] = []

    def summary(self) -> dict:
        """Medians of wall and CPU seconds, and the details of the last run."""
        medians = {
            key: statistics.median(run[key] for run in self.runs)
            for key in ("wall", "cpu")
        }
        spread = [run["wall"] for run in self.runs]
        return {
            **{k: v for k, v in self.runs[-1].items() if k != "ok"},
            **medians,
            "wall_min": min(spread),
            "wall_max": max(spread),
            "rounds": len(spread),
        }


def run_group(title: str, cases: list[Case], rounds: int) -> dict:
    """Interleaves the cases; returns their summaries and ratios to the first case."""
    print(f"{time.strftime('%H:%M:%S')} {title}", file=sys.stderr, flush=True)
    for i, case in enumerate(cases):
        verb, words = case.command.split(" ", 1)
        case.worker.ask(f"{verb} name=c{i} {words}")
    for _ in range(rounds):
        for i, case in enumerate(cases):
            case.runs.append(case.worker.ask(f"run c{i}"))
    for i, case in enumerate(cases):
        case.worker.ask(f"drop c{i}")
    result = {case.label: case.summary() for case in cases}
    for case in cases[1:]:
        for key in ("wall", "cpu"):
            result[case.label][f"speedup_{key}"] = statistics.median(
                first[key] / own[key] for first, own in zip(cases[0].runs, case.runs)
            )
    for label, figures in result.items():
        speedup = figures.get("speedup_cpu")
        print(
            f"    {label:28} {figures['wall']:8.3f} s wall {figures['cpu']:8.3f} s cpu"
            + (f"  {speedup:5.2f}x" if speedup else ""),
            file=sys.stderr,
            flush=True,
        )
    return {"title": title, "cases": result}


def attention_group(
    length: int, dtype: str, ours: Worker, torch: Worker, rounds: int, isa: str = "auto"
) -> dict:
    """Dense, pbs and mean pooling beside torch's SDPA."""
    shape = f"dtype={dtype} len={length} heads={HEADS[length]} head_dim=128"
    shape += f" kv_heads={HEADS[length] // 4}"
    mine = f"attention isa={isa} {shape}"
    cases = [
        Case("torch SDPA", torch, f"attention {shape}"),
        Case("dense", ours, f"{mine} method=dense"),
    ]
    if isa == "auto":
        cases += [
            Case("pbs", ours, f"{mine} method=pbs"),
            Case("mean_pooling", ours, f"{mine} method=mean_pooling"),
            Case("pbs, white noise", ours, f"{mine} method=pbs data=noise"),
        ]
        if length in PUBLISHED_DENSITY:
            density = PUBLISHED_DENSITY[length]
            label = f"pbs, lists forced to {density}"
            cases.append(Case(label, ours, f"{mine} method=pbs density={density}"))
    group = run_group(f"attention {dtype} {length} {isa}", cases, rounds)
    return {**group, "length": length, "dtype": dtype, "isa": isa, "heads": HEADS[length]}


def linear_group(
    shape: tuple, dtype: str, threads: int, ours: Worker, torch: Worker, rounds: int
) -> dict:
    """One linear layer beside torch's."""
    rows, wide, out = shape
    words = f"linear rows={rows} in={wide} out={out} dtype={dtype}"
    title = f"linear {dtype} {rows}x{wide}x{out}, {threads} threads"
    group = run_group(title, [Case("torch", torch, words), Case("ours", ours, words)], rounds)
    return {**group, "shape": shape, "dtype": dtype, "threads": threads}


def prefill_group(length: int, ours: Worker, rounds: int) -> dict:
    """Whole prefill: dense, pbs with real selection, density replay."""
    words = f"prefill len={length}"
    cases = [
        Case("dense", ours, f"{words} method=dense"),
        Case("pbs, real selection", ours, f"{words} method=pbs"),
    ]
    if length in PUBLISHED_DENSITY:
        density = PUBLISHED_DENSITY[length]
        label = f"density replay {density}"
        cases.append(Case(label, ours, f"{words} method=pbs density={density}"))
    return {**run_group(f"prefill {length}", cases, rounds), "length": length}


def machine() -> dict:
    """What the figures were measured on."""
    info = {"system": platform.platform(), "cpus": os.cpu_count()}
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "flags", "cpu MHz", "model", "cpu family"):
            info.setdefault(key.strip(), value.strip())
    wanted = {"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}
    info["flags"] = sorted(wanted & set(info.get("flags", "").split()))
    return info


def commit() -> str:
    """The commit the benchmark ran at; "+changes" when the tree differed from it."""
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("+changes" if dirty else "")


def main() -> None:
    """Runs the chosen sections and writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, help="folder for the prefill section")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    sections = ["attention", "avx2", "linear", "prefill"]
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    arguments = parser.parse_args()

    def start(threads: int, peer: bool, environment: dict | None = None) -> Worker:
        program = (
            [sys.executable, str(pathlib.Path(__file__).with_name("torch_worker.py"))]
            if peer
            else [str(arguments.build / "bin/bench_worker")]
        )
        return Worker([*program, "--threads", str(threads)], environment)

    results: dict[str, object] = {
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(sys.argv[1:]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    rounds = arguments.rounds
    if "attention" in arguments.only:
        ours, torch = start(1, False), start(1, True)
        results["attention"] = [
            attention_group(length, dtype, ours, torch, rounds if length < 16384 else 3)
            for dtype in ("f32", "bf16")
            for length in arguments.lengths
        ]
        ours.close(), torch.close()
    if "avx2" in arguments.only:
        ours, torch = start(1, False), start(1, True, AVX2_ONLY)
        results["avx2"] = [
            attention_group(length, dtype, ours, torch, rounds, isa="avx2")
            for dtype in ("f32", "bf16")
            for length in arguments.lengths[:1]
        ]
        ours.close(), torch.close()
    if "linear" in arguments.only:
        results["linear"] = []
        for threads in (1, 2):
            ours, torch = start(threads, False), start(threads, True)
            results["linear"] += [
                linear_group(shape, dtype, threads, ours, torch, 2 * rounds + 1)
                for dtype in ("f32", "bf16")
                for shape in LINEAR_SHAPES
            ]
            ours.close(), torch.close()
    if "prefill" in arguments.only:
        ours = start(os.cpu_count(), False)
        loaded = ours.ask(f"model path={arguments.model}")
        results["prefill_model"] = {"path": arguments.model.name, **loaded}
        results["prefill"] = [
            prefill_group(length, ours, 3 if length <= 8192 else 2)
            for length in arguments.lengths
        ]
        ours.close()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
