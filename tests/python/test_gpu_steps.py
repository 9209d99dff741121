"""Steps of tests/gpu without a GPU: what they find of a check program that hangs or is wrong,
what stands when a call, a server or a peer is lost, and what they do when time is short."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import threading
import types

import numpy as np
import pbs_client
import pytest
from real_server import REPOSITORY
from real_server import program as built

sys.path[:0] = [str(REPOSITORY / folder) for folder in ("tests/gpu", "tests/bench")]
import correctness  # noqa: E402
import prefills  # noqa: E402
import progress as progress_module  # noqa: E402
from progress import LOST, WRONG, Progress  # noqa: E402

# ---- progress


def test_a_call_that_ended_the_process_is_told_once_and_is_wrong_unless_a_peer_made_it(tmp_path):
    path = tmp_path / "step.json"
    Progress(path).begin(kind="attention", name="cudnn", peer=True)
    after = Progress(path)
    assert after.has(name="cudnn", ended=True) and after.status() == 0
    after.end({"kind": "attention", "name": "flash", "peer": True, "right": False})
    assert after.status() == 0
    after.begin(kind="attention", name="pbs", peer=False)
    assert Progress(path).status() == WRONG
    assert len(Progress(path).rows) == 3


def test_figures_that_json_cannot_hold_are_null(tmp_path):
    Progress(tmp_path / "a.json").end({"ms": float("nan"), "list": [float("inf"), 1.0]})
    (row,) = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)["rows"]
    assert row == {"ms": None, "list": [None, 1.0]}


# ---- correctness

# Cases a, b, ...: what each does. It begins behind --skip, as check_attention does.
CHECK = """#!/usr/bin/env python3
import json, os, signal, sys
words = sys.argv[1:]
skip = int(words[words.index("--skip") + 1])
for name, does in list(zip("abcdef", {does!r}.split()))[skip:]:
    print(json.dumps({{"begin": name, "seed": 1}}), flush=True)
    if does == "hangs":
        print(json.dumps({{"case": name, "seed": 1, "right": False, "hung": True}}), flush=True)
        sys.exit(2)
    if does == "faults": os.abort()
    if does == "stays": signal.pause()
    found = {{"case": name, "seed": 1, "right": does == "right", "equal_bits": True}}
    if does == "wrong": found["diagnosis"] = {{"wrong": 3, "first": {{"row": 64, "got": "nan"}}}}
    print(json.dumps(found), flush=True)
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """correctness with a check program whose cases do as told."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(correctness, "WORK", tmp_path)
    monkeypatch.setattr(correctness, "program", lambda name: tmp_path / name)

    def make(does: str, **families: str) -> Progress:
        (tmp_path / "check_attention").write_text(CHECK.format(does=does))
        (tmp_path / "check_attention").chmod(0o755)
        monkeypatch.setattr(correctness, "FAMILIES", families or {"one": "--only x"})
        return Progress(tmp_path / "correct.json")

    return make


@pytest.mark.parametrize(
    ("does", "expected"),
    [
        pytest.param("right right", (2, 2, 0, True, True), id="right"),
        pytest.param("right wrong right", (2, 3, 0, True, False), id="wrong"),
        pytest.param("right hangs right", (2, 3, 1, True, False), id="a hang"),
        pytest.param("faults right faults right", (2, 4, 2, True, False), id="two faults"),
        pytest.param("right stays right", (1, 1, 0, False, True), id="out of time"),
    ],
)
def test_a_family_goes_on_behind_a_case_that_ends_its_process(check, does, expected):
    found = check(does)
    correctness.families(found, 1 if "stays" in does else 60)
    row = found.rows[0]
    assert tuple(row[n] for n in ("right_cases", "cases", "lost", "finished", "right")) == expected
    assert found.status() == (0 if expected[-1] else WRONG)
    assert sum(case.get("hung", False) for case in found.rows[1:]) == does.count("hangs")


def test_families_run_side_by_side_and_their_wrong_cases_are_told(check):
    found = check("wrong", one="--only x", two="--only y --variant ampere")
    correctness.families(found, 60)
    families = [row for row in found.rows if row["kind"] == "family"]
    assert sorted((row["family"], row["variant"]) for row in families) == [("one", "chosen"), ("two", "ampere")]
    assert any("wrong: 3, first: {row: 64, got: nan}" in line for line in found.found["said"])


@pytest.fixture
def diagnosed(tmp_path, monkeypatch):
    """What is said of rows of calls that hung, with programs over an emulated device."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(correctness, "WORK", tmp_path)
    monkeypatch.setattr(correctness, "program", lambda _: built("check_attention_emulated"))
    environment = {"PBS_REHEARSAL": "1", "PBS_BUILD_DIR": str(built("check_attention_emulated").parent.parent)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def go(*rows: dict, seconds: float = 100) -> list[str]:
        Progress(tmp_path / "step.json").end(*rows)
        found = Progress(tmp_path / "step.diagnosis.json")
        correctness.diagnose(found, seconds)
        return found.found["said"]

    return go


HANG = "block 7, warpgroup 1 waits for k_full[1], parity 0, tile 3"
HUNG_CASE = {"kind": "case", "case": "poisoned_dense_bf16_d64", "variant": "chosen", "seed": 1,
             "right": False, "hung": True}  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "limit", "told"),
    [
        pytest.param(HANG, 100, HANG, id="a wait that ends"),
        pytest.param("", 0.001, "no wait of Hopper's kernels is late; DEADLINE", id="no wait of a barrier"),
    ],
)
def test_a_case_that_hung_is_run_with_bounded_waits(diagnosed, monkeypatch, planted, limit, told):
    monkeypatch.setenv("PBS_PLANTED_HANG", planted)
    monkeypatch.setattr(correctness, "script", lambda *_, **__: [])
    if not planted:  # of this case an emulator takes longer
        monkeypatch.setattr(correctness, "CASE_SECONDS_MAX", 1)
    row = HUNG_CASE | ({} if planted else {"case": "dense_bf16_d128_h24x8_900of900"})
    (said,) = diagnosed(row)
    assert f"{row['case']} with bounded waits: {told}" in said


