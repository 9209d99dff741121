"""A KV cache in transformers decodes as transformers' own, or is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import warnings

import numpy as np
import pytest

pytestmark = pytest.mark.peers

PROMPT_TOKENS, NEW_TOKENS = 100, 24


@pytest.fixture(scope="module")
def model(hf, folder):
    return hf.load_model(folder, dtype="f32")


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(3).integers(2, 320, PROMPT_TOKENS).tolist()


@pytest.fixture(scope="module")
def own_tokens(torch, model, prompt):
    """What transformers decodes all by itself."""
    with torch.no_grad():
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


@pytest.fixture(scope="module")
def cache(torch, model, prompt):
    """The own prefill of transformers as a KvCache."""
    from pbs_client.kv import KvCache, Span

    with torch.no_grad():
        output = model(torch.tensor([prompt]), use_cache=True)
    layers = next(part for part in output.values() if hasattr(part, "layers")).layers
    return KvCache(
        k=tuple(layer.keys[0].numpy() for layer in layers),
        v=tuple(layer.values[0].numpy() for layer in layers),
        layers=Span(0, len(layers)),
        tokens=Span(0, PROMPT_TOKENS),
        heads=Span(0, layers[0].keys.shape[1]),
        prompt_tokens=PROMPT_TOKENS,
        model_digest="xxh3-128:0",
    )


def _takes_cache(cache=None): ...


def _takes_past_key_values(past_key_values=None): ...


@pytest.mark.parametrize(
    "forward, name",
    [(_takes_cache, "cache"), (_takes_past_key_values, "past_key_values")],
)
def test_the_cache_goes_in_under_the_name_that_the_release_has(hf, forward, name):
    assert hf.caches.cache_argument(types.SimpleNamespace(forward=forward)) == name


def test_decoding_uses_nothing_that_a_later_release_takes_away(hf, model, prompt, cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.generate(model, prompt, cache, max_new_tokens=2)


@pytest.mark.parametrize("with_first_token", [True, False])
def test_decoding_from_the_cache_gives_transformers_own_tokens(
    hf, model, prompt, own_tokens, cache, with_first_token
):
    tokens = hf.generate(
        model,
        prompt,
        cache,
        first_token=own_tokens[0] if with_first_token else None,
        max_new_tokens=NEW_TOKENS,
        ignore_eos=True,
    )
    assert tokens == own_tokens


def test_decoding_leaves_the_cache_as_it_was(hf, model, prompt, cache):
    before = [array.copy() for array in cache.k + cache.v]
    hf.generate(model, prompt, cache, max_new_tokens=4, ignore_eos=True)
    for array, old in zip(cache.k + cache.v, before):
        np.testing.assert_array_equal(array, old)


def test_a_spoiled_cache_gives_other_tokens(hf, model, prompt, own_tokens, cache):
    spoiled = dataclasses.replace(cache, v=(*cache.v[:2], np.zeros_like(cache.v[2])))
    tokens = hf.generate(model, prompt, spoiled, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert tokens != own_tokens


def test_decoding_stops_at_the_end_token(hf, model, prompt, own_tokens, cache):
    end = own_tokens[5]
    first = own_tokens.index(end)
    arguments = {"max_new_tokens": NEW_TOKENS, "eos_token_id": end}
    tokens = hf.generate(model, prompt, cache, **arguments)
    assert tokens == own_tokens[: first + 1]


def test_a_first_token_that_ends_the_answer_is_all_of_it(hf, model, prompt, cache):
    tokens = hf.generate(model, prompt, cache, first_token=1, max_new_tokens=9)
    assert tokens == [1]


def test_one_new_token_is_the_first_token(hf, model, prompt, cache):
    tokens = hf.generate(model, prompt, cache, first_token=7, max_new_tokens=1)
    assert tokens == [7]


@pytest.mark.parametrize("cached", [PROMPT_TOKENS, PROMPT_TOKENS + 1, 5])
def test_a_cache_that_does_not_fit_its_ids_is_refused(torch, hf, cache, prompt, cached):
    ids = torch.tensor([prompt])
    if cached > PROMPT_TOKENS:
        ids = ids[:, :-1]
    whole = hf.dynamic_cache(cache, min(cached, PROMPT_TOKENS))
    with pytest.raises(ValueError, match="must have one fewer"):
        hf.check_generate_inputs(ids, whole)


def _fewer_layers(cache):
    return dataclasses.replace(cache, k=cache.k[:2], v=cache.v[:2])


def _one_head(cache):
    span = dataclasses.replace(cache.heads, count=1)
    return dataclasses.replace(cache, heads=span)


def _narrow(cache):
    return dataclasses.replace(cache, k=tuple(k[..., :8] for k in cache.k))


def _other_layout(cache):
    return dataclasses.replace(cache, layout="NHD")


def _part_of_the_tokens(cache):
    span = dataclasses.replace(cache.tokens, count=9)
    return dataclasses.replace(cache, tokens=span)


def _later_layers(cache):
    return dataclasses.replace(cache, layers=dataclasses.replace(cache.layers, begin=1))


def _longer_prompt(cache):
    return dataclasses.replace(cache, prompt_tokens=PROMPT_TOKENS + 1)


def _other_keys(cache):
    return dataclasses.replace(cache, k=tuple(np.roll(k, 1, 1) for k in cache.k))


def _other_values(cache):
    return dataclasses.replace(cache, v=tuple(v * 1.1 for v in cache.v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_fewer_layers, "layers 2, the model 3", id="layers"),
        pytest.param(_one_head, "KV heads 1, the model 2", id="heads"),
        pytest.param(_narrow, "head_dim 8", id="head_dim"),
        pytest.param(_other_layout, "layout NHD", id="layout"),
        pytest.param(_part_of_the_tokens, "9 of 100 tokens", id="tokens"),
        pytest.param(_later_layers, "first layer 1", id="first layer"),
        pytest.param(_longer_prompt, "100 of 101 tokens, the prompt 100", id="prompt"),
        pytest.param(_other_keys, "K of the first layer", id="keys of other tokens"),
        pytest.param(_other_values, "V of the first layer", id="other weights"),
    ],
)
def test_a_cache_of_another_model_or_prompt_is_refused(
    hf, model, prompt, cache, change, message
):
    with pytest.raises(hf.IncompatibleCacheError, match=message):
        hf.generate(model, prompt, change(cache), max_new_tokens=4)


def test_another_model_digest_is_refused(hf, model, prompt, cache):
    with pytest.raises(hf.IncompatibleCacheError, match="xxh3-128:0, the model other"):
        hf.generate(model, prompt, cache, max_new_tokens=4, model_digest="other")


def test_a_prompt_of_one_token_needs_the_first_token(hf, model, cache):
    one = dataclasses.replace(
        cache, tokens=dataclasses.replace(cache.tokens, count=1), prompt_tokens=1
    )
    with pytest.raises(ValueError, match="needs first_token"):
        hf.generate(model, [5], one, max_new_tokens=4)


def test_bfloat16_reaches_torch_bit_for_bit(torch, hf):
    import ml_dtypes

    bits = np.arange(2**16, dtype=np.uint16).reshape(1, 256, 256)
    tensor = hf.caches.to_torch(bits.view(ml_dtypes.bfloat16))
    assert tensor.dtype is torch.bfloat16
    np.testing.assert_array_equal(tensor.view(torch.int16).numpy(), bits.view(np.int16))


def test_a_value_that_overflows_float16_is_refused(torch, hf, cache):
    large = dataclasses.replace(cache, k=tuple(k * np.float32(1e6) for k in cache.k))
    with pytest.raises(ValueError, match="does not fit float16"):
        hf.dynamic_cache(large, 10, dtype=torch.float16)


def test_a_config_that_this_release_misreads_is_refused(hf, tmp_path, monkeypatch):
    config = {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(hf.transformers, "__version__", "4.57.6")
    with pytest.raises(ValueError, match=r"rope_parameters, which transformers 4\.57"):
        hf.load_model(tmp_path)


def test_without_torch_the_bridge_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "pbs_client.hf", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install .pbs-client\[hf\]"):
        import pbs_client.hf  # noqa: F401
