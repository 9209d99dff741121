#!/usr/bin/env python3
"""Attention against the reference (check_attention), and what is wrong where it is not.

    python3 tests/gpu/correctness.py families|diagnose --out FILE.json --seconds N

Both in processes side by side. families: of all kinds of kernels; one that a case ends is
followed by one that begins behind that case. diagnose, with --out STEP.diagnosis.json: where
cases and calls that hung in STEP.json wait, and where one tile reads its operands (probe.py).
"""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import subprocess
import sys
import time

from machine import REHEARSAL, WORK, finish, program
from progress import Progress, is_wrong, run_part_of

CASE_SECONDS_MAX = 40 if REHEARSAL else 5  # on the device
HUNG_MAX, START_SECONDS = 2, 10  # of a program and its device
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
        status = finish(subprocess.Popen([program(name), *words, *limit], stdout=out), seconds)
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
            cases.append({"kind": "case"} | of | {
                "case": begins[-1]["begin"], "seed": begins[-1]["seed"], "right": False,
                "error": f"it ended the process: status {status}",
            })  # fmt: skip
    right = sum(case["right"] for case in cases)
    row = {"kind": "family", "cases": len(cases), "right_cases": right, "lost": ended,
           "finished": status in (0, 1), "right": right == len(cases) > 0}  # fmt: skip
    return [of | row, *(case for case in cases if not case["right"])]


def families(progress: Progress, seconds: float) -> None:
    """All of them at once."""
    end = time.monotonic() + seconds
    with concurrent.futures.ThreadPoolExecutor(len(FAMILIES)) as pool:
        checks = [pool.submit(check_family, name, end) for name in FAMILIES]
        for check in concurrent.futures.as_completed(checks):
            row, *wrong = check.result()
            progress.end(row, *wrong)
            cut = "" if row["finished"] else ", not all checked"
            progress.say(f"{row['family']}: {row['right_cases']} of {row['cases']} cases right, "
                         f"{row['lost']} ended the process{cut}")
            for case in wrong[:3]:
                said = str(case.get("diagnosis", case.get("error", "")))
                progress.say(f"  {case['case']}: " + said.replace("'", ""))


def bounded_case(row: dict, seconds: float) -> list[str]:
    """What a case that hung says with waits that end."""
    words = ["--only", row["case"], "--variant", row["variant"], "--seed", str(row["seed"])]
    words += ["--random", "1" if row["case"].startswith("random") else "0"]
    status, lines = run(words, min(seconds, CASE_SECONDS_MAX + START_SECONDS), "check_attention_bounded")
    bad = next((line for line in lines if line.get("right") is False), {"error": f"nothing, status {status}"})
    told = bad.get("hang") or f"no wait of Hopper's kernels is late; {bad.get('error') or 'it is wrong'}"
    return [f"{row['case']} with bounded waits: {told}"]


def script(name: str, part: str, out: pathlib.Path, seconds: float, times: int = 1) -> list[str]:
    """What a script of this folder says, begun again where a call ends it."""
    end = time.monotonic() + seconds
    for _ in range(times):
        left = str(max(1.0, end - time.monotonic()))
        command = [sys.executable, pathlib.Path(__file__).with_name(name), part, "--out", out]
        if finish(subprocess.Popen([*command, "--seconds", left], stdout=subprocess.DEVNULL), float(left)) == 0:
            break
    found = Progress(out)
    ended = [row for row in found.rows if "ended" in row]
    return found.found["said"] + [f"{name} {part}, head dim {row.get('head_dim')}: it hung" for row in ended]


def diagnose(progress: Progress, seconds: float) -> None:
    """Of what a step found wrong."""
    end = time.monotonic() + seconds
    rows = Progress(progress.path.with_name(progress.path.name.replace(".diagnosis", ""))).rows
    hung = [row for row in rows if row.get("hung") or (row.get("ended") and is_wrong(row))][:HUNG_MAX]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        tasks = []
        for index, row in enumerate(hung):
            if row["kind"] == "case":
                tasks.append(pool.submit(bounded_case, row, seconds))
                continue
            call = Progress(progress.path.with_suffix(f".hung.{index}.json"))
            call.facts["call"] = row
            call.save()
            tasks.append(pool.submit(script, "attention.py", "hung", call.path, seconds))
        for variant in ("chosen", "ampere"):  # either head dim may hang
            out = progress.path.with_name(f"probe.{variant}.json")
            tasks.append(pool.submit(script, "probe.py", variant, out, end - time.monotonic(), times=2))
        for task in concurrent.futures.as_completed(tasks):
            for line in task.result():
                progress.say(line)


if __name__ == "__main__":
    sys.exit(run_part_of(__doc__, {"families": families, "diagnose": diagnose}))
