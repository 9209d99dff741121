"""tests/bench/gpu_report.py: tables of what runs on a GPU found, and what is refused."""

from __future__ import annotations

import io
import json
import sys
import tarfile

import pytest
from real_server import REPOSITORY

pytestmark = pytest.mark.peers
pytest.importorskip("matplotlib", reason="draws the plots")
sys.path.insert(0, str(REPOSITORY / "tests/bench"))
import gpu_report  # noqa: E402
import report  # noqa: E402

GPU = {"name": "A GPU", "driver_version": "1", "clocks.sm": "1980 MHz"}
MODEL = {"backend": "cuda", "device": "A GPU, 132 threads", "layers": 8}
OURS = {"kind": "attention", "head_dim": 128, "inputs": "structured", "tokens": 32768,
        "name": "pbs", "ms": 2.0, "dense_tflops": 500.0, "density": 0.5, "permute_ms": 0.1,
        "select_ms": 0.1, "attend_ms": 1.8, "step": "d128_32k"}  # fmt: skip
CUDNN = {key: OURS[key] for key in ("kind", "head_dim", "inputs", "tokens")} | {
    "name": "cudnn", "ms": 5.0, "dense_tflops": 200.0, "peer": True
}  # fmt: skip


def run_of(*rows: dict, **more) -> dict:
    return {
        "rehearsal": False, "gpu": GPU, "gpu_after": GPU, "commit": "c", "command": "x", "done": True,
        "written": "2026-01-02T03:04:05Z",
        "facts": {"modules": {"torch": "2"}, "model": MODEL, "matmul_tflops": 700.1, "copy_gb_per_s": 4e3},
        "steps": [{"name": "gate", "status": "right", "clocks": {"min": 1755, "median": 1980}}],
        "rows": list(rows),
    } | more  # fmt: skip


