"""Captured queries against transformers, on tiny random models of several families."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="a peer")
transformers = pytest.importorskip("transformers", reason="a peer")

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/models"))
import make_tiny_models  # noqa: E402
from pbs_client import Client  # noqa: E402
from real_server import running_server  # noqa: E402

pytestmark = pytest.mark.peers

# |a - b| over max |b|. f32: reordered sums of 300 terms over 3 layers.
F32_MAX = 1e-4
# Plain, with biases, with another rotation, and with norms of queries and keys.
FAMILIES = ("llama3", "llama-biases-f16", "qwen2-yarn", "qwen3")


def heads_of_transformers(folder: pathlib.Path, tokens: list[int]) -> list[tuple]:
    """(q, k, v) of each layer, as its attention receives them."""
    seen: list[tuple] = []

    def attend(module, query, key, value, *rest, **options):
        seen.append(tuple(x[0].float().numpy() for x in (query, key, value)))
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, query, key, value, *rest, **options
        )

    transformers.AttentionInterface.register("recording", attend)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="recording"
    ).eval()
    with torch.no_grad():
        model(torch.tensor([tokens]))
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_heads_equal_those_of_transformers(name, tmp_path):
    folder = make_tiny_models.make(name, tmp_path)
    tokens = json.loads((folder / "expected.json").read_text())["prompt"]
    expected = heads_of_transformers(folder, tokens)
    flags = ["--model", f"m={folder}", "--set", "cpu.compute_dtype=f32"]
    flags += ["--set", "models.0.kv_dtype=f32"]
    flags += ["--set", "models.0.yarn_attn_factor=ignored"]
    with running_server(*flags) as server, Client(server.target) as client:
        capture = client.capture("m", tokens, range(len(expected)))
    for layer, arrays in enumerate(expected):
        heads = capture.layers[layer]
        for kind, array in zip("qkv", arrays):
            error = np.abs(getattr(heads, kind) - array).max() / np.abs(array).max()
            assert error <= F32_MAX, (name, layer, kind)
