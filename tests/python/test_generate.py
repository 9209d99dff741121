"""Prefill on the real server, decode in transformers: exactly its own tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pbs_client import Attention, Client, Dense, MeanPooling, Pbs
from pbs_client.cli import main
from real_server import RECALL_MODEL, running_server

pytestmark = pytest.mark.peers

PROMPT_TOKENS, NEW_TOKENS = 300, 32
EXACT_METHODS = {
    "dense": Dense(),
    "pbs": Pbs(block_size=16, segment_size=32, threshold=1.0),
    "mean_pooling": MeanPooling(block_size=16, threshold=1.0),
}


@pytest.fixture(scope="module")
def models_server(folders):
    flags = [f"--model={name}={folder}" for name, folder in folders.items()]
    with running_server(*flags, f"--model=recall={RECALL_MODEL}") as running:
        yield running


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(3).integers(2, 320, PROMPT_TOKENS).tolist()


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(hf, folders, name):
    return hf.load_model(folders[name], dtype="f32")


@pytest.fixture(scope="module")
def own_tokens(model, prompt):
    import torch

    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, PROMPT_TOKENS:].tolist()


@pytest.mark.parametrize("method", EXACT_METHODS)
@pytest.mark.parametrize("with_first_token", [True, False], ids=["L", "L-1"])
def test_exact_prefills_decode_to_transformers_own_tokens(
    hf, models_server, name, model, prompt, own_tokens, method, with_first_token
):
    with Client(models_server.target) as client:
        exact = Attention(EXACT_METHODS[method], dense_fallback=False)
        result = client.prefill(name, prompt, exact, delivery="inline")
    tokens = hf.generate(
        model,
        prompt,
        result.kv,
        first_token=result.first_token if with_first_token else None,
        max_new_tokens=NEW_TOKENS,
        ignore_eos=True,
    )
    assert tokens == own_tokens


def test_the_script_decodes_to_transformers_own_tokens(
    models_server, folders, name, prompt, own_tokens, tmp_path, capsys
):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(prompt))
    words = ["generate", "--server", models_server.target, "--model", name]
    words += ["--model-path", str(folders[name]), "--tokens", str(path)]
    words += ["--max-new-tokens", str(NEW_TOKENS), "--method", "dense"]
    assert main([*words, "--ignore-eos", "--dtype", "f32"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["tokens"] == own_tokens
    assert line["prompt_tokens"] == PROMPT_TOKENS
    assert line["sparsity_digest"] == "exact"
    assert set(line["seconds"]) == {"load_model", "prefill", "fetch", "decode"}


def test_the_script_refuses_the_folder_of_another_model(
    models_server, folders, prompt, tmp_path, capsys
):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(prompt))
    words = ["generate", "--server", models_server.target, "--model", "qwen3"]
    words += ["--model-path", str(folders["llama"]), "--tokens", str(path)]
    assert main([*words, "--max-new-tokens", "4"]) == 2
    assert "architecture qwen3, the folder llama" in capsys.readouterr().err


def test_weights_that_differ_are_refused(hf, models_server, prompt, tmp_path):
    import tiny_models

    (full,) = (name for name in tiny_models.MODELS if name.startswith("llama"))
    other = hf.load_model(tiny_models.make(full, tmp_path / "other", seed=8))
    with Client(models_server.target) as client:
        kv = client.prefill("llama", prompt, delivery="inline").kv
    with pytest.raises(hf.IncompatibleCacheError, match="other weights"):
        hf.generate(other, prompt, kv, max_new_tokens=4)


def test_the_trained_model_answers_from_a_sparse_prefill(hf, models_server):
    prompt = json.loads((RECALL_MODEL / "prompt_8k.json").read_text())
    question = json.loads((RECALL_MODEL / "prompt_8k.question.json").read_text())
    answer = json.loads((RECALL_MODEL / "prompt_8k.answer.json").read_text())
    tokens = prompt + question
    model = hf.load_model(RECALL_MODEL, dtype="f32")
    with Client(models_server.target) as client:
        result = client.prefill("recall", tokens, Pbs(threshold=0.9), delivery="inline")
    decoded = hf.generate(
        model, tokens, result.kv, first_token=result.first_token, max_new_tokens=1
    )
    assert decoded == answer


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_trained_model_answers_a_remote_prefill_in_every_dtype(
    hf, models_server, dtype
):
    import torch

    ids = []
    for part in ("prompt_8k", "prompt_8k.question"):
        ids += json.loads((RECALL_MODEL / f"{part}.json").read_text())
    answer = json.loads((RECALL_MODEL / "prompt_8k.answer.json").read_text())
    model = hf.load_model(RECALL_MODEL, dtype=dtype)
    with hf.RemotePrefill(
        model, models_server.target, name="recall", attention=Pbs(threshold=0.9)
    ) as remote:
        output = remote.generate(torch.tensor([ids]), max_new_tokens=1, pad_token_id=0)
    assert output[0, len(ids) :].tolist() == answer
