#!/usr/bin/env python3
"""The one runner of a machine with a GPU: an ordered list of steps within a budget.

    python3 tests/gpu/run.py --budget 200 --to variants    the first call
    python3 tests/gpu/run.py --budget 450 --from lengths   the second
    python3 tests/gpu/run.py --list                        the steps

It takes what scripts/pack_gpu.sh made (--pack). Each step is a process group with a limit:
one that hangs or crashes costs its own results, and what it had written stays. A step that
no longer fits is left out, one that lacks what an earlier one makes is skipped, and both
are named. A step of kernels that fails is diagnosed; nothing runs behind a gate that is
wrong (--keep-going). Results and logs go into one tar, after every step and meanwhile
(--out, by default gpu_run.tar.gz in $OUT, else in build).

--rehearse: the same in small without a GPU, on an emulated device, with plain torch for
peers and servers on the CPU.

Needs Python alone, its steps what they say. Exit status 1 when anything was not right.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import machine
from machine import ROOT
from progress import LOST, WRONG, ended

SAVE_SECONDS = 15  # between two tars, at most
CLOSE_SECONDS = 4  # for the last one
OVER_SECONDS = 30  # that a step may take beyond what it was told, before it is ended
FITS = 0.8  # of its seconds a step is begun with
ATTEMPTS, ATTEMPT_SECONDS_MIN = 4, 5  # of a step that a call ends
DIAGNOSIS, DIAGNOSIS_SECONDS = "correctness.py diagnose", 25
TAIL_LINES = 6  # of the log of what failed
LOG_BYTES_MAX = 512 << 10  # of each, its end
WORK_BYTES_MIN = 12 << 30  # a model of eight layers, and the package
BAD = ("WRONG", "failed", "out of time")


@dataclasses.dataclass(frozen=True)
class Step:
    """A script of this folder, which writes NAME.json, or another program."""

    name: str
    seconds: int  # planned
    command: str
    needs: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()  # besides NAME.json and logs/NAME.log
    is_of_kernels: bool = False  # is diagnosed
    is_gate: bool = False  # nothing runs behind it when anything was wrong by then

    def files(self) -> list[str]:
        """All that it writes."""
        is_script = self.command.partition(" ")[0].endswith(".py")
        return [f"{self.name}.json"] * is_script + [f"logs/{self.name}.log", *self.writes]


def attention(name: str, seconds: int, **more) -> Step:
    """A step of attention.py."""
    return Step(name, seconds, f"attention.py {name}", RUN, is_of_kernels=True, **more)


RUN, SERVE, MODEL = ("machine", "programs"), ("unpack",), ("unpack", "model")
TESTS = "python -m pytest -q -p no:cacheprovider {root}/tests/python/test_"
PRESET = "--preset llama-3.1-8b --layers 8 --rope default --torch cuda --shard-size 1GB"
MAKE_MODEL = "python {root}/scripts/make_random_model.py --out {work}/model {preset}"
PROFILE = (
    "ncu --clock-control none --log-file {work}/logs/counters.txt -c 10 -k regex:Attend|RunKernel "
    "--section SpeedOfLight --section Occupancy --section WarpStateStats "
    "--section MemoryWorkloadAnalysis {python} {root}/tests/gpu/attention.py kernels "
    "--seconds 20 --out {work}/kernels.json"
)
SANITIZE = (
    "compute-sanitizer --error-exitcode 3 {programs}/check_attention --random 0 "
    "--only pbs_bf16_d128_h4x2 --only mean_pooling_f16_d64 --only dense_f16_d256"
)
STEPS = [
    # The first call.
    Step("machine", 8, "machine.py check"),
    # Where the programs that were brought do not start.
    Step("build", 170, "bash {root}/scripts/pack_gpu.sh --programs {work}/programs", ("machine",)),
    Step("correct", 30, "correctness.py families", RUN, ("logs/check_attention.jsonl",),
         is_of_kernels=True),
    attention("gate", 17, is_gate=True),
    attention("d128_32k", 45),
    attention("d128_128k", 40),
    attention("variants", 45),
    # The second.
    attention("lengths", 40),
    attention("noise", 15),
    attention("d64_32k", 35),
    Step("unpack", 10, "machine.py unpack", ("machine",)),
    Step("tests", 50, TESTS + "golden_parity.py {root}/tests/python/test_served_models.py", SERVE),
    Step("handoff", 15, TESTS + "handoff.py", SERVE),
    Step("linear", 30, "served.py linear", SERVE),
    Step("model", 20, MAKE_MODEL, ("machine",)),
    Step("ttft", 125, "served.py ttft", MODEL),
    Step("concurrent", 25, "served.py concurrent", MODEL),
    Step("counters", 30, PROFILE, RUN, ("logs/counters.txt",)),
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


def read(path: pathlib.Path) -> dict:
    """What a file has; nothing of one that is not there or was cut."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


