"""tests/gpu/run.py without a GPU: what becomes of steps that are right, wrong, hang, crash or
do not fit, and that all they wrote comes back; then rehearsals of its own steps, in small."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest
from real_server import REPOSITORY, program

sys.path.insert(0, str(REPOSITORY / "tests/gpu"))
import run  # noqa: E402
from run import Step  # noqa: E402

SCRIPT = """
import os, pathlib, signal, subprocess, sys
sys.path.insert(0, {folder!r})
from progress import LOST, Progress, run_part_of

def part(progress, seconds):
{body}

sys.exit(run_part_of("A step.", {{"go": part}}))
"""
BODIES = {
    "right": "progress.end({'kind': 'x', 'right': True}); progress.say('fine')",
    "wrong": "progress.end({'kind': 'x', 'right': False})",
    "starts": "progress.facts['programs'] = 'somewhere'",
    "crash": "progress.end({'kind': 'x'}); os.abort()",
    # With a process of its own, which must not be left behind.
    "hang": "progress.end({'kind': 'half'}); child = subprocess.Popen(['tail', '-f', '/dev/null']); "
            "pathlib.Path('{work}/child').write_text(str(child.pid)); signal.pause()",
    # The first call ends the process each time it is begun.
    "ended": "\n    ".join([
        "for name in 'ab':",
        "    if progress.has(name=name): continue",
        "    progress.begin(kind='x', name=name, peer=True)",
        "    if name == 'a': os._exit(9)",
        "    progress.end({'kind': 'x', 'name': name})",
    ]),
}  # fmt: skip


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs steps; gives status, results, what was printed, and the names in the tar."""

    def step(name: str, does: str, seconds: int = 5, **more) -> Step:
        body = "    " + BODIES[does].replace("{work}", str(tmp_path))
        path = tmp_path / f"{name}.py"
        path.write_text(SCRIPT.format(folder=str(REPOSITORY / "tests/gpu"), body=body))
        return Step(name, seconds, f"{path} go", **more)

    def go(*steps: Step, budget: float = 60, keep_going: bool = False):
        monkeypatch.setattr(run, "OVER_SECONDS", 0)
        monkeypatch.setattr(run, "ATTEMPT_SECONDS_MIN", 1)
        out = tmp_path / "out.tar.gz"
        arguments = argparse.Namespace(
            rehearse=True, budget=budget + run.CLOSE_SECONDS, keep_going=keep_going, out=out, pack=tmp_path
        )
        runner = run.Runner(arguments, tmp_path / "work")
        runner.run_steps(list(steps))
        status = runner.close(list(steps))
        with tarfile.open(out) as tar:
            results = json.load(tar.extractfile("gpu_run/results.json"))
            names = {name.removeprefix("gpu_run/") for name in tar.getnames()}
        return status, results, capsys.readouterr().out, names

    go.step = step
    return go


def statuses(results: dict) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in results["steps"]}


def test_what_steps_write_comes_back_and_is_marked_as_a_rehearsal(call):
    status, results, printed, names = call(call.step("a", "right"), call.step("b", "right"))
    assert status == 0 and results["done"] and results["rehearsal"]
    assert [(row["step"], row["rehearsal"]) for row in results["rows"]] == [("a", True), ("b", True)]
    assert {"a.json", "b.json", "logs/a.log", "logs/b.log"} <= names
    assert "REHEARSAL" in printed and "== a: right" in printed and "   fine" in printed


def test_a_file_that_a_step_promised_and_did_not_write_is_named(call):
    _, _, printed, _ = call(call.step("a", "right", writes=("logs/promised.txt",)))
    assert "MISSING logs/promised.txt" in printed


