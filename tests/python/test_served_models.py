"""Tiny models of every family through the running server, beside what transformers
computes from them in f32.

PBS_TINY_MODELS: a folder of tests/models/make_tiny_models.py; without it the models are made
here, which takes torch and transformers.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

import numpy as np
import pytest
from pbs_client import (
    Attention,
    Client,
    Dense,
    Inline,
    Logits,
    Pbs,
    safetensors_file,
)
from real_server import REPOSITORY, running_server

pytestmark = pytest.mark.peers

MADE = os.environ.get("PBS_TINY_MODELS")
# Of head dims that every backend has.
NAMES = ["llama3", "mistral", "qwen3", "qwen3-tied-bias"]
if MADE is not None:
    NAMES = [name for name in NAMES if (pathlib.Path(MADE) / name).exists()]
# |a - b| over max |b|, by the dtype that products are computed in. f32: reordered sums of
# 300 terms over 3 layers. bf16: operands of every product are rounded (2^-9), about 40
# products deep.
DIFFERENCE_MAX = {"f32": 1e-4, "bf16": 5e-2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    if MADE is not None:
        return {name: pathlib.Path(MADE) / name for name in NAMES}
    pytest.importorskip("torch", reason="a peer")
    pytest.importorskip("transformers", reason="a peer")
    sys.path.insert(0, str(REPOSITORY / "tests/models"))
    import make_tiny_models

    out = tmp_path_factory.mktemp("tiny-models")
    return {name: make_tiny_models.make(name, out) for name in NAMES}


@pytest.fixture(scope="module")
def models(folders):
    """A client of a server of all of them."""
    flags = [f"--model={name}={folder}" for name, folder in folders.items()]
    with running_server(*flags) as server, Client(server.target) as client:
        yield client


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# A threshold of 1 keeps every block: the same attention by another road.
@pytest.mark.parametrize("method", [Dense(), Pbs(threshold=1.0)], ids=["dense", "pbs"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_cache_are_those_of_transformers(models, folders, name, method):
    expected = safetensors_file.read(folders[name] / "expected.safetensors")
    tokens = json.loads((folders[name] / "expected.json").read_text())["prompt"]
    (served,) = (model for model in models.models() if model.name == name)
    allowed = DIFFERENCE_MAX[served.compute_dtype]
    result = models.prefill(
        name,
        tokens,
        Attention(method, dense_fallback=False),
        delivery=Inline("f32"),
        logits=Logits(all_of_last_token=True),
    )
    logits = difference(result.last_token_logits, expected["logits"][len(tokens) - 1])
    kv = max(
        difference(array, expected[f"layers.{layer}.{kind}"])
        for kind, arrays in (("k", result.kv.k), ("v", result.kv.v))
        for layer, array in enumerate(arrays)
    )
    print(f"{name} {served.compute_dtype}: logits {logits:.2e}, KV {kv:.2e}")
    assert logits <= allowed
    assert kv <= allowed
