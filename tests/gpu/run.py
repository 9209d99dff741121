#!/usr/bin/env python3
"""The one runner of a machine with a GPU: an ordered list of steps within a budget.

    python3 tests/gpu/run.py --budget 200 --to variants    the first call
    python3 tests/gpu/run.py --budget 450 --from lengths   the second

It takes what scripts/pack_gpu.sh made (--pack) and puts results and logs into one tar,
after every step and meanwhile (--out, by default gpu_run.tar.gz in $OUT, else in build);
docs/BENCHMARKS.md, "Attention on a GPU", says how. The last line of a call with a gate is
"go on: ..." or "stop: ...".

--rehearse: the same in small without a GPU, on an emulated device, with plain torch for
peers and servers on the CPU. Needs Python alone, its steps what they say. Exit status 1 when
anything was not right.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import machine
from machine import ROOT
from progress import LOST, WRONG, ended, is_wrong

SAVE_SECONDS = 15  # between two tars, at most
CLOSE_SECONDS = 4  # for the last one
OVER_SECONDS = 30  # that a step may take beyond what it was told, before it is ended
FIRST_OVER_SECONDS = 90  # of the first one, without which nothing runs: the disk is cold
FITS = 0.8  # of its seconds a step is begun with
ATTEMPTS, ATTEMPT_SECONDS_MIN = 4, 5  # of a step that a call ends
DIAGNOSIS, DIAGNOSIS_SECONDS = "correctness.py diagnose", 30
TAIL_LINES = 6  # of the log of what failed
LOG_BYTES_MAX = 512 << 10  # of each, its end
WORK_BYTES_MIN = 12 << 30  # a model of eight layers, and the package
BAD = ("WRONG", "failed", "out of time")
CLOCKS = "--query-gpu=clocks.sm,utilization.gpu,power.draw,clocks_event_reasons.active"
SAMPLE_CLOCKS = ["nvidia-smi", CLOCKS, "--format=csv,noheader,nounits", "-lms", "500"]


@dataclasses.dataclass(frozen=True)
class Step:
    """A script of this folder, which writes NAME.json, or another program. What it says is
    in logs/NAME.log."""

    name: str
    seconds: int  # planned
    command: str
    needs: tuple[str, ...] = ()
    is_of_kernels: bool = False  # is diagnosed
    is_gate: bool = False  # nothing runs behind it when anything was wrong by then
    over: int = OVER_SECONDS


def attention(name: str, seconds: int, **more) -> Step:
    """A step of attention.py."""
    return Step(name, seconds, f"attention.py {name}", RUN, is_of_kernels=True, **more)


RUN, SERVE, MODEL = ("machine", "programs"), ("unpack",), ("unpack", "model")
TESTS = "python -m pytest -q -p no:cacheprovider {root}/tests/python/test_"
PRESET = "--preset llama-3.1-8b --layers 8 --rope default --torch cuda --shard-size 1GB"
PROFILE = (
    "ncu --clock-control none --log-file {work}/logs/counters.txt -c 10 -k regex:Attend|RunKernel "
    "--section SpeedOfLight --section Occupancy --section WarpStateStats "
    "--section MemoryWorkloadAnalysis {python} {root}/tests/gpu/attention.py kernels "
    "--seconds 20 --out {work}/logs/kernels.json"  # slow: no figures of these results
)
SANITIZE = (
    "compute-sanitizer --error-exitcode 3 {programs}/check_attention --random 0 "
    "--only pbs_bf16_d128_h4x2 --only mean_pooling_f16_d64 --only dense_f16_d256"
)
STEPS = [
    # The first call.
    Step("machine", 8, "machine.py check", over=FIRST_OVER_SECONDS),
    # Where the programs that were brought do not start.
    Step("build", 170, "bash {root}/scripts/pack_gpu.sh --programs {work}/programs", ("machine",)),
    Step("correct", 30, "correctness.py families", RUN, is_of_kernels=True),
    attention("gate", 17, is_gate=True),
    attention("d128_32k", 45),
    attention("d128_128k", 40),
    attention("variants", 45),
    # The second.
    attention("lengths", 40),
    attention("noise", 15),
    attention("methods", 15),
    attention("d64_32k", 35),
    Step("unpack", 10, "machine.py unpack", ("machine",)),
    Step("tests", 50, TESTS + "golden_parity.py {root}/tests/python/test_served_models.py", SERVE),
    Step("handoff", 15, TESTS + "handoff.py", SERVE),
    Step("linear", 30, "served.py linear", SERVE),
    Step("model", 20, "python {root}/tests/models/make_random_model.py --out {work}/model {preset}", ("machine",)),
    Step("ttft", 125, "served.py ttft", MODEL),
    Step("concurrent", 25, "served.py concurrent", MODEL),
    Step("counters", 30, PROFILE, RUN),
    Step("sanitize", 25, SANITIZE, RUN),
]  # fmt: skip
NAMES = [step.name for step in STEPS]


def select(first: str, last: str, only: list[str]) -> list[Step]:
    """From a step to another one, or some; with what they need, in order."""
    wanted = set(only or NAMES[NAMES.index(first) : NAMES.index(last) + 1]) | {"build"}
    for step in reversed(STEPS):
        wanted |= set(step.needs) if step.name in wanted else set()
    return [step for step in STEPS if step.name in wanted]


def seconds_of(step: Step, later: list[Step], left: float) -> float:
    """What a step is told to take: its plan, and what no later one that still fits plans."""
    spare = left - step.seconds
    for other in later:
        spare -= other.seconds if other.seconds <= spare and other.name != "build" else 0
    return min(left, step.seconds + max(0.0, spare))


def clocks_of(said: str) -> dict:
    """SM clocks of a GPU at work, in MHz, and bits of why they were not higher, of what
    SAMPLE_CLOCKS says."""
    samples = [line.split(", ") for line in said.splitlines()]
    busy = [s for s in samples if len(s) == 4 and s[0].isdigit() and s[1].isdigit() and int(s[1]) > 50]
    clocks = sorted(int(sample[0]) for sample in busy)
    reasons = sorted({sample[3] for sample in busy})
    return {"min": clocks[0], "median": clocks[len(clocks) // 2], "reasons": reasons} if busy else {}


def holds_programs(folder: pathlib.Path) -> bool:
    """Whether they have room there, and may run."""
    there = os.statvfs(folder)
    is_roomy = os.access(folder, os.W_OK) and there.f_bavail * there.f_frsize > WORK_BYTES_MIN
    return is_roomy and not there.f_flag & os.ST_NOEXEC


def read_text(path: pathlib.Path) -> str:
    """Nothing of a file that is not there."""
    return path.read_text(errors="replace") if path.exists() else ""


def read(path: pathlib.Path) -> dict:
    """What a file has; nothing of one that was cut."""
    with contextlib.suppress(ValueError):
        return json.loads(read_text(path))
    return {}


class Runner:
    """One call: its work folder, its tar, and what became of its steps."""

    def __init__(self, arguments: argparse.Namespace, work: pathlib.Path):
        self.arguments, self.work, self.begin = arguments, work, time.monotonic()
        self.group: int | None = None  # of the step that runs
        (work / "logs").mkdir(parents=True)
        self.clocks, self.clocks_seen = None, 0
        with contextlib.suppress(OSError), open(work / "logs/clocks.csv", "w") as log:
            self.clocks = subprocess.Popen(SAMPLE_CLOCKS, stdout=log, stderr=log)
        commit = arguments.pack / "commit"
        self.results: dict = {
            "rehearsal": arguments.rehearse, "gpu": machine.query_gpu(), "gpu_after": None,
            "commit": commit.read_text().strip() if commit.exists() else "unknown",
            "command": " ".join(["tests/gpu/run.py", *sys.argv[1:]]),
            "budget": arguments.budget, "done": False, "facts": {}, "steps": [], "rows": [],
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip
        paths = [work / "python", *(ROOT / f for f in ("client/python", "tests/python", "tests/bench"))]
        own = {
            "PBS_TEST_BACKEND": "cpu" if arguments.rehearse else "cuda", "PBS_BIN": work / "package/bin",
            "PBS_GPU_PACK": arguments.pack, "PBS_GPU_WORK": work, "PYTHONUNBUFFERED": "1",
            "PBS_REHEARSAL": "1" if arguments.rehearse else "0", "TRITON_CACHE_DIR": work / "triton",
            "PBS_TINY_MODELS": arguments.pack / "tiny-models", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        self.environment = os.environ | {name: str(value) for name, value in own.items()}

    def left(self) -> float:
        """Seconds of the budget."""
        return self.begin + self.arguments.budget - CLOSE_SECONDS - time.monotonic()

    def save(self) -> None:
        """Writes the tar, at once or not at all."""
        results = self.results | {"seconds": round(time.monotonic() - self.begin, 1), "rows": []}
        for file in sorted(self.work.glob("*.json"), key=lambda path: path.stat().st_mtime):
            more = {"step": file.stem} | ({"rehearsal": True} if self.arguments.rehearse else {})
            found = read(file)
            rows = found.get("rows", []) + [ended(call) for call in [found.get("running")] if call]
            results["rows"] += [row | more for row in rows]
        (self.work / "results").write_text(json.dumps(results, indent=1) + "\n")
        draft = self.arguments.out.with_suffix(".part")
        with tarfile.open(draft, "w:gz") as tar:
            tar.add(self.work / "results", "gpu_run/results.json")
            for file in [*self.work.glob("*.json"), *self.work.glob("logs/*")]:
                entry = tarfile.TarInfo(f"gpu_run/{file.relative_to(self.work)}")
                entry.size = min(file.stat().st_size, LOG_BYTES_MAX)
                with open(file, "rb") as log:
                    log.seek(-entry.size, os.SEEK_END)
                    tar.addfile(entry, log)
        os.replace(draft, self.arguments.out)

    def run(self, step: Step, seconds: float) -> int | None:
        """Status of a command in a group of its own, of which nothing is left behind; None
        when its time was over."""
        name, end = step.name, time.monotonic() + min(self.left(), seconds + step.over)
        places = {"root": ROOT, "work": self.work, "python": sys.executable,
                  "programs": self.work / "programs",
                  "preset": "--preset tiny" if self.arguments.rehearse else PRESET}  # fmt: skip
        first, *words = step.command.format(**places).split()
        if first.endswith(".py"):
            words = [str(ROOT / "tests/gpu" / first), *words, "--out", str(self.work / f"{name}.json"),
                     "--seconds", f"{seconds - 2:.1f}"]  # fmt: skip
        words = [sys.executable if first.endswith((".py", "python")) else first, *words]
        with open(self.work / f"logs/{name}.log", "a") as log:
            process = subprocess.Popen(
                words, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        self.group, status = process.pid, None
        while status is None and time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(max(0.05, min(SAVE_SECONDS, end - time.monotonic())))
            if status is None:
                self.save()
        self.end_group()
        return status

    def end_group(self) -> None:
        """Servers and peers, too."""
        if self.group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)
        self.group = None

    def run_step(self, step: Step, seconds: float) -> tuple[str, str]:
        """What became of it, and why. A process that a call ended is followed by one that
        carries on behind it."""
        begin, status = time.monotonic(), None
        for _ in range(ATTEMPTS):
            left = max(ATTEMPT_SECONDS_MIN, begin + seconds - time.monotonic())
            try:
                status = self.run(step, left)
            except FileNotFoundError as error:
                return "not here", str(error)
            called = read(self.work / f"{step.name}.json").get("running")
            carries_on = (called or status == LOST) and left > ATTEMPT_SECONDS_MIN
            if status in (0, WRONG, None) or not carries_on:
                break
        if status is None:
            found = "WRONG" if any(map(is_wrong, self.rows(step.name))) else "out of time"
            return found, f"ended after {time.monotonic() - begin:.0f} s"
        if status in (0, WRONG):
            return ("right" if status == 0 else "WRONG"), ""
        if not step.command.startswith(("ncu", "compute-sanitizer")):
            return "failed", f"status {status}"
        # A tool ends as its program does: check_attention counts what is wrong.
        is_wrong_case = re.search(r'"wrong": [1-9]', read_text(self.work / f"logs/{step.name}.log"))
        return "WRONG" if is_wrong_case else "not here", f"status {status}"

    def rows(self, name: str) -> list[dict]:
        """What a step has found."""
        return read(self.work / f"{name}.json").get("rows", [])

    def lacks(self, step: Step) -> str:
        """What an earlier step did not make."""
        became = {entry["name"]: entry["status"] for entry in self.results["steps"]}
        if self.results["facts"].get("programs") or became.get("build") == "right":
            became["programs"] = "right"
        bad = [need for need in step.needs if became.get(need) != "right"]
        return f"it needs {bad[0]}: {became.get(bad[0], 'not there')}" if bad else ""

    def note(self, name: str, status: str, why: str, seconds: float, planned: int) -> None:
        """Keeps and prints what became of a step."""
        found = read(self.work / f"{name}.json")
        said = list(found.get("said", []))
        if status in BAD or not found:
            said += read_text(self.work / f"logs/{name}.log").splitlines()[-TAIL_LINES:]
        facts = self.results["facts"] | found.get("facts", {})
        sampled = read_text(self.work / "logs/clocks.csv")
        clocks, self.clocks_seen = clocks_of(sampled[self.clocks_seen :]), len(sampled)
        if facts.get("cublaslt") and not self.arguments.rehearse:
            self.environment["PBS_TEST_SERVER_FLAGS"] = f"--set cuda.cublaslt={facts['cublaslt']}"
        self.results["facts"] = facts
        self.results["steps"].append({
            "name": name, "status": status, "why": why, "seconds": round(seconds, 1),
            "planned": planned, "said": said, "clocks": clocks,
        })  # fmt: skip
        at = ", SM at {min} MHz or more, {median} mostly".format(**clocks) if clocks else ""
        print(f"== {name}: {status}{', ' * bool(why)}{why} ({seconds:.1f} s of {planned}{at})")
        print("".join(f"   {line}\n" for line in said), end="", flush=True)
        self.save()

    def run_steps(self, steps: list[Step]) -> None:
        """All of them."""
        stopped = ""
        for index, step in enumerate(steps):
            began, left = time.monotonic(), self.left()
            if step.name == "build" and not self.results["facts"].get("building_may_help"):
                continue
            if why := stopped or self.lacks(step):
                self.note(step.name, "skipped", why, 0, step.seconds)
                continue
            if left < FITS * step.seconds:
                self.note(step.name, "left out", f"{left:.0f} s are left", 0, step.seconds)
                continue
            status, why = self.run_step(step, seconds_of(step, steps[index + 1 :], left))
            self.note(step.name, status, why, time.monotonic() - began, step.seconds)
            began, left = time.monotonic(), min(DIAGNOSIS_SECONDS, self.left())
            if status in BAD and step.is_of_kernels and left > ATTEMPT_SECONDS_MIN:
                diagnosis = Step(f"{step.name}.diagnosis", DIAGNOSIS_SECONDS, DIAGNOSIS)
                became = self.run_step(diagnosis, left)
                self.note(diagnosis.name, *became, time.monotonic() - began, diagnosis.seconds)
            if step.is_gate and not self.arguments.keep_going:
                stopped = self.verdict(step)[0]
                stopped += f": stopped at {step.name}" * bool(stopped)

    def verdict(self, gate: Step) -> tuple[str, str]:
        """What speaks against going on, and what does not but should be known: variants that
        are wrong, and on a slow machine what there was no time for, if the rest was right.
        The gate has to be right, all of it."""
        stop, know = [], []
        for entry in self.results["steps"]:
            name, status, rows = entry["name"], entry["status"], self.rows(entry["name"])
            know += [f"{row['family']} not all checked" for row in rows if row.get("finished") is False]
            is_wrong_row = any(is_wrong(row) and ":" not in row.get("name", "") for row in rows)
            was_right = any(row.get("right") for row in rows) and not is_wrong_row
            if name == gate.name and status != "right":
                stop.append(f"{name} {status}")
            elif status == "left out" or status in ("out of time", "WRONG") and was_right:
                know.append(f"{name} {status}")
            elif status in BAD and "diagnosis" not in name:
                stop.append(f"{name} {status}")
        return ", ".join(stop), ", ".join(know)

    def close(self, steps: list[Step]) -> int:
        """The last tar and the table of steps; the exit status."""
        self.results["done"] = True
        self.save()  # first: the driver may not answer any more
        self.results["gpu_after"] = machine.query_gpu()
        self.save()
        out, entries = self.arguments.out, self.results["steps"]
        mark, seconds = "REHEARSAL, no GPU: " * self.arguments.rehearse, time.monotonic() - self.begin
        print(f"\n{mark}{out}, {out.stat().st_size >> 10} KiB, {seconds:.0f} s of "
              f"{self.arguments.budget:.0f}")  # fmt: skip
        print(f"{'step':24} {'status':12} {'seconds':>8} {'planned':>8}  why")
        for entry in entries:
            print(f"{entry['name']:24} {entry['status']:12} {entry['seconds']:8.1f} "
                  f"{entry['planned']:8}  {entry['why']}")
        for gate in (step for step in steps if step.is_gate):
            stop, know = self.verdict(gate)
            know = f", but: {know}" * bool(know)
            print(f"stop: {stop}" if stop else f"go on: {gate.name} is right{know}")
        return int(any(entry["status"] in BAD for entry in entries))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = pathlib.Path(os.environ.get("OUT") or ROOT / "build")
    parser.add_argument("--budget", type=float, default=530, help="seconds, for all of it")
    parser.add_argument("--from", dest="first", choices=NAMES, default=NAMES[0])
    parser.add_argument("--to", dest="last", choices=NAMES, default=NAMES[-1])
    parser.add_argument("--only", choices=NAMES, action="append", default=[])
    parser.add_argument("--pack", type=pathlib.Path, default=machine.PACK)
    parser.add_argument("--out", type=pathlib.Path, default=folder / "gpu_run.tar.gz")
    parser.add_argument("--keep-going", action="store_true", help="behind a gate that is wrong")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    return parser.parse_args()


def main() -> int:
    """The exit status."""
    arguments = parse()
    steps = select(arguments.first, arguments.last, arguments.only)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    memory = pathlib.Path("/dev/shm")
    folder = memory if holds_programs(memory) else None
    work = pathlib.Path(tempfile.mkdtemp(prefix="pbs-gpu-", dir=folder))
    runner = Runner(arguments, work / "run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        runner.run_steps(steps)
        return runner.close(steps)
    finally:
        runner.end_group()
        if runner.clocks:
            runner.clocks.kill()
        runner.save()
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