def test_a_step_that_hangs_is_ended_with_its_processes_and_the_next_runs(call, tmp_path):
    status, results, _, _ = call(call.step("a", "hang", 2), call.step("b", "right"), budget=8)
    assert status == 1
    assert statuses(results) == {"a": "out of time", "b": "right"}
    assert {"kind": "half", "step": "a", "rehearsal": True} in results["rows"]
    child = pathlib.Path("/proc", (tmp_path / "child").read_text(), "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_step_that_crashes_keeps_its_rows_and_says_how_it_ended(call):
    status, results, printed, _ = call(call.step("a", "crash"), call.step("b", "right"))
    assert status == 1 and statuses(results) == {"a": "failed", "b": "right"}
    assert results["steps"][0]["why"] == "status -6"
    assert results["rows"][0]["kind"] == "x"


def test_a_call_that_ends_its_process_is_told_and_the_step_carries_on_behind_it(call):
    _, results, _, _ = call(call.step("a", "ended"))
    assert statuses(results) == {"a": "right"}
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["a"]["ended"] and "error" not in rows["b"]


def test_a_step_is_skipped_for_want_of_what_another_one_makes_and_left_out_for_want_of_time(call):
    _, results, printed, _ = call(
        call.step("a", "wrong"), call.step("b", "right", needs=("a",)),
        call.step("c", "right", 1000), call.step("d", "right"),
    )  # fmt: skip
    assert statuses(results) == {"a": "WRONG", "b": "skipped", "c": "left out", "d": "right"}
    assert "b: skipped, it needs a: WRONG" in printed and "s are left" in printed


def test_a_program_that_is_not_there_is_not_a_failure(call):
    status, results, _, _ = call(Step("a", 5, "no-such-profiler --now"))
    assert status == 0 and statuses(results) == {"a": "not here"}


@pytest.mark.parametrize(("keep_going", "became"), [(False, "skipped"), (True, "right")])
def test_nothing_runs_behind_a_gate_when_anything_was_wrong(call, keep_going, became):
    _, results, _, _ = call(
        call.step("a", "wrong"), call.step("gate", "right", is_gate=True), call.step("b", "right"),
        keep_going=keep_going,
    )  # fmt: skip
    assert statuses(results) == {"a": "WRONG", "gate": "right", "b": became}


def test_a_step_of_kernels_that_fails_is_diagnosed_and_what_that_finds_comes_back(call, monkeypatch):
    diagnosis = call.step("diagnosis", "right")
    monkeypatch.setattr(run, "DIAGNOSIS", diagnosis.command)
    _, results, printed, names = call(
        call.step("a", "wrong", is_of_kernels=True), call.step("b", "right", is_of_kernels=True)
    )
    assert statuses(results) == {"a": "WRONG", "a.diagnosis": "right", "b": "right"}
    assert "a.diagnosis.json" in names and "   fine" in printed


@pytest.mark.parametrize(
    ("does", "expected"),
    [
        pytest.param("starts", {"machine": "right", "user": "right"}, id="they start"),
        pytest.param("right", {"machine": "right", "build": "right", "user": "right"}, id="they do not"),
    ],
)
def test_programs_are_built_only_where_those_that_were_brought_do_not_start(call, does, expected):
    _, results, _, _ = call(
        call.step("machine", does), call.step("build", "right"), call.step("user", "right", needs=("programs",))
    )
    assert statuses(results) == expected


def test_a_step_may_take_what_no_later_one_plans():
    a, b, c = (Step(name, seconds, "") for name, seconds in (("a", 10), ("b", 20), ("c", 40)))
    assert run.seconds_of(a, [b, c], 100) == 40  # 30 s are nobody's
    assert run.seconds_of(a, [b, c], 60) == 40  # c does not fit: its 30 s are nobody's, too
    assert run.seconds_of(a, [b, c], 10) == 10


# ---- its own steps


def test_every_step_needs_earlier_ones_and_both_calls_fit_their_budgets():
    for index, step in enumerate(run.STEPS):
        assert set(step.needs) - {"programs"} <= set(run.NAMES[:index])

    def planned(first: str, last: str) -> int:
        return sum(step.seconds for step in run.select(first, last, []) if step.name != "build")

    assert planned("machine", "variants") <= 200 - run.CLOSE_SECONDS
    assert planned("lengths", "sanitize") <= 450 - run.CLOSE_SECONDS
    assert "machine" in [step.name for step in run.select("ttft", "ttft", [])]


@pytest.fixture
def pack(tmp_path) -> pathlib.Path:
    """What scripts/pack_gpu.sh makes, of this build."""
    with tarfile.open(tmp_path / "programs.tar.xz", "w:xz"):
        pass  # emulated, they are the build's
    with tarfile.open(tmp_path / "pbs-prefill-test.tar", "w", dereference=True) as tar:
        for name in ("pbs-prefilld", "pbs-decode"):
            tar.add(program(name), f"pbs-prefill-test/bin/{name}")
    (tmp_path / "bench_worker").symlink_to(program("bench_worker").resolve())
    (tmp_path / "commit").write_text("given\n")
    return tmp_path


def rehearse(pack: pathlib.Path, *words: str) -> tuple[int, dict, str]:
    out = pack / "out.tar.gz"
    command = [sys.executable, REPOSITORY / "tests/gpu/run.py", "--rehearse", "--pack", pack, "--out", out]
    environment = os.environ | {"PBS_BUILD_DIR": str(program("pbs-prefilld").resolve().parent.parent)}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
    with tarfile.open(out) as tar:
        return done.returncode, json.load(tar.extractfile("gpu_run/results.json")), done.stdout


@pytest.mark.peers
def test_the_first_call_is_rehearsed_up_to_its_gate(pack):
    pytest.importorskip("torch", reason="a peer")
    status, results, printed = rehearse(pack, "--budget", "200", "--to", "gate")
    assert status == 0, printed
    assert statuses(results) == {"machine": "right", "correct": "right", "gate": "right"}
    assert results["commit"] == "given" and results["facts"]["modules"]["torch"]
    rows = {row.get("name"): row for row in results["rows"] if row["kind"] == "attention"}
    assert rows["pbs_dense"]["from"] == "cudnn" and rows["pbs_dense"]["right"]
    assert rows["pbs_replay_in_order"]["from"] == "triton_replay" and rows["pbs_replay_in_order"]["right"]
    assert all(row["right"] for row in results["rows"] if row["kind"] in ("golden", "family"))
    assert "MISSING" not in printed


@pytest.mark.peers
def test_the_second_call_is_rehearsed_on_a_cpu(pack):
    pytest.importorskip("torch", reason="a peer")
    wanted = ["noise", "handoff", "linear", "ttft", "concurrent"]
    words = [word for name in wanted for word in ("--only", name)]
    status, results, printed = rehearse(pack, "--budget", "450", *words)
    assert status == 0, printed
    assert set(statuses(results)) == {"machine", "unpack", "model", *wanted}
    assert set(statuses(results).values()) == {"right"}
    rows = {(row["kind"], row.get("tokens"), row.get("name")): row for row in results["rows"]}
    assert rows["prefill", 131072, "dense"]["cosine"] > 0.9999
    assert rows["prefill", 131072, "pbs"]["stats"]["stages"]["attend"] > 0
    replay = rows["prefill", 131072, "density replay"]
    assert replay["stats"]["density"] == pytest.approx(replay["wanted_density"], abs=0.01)
    assert rows["concurrent", 1024, None]["right"] and rows["linear", None, "QKV"]["ratio"] > 0
    assert "MISSING" not in printed
