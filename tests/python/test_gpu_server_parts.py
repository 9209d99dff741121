"""The parts of scripts/gpu_server_suite.sh without a GPU: what they measure when time is
short, and what stands when a server or a peer is lost."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import threading
import types

import numpy as np
import pbs_client
import pytest
from real_server import REPOSITORY

sys.path[:0] = [str(REPOSITORY / folder) for folder in ("tests/gpu", "tests/bench")]
import bench_common  # noqa: E402
import prefills  # noqa: E402
import server_suite  # noqa: E402

# ---- a server that is lost


@pytest.fixture
def suite(monkeypatch):
    """server_suite with a server that is not there."""
    server = types.SimpleNamespace(target="nowhere:1")
    monkeypatch.setattr(server_suite, "served_model", lambda *_: contextlib.nullcontext(server))
    monkeypatch.setattr(server_suite, "facts_of", lambda _: {"weight_bytes": 1, "layers": 1})
    monkeypatch.setattr(server_suite, "start_torch", lambda _: None)

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    return server_suite


def test_a_length_that_lost_the_server_is_not_begun_again(suite, monkeypatch, tmp_path):
    measured = []

    def measure(_client, _peer, _facts, tokens, _replay, _end):
        measured.append(tokens)
        if tokens == 2000:
            gone = pbs_client.UnavailableError("gone")
            return [{"name": None, "error": "gone"}], gone
        return [{"name": "dense", "ttft_seconds": 1.0}], None

    monkeypatch.setattr(suite, "measure_length", measure)
    arguments = types.SimpleNamespace(
        out=tmp_path / "ttft.json", seconds=100, model=tmp_path,
        lengths=suite.lengths_of("1000 2000 3000:0.5"),
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        suite.ttft(arguments)
    assert ended.value.code == suite.LOST
    assert suite.ttft(arguments) == suite.DONE
    assert measured == [1000, 2000, 3000]
    rows = json.loads(arguments.out.read_text())["timings"]
    assert [row["tokens"] for row in rows] == [1000, 2000, 3000]
    assert "gone" in rows[1]["error"]


def test_a_length_that_ended_the_process_is_told_and_not_begun_again(suite, monkeypatch, tmp_path):
    arguments = types.SimpleNamespace(
        out=tmp_path / "ttft.json", seconds=100, model=tmp_path, lengths={1000: None, 2000: None}
    )

    def die(*_):
        raise SystemExit(9)

    monkeypatch.setattr(suite, "measure_length", die)
    with pytest.raises(SystemExit):
        suite.ttft(arguments)
    monkeypatch.setattr(suite, "measure_length", lambda *_: ([{"name": "dense"}], None))
    assert suite.ttft(arguments) == suite.DONE
    rows = json.loads(arguments.out.read_text())["timings"]
    assert [(row["tokens"], "error" in row) for row in rows] == [(1000, True), (2000, False)]


def test_a_length_that_there_is_no_time_for_is_left_out(suite, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "facts_of", lambda _: {"weight_bytes": 16e9, "layers": 32})
    monkeypatch.setattr(suite, "measure_length", lambda *_: ([{"name": "dense"}], None))
    arguments = types.SimpleNamespace(
        out=tmp_path / "ttft.json", seconds=60, model=tmp_path, lengths={131072: 0.219, 8192: 0.58}
    )
    assert suite.ttft(arguments) == suite.DONE
    rows = json.loads(arguments.out.read_text())["timings"]
    assert [row["tokens"] for row in rows] == [8192]


LLAMA = {"weight_bytes": 16e9, "layers": 32}


@pytest.mark.parametrize(
    ("ttft_seconds", "measured"),
    [pytest.param(1.3, [32768, 131072], id="fast"), pytest.param(4.0, [32768], id="slow")],
)
def test_the_longest_length_is_begun_by_the_speed_of_the_one_before(
    suite, monkeypatch, tmp_path, ttft_seconds, measured
):
    monkeypatch.setattr(suite, "facts_of", lambda _: LLAMA)
    row = {"name": "dense", "ttft_seconds": ttft_seconds}
    monkeypatch.setattr(suite, "measure_length", lambda *_: ([row], None))
    arguments = types.SimpleNamespace(
        out=tmp_path / "ttft.json", seconds=100, model=tmp_path,
        lengths={32768: 0.405, 131072: 0.219},
    )  # fmt: skip
    assert suite.ttft(arguments) == suite.DONE
    rows = json.loads(arguments.out.read_text())["timings"]
    assert [row["tokens"] for row in rows] == measured


def test_a_replay_is_counted_by_its_density():
    dense = server_suite.flops(131072, LLAMA)
    without = server_suite.flops_min(131072, LLAMA, None, True)
    assert without == 5 * dense
    replays = server_suite.flops_min(131072, LLAMA, 0.219, True) - without
    assert replays < 0.5 * (server_suite.SEARCH_RUNS + 1) * dense
    # A replay's time does not make the machine look slow.
    timings = [
        {"tokens": 131072, "name": "dense", "ttft_seconds": dense / 1e14},
        {"tokens": 131072, "name": "replay", "density": 0.219,
         "ttft_seconds": server_suite.flops(131072, LLAMA, 0.219) / 1e14},
        {"tokens": 8192, "name": "dense", "ttft_seconds": 100.0},
        {"tokens": 262144, "name": None, "error": "gone"},
    ]  # fmt: skip
    assert server_suite.rate_of(timings, LLAMA) == pytest.approx(1e14)


# ---- rounds


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


class Served:
    """A client whose prefills take a second each, until one fails."""

    def __init__(self, clock: Clock, prefills_max: int = 1000):
        self.clock, self.left = clock, prefills_max

    def prefill(self, _model, _tokens, _method, **_options):
        self.clock.run(1.0)
        self.left -= 1
        if self.left < 0:
            raise pbs_client.UnavailableError("gone")
        return types.SimpleNamespace(
            first_token=7, last_token_logits=np.ones(4), stats=types.SimpleNamespace(density=0.9)
        )


@pytest.fixture
def clock(monkeypatch) -> Clock:
    ticking = Clock()
    for module in (server_suite, prefills):
        monkeypatch.setattr(module, "time", ticking)
    return ticking


@pytest.mark.parametrize(
    ("seconds", "prefills_max", "rounds"),
    [
        pytest.param(100, 1000, server_suite.CONCURRENT_ROUNDS, id="time for all"),
        pytest.param(40, 1000, 2, id="time for two"),
        pytest.param(100, 40, 2, id="lost in the third"),
        pytest.param(10, 1000, 0, id="time for none"),
    ],
)
def test_prompts_at_once_stop_in_time_and_keep_what_was_measured(
    suite, clock, monkeypatch, tmp_path, seconds, prefills_max, rounds
):
    client = Served(clock, prefills_max)
    monkeypatch.setattr(suite, "facts_of", lambda _: LLAMA | {"vocab_size": 10})
    monkeypatch.setattr(suite, "Client", lambda _: contextlib.nullcontext(client))
    out = tmp_path / "concurrent.json"
    arguments = types.SimpleNamespace(out=out, seconds=seconds, model=tmp_path, tokens=3)
    lost = pytest.raises(pbs_client.UnavailableError)
    with lost if prefills_max < 1000 else contextlib.nullcontext():
        status = suite.concurrent_prompts(arguments)
        assert status == (suite.DONE if rounds else suite.UNFINISHED)
        assert clock.now <= seconds
    assert out.exists() == (rounds > 0)
    assert not rounds or len(json.loads(out.read_text())["rounds"]) == rounds


@pytest.fixture
def measure(clock, monkeypatch):
    """Rows of a length by name, and the error of the server, if any."""
    monkeypatch.setattr(prefills, "served_figures", lambda _: {})

    def run(prefills_max: int = 1000, peer=None, replay=None, end: float = 1e9):
        rows, failure = prefills.measure_length(
            Served(clock, prefills_max), peer, {"vocab_size": 10}, 3, replay, end
        )
        return {row["name"]: row for row in rows}, failure

    return run


def test_rounds_before_the_one_that_lost_the_server_stand(measure):
    rows, failure = measure(1 + 2 * 4 + 1)  # a warm-up, four rounds of two, half of one
    assert isinstance(failure, pbs_client.UnavailableError)
    assert (rows["dense"]["rounds"], rows["pbs"]["rounds"]) == (5, 4)
    assert rows["pbs"]["dense_over_this"] == 1.0
    assert "gone" in rows[None]["error"] and "after 4 rounds" in rows[None]["error"]


def test_a_server_lost_before_the_first_round_is_told(measure):
    rows, failure = measure(0)
    assert failure is not None and list(rows) == [None]
    rows, failure = measure(2, replay=prefills.Density(0.5))
    assert failure is not None and "gone" in rows[None]["error"]
    assert not any("ttft_seconds" in row for row in rows.values())


def test_the_search_for_a_threshold_leaves_time_for_a_round(measure, clock):
    rows, _ = measure(replay=prefills.Density(0.5), end=7.0)  # no threshold gives it
    assert "no time to find its threshold" in rows["density replay 0.5 by threshold"]["error"]
    assert rows["dense"]["rounds"] >= 1 and clock.now <= 7.0


def test_a_peer_that_ends_is_gone_on_without(suite, measure, tmp_path, monkeypatch):
    script = (
        "import json, sys\n"
        "for count, line in enumerate(sys.stdin):\n"
        "    words = json.loads(line)\n"
        "    if count == 3: sys.exit(1)\n"
        "    if 'logits' in words: import numpy; numpy.save(words['logits'], numpy.ones(4))\n"
        "    print(json.dumps({'seconds': 2.0, 'sdpa': 'flash'}), flush=True)\n"
    )
    peer = bench_common.Worker([sys.executable, "-c", script])
    assert suite.is_alive(peer)
    rows, failure = measure(peer=peer)
    assert failure is None and rows["dense"]["rounds"] == prefills.ROUNDS_MAX
    assert rows["dense"]["right"] and rows["dense"]["torch_over_this"] == 2.0
    assert rows["torch"]["rounds"] == 1 and "the worker died" in rows["torch"]["failed"]
    assert not suite.is_alive(peer)
    with pytest.raises(RuntimeError, match="the worker died"):
        peer.ask("model", path="x" * 100_000)  # more than a pipe takes
    rows, failure = measure(peer=peer)
    assert failure is None and rows["dense"]["rounds"] == prefills.ROUNDS_MAX
    assert "the worker died" in rows["torch"]["error"]

    # The next length is measured without it.
    peers = []
    monkeypatch.setattr(suite, "start_torch", lambda _: peer)
    monkeypatch.setattr(
        suite, "measure_length", lambda *given: (peers.append(given[1]) or [{"name": "dense"}], None)
    )
    arguments = types.SimpleNamespace(
        out=tmp_path / "ttft.json", seconds=100, model=tmp_path, lengths={1000: None, 2000: None}
    )
    assert suite.ttft(arguments) == suite.DONE
    assert peers == [peer, None]


# ---- what a part runs in


def test_a_served_model_has_a_budget_that_no_machine_sets(monkeypatch):
    monkeypatch.setattr(server_suite, "running_server", lambda *flags: flags)
    flags = server_suite.served_model(pathlib.Path("there"))
    at = flags.index("admission.memory_bytes_max=48000000000")
    assert flags[at - 1] == "--set" and "big=there" in flags


def test_libraries_of_the_image_are_still_found(monkeypatch):
    folder = pathlib.Path("package/lib")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/driver:/more")
    assert server_suite.library_path(folder) == "package/lib:/driver:/more"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert server_suite.library_path(folder) == "package/lib"


def test_plugins_that_are_installed_have_no_part_in_the_tests(monkeypatch, tmp_path):
    plugin = tmp_path / "plugin-1.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[pytest11]\nplugin = that_is_not_there\n")
    (tmp_path / "test_one.py").write_text("def test_one():\n    pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(server_suite, "SERVED_TESTS", [str(tmp_path / "test_one.py")])
    arguments = types.SimpleNamespace(out=tmp_path / "tests.json", pytest="")
    assert server_suite.tests(arguments) == server_suite.DONE
    assert json.loads(arguments.out.read_text()) == {"right": 1, "skipped": 0, "failed": []}


# ---- density replay by threshold


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
    replay = prefills.Density(wanted)
    assert replay.search(density_at)
    assert density_at(replay.threshold) == replay.reached
    assert abs(replay.reached - wanted) <= prefills.DENSITY_ERROR_MAX


def test_a_density_that_no_threshold_gives_is_said():
    asked = []

    def density_at(threshold: float) -> float:
        asked.append(threshold)
        return 0.2 if threshold < 0.7 else 0.9

    assert not prefills.Density(0.5).search(density_at)
    assert len(asked) == prefills.CALIBRATIONS_MAX
