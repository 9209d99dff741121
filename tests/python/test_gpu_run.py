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
import types

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
    "unlinked": "progress.facts['building_may_help'] = True",
    "variant": "progress.end({'kind': 'x', 'right': True}, {'name': 'pbs:wide', 'right': False})",
    "cut": "progress.end({'kind': 'family', 'family': 'one', 'right': True, 'finished': False})",
    "slow": "progress.end({'kind': 'family', 'right': True}); signal.pause()",
    "slow and wrong": "progress.end({'right': True}, {'right': False}); signal.pause()",
    "slow from the start": "signal.pause()",
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
        return Step(name, seconds, f"{path} go", **{"over": 0} | more)

    def go(*steps: Step, budget: float = 60, keep_going: bool = False):
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


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Makes a program of the path."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(name: str, body: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    return make


def test_figures_that_a_profiler_slowed_down_are_logged_and_no_results(call, tool):
    tool("ncu", 'echo \'{"rows": [{"kind": "attention"}]}\' >"${@: -1}"')
    _, results, _, names = call(Step("counters", 5, run.PROFILE))
    assert statuses(results) == {"counters": "right"} and results["rows"] == []
    assert "logs/kernels.json" in names


@pytest.mark.parametrize(
    ("said", "status", "became"),
    [
        pytest.param('{"wrong": 2}', 1, "WRONG", id="wrong cases"),
        pytest.param('{"wrong": 0}', 0, "right", id="right"),
        pytest.param("an access out of bounds", 3, "WRONG", id="found by the tool"),
        pytest.param("Device not supported", 1, "not here", id="no tool for the device"),
    ],
)
def test_what_a_program_finds_wrong_under_a_tool_is_wrong(call, tool, said, status, became):
    tool("compute-sanitizer", f"echo '{said}'; exit {status}")
    _, results, _, _ = call(Step("sanitize", 5, run.SANITIZE))
    assert statuses(results) == {"sanitize": became}


def test_clocks_of_a_gpu_at_work_are_kept_by_step(call, tool):
    tool("nvidia-smi", 'case "$*" in *-lms*) printf "345, 0, 90, 0x1\n1980, 99, 650, 0x0\n1755, 100, 699, 0x4\n'
                       '1965, 98, 699, 0x0\n[N/A], 98, 699, 0x0\n"; exec sleep 60;; esac; exit 1')  # fmt: skip
    _, results, printed, names = call(call.step("a", "right"), call.step("b", "right"))
    assert results["steps"][0]["clocks"] == {"min": 1755, "median": 1965, "reasons": ["0x0", "0x4"]}
    assert results["steps"][1]["clocks"] == {} and "logs/clocks.csv" in names
    assert "SM at 1755 MHz or more, 1965 mostly" in printed


def test_results_are_saved_before_a_driver_is_asked_that_may_not_answer(call, monkeypatch, tmp_path):
    asked = []

    def query():
        if asked:
            with tarfile.open(tmp_path / "out.tar.gz") as tar:
                asked.append(json.load(tar.extractfile("gpu_run/results.json"))["done"])
        asked.append(None)

    monkeypatch.setattr(run.machine, "query_gpu", query)
    call(call.step("a", "right"))
    assert asked == [None, True, None]


def test_a_driver_that_does_not_answer_is_not_waited_for(monkeypatch, tool):
    tool("nvidia-smi", "exec sleep 60")
    finish = run.machine.finish
    monkeypatch.setattr(run.machine, "finish", lambda process, _: finish(process, 1))
    assert run.machine.query_gpu() is None


def test_the_first_step_may_take_as_long_as_a_cold_disk_needs():
    (first, *others) = run.STEPS
    assert first.name == "machine" and first.seconds + first.over >= 98
    assert {step.over for step in others} == {run.OVER_SECONDS}


def test_programs_are_not_put_where_they_may_not_run(monkeypatch, tmp_path):
    for flag, blocks, holds in ((0, 20 << 20, True), (os.ST_NOEXEC, 20 << 20, False), (0, 1, False)):
        there = types.SimpleNamespace(f_flag=flag, f_bavail=blocks, f_frsize=1024)
        monkeypatch.setattr(run.os, "statvfs", lambda _, there=there: there)
        assert run.holds_programs(tmp_path) == holds


