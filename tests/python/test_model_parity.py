"""The model against transformers, on tiny random models of every served family.

Runs build/tests/model_dump (PBS_MODEL_DUMP, or next to PBS_BIN) on the folders of
tests/models/make_tiny_models.py, and pbs-decode beside a server of all of them.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="a peer")
pytest.importorskip("transformers", reason="a peer")
from safetensors.torch import load_file  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/models"))
import make_tiny_models  # noqa: E402
from real_server import running_server  # noqa: E402

pytestmark = pytest.mark.peers

# |a - b| over max |b|. f32: reordered sums of 300 terms over 3 layers. bf16: operands of
# every product are rounded (2^-9), about 40 products deep.
LOGITS_F32_MAX = 1e-4
KV_F32_MAX = 1e-4
LOGITS_BF16_MAX = 5e-2
KV_HALF_MAX = {"f16": 2e-3, "bf16": 1.6e-2}  # a few ulps: the attention input is stored
BF16_STORED = [
    name
    for name, tiny in make_tiny_models.MODELS.items()
    if tiny.dtype == torch.bfloat16
]


def dump_binary() -> pathlib.Path:
    if "PBS_MODEL_DUMP" in os.environ:
        return pathlib.Path(os.environ["PBS_MODEL_DUMP"])
    binaries = pathlib.Path(os.environ.get("PBS_BIN", ROOT / "build/bin"))
    return binaries.parent / "tests/model_dump"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny-models")
    made = {}

    def folder(name: str) -> pathlib.Path:
        if name not in made:
            made[name] = make_tiny_models.make(name, out)
        return made[name]

    return folder


def dump(folder: pathlib.Path, *options: str):
    """The JSON line and the tensors of model_dump on the folder's prompt."""
    tokens = folder / "tokens.json"
    expected = json.loads((folder / "expected.json").read_text())
    tokens.write_text(json.dumps(expected["prompt"]))
    out = folder / "dump.safetensors"
    command = [str(dump_binary()), str(folder), str(tokens), str(out)]
    done = subprocess.run(
        command + ["--last-logits", "0", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), load_file(out)


def difference(actual, expected) -> float:
    actual, expected = actual.float(), expected.float()
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def kv_difference(actual: dict, expected: dict) -> float:
    names = [name for name in expected if name.startswith("layers.")]
    return max(difference(actual[name], expected[name]) for name in names)


@pytest.mark.parametrize("name", make_tiny_models.MODELS)
def test_f32_prefill_and_greedy_tokens_equal_transformers(name, tiny_models):
    folder = tiny_models(name)
    expected = load_file(folder / "expected.safetensors")
    greedy = json.loads((folder / "expected.json").read_text())["greedy"]
    line, actual = dump(folder, "--compute", "f32", "--new-tokens", str(len(greedy)))
    assert line["compute_dtype"] == "f32"
    logits = difference(actual["logits"], expected["logits"])
    kv = kv_difference(actual, expected)
    print(f"{name}: logits {logits:.2e}, KV {kv:.2e}")
    assert logits <= LOGITS_F32_MAX
    assert kv <= KV_F32_MAX
    assert line["greedy"] == greedy


@pytest.fixture(scope="session")
def server_of_all(tiny_models):
    flags = [f"--model={name}={tiny_models(name)}" for name in make_tiny_models.MODELS]
    with running_server(*flags, "--set", "cpu.compute_dtype=f32") as server:
        yield server


@pytest.mark.parametrize("name", make_tiny_models.MODELS)
def test_the_decode_tier_continues_a_served_prefill_as_transformers_does(
    name, tiny_models, server_of_all
):
    folder = tiny_models(name)
    expected = json.loads((folder / "expected.json").read_text())
    tokens = folder / "prompt.json"
    tokens.write_text(json.dumps(expected["prompt"]))
    new_tokens = len(expected["greedy"])
    binary = dump_binary().parent.parent / "bin/pbs-decode"
    command = [binary, "--server", server_of_all.target, "--model", name, "--json"]
    command += ["--model-path", folder, "--tokens", tokens]
    command += ["--max-new-tokens", str(new_tokens)]
    command += ["--method", "dense", "--compute-dtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == expected["greedy"]


@pytest.mark.parametrize(
    "method, options",
    [
        ("pbs", ["--segment-size", "32"]),
        ("mean_pooling", []),
        ("xattention", []),
        ("prism", []),
    ],
)
def test_a_threshold_of_one_equals_dense_attention(method, options, tiny_models):
    folder = tiny_models("llama3")
    expected = load_file(folder / "expected.safetensors")
    line, actual = dump(
        folder,
        "--compute",
        "f32",
        "--method",
        method,
        "--threshold",
        "1",
        "--block-size",
        "16",
        *options,
    )
    assert min(line["density"]) >= 1.0
    assert difference(actual["logits"], expected["logits"]) <= LOGITS_F32_MAX


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16"])
def test_a_half_precision_cache_costs_its_rounding_only(kv_dtype, tiny_models):
    folder = tiny_models("qwen3")
    expected = load_file(folder / "expected.safetensors")
    line, actual = dump(folder, "--compute", "f32", "--kv-dtype", kv_dtype)
    assert line["kv_dtype"] == kv_dtype
    assert (
        actual["layers.0.k"].dtype
        == {
            "f16": torch.float16,
            "bf16": torch.bfloat16,
        }[kv_dtype]
    )
    kv = kv_difference(actual, expected)
    print(f"{kv_dtype} cache: KV {kv:.2e}")
    assert kv <= KV_HALF_MAX[kv_dtype]


@pytest.mark.parametrize("name", BF16_STORED)
def test_bf16_compute_is_no_further_from_f32_than_transformers_own(name, tiny_models):
    folder = tiny_models(name)
    expected = load_file(folder / "expected.safetensors")
    probe = subprocess.run(
        [str(dump_binary()), str(folder), "/dev/null", "none", "--compute", "bf16"],
        capture_output=True,
        text=True,
    )
    if "compute bf16 needs" in probe.stderr:
        pytest.skip(probe.stderr.strip())
    line, actual = dump(folder, "--compute", "bf16")
    assert line["compute_dtype"] == "bf16"
    ours = difference(actual["logits"], expected["logits"])
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        theirs = difference(
            peer(expected["ids"][None].long()).logits[0], expected["logits"]
        )
    print(f"{name} bf16: ours {ours:.2e}, transformers {theirs:.2e}")
    assert ours <= LOGITS_BF16_MAX
    assert ours <= 1.25 * theirs


def test_equal_weights_have_one_digest_however_they_are_sharded(tiny_models, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_models("mistral")
    whole = tmp_path / "whole"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(whole)
    for name in ("expected.json",):
        (whole / name).write_text((folder / name).read_text())
    assert dump(folder)[0]["digest"] == dump(whole)[0]["digest"]
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(whole)
    assert dump(folder)[0]["digest"] != dump(whole)[0]["digest"]
