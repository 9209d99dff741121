"""scripts/gpu_server_suite.sh without a GPU: the whole of it on the CPU, what a part that
hangs costs, and the report."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from real_server import REPOSITORY, program

sys.path[:0] = [str(REPOSITORY / folder) for folder in ("tests/gpu", "tests/bench", "scripts")]
import collect  # noqa: E402
import machine  # noqa: E402
import prefills  # noqa: E402

GPU = {"name": "A GPU", "driver_version": "1", "clocks.sm": "1980 MHz"}
MODEL = {"backend": "cuda", "device": "A GPU, 132 threads", "layers": 32, "weight_bytes": 16e9}


@pytest.fixture
def package(tmp_path) -> pathlib.Path:
    """What scripts/pack_gpu_suite.sh makes, of this build."""
    folder = tmp_path / "package"
    programs = folder / "pbs-prefill-test/bin"
    programs.mkdir(parents=True)
    for name in ("pbs-prefilld", "pbs-decode"):
        (programs / name).symlink_to(program(name))
    (folder / "bench_worker").symlink_to(program("bench_worker"))
    return folder


def run_suite(package: pathlib.Path, out: pathlib.Path, **settings: str) -> tuple[int, dict]:
    """Status, and the results."""
    environment = {
        "PBS_PACKAGE": str(package), "OUT": str(out), "PYTHON": sys.executable,
        "PBS_SUITE_BACKEND": "cpu", "PBS_SUITE_MODEL": "--preset tiny", "PBS_COMMIT": "given",
        "GIT_DIR": "/dev/null",
    }  # fmt: skip
    script = REPOSITORY / "scripts/gpu_server_suite.sh"
    done = subprocess.run([script], env=os.environ | environment | settings)
    return done.returncode, json.loads((out / "gpu_server.json").read_text())


# ---- all of it


@pytest.mark.peers
def test_the_suite_measures_every_part_on_a_cpu(package, tmp_path):
    pytest.importorskip("torch", reason="a peer")
    status, results = run_suite(
        package, tmp_path / "out", PBS_SUITE_LENGTHS="2048:0.8 9000 1024",
        PBS_SUITE_ARGUMENTS="--shrink 16 --rows 32 --repetitions 1 --tokens 300 "
        "--pytest=-kpbs_struct_700_d64_bf16",
    )  # fmt: skip
    assert status == 0
    assert results["done"] and results["backend"] == "cpu" and results["commit"] == "given"
    assert results["tests"]["right"] > 0 and results["tests"]["failed"] == []
    assert [row["right"] for row in results["handoff"]["rows"]] == [True, True]
    assert [group["shape"] for group in results["linear"]["groups"]][0] == [32, 256, 384]
    assert all(g["cases"]["ours"]["speedup_wall"] > 0 for g in results["linear"]["groups"])
    assert results["concurrent"]["right"] and len(results["concurrent"]["rounds"][0]["ttft"]) == 8
    assert results["host_memory_bytes"] > 0 and results["host_memory_bytes_after"] > 0
    assert pathlib.Path(results["model_folder"]).is_dir()
    rows = {(row["tokens"], row["name"]): row for row in results["ttft"]["timings"]}
    for name in ("torch", "dense", "pbs", "density replay 0.8 by threshold"):
        assert rows[2048, name]["ttft_seconds"] > 0, rows[2048, name]
    assert rows[2048, "dense"]["cosine"] > 0.9999
    replay = rows[2048, "density replay 0.8 by threshold"]
    assert replay["density"] == pytest.approx(0.8, abs=prefills.DENSITY_ERROR_MAX)
    assert replay["dense_over_this"] > 0 and replay["stages"]["select"] > 0
    assert "outside [1, 8192]" in rows[9000, None]["error"]  # refused, and the next length is measured
    assert rows[1024, "pbs"]["rounds"] >= prefills.ROUNDS_MIN


def test_a_part_that_hangs_is_ended_with_its_server_and_the_time_is_kept(package, tmp_path):
    decode = package / "pbs-prefill-test/bin/pbs-decode"
    decode.unlink()
    decode.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    decode.chmod(0o755)
    seconds, begin = 24, time.monotonic()
    status, results = run_suite(
        package, tmp_path / "out", PBS_GPU_SECONDS=str(seconds), TMPDIR=str(tmp_path),
        PBS_SUITE_PARTS="handoff concurrent",
    )  # fmt: skip
    assert time.monotonic() - begin <= seconds
    assert status == 0  # nothing was found wrong
    assert any(check.startswith("handoff: not finished in") for check in results["checks"])
    assert "concurrent" not in results
    assert any("left out, no time" in check for check in results["checks"])
    left = [p for p in pathlib.Path("/proc").glob("[0-9]*/cmdline") if names(p, str(tmp_path))]
    assert left == []


def names(cmdline: pathlib.Path, text: str) -> bool:
    """Whether a process was started with a text among its words."""
    with contextlib.suppress(OSError):
        return text.encode() in cmdline.read_bytes()
    return False


def test_a_wrong_answer_is_told_and_costs_no_other_part(package, tmp_path):
    decode = package / "pbs-prefill-test/bin/pbs-decode"
    decode.unlink()
    decode.write_text("#!/bin/sh\necho the cache is wrong >&2\nexit 1\n")
    decode.chmod(0o755)
    status, results = run_suite(
        package, tmp_path / "out", PBS_SUITE_PARTS="handoff concurrent",
        PBS_SUITE_ARGUMENTS="--tokens 300",
    )  # fmt: skip
    assert status == 1
    assert [row["error"] for row in results["handoff"]["rows"]] == ["the cache is wrong"] * 2
    assert results["concurrent"]["right"]


# ---- the results, and the report


def test_a_gpu_is_named_by_its_driver_where_nvidia_smi_is_not(tmp_path):
    assert machine.read_driver(tmp_path) is None
    folder = tmp_path / "gpus/0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 50\n")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    )
    found = machine.read_driver(tmp_path)
    assert found == {"name": "NVIDIA H200", "driver_version": "580.65.06"}


def test_results_that_were_cut_while_written_are_nothing(tmp_path):
    path = tmp_path / "ttft.json"
    path.write_text('{"timings": [{"na')
    assert collect.read(path) == {}
    assert collect.read(tmp_path / "none.json") == {}


def timing(tokens: int, name: str, **more) -> dict:
    stages = dict.fromkeys((*"queue embed qkv permute select attend mlp copy".split(),), 0.01)
    served = {} if name == "torch" else {
        "kv_ready_seconds": 1.1, "density": 0.5, "stages": stages, "kv_copy_seconds": 0.2,
        "hidden_share": 0.96, "torch_over_this": 1.0,
    }  # fmt: skip
    row = {"tokens": tokens, "name": name, "ttft_seconds": 1.0, "rounds": 3}
    return row | {"dense_over_this": 1.0} | served | more


def results_of(*timings: dict, **more) -> dict:
    return {
        "gpu": GPU, "gpu_after": GPU, "backend": "cuda", "commit": "c", "command": "x",
        "done": True, "checks": ["tests: right, 9 s"], "ttft": {"model": MODEL, "timings": [*timings]},
    } | more  # fmt: skip


@pytest.fixture
def report(tmp_path, monkeypatch):
    """gpu_report on a page and a folder of results of its own."""
    pytest.importorskip("matplotlib", reason="draws the plots")
    import gpu_report
    import report

    page = tmp_path / "PAGE.md"
    page.write_text("# P\n\n## Attention on a GPU\n\nText.\n\n## A served model on a GPU\n\nMore.\n")
    for module in (gpu_report, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        monkeypatch.setattr(module, "PAGE", page)

    def write(results: dict) -> tuple[int, str]:
        (tmp_path / "gpu_server.json").write_text(json.dumps(results))
        return gpu_report.main(), page.read_text()

    return write


REPLAY = "density replay 0.219 by threshold"


@pytest.mark.peers
@pytest.mark.parametrize(
    ("results", "expected"),
    [
        pytest.param(results_of(), ["Prefills were not measured", "Linear layers were"], id="none"),
        pytest.param(
            results_of(timing(32768, "dense", torch_over_this=0.9)),
            ["| 32K | ours, dense | 1.000 s | 1.100 s | 0.500 |", "1.11x **>** 1.05", "96.0 % >= 95"],
            id="dense is slow",
        ),
        pytest.param(
            results_of(timing(131072, REPLAY, dense_over_this=2.3),
                       timing(32768, "pbs", dense_over_this=0.9, hidden_share=0.9)),
            ["2.30x >= 2.2", "0.90x **<** 0.97", "90.0 % **<** 95", "gpu_server.svg"],
            id="goals",
        ),
        pytest.param(
            results_of({"tokens": 8192, "name": None, "error": "a|b\nc"}, done=False),
            ["| 8K | nothing | a\\|b c |", "the run was cut short"],
            id="lost",
        ),
        pytest.param(
            results_of(timing(8192, "dense", **{"right": False, "from": "torch"})),
            ["**wrong**: logits of ours, dense, 8K, differ from torch's"],
            id="wrong",
        ),
        pytest.param(
            results_of(
                linear={"repetitions": 2, "groups": [{
                    "name": "QKV", "shape": [8192, 4096, 6144],
                    "cases": {"torch": {"wall": 2e-3}, "ours": {"wall": 2e-3, "speedup_wall": 1.0}},
                }]},
                tests={"right": 3, "skipped": 1, "failed": ["x"]},
                handoff={"rows": [{"name": "pbs", "right": False, "error": "e"}]},
                concurrent={"prompts": 8, "tokens": 16384, "alone_over_together": 1.01,
                            "right": True, "model": MODEL},
            ),
            ["| 412 | 412 | 1.00x >= 0.95 |", "**wrong**: x", "pbs cache: **wrong**, e", "1.01x the"],
            id="the other parts",
        ),
    ],
)  # fmt: skip
def test_the_report_takes_what_there_is(report, results, expected):
    status, page = report(results)
    assert status == 0
    section = page[page.index("## A served model on a GPU") :]
    for part in [*expected, "A GPU", "1980 MHz", "32 of its 32 layers" if "ttft" in results else ""]:
        assert part in section
    assert report(results)[1] == page  # the same page once more


@pytest.mark.peers
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"backend": "cpu"}, id="a CPU's"),
        pytest.param({"gpu": None}, id="no driver"),
        pytest.param({"ttft": {"model": MODEL | {"device": "emulated, 4 threads"}}}, id="emulated"),
        pytest.param({"concurrent": {"model": MODEL | {"backend": "cpu"}}}, id="served by a CPU"),
    ],
)
def test_results_that_are_not_of_a_gpu_are_refused(report, changes, capsys):
    status, page = report(results_of(**changes))
    assert status == 1
    assert "gpu_server.json is refused" in capsys.readouterr().err
    assert "table: gpu_server" not in page


# ---- the peer


@pytest.mark.peers
def test_attention_that_no_backend_runs_is_an_error_and_not_the_end(monkeypatch):
    pytest.importorskip("torch", reason="a peer")
    import torch_model

    def refuse():
        raise RuntimeError("not these heads")

    with pytest.raises(RuntimeError, match="none of cudnn, flash"):
        torch_model.fastest(refuse)


@pytest.mark.peers
def test_rotations_of_the_torch_model_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason="a peer")
    rope = pytest.importorskip("transformers.modeling_rope_utils", reason="a peer")
    import make_random_model
    import torch_model
    import transformers

    scaling = make_random_model.LLAMA3_ROPE
    config = transformers.LlamaConfig(
        head_dim=128, rope_parameters=scaling | {"rope_theta": 5e5}, max_position_embeddings=131072
    )
    expected, _ = rope.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    words = {"head_dim": 128, "rope_theta": 5e5, "rope_scaling": scaling}
    torch.testing.assert_close(torch_model.inverse_frequencies(words).float(), expected)
