"""The authors' own outputs, through the running server with `pbs-client attend`.

tests/golden holds inputs, key orders, block masks and outputs of the published code.
f32: our order and mask are theirs, and outputs agree. f16 and bf16: scores tie within a
rounding, so masks are compared given their order and outputs given both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from pbs_client import safetensors_file
from pbs_client.cli import main
from real_server import BACKEND

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())


def words_of(case: dict) -> list[str]:
    """The method of a manifest entry as arguments of the script."""
    if case["method"] == "meanpooling":
        options = case["params"]
        words = ["--method", "mean_pooling"]
        block, threshold = options["block_size"], options["threshold"]
        force_first = options["force_select_first_block"]
    else:
        words = ["--method", "pbs", "--scope", "query_head"]
        words += ["--segment-size", str(case["segment"])]
        block, threshold, force_first = case["block"], case["tau"], case["force_first"]
    words += ["--block-size", str(block), "--threshold", str(threshold)]
    return words if force_first else [*words, "--no-force-first-block"]


CASES = {
    case["name"]: case
    for case in MANIFEST["cases"] + MANIFEST["baselines"]
    if case["method"] in ("pbs", "meanpooling")
}
# What the CUDA backend computes (docs/KERNELS.md).
if BACKEND == "cuda":
    CASES = {
        name: case
        for name, case in CASES.items()
        if case["dtype"] in ("f16", "bf16") and case.get("block", 128) == 128
    }
# |o - o*| between two roundings of one sum (docs/KERNELS.md); some of theirs are stored
# as f16.
OUTPUT_ERROR_MAX = {"f32": 2e-5, "f16": 2e-3, "bf16": 4e-2}
STORED_F16_ERROR_MAX = 2e-3
MANTISSA_BITS = {"f32": 23, "f16": 10, "bf16": 7}


@dataclass
class Golden:
    """A case with its tensors, and its inputs as a file."""

    case: dict
    tensors: dict
    input_file: Path

    def has(self, name: str) -> bool:
        return name in self.tensors


@pytest.fixture(params=CASES)
def golden(request, tmp_path) -> Golden:
    case = CASES[request.param]
    tensors = safetensors_file.read(GOLDEN / case["file"])
    if "inputs_from" in case:
        source = f"{case['inputs_from']}.safetensors"
        tensors.update(safetensors_file.read(GOLDEN / source, ["q", "k", "v"]))
    inputs = tmp_path / "in.safetensors"
    names = ("q", "k", "v", "order", "block_mask")
    safetensors_file.write(inputs, {n: tensors[n] for n in names if n in tensors})
    return Golden(case, tensors, inputs)


def attend(capsys, server, golden: Golden, *given: str) -> tuple[dict, dict]:
    """Runs the case; gives the printed line and the tensors written."""
    case = golden.case
    output = golden.input_file.with_name("out.safetensors")
    files = ["--input", str(golden.input_file), "--output", str(output)]
    words = [*words_of(case), "--dtype", case["dtype"]]
    want = "o,lse,block_mask" + (",order" if case["method"] == "pbs" else "")
    capsys.readouterr()
    command = ["attend", "--server", server.target, *files, *words, "--want", want]
    assert main([*command, *given]) == 0
    return json.loads(capsys.readouterr().out), safetensors_file.read(output)


def difference(golden: Golden, output: np.ndarray) -> tuple[float, float]:
    """(largest |o - o*|, what is allowed)."""
    theirs = golden.tensors["o"]
    allowed = OUTPUT_ERROR_MAX[golden.case["dtype"]]
    if theirs.dtype == np.float16:
        allowed = max(allowed, STORED_F16_ERROR_MAX)
    error = np.abs(output.astype(np.float64) - theirs.astype(np.float64)).max()
    return float(error), allowed


def test_outputs_given_their_order_and_blocks_are_theirs(capsys, server, golden):
    given = ["--use-order"] if golden.has("order") else []
    given += ["--use-block-mask"] if golden.has("block_mask") else []
    line, out = attend(capsys, server, golden, *given)
    error, allowed = difference(golden, out["o"])
    print(f"{golden.case['name']}: |o - o*| {error:.2e}, allowed {allowed:.0e}")
    assert error <= allowed
    for name in ("order", "block_mask"):
        if golden.has(name):
            np.testing.assert_array_equal(out[name], golden.tensors[name])
    assert line["backend"] == BACKEND


def test_blocks_given_their_order_are_theirs(capsys, server, golden):
    if not golden.has("block_mask"):
        assert golden.case["dense_fallback"]  # short: they ran dense, without a mask
        line, _ = attend(capsys, server, golden)
        assert line["method_run"] == "dense"
        return
    given = ["--use-order"] if golden.has("order") else []
    _, out = attend(capsys, server, golden, *given)
    np.testing.assert_array_equal(out["block_mask"], golden.tensors["block_mask"])


def importance(q, k, block: int, segment: int) -> np.ndarray:
    """Unrounded scores that order the keys of one head, [keys of whole segments]."""
    whole = len(k) // segment * segment
    logits = q[-block:].astype(np.float64) @ k[:whole].astype(np.float64).T
    logits /= np.sqrt(q.shape[1])
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)).mean(0)


def moved_keys(golden: Golden, order: np.ndarray) -> tuple[int, float]:
    """(keys in other slots than theirs, largest score gap of a move in ulps)."""
    case, q, k = golden.case, golden.tensors["q"], golden.tensors["k"]
    group = q.shape[1] // k.shape[1]
    moved, gap_ulps = 0, 0.0
    for batch, head in np.ndindex(q.shape[:2]):
        ours, theirs = order[batch, head], golden.tensors["order"][batch, head]
        slots = np.flatnonzero(ours != theirs)
        if not slots.size:
            continue
        scores = importance(
            q[batch, head], k[batch, head // group], case["block"], case["segment"]
        )
        mine, other = scores[ours[slots]], scores[theirs[slots]]
        ulp = 2.0 ** (
            np.floor(np.log2(np.maximum(mine, other))) - MANTISSA_BITS[case["dtype"]]
        )
        moved += slots.size
        gap_ulps = max(gap_ulps, float((np.abs(mine - other) / ulp).max()))
    return moved, gap_ulps


def test_our_own_order_and_blocks_are_theirs_but_for_ties_of_half_precision(
    capsys, server, golden
):
    line, out = attend(capsys, server, golden)
    moved, gap_ulps = (
        moved_keys(golden, out["order"]) if golden.has("order") else (0, 0)
    )
    print(
        f"{golden.case['name']}: {moved} keys moved, by at most {gap_ulps:.2f} ulp, "
        f"density {line['density']:.3f}"
    )
    assert gap_ulps <= 1
    if golden.case["dtype"] != "f32":
        return
    assert moved == 0
    if golden.has("block_mask"):
        np.testing.assert_array_equal(out["block_mask"], golden.tensors["block_mask"])
    error, allowed = difference(golden, out["o"])
    assert error <= allowed


def test_the_files_order_and_blocks_are_ignored_unless_asked_for(
    capsys, server, golden, tmp_path
):
    if not golden.has("block_mask"):
        assert golden.case["dense_fallback"]
        return
    line, expected = attend(capsys, server, golden)
    spoiled = safetensors_file.read(golden.input_file)
    for name in ("order", "block_mask"):
        if name in spoiled:
            spoiled[name] = np.zeros_like(spoiled[name])
    safetensors_file.write(golden.input_file, spoiled)
    again, out = attend(capsys, server, golden)
    assert again["density"] == line["density"]
    for name, array in expected.items():
        np.testing.assert_array_equal(out[name], array)