def test_a_program_that_is_not_there_is_not_a_failure(call):
    status, results, _, _ = call(Step("a", 5, "no-such-profiler --now"))
    assert status == 0 and statuses(results) == {"a": "not here"}


@pytest.mark.parametrize(("keep_going", "became"), [(False, "skipped"), (True, "right")])
def test_nothing_runs_behind_a_gate_when_anything_was_wrong(call, keep_going, became):
    _, results, printed, _ = call(
        call.step("a", "wrong"), call.step("gate", "right", is_gate=True), call.step("b", "right"),
        keep_going=keep_going,
    )  # fmt: skip
    assert statuses(results) == {"a": "WRONG", "gate": "right", "b": became}
    assert printed.splitlines()[-1] == "stop: a WRONG"


@pytest.mark.parametrize(
    ("does", "gate", "last"),
    [
        pytest.param("right", "right", "go on: gate is right", id="right"),
        pytest.param("cut", "right", "go on: gate is right, but: one not all checked", id="families cut"),
        pytest.param("slow", "right", "go on: gate is right, but: a out of time", id="slow"),
        pytest.param("slow and wrong", "right", "stop: a WRONG", id="slow and wrong"),
        pytest.param("slow from the start", "right", "stop: a out of time", id="nothing was checked"),
        pytest.param("crash", "right", "stop: a failed", id="crash"),
        pytest.param("right", "slow", "stop: gate out of time", id="a slow gate"),
        pytest.param("right", "slow and wrong", "stop: gate WRONG", id="a gate wrong and slow"),
        pytest.param("right", "crash", "stop: gate failed", id="a gate that crashes"),
    ],
)
def test_a_gate_is_open_to_a_slow_machine_but_not_to_what_nothing_says_is_right(call, does, gate, last):
    _, results, printed, _ = call(
        call.step("a", does, 2), call.step("gate", gate, 2, is_gate=True), call.step("b", "right", 2), budget=9
    )
    assert printed.splitlines()[-1] == last
    assert statuses(results)["b"] == ("right" if last.startswith("go on") else "skipped")


@pytest.mark.parametrize(
    ("behind", "last"),
    [
        pytest.param("variant", "go on: gate is right, but: b WRONG", id="a variant is wrong"),
        pytest.param("wrong", "stop: b WRONG", id="wrong"),
    ],
)
def test_a_second_call_is_advised_unless_what_a_backend_runs_is_wrong(call, behind, last):
    _, _, printed, _ = call(
        call.step("gate", "right", is_gate=True), call.step("b", behind), call.step("c", "right", 1000)
    )
    end = ", c left out" if last.startswith("go on") else ""
    assert printed.splitlines()[-1] == last + end


def test_a_call_without_a_gate_advises_nothing(call):
    _, _, printed, _ = call(call.step("a", "right"))
    assert "go on" not in printed and "stop" not in printed


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
        pytest.param("right", {"machine": "right", "user": "skipped"}, id="no device"),
        pytest.param("unlinked", {"machine": "right", "build": "right", "user": "right"}, id="another system"),
    ],
)
def test_programs_are_built_only_where_those_that_were_brought_are_not_for_the_system(call, does, expected):
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
    (tmp_path / "sources").write_text(run.machine.hash_sources() + "\n")
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
    assert rows["pbs_all"]["right"] and rows["pbs_all"]["density"] >= 1
    assert rows["pbs_replay_in_order"]["from"] == "triton_replay" and rows["pbs_replay_in_order"]["right"]
    assert all(row["right"] for row in results["rows"] if row["kind"] in ("golden", "family"))
    assert printed.splitlines()[-1] == "go on: gate is right"


@pytest.mark.peers
def test_the_second_call_is_rehearsed_on_a_cpu(pack):
    pytest.importorskip("torch", reason="a peer")
    wanted = ["noise", "methods", "handoff", "linear", "ttft", "concurrent"]
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
