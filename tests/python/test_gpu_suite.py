"""What of tests/gpu needs no GPU: how a run carries on, the lists of a peer, the report."""

from __future__ import annotations

import json
import sys

import pytest
from real_server import REPOSITORY

sys.path[:0] = [str(REPOSITORY / folder) for folder in ("tests/gpu", "tests/bench", "scripts")]
from progress import Progress  # noqa: E402

PART = {"inputs": "structured", "tokens": 8192, "head_dim": 128}
GPU = {"name": "a GPU", "driver_version": "1"}
FACTS = {"gpu": GPU, "torch": "2", "commit": "c", "command": "x", "checks": ["sm_90: 3 of 3"]}
OURS = {
    "name": "pbs", "ms": 2.0, "dense_tflops": 500.0, "density": 0.5, "permute_ms": 0.1,
    "select_ms": 0.1, "attend_ms": 1.8,
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.json"


# ---- tests/gpu/progress.py


def test_a_call_that_ended_the_process_is_told_and_barred_for_its_head_dim(path):
    first = Progress(path, FACTS)
    first.begin(PART | {"name": "pbs"})
    second = Progress(path, FACTS)
    assert second.is_barred(128, "pbs")
    assert not second.is_barred(64, "pbs")
    assert not second.is_barred(128, "cudnn")
    assert second.result["parts"] == []  # the rest of the part runs
    assert not second.is_right()


def test_a_part_that_ended_the_process_outside_a_call_is_not_repeated(path):
    Progress(path, FACTS).begin(PART | {"name": None})
    assert Progress(path, FACTS).result["parts"] == [PART]


def test_a_case_that_ended_the_process_is_wrong_and_not_repeated(path):
    Progress(path, FACTS).begin({"case": "short"})
    progress = Progress(path, FACTS)
    assert progress.has_case("short")
    assert not progress.is_right()


def test_a_peer_that_ended_the_process_makes_nothing_wrong(path):
    Progress(path, FACTS).begin(PART | {"name": "flex_replay"})
    assert Progress(path, FACTS).is_right()


def test_a_finished_file_is_begun_anew(path):
    progress = Progress(path, FACTS)
    progress.finish(PART, [OURS])
    assert Progress(path, FACTS).result["parts"] == [PART]
    progress.result["done"] = True
    progress.save()
    assert Progress(path, FACTS).result["parts"] == []


def test_figures_that_json_cannot_hold_are_null(path):
    progress = Progress(path, FACTS)
    progress.finish(PART, [OURS | {"difference": float("nan"), "ms": float("inf")}])
    (row,) = json.loads(path.read_text(), parse_constant=pytest.fail)["timings"]
    assert row["difference"] is None and row["ms"] is None


# ---- tests/gpu/inputs.py


@pytest.mark.peers
def test_flex_attention_masks_inside_diagonal_blocks_only():
    torch = pytest.importorskip("torch", reason="a peer")
    import inputs

    heads, blocks = 3, 6
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(heads, blocks, blocks, generator=generator) < 0.5
    mask |= torch.eye(blocks, dtype=torch.bool)
    lists = inputs.flex_blocks(mask)
    assert torch.equal(lists.to_dense()[0].bool(), torch.tril(mask))
    assert torch.equal(lists.full_kv_num_blocks[0].long(), torch.tril(mask, -1).sum(-1))
    # One block is left to the mask function in each row: the diagonal one.
    assert (lists.kv_num_blocks == 1).all()
    assert torch.equal(
        lists.kv_indices[0, :, :, 0].long(), torch.arange(blocks).expand(heads, blocks)
    )
    assert lists.mask_mod(0, 0, torch.tensor(5), torch.tensor(5))
    assert not lists.mask_mod(0, 0, torch.tensor(5), torch.tensor(6))


# ---- scripts/gpu_report.py


@pytest.mark.peers
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([], [], id="nothing was timed"),
        pytest.param([OURS], ["| 0.500 | 2.00 | 278 | 11.1% | ? |"], id="no peer ran"),
        pytest.param(
            [OURS, {"name": "cudnn", "ms": 5.0, "dense_tflops": 1.0}],
            ["| 278 | 11.1% | 2.50x >="],
            id="all",
        ),
        pytest.param(
            [OURS | {"attend_ms": 0.0}, {"name": "cudnn", "error": "a|b\nc"}],
            ["| ? | 2.00 | ? | ? | ? |", "not measured: cudnn, structured, 8192, 128: a\\|b c"],
            id="no stage times",
        ),
        pytest.param([{"name": "pbs", "error": "a|b"}], ["| a\\|b |"], id="ours failed"),
        pytest.param([{"name": None, "error": "memory"}], ["not measured: inputs"], id="no inputs"),
        pytest.param(
            [OURS | {"difference": None, "from": "cudnn", "right": False}],
            ["**wrong**: pbs, structured, 8192, 128 differs from cudnn"],
            id="wrong",
        ),
    ],
)
def test_the_report_takes_what_there_is(path, monkeypatch, rows, expected):
    pytest.importorskip("matplotlib", reason="draws the plots")
    import gpu_report
    import report

    progress = Progress(path, FACTS)
    progress.finish(PART, rows)
    results = json.loads(path.read_text())
    text = gpu_report.attention_table(results)
    for part in [*expected, "a GPU", "sm_90: 3 of 3", "the run was cut short"]:
        assert part in text
    monkeypatch.setattr(report, "RESULTS", path.parent)
    gpu_report.plot(results)
    assert (path.parent / "gpu_attention.svg").exists()