def prefill(name: str, tokens: int = 32768, **more) -> dict:
    stages = dict.fromkeys(gpu_report.STAGES, 0.01)
    stats = {"total_seconds": 1.1, "density": 0.5, "kv_copy_seconds": 0.2, "stages": stages}
    row = {"kind": "prefill", "tokens": tokens, "layers": 8, "name": name, "ttft_seconds": 1.0, "rounds": 3}
    return row | ({} if name == "torch" else {"stats": stats, "torch_over_this": 1.0}) | more


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Runs the report over runs; gives the page."""
    page = tmp_path / "PAGE.md"
    page.write_text("# P\n\n" + "".join(
        f"<!-- table: gpu_{name} -->\n<!-- end -->\n" for name in ("attention", "server")
    ))  # fmt: skip
    for module in (gpu_report, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        monkeypatch.setattr(module, "PAGE", page)

    def go(*runs: dict, take: bool = False) -> str:
        words = []
        for count, run in enumerate(runs):
            text = json.dumps(run).encode()
            if take:
                words += ["--take", str(tmp_path / f"{count}.tar.gz")]
                with tarfile.open(words[-1], "w:gz") as tar:
                    entry = tarfile.TarInfo("gpu_run/results.json")
                    entry.size = len(text)
                    tar.addfile(entry, io.BytesIO(text))
            else:
                (tmp_path / f"gpu_{count}.json").write_bytes(text)
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", *words])
        gpu_report.main()
        return page.read_text()

    return go


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([OURS], ["| 0.500 | 2.00 | 278 | 11.1% | ? |"], id="no peer ran"),
        pytest.param([OURS, CUDNN], ["| 278 | 11.1% | 2.50x >= 2.0 |"], id="all"),
        pytest.param([OURS | {"ms": 4.0, "attend_ms": 3.6}, CUDNN], ["1.25x **<** 2.0"], id="a goal missed"),
        pytest.param(
            [OURS | {"attend_ms": 0.0}, CUDNN | {"ms": None, "error": "a|b\nc"}],
            ["| ? | 2.00 | ? | ? | ? |", "not measured: cudnn, structured, 32768, 128: a\\|b c"],
            id="no stage times",
        ),
        pytest.param(
            [OURS | {"difference": None, "from": "cudnn", "right": False}],
            ["**wrong**: pbs, structured, 32768, 128: differs from cudnn", "| 128 | wrong |  |"], id="wrong",
        ),
        pytest.param(
            [OURS, CUDNN, CUDNN | {"name": "flash", "ms": 1.0, "from": "cudnn", "right": False}],
            ["| 278 | 11.1% | 2.50x >= 2.0 |", "**wrong**: flash, structured, 32768, 128: differs from cudnn",
             "FlashAttention-3 was not run"], id="a wrong peer",
        ),
        pytest.param(
            [OURS | {"name": "pbs_dense:chosen", "right": False, "why": "not finite"},
             OURS | {"name": "pbs_dense:wide"}, OURS | {"name": "pbs_all"}, CUDNN],
            ["| pbs_dense, chosen | structured | 32K | 128 | wrong |  |", "128: not finite",
             "| pbs_dense, wide | structured | 32K | 128 | ? |  |", "| 278 | 11.1% | 2.50x |"],
            id="wrong chosen kernels",
        ),
        pytest.param(
            [{"kind": "gate", "name": "pbs_dense", "right": False, "error": "nothing says that it is right"},
             {"kind": "part", "inputs": "structured", "tokens": 8192, "error": "left out, no time"}],
            ["**wrong**: pbs_dense: nothing says", "not measured: structured, 8192: left out"], id="not checked",
        ),
        pytest.param(
            [OURS | {"name": "pbs_dense:chosen"}, OURS | {"name": "pbs_dense:wide", "ms": 1.6},
             OURS | {"name": "pbs_dense:odd", "ms": None, "error": "not for these"}],
            ["| pbs_dense, wide | structured | 32K | 128 | 1.60 | 1.250x |",
             "| pbs_dense, odd | structured | 32K | 128 | not for these |"], id="variants",
        ),
        pytest.param(
            [{"kind": "golden", "case": "short", "right": True},
             {"kind": "family", "family": "Hopper", "right_cases": 3, "cases": 4, "right": False},
             {"kind": "case", "case": "long", "right": False, "error": "status -6"}],
            ["authors' outputs: 1 of 1 cases right", "Hopper: 3 of 4", "**wrong**: long: status -6"],
            id="correctness",
        ),
        pytest.param([prefill("dense", torch_over_this=0.9)], ["1.11x **>** 1.05", "95.0% >= 95%"], id="dense"),
        pytest.param(
            [prefill("density replay", 131072, dense_over_this=2.3), prefill("pbs", dense_over_this=0.9)],
            ["2.30x >= 2.2", "0.90x **<** 0.97", "8 layers of the shape"], id="goals of prefills",
        ),
        pytest.param(
            [{"kind": "prefill", "tokens": 8192, "layers": 8, "name": "dense", "error": "a|b\nc"}],
            ["| 8K | ours, dense | a\\|b c |"], id="lost",
        ),
        pytest.param(
            [{"kind": "linear", "name": "QKV", "rows": 8192, "in": 4096, "out": 6144, "torch_tflops": 412.0,
              "tflops": 413.0, "ratio": 1.0}, {"kind": "concurrent", "prompts": 8, "tokens": 16384,
              "alone_over_together": 1.01, "right": False}],
            ["| 412 | 413 | 1.00x >= 0.95 |", "1.01x the speed", "**wrong**: 16384"], id="the others",
        ),
    ],
)  # fmt: skip
def test_the_report_takes_what_there_is(write, tmp_path, rows, expected):
    page = write(run_of(*rows))
    for part in [*expected, "A GPU", "700 TFLOP/s of torch's product, 4000 GB/s of its copy",
                 "SM clock at work, least and median: gate 1755, 1980",
                 "[`docs/results/gpu_0.json`](results/gpu_0.json)"]:  # fmt: skip
        assert part in page
    assert write(run_of(*rows)) == page  # the same page once more
    assert (tmp_path / "gpu_attention.svg").exists() and (tmp_path / "gpu_server.svg").exists()


def test_of_several_calls_the_later_row_counts_but_no_error_stands_for_a_figure(write):
    page = write(
        run_of(OURS, CUDNN),
        run_of(OURS | {"ms": 1.0}, CUDNN | {"ms": None, "error": "memory"}, written="2026-01-03T00:00:00Z",
               steps=[{"name": "ttft", "status": "failed"}], done=False),
    )  # fmt: skip
    assert "5.00x >= 2.0" in page and "memory" not in page
    assert "gpu_0.json" in page and "gpu_1.json: ttft failed, it was cut short" in page


def test_a_tar_is_taken_into_the_results(write, tmp_path):
    page = write(run_of(OURS, CUDNN), take=True)
    assert "gpu_20260102030405.json" in page
    assert json.loads((tmp_path / "gpu_20260102030405.json").read_text())["commit"] == "c"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        pytest.param({"rehearsal": True}, "of a rehearsal", id="a rehearsal"),
        pytest.param({"gpu": None}, "no driver named a GPU", id="no driver"),
        pytest.param({"facts": {"model": MODEL | {"device": "emulated"}}}, "ran on emulated", id="emulated"),
        pytest.param({"facts": {"model": MODEL | {"backend": "cpu"}}}, "the server ran on", id="a CPU's"),
    ],
)
@pytest.mark.parametrize("take", [False, True])
def test_results_that_are_not_of_a_gpu_are_refused(write, tmp_path, changes, why, take):
    with pytest.raises(SystemExit, match=why):
        write(run_of(OURS, **changes), take=take)
    assert "| run |" not in (tmp_path / "PAGE.md").read_text()
