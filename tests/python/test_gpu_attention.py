"""tests/gpu/attention.py without a GPU: what opens the gate, what is taken for right, in which
order calls are timed, and what is said of them."""

from __future__ import annotations

import sys

import pytest
from real_server import REPOSITORY

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch", reason="a peer")
sys.path.insert(0, str(REPOSITORY / "tests/gpu"))
import attention  # noqa: E402
import inputs  # noqa: E402
from pbs_library import Lists  # noqa: E402
from progress import WRONG, Progress  # noqa: E402

RIGHT = torch.ones(2, 1024, 64)


@pytest.fixture(autouse=True)
def unwatched(monkeypatch):
    """What is late would end the tests."""
    monkeypatch.setattr(attention, "watch", lambda _: None)


class Call:
    """A call of ours that gives an output."""

    def __init__(self, output, density: float):
        self.output, self.density, self.workspace_bytes = output, density, 1

    def __call__(self):
        return self.output

    def report(self) -> dict:
        return {"density": self.density, "permute_ms": 0.1, "select_ms": 0.1, "attend_ms": 1.0}


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """Runs the gate; what is not named gives the right output, None fails."""

    def go(outputs: dict, densities: dict, seconds: float = 100) -> Progress:
        lists = Lists.from_mask(torch.ones(2, 8, 8, dtype=torch.bool).tril())

        def maker(_library, _tensors, _lists, name):
            def make():
                output = outputs.get(name, RIGHT)
                if output is None:
                    raise RuntimeError("not here")
                call = Call(output, densities.get(name, 1.0))
                return call if name.startswith("pbs") else call.__call__

            return make

        def tensors_of(part):
            if "inputs" in outputs:
                raise RuntimeError("out of memory")
            return (RIGHT, RIGHT, RIGHT), lambda: lists

        for name, value in {
            "maker": maker, "tensors_of": tensors_of, "Attention": Call, "PART_SECONDS_MAX": 0.0,
            "Library": lambda _: None, "run_golden": lambda *_: None, "is_lost": lambda: False,
            "synchronize": lambda: None, "milliseconds": lambda call: (call(), 1.0)[1],
        }.items():  # fmt: skip
            monkeypatch.setattr(attention, name, value)
        found = Progress(tmp_path / "gate.json")
        attention.run_step("gate", found, seconds)
        return found

    return go


def changed(value: float):
    output = RIGHT.clone()
    output[1, 1023, 5] = value
    return output


NO_DENSE_PEER = {"cudnn": None, "flash": None}


@pytest.mark.parametrize(
    ("outputs", "densities", "seconds", "status"),
    [
        pytest.param({}, {}, 100, 0, id="all right"),
        pytest.param({"cudnn": None, "triton_replay": None}, {}, 100, 0, id="a peer is enough"),
        pytest.param({"cudnn": changed(9.0)}, {}, 100, 0, id="a peer is wrong"),
        pytest.param({"inputs": None}, {}, 100, WRONG, id="no inputs"),
        pytest.param(NO_DENSE_PEER, {}, 100, WRONG, id="no dense peer"),
        pytest.param({"triton_replay": None, "masked_replay": None}, {}, 100, WRONG, id="no sparse peer"),
        pytest.param({}, {}, 1, WRONG, id="no time"),
        pytest.param({"pbs_all": changed(9.0)}, {}, 100, WRONG, id="order, gather or lists"),
        pytest.param({"pbs_dense": changed(float("nan"))}, {}, 100, WRONG, id="not a number"),
        pytest.param({"pbs_dense": None}, {}, 100, WRONG, id="ours fails"),
        pytest.param({}, {"pbs_all": 1.3}, 100, WRONG, id="reads too much"),
        pytest.param({}, {"pbs_all": 0.0}, 100, WRONG, id="reads nothing"),
        pytest.param({}, {"pbs_replay_in_order": 0.97}, 100, WRONG, id="other lists than given"),
    ],
)
def test_the_gate_opens_only_when_all_of_ours_that_it_asks_for_is_right(
    gate, outputs, densities, seconds, status
):
    found = gate(outputs, densities, seconds)
    assert found.status() == status
    told = {row["name"] for row in found.rows if row["kind"] == "gate"}
    right = {row["name"] for row in found.rows if row["kind"] == "attention" and row.get("right")}
    assert told == set(attention.REQUIRED) - right and bool(told) == (status == WRONG)


def test_a_line_says_time_speed_density_and_the_ratio_to_the_fastest_right_peer(gate):
    found = gate({"flash": changed(9.0), "pbs_all": changed(2.0)}, {})
    lines = "\n".join(found.found["said"])
    assert "pbs_dense 1.000 ms, 550 TFLOP/s, density 1.000, 1.00x cudnn" in lines
    assert "pbs_all 1.000 ms, 550 TFLOP/s, density 1.000, 1.00x cudnn, WRONG: 0.125" in lines


def test_outputs_of_ours_that_nothing_is_compared_with_are_finite():
    outputs = {"pbs": RIGHT, "pbs_replay": changed(float("inf"))}
    found: dict[str, dict] = {name: {} for name in outputs}
    attention.compare(outputs, found)
    assert found == {"pbs": {}, "pbs_replay": {"right": False, "why": "outputs are not finite"}}


def test_outputs_are_compared_with_what_computes_the_same_and_variants_with_the_chosen():
    wrong = changed(2.0)
    outputs = {"cudnn": RIGHT, "flash": wrong, "pbs_dense": RIGHT, "pbs": wrong,
               "pbs_dense:chosen": RIGHT, "pbs_dense:ampere": wrong}  # fmt: skip
    found: dict[str, dict] = {name: {} for name in outputs}
    attention.compare(outputs, found)
    assert found["pbs_dense"] == {"difference": 0.0, "from": "cudnn", "right": True}
    assert found["pbs"] == found["cudnn"] == found["pbs_dense:chosen"] == {}
    assert found["pbs_dense:ampere"]["from"] == "pbs_dense:chosen"
    assert found["pbs_dense:ampere"]["right"] is False


def test_a_call_of_ours_that_fails_is_wrong_and_a_variant_that_does_not_apply_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(attention, "is_lost", lambda: False)

    def fail():
        raise RuntimeError("not for these")

    names = ["pbs", "pbs:wide", "cudnn"]
    found = Progress(tmp_path / "a.json")
    _, rows = attention.prepare(found, {"head_dim": 64}, dict.fromkeys(names, fail))
    assert [rows[name].get("right") for name in names] == [False, None, None]


def test_rounds_go_there_and_back(monkeypatch):
    order = []
    monkeypatch.setattr(attention, "milliseconds", lambda call: call())
    calls = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    attention.interleave(calls, 0)
    assert "".join(order) == ("abccba" * attention.ROUNDS_MIN)[: 3 * attention.ROUNDS_MIN]


@pytest.mark.parametrize("tokens", attention.REPLAY)
def test_lists_of_a_replay_have_the_density_that_was_asked_for(monkeypatch, tokens):
    monkeypatch.setattr(inputs, "DEVICE", "cpu")
    mask = inputs.replay_mask(4, tokens, attention.REPLAY[tokens])
    assert Lists.from_mask(mask).density() == pytest.approx(attention.REPLAY[tokens], abs=0.01)


def test_every_length_of_the_first_call_checks_the_way_by_order_gather_and_lists():
    for step in ("gate", "d128_32k", "d128_128k"):
        (part,) = attention.PARTS[step]
        assert {"cudnn", "pbs_all"} <= set(part.names)
