#!/usr/bin/env python3
"""Attention against the reference (check_attention), and what is wrong where it is not.

    python3 tests/gpu/correctness.py families|diagnose --out FILE.json --seconds N

families: all kinds of kernels in processes side by side; one that a case ends is followed
by one that begins behind that case. diagnose, with --out STEP.diagnosis.json: of what
STEP.json has of cases that hung, where their kernels wait; then where one tile reads its
keys and values (probe.py).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
import signal
import subprocess
import sys
import time

from machine import REHEARSAL, WORK, program
from progress import Progress, run_part_of

CASE_SECONDS_MAX = 40 if REHEARSAL else 5  # on the device
HUNG_CASES_MAX = 2
FAMILIES = {
    "Hopper, head dim 128": "--random 80 --only _d128_",
    "Hopper, head dim 64": "--random 80 --only _d64_",
    "sm_80, head dims 96 and 256": "--random 40 --only _d96_ --only _d256_",
    "sm_80, head dims 64 and 128": "--random 20 --variant ampere --only _d64_ --only _d128_",
}
if REHEARSAL:  # of each what an emulator has the time for
    REHEARSED = ("poisoned_dense_bf16_d128", "poisoned_dense_bf16_d64", "poisoned_dense_bf16_d96",
                 "bf16_d64_h2x1 --variant ampere")  # fmt: skip
    FAMILIES = {name: f"--random 0 --only {words}" for name, words in zip(FAMILIES, REHEARSED)}


def run(words: list[str], seconds: float, name: str = "check_attention") -> tuple[int | None, list]:
    """Status, None when it was not finished, and the lines that a program printed."""
    said = WORK / f"said_{time.monotonic_ns()}"
    limit = ["--case-seconds", str(CASE_SECONDS_MAX)]
    with open(said, "w") as out:
        process = subprocess.Popen([program(name), *words, *limit], stdout=out)
        try:
            status = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            process.kill()  # one that hangs in its driver may take long to go
            status = None
    with open(WORK / "logs/check_attention.jsonl", "a") as log:
        log.write(said.read_text())
    return status, [json.loads(line) for line in said.read_text().splitlines() if line.endswith("}")]


def check_family(name: str, end: float) -> list[dict]:
    """Its row, and one for every case that is not right."""
    words = FAMILIES[name].split()
    of = {"family": name, "variant": "ampere" if "ampere" in words else "chosen"}
    cases: list[dict] = []
    begun = ended = 0
    while True:
        status, lines = run([*words, "--skip", str(begun)], end - time.monotonic())
        begins = [line for line in lines if "begin" in line]
        cases += [{"kind": "case"} | of | line for line in lines if "case" in line]
        begun += len(begins)
        if status in (0, 1, None) or not begins:
            break
        ended += 1
        if len(cases) < begun:
            hung = status == -signal.SIGALRM
            why = f"over {CASE_SECONDS_MAX} s" if hung else f"status {status}"
            cases.append({"kind": "case"} | of | {
                "case": begins[-1]["begin"], "seed": begins[-1]["seed"], "hung": hung, "right": False,
                "error": f"it ended the process: {why}",
            })  # fmt: skip
    right = sum(case["right"] for case in cases)
    row = {"kind": "family", "cases": len(cases), "right_cases": right, "lost": ended,
           "finished": status in (0, 1), "right": right == len(cases) > 0}  # fmt: skip
    return [of | row, *(case for case in cases if not case["right"])]


def families(progress: Progress, seconds: float) -> None:
    """All of them at once."""
    end = time.monotonic() + seconds
    with concurrent.futures.ThreadPoolExecutor(len(FAMILIES)) as pool:
        for row, *wrong in pool.map(lambda name: check_family(name, end), FAMILIES):
            progress.end(row, *wrong)
            cut = "" if row["finished"] else ", not all checked"
            progress.say(f"{row['family']}: {row['right_cases']} of {row['cases']} cases right, "
                         f"{row['lost']} ended the process{cut}")
            for case in wrong[:3]:
                said = str(case.get("diagnosis", case.get("error", "")))
                progress.say(f"  {case['case']}: " + said.replace("'", ""))


def diagnose(progress: Progress, seconds: float) -> None:
    """Of what a step found wrong."""
    end, folder = time.monotonic() + seconds, pathlib.Path(__file__).parent
    of = progress.path.with_name(progress.path.name.replace(".diagnosis", ""))
    rows = Progress(of).rows  # with the call that was running when its time was over
    hung = [row for row in rows if row.get("hung") or (row.get("ended") and not row.get("peer"))]
    for row in hung[:HUNG_CASES_MAX]:
        # Of a call that was no case: a case of the same kernels.
        case = row.get("case", f"dense_bf16_d{row.get('head_dim', 128)}_h")
        variant = row.get("variant") or row.get("name", "").partition(":")[2] or "chosen"
        words = ["--only", case, "--variant", variant, "--seed", str(row.get("seed", 1))]
        words += ["--random", "1" if case.startswith("random") else "0"]
        status, lines = run(words, CASE_SECONDS_MAX + 3, "check_attention_bounded")
        told = next((line["hang"] for line in lines if "hang" in line), f"nothing, status {status}")
        progress.end({"kind": "hang", "case": case, "says": told})
        progress.say(f"{case} with bounded waits: {told}")
    for variant in ("chosen", "ampere"):  # processes of their own: they may hang, too
        out, left = progress.path.with_name(f"probe.{variant}.json"), max(1.0, end - time.monotonic())
        command = [sys.executable, folder / "probe.py", variant, "--out", out, "--seconds", str(left)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=subprocess.DEVNULL, timeout=left)
        found = Progress(out)
        hung = [row["head_dim"] for row in found.rows if "ended" in row]
        for line in found.found["said"] + [f"one tile, head dim {d}, {variant}: it hung" for d in hung]:
            progress.say(line)


if __name__ == "__main__":
    sys.exit(run_part_of(__doc__, {"families": families, "diagnose": diagnose}))