class Runner:
    """One call: its work folder, its tar, and what became of its steps."""

    def __init__(self, arguments: argparse.Namespace, work: pathlib.Path):
        self.arguments, self.work, self.begin = arguments, work, time.monotonic()
        self.group: int | None = None  # of the step that runs
        (work / "logs").mkdir(parents=True)
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

    def run(self, command: str, seconds: float, name: str) -> int | None:
        """Status of a command in a group of its own, of which nothing is left behind; None
        when its time was over."""
        end = time.monotonic() + min(self.left(), seconds + OVER_SECONDS)
        places = {"root": ROOT, "work": self.work, "python": sys.executable,
                  "programs": self.results["facts"].get("programs"),
                  "preset": "--preset tiny" if self.arguments.rehearse else PRESET}  # fmt: skip
        first, *words = command.format(**places).split()
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
                status = self.run(step.command, left, step.name)
            except FileNotFoundError as error:
                return "not here", str(error)
            called = read(self.work / f"{step.name}.json").get("running")
            carries_on = (called or status == LOST) and left > ATTEMPT_SECONDS_MIN
            if status in (0, WRONG, None) or not carries_on:
                break
        if status is None:
            return "out of time", f"ended after {time.monotonic() - begin:.0f} s"
        if status in (0, WRONG):
            return ("right" if status == 0 else "WRONG"), ""
        is_tool = step.command.startswith(("ncu", "compute-sanitizer"))
        return ("not here" if is_tool else "failed"), f"status {status}"

    def lacks(self, step: Step) -> str:
        """What an earlier step did not make."""
        became = {entry["name"]: entry["status"] for entry in self.results["steps"]}
        became |= {"programs": "right"} if self.results["facts"].get("programs") else {}
        bad = [need for need in step.needs if became.get(need) != "right"]
        return f"it needs {bad[0]}: {became.get(bad[0], 'not there')}" if bad else ""

    def note(self, name: str, status: str, why: str, seconds: float, planned: int) -> None:
        """Keeps and prints what became of a step."""
        found, log = read(self.work / f"{name}.json"), self.work / f"logs/{name}.log"
        said = list(found.get("said", []))
        if (status in BAD or not found) and log.exists():
            said += log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        facts = self.results["facts"] | found.get("facts", {})
        if (name, status) == ("build", "right"):
            facts["programs"] = str(self.work / "programs")
        if facts.get("cublaslt") and not self.arguments.rehearse:
            self.environment["PBS_TEST_SERVER_FLAGS"] = f"--set cuda.cublaslt={facts['cublaslt']}"
        self.results["facts"] = facts
        self.results["steps"].append({
            "name": name, "status": status, "why": why, "seconds": round(seconds, 1),
            "planned": planned, "said": said,
        })  # fmt: skip
        print(f"== {name}: {status}{', ' * bool(why)}{why} ({seconds:.1f} s of {planned})")
        print("".join(f"   {line}\n" for line in said), end="", flush=True)
        self.save()

    def diagnose(self, step: Step) -> None:
        """Of a step of kernels that failed."""
        seconds, begin = min(DIAGNOSIS_SECONDS, self.left()), time.monotonic()
        if seconds < ATTEMPT_SECONDS_MIN or not (self.work / f"{step.name}.json").exists():
            return
        name = f"{step.name}.diagnosis"
        status = self.run(DIAGNOSIS, seconds, name)
        became = {0: "right", None: "out of time"}.get(status, "failed")
        self.note(name, became, "", time.monotonic() - begin, DIAGNOSIS_SECONDS)

    def run_steps(self, steps: list[Step]) -> None:
        """All of them."""
        stopped = ""
        for index, step in enumerate(steps):
            began, left = time.monotonic(), self.left()
            if step.name == "build" and self.results["facts"].get("programs"):
                continue
            if why := stopped or self.lacks(step):
                self.note(step.name, "skipped", why, 0, step.seconds)
                continue
            if left < FITS * step.seconds:
                self.note(step.name, "left out", f"{left:.0f} s are left", 0, step.seconds)
                continue
            status, why = self.run_step(step, seconds_of(step, steps[index + 1 :], left))
            self.note(step.name, status, why, time.monotonic() - began, step.seconds)
            if status in BAD and step.is_of_kernels:
                self.diagnose(step)
            bad = [entry["name"] for entry in self.results["steps"] if entry["status"] in BAD[:2]]
            if step.is_gate and bad and not self.arguments.keep_going:
                stopped = f"{', '.join(bad)}: stopped at {step.name}"

    def close(self, steps: list[Step]) -> int:
        """The last tar and the table of steps; the exit status."""
        self.results |= {"gpu_after": machine.query_gpu(), "done": True}
        self.save()
        out, entries = self.arguments.out, self.results["steps"]
        with tarfile.open(out) as tar:
            there = {name.removeprefix("gpu_run/") for name in tar.getnames()}
        mark, seconds = "REHEARSAL, no GPU: " * self.arguments.rehearse, time.monotonic() - self.begin
        print(f"\n{mark}{out}, {out.stat().st_size >> 10} KiB, {seconds:.0f} s of "
              f"{self.arguments.budget:.0f}")  # fmt: skip
        print(f"{'step':24} {'status':12} {'seconds':>8} {'planned':>8}  files, why")
        for entry in entries:
            files = [file for step in steps if step.name == entry["name"] for file in step.files()]
            missing = [file for file in files if entry["status"] == "right" and file not in there]
            note = entry["why"] + f"MISSING {', '.join(missing)}" * bool(missing)
            note = note or f"{len(files)} files" * (entry["status"] == "right")
            print(f"{entry['name']:24} {entry['status']:12} {entry['seconds']:8.1f} "
                  f"{entry['planned']:8}  {note}")
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
    parser.add_argument("--list", action="store_true", help="what would run")
    return parser.parse_args()


def main() -> int:
    """The exit status."""
    arguments = parse()
    steps = select(arguments.first, arguments.last, arguments.only)
    for step in steps if arguments.list else []:
        needs, writes = ", ".join(step.needs) or "nothing", ", ".join(step.files())
        print(f"{step.name:12} {step.seconds:4} s  needs {needs}; writes {writes}")
    if arguments.list:
        return 0
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    memory = pathlib.Path("/dev/shm")
    is_roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > WORK_BYTES_MIN
    work = pathlib.Path(tempfile.mkdtemp(prefix="pbs-gpu-", dir=memory if is_roomy else None))
    runner = Runner(arguments, work / "run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        runner.run_steps(steps)
        return runner.close(steps)
    finally:
        runner.end_group()
        runner.save()
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