@pytest.mark.peers
@pytest.mark.parametrize(
    "call",
    [
        {"kind": "attention", "name": "pbs_dense:more_stages", "head_dim": 64, "inputs": "structured",
         "tokens": 8192},
        {"kind": "golden", "case": "pbs_short"},
        {"kind": "attention", "head_dim": 64, "inputs": "structured", "tokens": 8192},
    ],
    ids=["attention", "golden", "no call"],
)  # fmt: skip
def test_a_call_that_hung_is_run_itself_with_bounded_waits(diagnosed, monkeypatch, call):
    pytest.importorskip("torch", reason="a peer")
    import attention

    if call["kind"] == "golden":
        call["case"] = attention.golden_cases()[0]["name"]
    monkeypatch.setenv("PBS_PLANTED_HANG", HANG)
    own, began = correctness.script, []
    monkeypatch.setattr(
        correctness, "script", lambda *words, **more: began.append(words[:2]) or (
            own(*words, **more) if words[0] == "attention.py" else []),
    )  # fmt: skip
    (said,) = diagnosed(call | {"ended": True, "peer": False})
    assert sorted(began) == [("attention.py", "hung"), ("probe.py", "ampere"), ("probe.py", "chosen")]
    name = call.get("name") or call.get("case")
    assert said == f"{name} with bounded waits: {HANG}" if name else "not run" in said


def test_what_is_diagnosed_is_looked_at_side_by_side(diagnosed, monkeypatch):
    together = threading.Barrier(4)  # two cases, two probes
    monkeypatch.setattr(correctness, "bounded_case", lambda *_: [str(together.wait(20))])
    monkeypatch.setattr(correctness, "script", lambda *_, **__: [str(together.wait(20))])
    assert sorted(diagnosed(HUNG_CASE, HUNG_CASE, seconds=1)) == ["0", "1", "2", "3"]


# ---- prefills


class Clock:
    """Time that passes when something runs."""

    def __init__(self):
        self.now, self.lock = 0.0, threading.Lock()

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def run(self, seconds: float) -> None:
        with self.lock:
            self.now += seconds


@dataclasses.dataclass
class Stats:
    density: float = 0.9


class Served:
    """A client whose prefills take a second each, until one fails."""

    def __init__(self, clock: Clock, prefills_max: int = 1000):
        self.clock, self.left = clock, prefills_max

    def prefill(self, _model, _tokens, _method, **_options):
        self.clock.run(1.0)
        self.left -= 1
        if self.left < 0:
            raise pbs_client.UnavailableError("gone")
        return types.SimpleNamespace(first_token=7, last_token_logits=np.ones(4), stats=Stats())


@pytest.fixture
def clock(monkeypatch) -> Clock:
    ticking = Clock()
    monkeypatch.setattr(prefills, "time", ticking)
    return ticking


@pytest.fixture
def measure(clock):
    """Rows of a length by name, and the error of the server, if any."""

    def go(prefills_max: int = 1000, peer=None, density=None, end: float = 1e9):
        served = Served(clock, prefills_max)
        rows, failure = prefills.measure_length(served, peer, np.ones(3, np.uint32), density, end)
        return {row["name"]: row for row in rows}, failure

    return go


def test_rounds_before_the_one_that_lost_the_server_stand(measure):
    rows, failure = measure(1 + 2 * 4 + 1)  # a warm-up, four rounds of two, half of one
    assert isinstance(failure, pbs_client.UnavailableError)
    assert (rows["dense"]["rounds"], rows["pbs"]["rounds"]) == (5, 4)
    assert rows["pbs"]["dense_over_this"] == 1.0


