"""generate() of transformers with a remote prefill gives transformers' own tokens."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import urllib.request

import grpc
import numpy as np
import pytest
from fake_server import fake_server, forward
from pbs_client import (
    Attention,
    Client,
    InvalidArgumentError,
    NotFoundError,
    Pbs,
    ResourceExhaustedError,
    UnavailableError,
    _messages,
)
from real_server import running_server
from test_errors import retry_details

pytestmark = pytest.mark.peers

PREFILL = "/pbs.v1.Prefill/Prefill"
CONTROL = ("/pbs.v1.Prefill/GetServerInfo", "/pbs.v1.Prefill/ListModels")
PrefillRequest = _messages.PrefillRequest
PAD, NEW_TOKENS = 319, 16
SECONDS_MAX = 30  # only a failure takes so long
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


@contextlib.contextmanager
def faulty_server(server, prefill):
    """A server with the models of `server` whose Prefill a test answers."""
    with grpc.insecure_channel(server.target) as channel:
        handlers = {path: forward(channel, path) for path in CONTROL}
        with fake_server({**handlers, PREFILL: prefill}) as target:
            yield target


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


def test_a_sparse_prefill_gives_other_tokens(torch, hf, model, models_server, name):
    sparse = Attention(Pbs(block_size=16, segment_size=32, threshold=0.2), False)
    inputs = batch(torch, (600,))
    with hf.RemotePrefill(
        model, models_server.target, name=name, attention=sparse
    ) as remote:
        tokens = generated(torch, remote, inputs)
        (prefill,) = remote.prefills
    assert tokens.tolist() != generated(torch, model, inputs).tolist()
    assert prefill.sparsity_digest.startswith("pbs-")
    assert prefill.stats.density < 1
    assert prefill.stats.prompt_tokens == 600
    assert prefill.kv is None


def test_a_cache_that_travels_as_f8_e4m3_is_an_approximation(
    torch, hf, model, models_server, name
):
    prompt, continuation = [5, 9, 17] * 60, [5, 9, 17]
    scores = {}
    for form in (None, "f8_e4m3"):
        with hf.RemotePrefill(
            model, models_server.target, name=name, attention="dense", wire_dtype=form
        ) as remote:
            (score,) = remote.score([(prompt, continuation)])
            scores[form] = score.log_likelihood
            tokens = generated(torch, remote, batch(torch, (130, 7)))
        assert tokens.shape == (2, 130 + NEW_TOKENS)
    assert scores["f8_e4m3"] != scores[None]
    assert scores["f8_e4m3"] == pytest.approx(scores[None], abs=0.5)


def test_an_unknown_form_of_travel_is_refused(hf, model):
    with pytest.raises(ValueError, match="wire_dtype 'fp8' is not f8_e4m3"):
        hf.RemotePrefill(model, "127.0.0.1:1", wire_dtype="fp8")


def test_a_prompt_that_is_twice_in_a_batch_is_sent_once(torch, model, remote):
    inputs = {k: v.repeat(2, 1) for k, v in batch(torch, (50, 20)).items()}
    own = generated(torch, model, inputs)
    assert generated(torch, remote, inputs).tolist() == own.tolist()
    assert len(remote.prefills) == 2


def test_without_a_mask_padding_is_what_transformers_takes_for_it(torch, model, remote):
    ids = batch(torch, (50, 20))["input_ids"]
    for pad in (PAD, None, 1):  # 1 is the end token: then nothing is padding
        inputs = {"input_ids": ids}
        own = generated(torch, model, inputs, pad_token_id=pad)
        assert generated(torch, remote, inputs, pad_token_id=pad).tolist() == own.tolist()


def test_ids_may_be_the_first_argument_and_settings_a_config(torch, model, remote):
    from transformers import GenerationConfig

    ids = batch(torch, (50,))["input_ids"]
    config = GenerationConfig(max_new_tokens=5, num_beams=2, pad_token_id=PAD)
    own = model.generate(ids, generation_config=config)
    assert remote.generate(ids, generation_config=config).tolist() == own.tolist()
    assert remote.generate(ids, config).tolist() == own.tolist()


def test_scores_and_logits_of_the_new_tokens_are_transformers_own(torch, model, remote):
    inputs = batch(torch, (50, 20))
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    own = generated(torch, model, inputs, **asked)
    ours = generated(torch, remote, inputs, **asked)
    assert ours.sequences.tolist() == own.sequences.tolist()
    for name in ("scores", "logits"):
        torch.testing.assert_close(
            torch.stack(ours[name]), torch.stack(own[name]), atol=1e-3, rtol=1e-3
        )


def test_tokens_are_streamed_as_they_come(torch, model, remote):
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streams = Streamer(), Streamer()
    inputs = batch(torch, (50,))
    for one, streamer in zip((model, remote), streams):
        generated(torch, one, inputs, streamer=streamer)
    assert streams[1].tokens == streams[0].tokens
    assert streams[1].tokens[-1] == "end"


def test_it_has_the_attributes_of_the_model(hf, model, models_server, name):
    with hf.RemotePrefill(model, models_server.target, name=name) as remote:
        assert remote.config is model.config
        assert remote.device == model.device
        before = model.generation_config
        try:
            remote.generation_config = "another"
            assert model.generation_config == "another"
        finally:
            model.generation_config = before
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            remote.nothing  # noqa: B018


def test_generate_of_the_model_may_be_replaced_by_it(torch, model, remote):
    inputs = batch(torch, (50,))
    own = generated(torch, model, inputs)
    model.generate = remote.generate
    try:
        assert generated(torch, model, inputs).tolist() == own.tolist()
    finally:
        del model.generate
    assert len(remote.prefills) == 1


# ---- what is refused


REFUSED = {
    # arguments of generate(); what the message names
    "an assistant": ({"assistant_model": object()}, "assistant_model"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    "a static cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "no cache": ({"use_cache": False}, "use_cache"),
    "chunks": ({"prefill_chunk_size": 16}, "prefill_chunk_size"),
    "guidance": ({"guidance_scale": 2.0}, "guidance_scale"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    "dola": ({"dola_layers": "high"}, "dola_layers"),
    "code": ({"custom_generate": "somebody/code"}, "custom_generate"),
    "healing": ({"token_healing": True}, "token_healing"),
    "attentions": ({"output_attentions": True}, "output_attentions"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states"),
    "own positions": ({"position_ids": "a tensor"}, "position_ids"),
    "embeddings": ({"inputs_embeds": "a tensor"}, "inputs_embeds"),
}


@pytest.mark.parametrize(("arguments", "named"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_name(torch, remote, arguments, named):
    with pytest.raises(ValueError, match=named):
        remote.generate(**batch(torch, (50,)), **arguments)
    assert remote.prefills == ()


def test_what_a_config_asks_for_is_refused_too(torch, remote):
    from transformers import GenerationConfig

    config = GenerationConfig(prefill_chunk_size=16)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        remote.generate(batch(torch, (50,))["input_ids"], generation_config=config)


WRONG_PADDING = {
    "on the right": [[1, 1, 1, 0], [1, 1, 1, 1]],
    "in the middle": [[1, 0, 1, 1], [1, 1, 1, 1]],
    "a row of padding": [[0, 0, 0, 0], [1, 1, 1, 1]],
}


@pytest.mark.parametrize("mask", WRONG_PADDING.values(), ids=WRONG_PADDING)
def test_padding_that_is_not_on_the_left_is_refused(torch, remote, mask):
    ids = batch(torch, (4, 4))["input_ids"]
    with pytest.raises(ValueError, match="padded on the left"):
        remote.generate(ids, attention_mask=torch.tensor(mask), pad_token_id=PAD)


@pytest.mark.parametrize("shape", [(2, 5), (1, 4), (2, 4, 4)])
def test_a_mask_of_another_shape_is_refused(torch, remote, shape):
    ids = batch(torch, (4, 4))["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask of shape .* does not fit"):
        remote.generate(ids, attention_mask=torch.ones(shape), pad_token_id=PAD)


@pytest.mark.parametrize("shape", [None, (4,), (1, 0)])
def test_ids_of_another_shape_are_refused(torch, remote, shape):
    ids = None if shape is None else torch.ones(shape, dtype=torch.long)
    with pytest.raises(ValueError, match="input_ids are"):
        remote.generate(ids)


BAD_ARGUMENTS = {
    "no prefills at once": ({"concurrency": 0}, r"concurrency 0 is outside \[1, 256\]"),
    "too many": ({"concurrency": 257}, r"concurrency 257 is outside \[1, 256\]"),
    "a negative turn": ({"continue_tokens_max": -1}, "continue_tokens_max -1 is below 0"),
    "no server": ({"server": "here"}, "'here' is not HOST:PORT"),
    "no method": ({"attention": "fast"}, "method 'fast' is not one of"),
}


@pytest.mark.parametrize(("arguments", "named"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_arguments_out_of_range_are_refused(
    hf, model, models_server, name, arguments, named
):
    arguments = {"server": models_server.target, "name": name, **arguments}
    with pytest.raises(ValueError, match=named):
        hf.RemotePrefill(model, **arguments)


def test_a_model_on_several_devices_is_refused(hf, model, models_server, monkeypatch):
    monkeypatch.setattr(model, "hf_device_map", {"a": 0, "b": 1}, raising=False)
    with pytest.raises(ValueError, match="spread over 2 devices"):
        hf.RemotePrefill(model, models_server.target)


# ---- errors, and what the server then holds


@pytest.fixture
def held(models_server):
    """What the server holds at the end of the test: nothing."""

    def figures():
        url = f"http://{models_server.metrics}/metrics"
        text = urllib.request.urlopen(url, timeout=30).read().decode()
        names = "pbs_kv_held_bytes|pbs_kv_leases|pbs_requests_(running|waiting)"
        found = re.findall(rf"^((?:{names})\S*) (\S+)$", text, re.M)
        return {line[0]: float(line[-1]) for line in found}

    yield
    end = time.monotonic() + SECONDS_MAX
    while any(left := figures().values()) and time.monotonic() < end:
        threading.Event().wait(0.05)
    assert left
    assert not any(left), figures()


def test_a_model_that_the_server_has_otherwise_is_refused(hf, folders, models_server):
    llama = hf.load_model(folders["llama"], dtype="f32")
    with pytest.raises(hf.IncompatibleCacheError, match="architecture qwen3, the folder"):
        hf.RemotePrefill(llama, models_server.target, name="qwen3")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 321),
        ("num_hidden_layers", 4),
        ("num_key_value_heads", 4),
        ("head_dim", 32),
        ("num_attention_heads", 8),
    ],
)
def test_a_size_that_differs_is_named(hf, folders, models_server, field, value):
    names = {"num_hidden_layers": "num_layers", "num_key_value_heads": "num_kv_heads"}
    names["num_attention_heads"] = "num_heads"
    model = hf.load_model(folders["llama"], dtype="f32")
    setattr(model.config, field, value)
    named = f"has {names.get(field, field)} .*, the folder {value}"
    with pytest.raises(hf.IncompatibleCacheError, match=named):
        hf.RemotePrefill(model, models_server.target, name="llama")


def test_other_weights_are_refused_with_the_first_prefill(
    torch, hf, models_server, tmp_path, held
):
    import tiny_models

    (full,) = (name for name in tiny_models.MODELS if name.startswith("llama"))
    other = hf.load_model(tiny_models.make(full, tmp_path / "other", seed=8))
    with (
        hf.RemotePrefill(other, models_server.target, name="llama") as remote,
        pytest.raises(hf.IncompatibleCacheError, match="other weights"),
    ):
        remote.generate(**batch(torch, (50, 40)))


def test_a_model_that_is_not_served_is_refused(hf, model, models_server):
    with pytest.raises(NotFoundError, match="'other' is not served; these are: llama"):
        hf.RemotePrefill(model, models_server.target, name="other")


def test_an_error_of_the_server_ends_the_batch_and_leaves_nothing(
    torch, model, remote, held
):
    inputs = batch(torch, (900, 50, 60, 70, 80, 90))
    inputs["input_ids"][2, -3] = 320  # beyond the vocabulary
    with pytest.raises(InvalidArgumentError, match="vocab") as caught:
        generated(torch, remote, inputs)
    assert "320" not in str(caught.value).replace("vocab_size 320", "")
    inputs["input_ids"][2, -3] = 5
    own = generated(torch, model, inputs)
    assert generated(torch, remote, inputs).tolist() == own.tolist()


def test_a_prompt_that_fails_does_not_wait_for_the_others(torch, hf, model, name, held,
                                                          models_server):  # fmt: skip
    """The first prompt is never answered; the second is refused."""
    cancelled = threading.Event()
    calls = []

    def prefill(requests, context):
        (request,) = requests
        calls.append(PrefillRequest.FromString(request))
        if len(calls[-1].token_ids) == 50:
            context.add_callback(cancelled.set)
            cancelled.wait(SECONDS_MAX)
        else:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused")
        yield b""

    with (
        faulty_server(models_server, prefill) as target,
        hf.RemotePrefill(model, target, name=name) as remote,
        pytest.raises(InvalidArgumentError, match="refused"),
    ):
        remote.generate(**batch(torch, (50, 20)), pad_token_id=PAD)
    assert cancelled.wait(SECONDS_MAX)
    assert len(calls) == 2


def test_a_server_at_its_limit_is_asked_again_when_it_says(
    torch, hf, model, name, models_server
):
    refusals = iter([True, True])

    def prefill(requests, context):
        if next(refusals, False):
            context.set_trailing_metadata(
                (("grpc-status-details-bin", retry_details(0, 1_000_000)),)
            )
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        yield from forward(channel, PREFILL)(requests, context)

    inputs = batch(torch, (50,))
    with (
        grpc.insecure_channel(models_server.target) as channel,
        faulty_server(models_server, prefill) as target,
        hf.RemotePrefill(model, target, name=name, attention="dense") as remote,
    ):
        tokens = generated(torch, remote, inputs)
    assert tokens.tolist() == generated(torch, model, inputs).tolist()


WITHOUT_A_TIME = {
    "it says no time": (b"", None),
    "the time is beyond the timeout": (retry_details(900, 0), 60),
}


@pytest.mark.parametrize(
    ("details", "timeout"), WITHOUT_A_TIME.values(), ids=WITHOUT_A_TIME
)
def test_a_server_at_its_limit_that_gives_no_time_ends_the_call(
    torch, hf, model, name, models_server, details, timeout
):
    def prefill(requests, context):
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        yield b""

    with (
        faulty_server(models_server, prefill) as target,
        hf.RemotePrefill(model, target, name=name, timeout=timeout) as remote,
        pytest.raises(ResourceExhaustedError, match="queue is full"),
    ):
        remote.generate(**batch(torch, (50,)))


def test_a_server_that_is_gone_is_unavailable(torch, hf, model, name, folders):
    with running_server(f"--model={name}={folders[name]}") as server:
        target = server.target
        remote = hf.RemotePrefill(model, target)
    with remote, pytest.raises(UnavailableError):
        remote.generate(**batch(torch, (50,)))
    with pytest.raises(UnavailableError):
        hf.RemotePrefill(model, target)


def test_a_given_client_stays_open(torch, hf, model, models_server, name):
    with Client(models_server.target) as client:
        with hf.RemotePrefill(model, client, name=name) as remote:
            remote.generate(**batch(torch, (50,)), max_new_tokens=1)
        assert client.models()
