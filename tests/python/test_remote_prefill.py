"""generate() of transformers with a remote prefill gives transformers' own tokens."""

from __future__ import annotations

import numpy as np
import pytest
from real_server import running_server

pytestmark = pytest.mark.peers

PAD, NEW_TOKENS = 319, 16
LENGTHS = {
    "one prompt": (130,),
    "equal lengths": (64, 64, 64),
    "different lengths": (130, 7, 64, 129),
    "with prompts of one and two tokens": (40, 1, 2),
    "one token each": (1, 1),
}
METHODS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 40},
    "three samples of each": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"do_sample": False, "num_beams": 3},
    "the best two of beams": {"num_beams": 3, "num_return_sequences": 2},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.5},
}


@pytest.fixture(scope="module")
def torch():
    import torch

    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="module")
def hf():
    from pbs_client import hf

    return hf


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import tiny_models

    root = tmp_path_factory.mktemp("models")
    return {
        name.split(",")[0]: tiny_models.make(name, root / name.split(",")[0])
        for name in tiny_models.MODELS
    }


@pytest.fixture(scope="module")
def models_server(folders):
    flags = [f"--model={name}={folder}" for name, folder in folders.items()]
    with running_server(*flags, "--metrics-listen", "127.0.0.1:0") as running:
        yield running


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(hf, folders, name):
    return hf.load_model(folders[name], dtype="f32")


@pytest.fixture(scope="module")
def remote(hf, model, models_server, name):
    with hf.RemotePrefill(
        model, models_server.target, name=name, attention="dense"
    ) as connected:
        yield connected


def batch(torch, lengths, seed=3):
    """Random prompts, padded on the left as a tokenizer pads them."""
    random = np.random.default_rng(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        prompt = random.integers(2, PAD, length)
        ids[row, width - length :] = torch.from_numpy(prompt)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generated(torch, model, inputs, **arguments):
    """Tokens that `model` generates, with the seed of all tests."""
    torch.manual_seed(11)
    arguments = {"max_new_tokens": NEW_TOKENS, "pad_token_id": PAD, **arguments}
    return model.generate(**inputs, **arguments)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_remote_prefill_gives_transformers_own_tokens(
    torch, model, remote, lengths, method
):
    inputs = batch(torch, lengths)
    own = generated(torch, model, inputs, **method)
    assert generated(torch, remote, inputs, **method).tolist() == own.tolist()
    assert len(remote.prefills) == sum(length > 1 for length in lengths)