def test_a_server_lost_before_the_first_round_is_told(measure):
    rows, failure = measure(0)
    assert failure is not None and "gone" in rows["dense"]["error"]
    rows, failure = measure(2, density=0.5)
    assert failure is not None and not any("ttft_seconds" in row for row in rows.values())


def test_the_search_for_a_threshold_leaves_time_for_a_round(measure, clock):
    rows, _ = measure(density=0.5, end=7.0)  # no threshold gives it
    assert "no time to find its threshold" in rows["density replay"]["error"]
    assert rows["dense"]["rounds"] >= 1 and clock.now <= 7.0


def test_a_peer_that_fails_is_gone_on_without(measure, clock):
    calls = []

    def peer(_ids):
        clock.run(2.0)
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return np.ones(4)

    rows, failure = measure(peer=peer)
    assert failure is None and rows["dense"]["rounds"] == prefills.ROUNDS_MAX
    assert rows["dense"]["right"] and rows["dense"]["torch_over_this"] == 2.0
    assert rows["torch"]["rounds"] == 1 and "out of memory" in rows["torch"]["error"]


@pytest.mark.parametrize("wanted", [0.58, 0.405, 0.219, 0.06])
@pytest.mark.parametrize(
    "density_at",
    [
        pytest.param(lambda t: 0.02 + 0.98 * t, id="noise"),
        pytest.param(lambda t: 0.02 + 0.98 * t**2, id="bent"),
        pytest.param(lambda t: t**0.5, id="bent the other way"),
    ],
)
def test_the_threshold_of_a_density_is_found(density_at, wanted):
    threshold, reached, found = prefills.find_threshold(wanted, density_at)
    assert found and density_at(threshold) == reached
    assert abs(reached - wanted) <= prefills.DENSITY_ERROR_MAX


def test_a_density_that_no_threshold_gives_is_said():
    asked = []

    def density_at(threshold: float) -> float:
        asked.append(threshold)
        return 0.2 if threshold < 0.7 else 0.9

    assert not prefills.find_threshold(0.5, density_at)[2]
    assert len(asked) == prefills.CALIBRATIONS_MAX


# ---- a served model


@pytest.fixture
def served(monkeypatch):
    """served with a server that is not there, and no peer."""
    pytest.importorskip("torch", reason="a peer")
    import served as module

    @contextlib.contextmanager
    def nothing(_progress):
        yield None, {"layers": 8, "vocab_size": 10}

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(module, "served_model", nothing)
    monkeypatch.setattr(module, "torch_peer", lambda _: None)
    monkeypatch.setattr(progress_module.os, "_exit", leave)
    return module


@pytest.mark.peers
def test_a_length_that_lost_the_server_is_not_begun_again(served, monkeypatch, tmp_path):
    measured = []

    def measure(_client, _peer, ids, _density, _end):
        measured.append(len(ids))
        gone = pbs_client.UnavailableError("gone") if len(measured) == 2 else None
        return [{"name": "dense", **({"error": "gone"} if gone else {"ttft_seconds": 1.0})}], gone

    monkeypatch.setattr(served, "measure_length", measure)
    with pytest.raises(SystemExit) as ended:
        served.ttft(Progress(tmp_path / "ttft.json"), 100)
    assert ended.value.code == LOST
    after = Progress(tmp_path / "ttft.json")
    served.ttft(after, 100)
    assert measured == [tokens // served.SHRINK for tokens in served.LENGTHS]
    assert [row["tokens"] for row in after.rows] == list(served.LENGTHS)
    assert "gone" in after.rows[1]["error"]


@pytest.mark.peers
@pytest.mark.parametrize(
    ("seconds", "prefills_max", "rounds"),
    [(100, 1000, 3), (40, 1000, 2), (100, 40, 2), (10, 1000, 0)],
    ids=["time for all", "time for two", "lost in the third", "time for none"],
)
def test_prompts_at_once_stop_in_time_and_keep_what_was_measured(
    served, clock, monkeypatch, tmp_path, seconds, prefills_max, rounds
):
    @contextlib.contextmanager
    def client(_progress):
        yield Served(clock, prefills_max), {"layers": 8, "vocab_size": 10}

    monkeypatch.setattr(served, "served_model", client)
    monkeypatch.setattr(served, "time", clock)
    found = Progress(tmp_path / "concurrent.json")
    fails = prefills_max < 1000 or rounds == 0
    with pytest.raises((pbs_client.UnavailableError, SystemExit)) if fails else contextlib.nullcontext():
        served.concurrent_prompts(found, seconds)
    assert clock.now <= seconds
    assert [len(row["rounds"]) for row in Progress(found.path).rows] == ([rounds] if rounds else [])
