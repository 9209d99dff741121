"""What the benchmark drivers share: workers, interleaved rounds, result files."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"


class WorkerDiedError(RuntimeError):
    """A worker that has ended: it answers nothing any more."""


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

    def ask(self, command: str, **words: object) -> dict:
        """Sends one command and returns its reply.

        RuntimeError on an error reply; WorkerDiedError where there is none.
        """
        line = json.dumps({"do": command, **words})
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            raise WorkerDiedError(f"{line}: the worker died")
        reply = json.loads(answer)
        if "error" in reply:
            raise RuntimeError(f"{line}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):  # what a dead one has not read
            self._process.stdin.close()
        self._process.wait()


class Case:
    """One line of a group: a label, its worker and how it is prepared."""

    def __init__(self, label: str, worker: Worker, command: str, **words: object):
        self.label, self.worker = label, worker
        self.command, self.words = command, words
        self.runs: list[dict] = []

    def summary(self) -> dict:
        """Medians of wall, CPU and TTFT seconds, and the details of the last run."""
        medians = {
            key: statistics.median(run[key] for run in self.runs)
            for key in ("wall", "cpu", "ttft")
            if key in self.runs[-1]
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
        case.worker.ask(case.command, name=f"c{i}", **case.words)
    for _ in range(rounds):
        for i, case in enumerate(cases):
            case.runs.append(case.worker.ask("run", name=f"c{i}"))
    for i, case in enumerate(cases):
        case.worker.ask("drop", name=f"c{i}")
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
    """The commit of the tree; "+changes" when what can be measured differs from it."""
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # What benchmarks and their report write themselves changes no figure.
        unmeasured = (":(exclude)docs", ":(exclude)README.md")
        status = ("status", "--porcelain", "--untracked-files=no", "--", ".")
        dirty = git(*status, *unmeasured)
        return git("rev-parse", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_header() -> dict:
    """What a run is, for write_results(). To be asked for when the run begins.

    The command is what the scripts say they were called with (PBS_BENCH_COMMAND).
    """
    command = os.environ.get("PBS_BENCH_COMMAND", " ".join(sys.argv))
    return {"machine": machine(), "commit": commit(), "command": command}


def write_results(name: str, header: dict, figures: dict) -> pathlib.Path:
    """Writes docs/results/NAME.json: machine, commit, command, time, figures."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    written = {"written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    path.write_text(json.dumps({**header, **written, **figures}, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    return path
