"""Hugging Face bridge: moves a prefilled KV cache to `transformers` and generates.

    model = hf.load_model("/models/llama")
    tokens = hf.generate(model, prompt, client.fetch(ticket), max_new_tokens=64)

Needs torch and transformers (4.57 or 5.x): pip install "pbs-client[hf]".

transformers takes the position of the next token from the length of the cache. A cache
of the whole prompt together with the prompt alone therefore computes the last token
twice, one position late, and decodes wrong tokens without an error. Right pairs are:

* the cache of all but the last token, with the prompt;
* the whole cache, with the prompt and the first token that the prefill returned.

generate_inputs() makes either pair, and check_generate_inputs() refuses all others.

Errors: ImportError names the packages to install. IncompatibleCacheError (a ValueError)
means that a cache is not of this model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pbs_client import dtypes
from pbs_client.kv import Array, KvCache
from pbs_client.results import ModelInfo

try:
    import torch
    import transformers
except ImportError as error:
    raise ImportError(
        f"{error}; pbs_client.hf needs torch and transformers: "
        'pip install "pbs-client[hf]"'
    ) from error


# Allowed relative error between the server's key of the first layer and this model's.
# bf16 in either of them gives up to .01; another rotary base, other weights or another
# token give about 1.
_FIRST_LAYER_ERROR_MAX = 0.05


class IncompatibleCacheError(ValueError):
    """The KV cache was not made by this model, or not for this prompt."""


def load_model(
    path: str | Path, *, dtype: str | None = None, device: str = "cpu"
) -> Any:
    """A causal language model from a Hugging Face folder, ready to decode.

    Args:
        path: the folder; nothing is downloaded.
        dtype: "f32", "f16" or "bf16"; None is the dtype in its config.json.
        device: a torch device.

    Raises:
        ValueError: this transformers release would misread the folder.
        OSError: it is not a model folder.
    """
    check_release_reads(path)
    chosen = "auto" if dtype is None else _torch_dtype(dtypes.float_dtype(dtype))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path), dtype=chosen, local_files_only=True
    )
    return model.eval().to(device)


def check_release_reads(path: str | Path) -> None:
    """ValueError when transformers < 5 reads a config.json that only 5 understands.

    Release 5 writes `rope_parameters`. Release 4 reads such a folder without an error,
    with the default rotary base, and decodes wrong tokens.
    """
    if int(transformers.__version__.split(".")[0]) >= 5:
        return
    config = json.loads((Path(path) / "config.json").read_text())
    if "rope_parameters" in config and "rope_theta" not in config:
        raise ValueError(
            f"{path}/config.json states rope_parameters, which transformers "
            f"{transformers.__version__} ignores; use transformers >= 5"
        )


def check_compatible(model: Any, cache: KvCache, model_digest: str = "") -> None:
    """Refuses a cache that this model cannot have made.

    Args:
        model: a transformers model, or its config.
        cache: from Client.fetch() or an inline prefill.
        model_digest: the digest that the cache must have; "" skips this check.

    Raises:
        IncompatibleCacheError: layers, KV heads, head width or digest differ, or the
            cache is not complete.
    """
    config = getattr(model, "config", model)
    heads = config.num_attention_heads
    expected = {
        "layers": config.num_hidden_layers,
        "KV heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "first layer": 0,
        "first KV head": 0,
        "first token": 0,
        "layout": "HND",
    }
    actual = {
        "layers": cache.num_layers,
        "KV heads": cache.heads.count,
        "head_dim": cache.head_dim,
        "first layer": cache.layers.begin,
        "first KV head": cache.heads.begin,
        "first token": cache.tokens.begin,
        "layout": cache.layout,
    }
    if model_digest:
        expected["model_digest"] = model_digest
        actual["model_digest"] = cache.model_digest
    for name, value in expected.items():
        if actual[name] != value:
            raise IncompatibleCacheError(
                f"the KV cache has {name} {actual[name]}, the model {value}"
            )


def check_first_layer(
    model: Any, prompt: Sequence[int] | Array, cache: KvCache
) -> None:
    """Compares the first layer's K and V of the last token with this model's.

    They depend on the embedding, the first projections and the rotary embedding, not on
    attention, so they are the same for every method. The check takes the time of one
    decoding step.

    Raises:
        IncompatibleCacheError: they differ, because of other weights, another prompt,
            or a config that this transformers release reads differently.
    """
    last = len(prompt) - 1
    made = transformers.DynamicCache()
    with torch.no_grad():
        model(
            input_ids=torch.tensor([[int(prompt[last])]], device=model.device),
            position_ids=torch.tensor([[last]], device=model.device),
            use_cache=True,
            **{_cache_argument(model): made},
        )
    layer = made.layers[0]
    for name, here, there in (
        ("K", layer.keys, cache.k[0]),
        ("V", layer.values, cache.v[0]),
    ):
        ours = here[0, :, 0].float().cpu()
        theirs = _to_torch(np.ascontiguousarray(there[:, last])).float()
        error = float((ours - theirs).norm() / ours.norm().clamp_min(1e-30))
        if not error <= _FIRST_LAYER_ERROR_MAX:
            raise IncompatibleCacheError(
                f"{name} of the first layer and last token is not this model's: off by "
                f"{error:.3g} (limit {_FIRST_LAYER_ERROR_MAX}): the server has other "
                "weights or another config, or prefilled another prompt"
                + _attn_factor_reason(getattr(model, "config", None))
            )


def check_same_model(model: Any, info: ModelInfo) -> None:
    """Refuses a server model that differs from this model.

    Args:
        model: a transformers model, or its config.
        info: from Client.models().

    Raises:
        IncompatibleCacheError: architecture, vocabulary, a size or the factor of yarn's
            rotary positions differs.
    """
    config = getattr(model, "config", model)
    for name, here, there in (
        ("architecture", config.model_type, info.architecture),
        ("vocab_size", config.vocab_size, info.vocab_size),
        ("hidden_size", config.hidden_size, info.hidden_size),
        ("num_layers", config.num_hidden_layers, info.num_layers),
    ):
        if here != there:
            raise IncompatibleCacheError(
                f"model {info.name} of the server has {name} {there}, the folder {here}"
            )
    _check_attention_factor(config, info)


def _check_attention_factor(config: Any, info: ModelInfo) -> None:
    """Refuses keys whose rotary factor differs from that of transformers."""
    there = info.rope_attention_factor
    if there == 0:
        return  # the server does not state it
    rope = _rope_settings(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    function = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS.get(rope_type)
    here = 1.0 if function is None else function(config, "cpu")[1]
    if abs(here - there) > 1e-6 * abs(there):
        raise IncompatibleCacheError(
            f"model {info.name} of the server multiplies rotary positions by "
            f"{there:.6g}, transformers by {here:.6g}{_attn_factor_reason(config)}"
        )


def _rope_settings(config: Any) -> dict[str, Any]:
    """Rotary settings of transformers 5 or 4; empty where there are none."""
    return (
        getattr(config, "rope_parameters", None)
        or getattr(config, "rope_scaling", None)
        or {}
    )


def _attn_factor_reason(config: Any) -> str:
    """Advice about a config key that the server reads and transformers ignores."""
    if "attn_factor" not in _rope_settings(config):
        return ""
    return (
        "; transformers ignores the attn_factor of this model, so start the server with "
        "models[].yarn_attn_factor ignored"
    )


def dynamic_cache(
    cache: KvCache, num_tokens: int, *, dtype: Any = None, device: Any = "cpu"
) -> Any:
    """The first tokens of a KV cache as a transformers DynamicCache.

    Args:
        cache: whole layers and heads, from token 0.
        num_tokens: tokens to take, 1 .. cache.tokens.count. The module's docstring
            states the number for given input ids.
        dtype: a torch dtype; None keeps the cache's.
        device: a torch device.

    Raises:
        ValueError: num_tokens is out of range, or a value does not fit `dtype`.
    """
    if not 0 < num_tokens <= cache.tokens.count:
        raise ValueError(
            f"num_tokens {num_tokens} is outside [1, {cache.tokens.count}]"
        )
    made = transformers.DynamicCache()
    for layer, (k, v) in enumerate(zip(cache.k, cache.v)):
        parts = [_layer_tensor(array, num_tokens, dtype, device) for array in (k, v)]
        made.update(*parts, layer)
    return made


def generate_inputs(
    model: Any,
    prompt: Sequence[int] | Array,
    cache: KvCache,
    *,
    first_token: int | None = None,
    model_digest: str = "",
) -> dict[str, Any]:
    """Arguments for `model.generate(**inputs, ...)`: ids and the matching cache.

    Args:
        model: a transformers causal language model.
        prompt: the prefilled ids; at least 2 of them without first_token.
        cache: the cache of the whole prompt.
        first_token: the prefill's greedy next token. With it the whole cache is used
            and the ids are prompt + first_token. Without it this model computes the
            last prompt token again.
        model_digest: see check_compatible().

    Raises:
        IncompatibleCacheError: the cache is not of this model or not of this prompt
            (check_compatible(), check_first_layer()).
    """
    check_compatible(model, cache, model_digest)
    ids = [int(token) for token in prompt]
    if cache.prompt_tokens != len(ids) or cache.tokens.count != len(ids):
        raise IncompatibleCacheError(
            f"the KV cache has {cache.tokens.count} of {cache.prompt_tokens} tokens, "
            f"the prompt {len(ids)}"
        )
    if first_token is not None:
        ids.append(first_token)
    if len(ids) < 2:
        raise ValueError("a prompt of one token needs first_token")
    check_first_layer(model, prompt, cache)
    made = dynamic_cache(cache, len(ids) - 1, dtype=model.dtype, device=model.device)
    input_ids = torch.tensor([ids], device=model.device)
    check_generate_inputs(input_ids, made)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        _cache_argument(model): made,
    }


def check_generate_inputs(input_ids: Any, past_key_values: Any) -> None:
    """Refuses pairs that transformers would decode wrongly without an error.

    Raises:
        ValueError: the cache covers all of the input ids, or leaves more than the last
            one to compute.
    """
    tokens, cached = input_ids.shape[-1], past_key_values.get_seq_length()
    if tokens != cached + 1:
        raise ValueError(
            f"input_ids have {tokens} tokens and the cache {cached}; the cache must "
            "have one fewer: crop it by one, or append the first new token to the ids"
        )


def generate(
    model: Any,
    prompt: Sequence[int] | Array,
    cache: KvCache,
    *,
    max_new_tokens: int,
    first_token: int | None = None,
    ignore_eos: bool = False,
    model_digest: str = "",
    **generate_arguments: Any,
) -> list[int]:
    """Decodes after a prefilled prompt, by default greedily.

    Args:
        model: a transformers causal language model.
        prompt: the prefilled ids.
        cache: the cache of the whole prompt; it is copied, not changed.
        max_new_tokens: at least 1, first_token included.
        first_token: see generate_inputs(). It is the first of the returned tokens.
        ignore_eos: ignore end tokens, so that max_new_tokens are decoded.
        model_digest: see check_compatible().
        **generate_arguments: for `model.generate`, such as do_sample=True.

    Returns:
        The new tokens. The last is an end token unless max_new_tokens were decoded.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} is below 1")
    head = [] if first_token is None else [first_token]
    is_over = not ignore_eos and first_token in _eos_ids(model)
    left = max_new_tokens - len(head)
    if left == 0 or is_over:
        check_compatible(model, cache, model_digest)
        return head
    inputs = generate_inputs(
        model, prompt, cache, first_token=first_token, model_digest=model_digest
    )
    arguments = {"do_sample": False, "pad_token_id": 0, **generate_arguments}
    if ignore_eos:
        arguments["min_new_tokens"] = left
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=left, **arguments)
    new_tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return head + new_tokens


def _cache_argument(model: Any) -> str:
    """The name of the cache argument in the model's transformers release.

    Up to 5.23 it is `past_key_values`, which ends with 5.40.
    """
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _eos_ids(model: Any) -> set[int]:
    """End tokens of the model's generation settings."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return set()
    return {ids} if isinstance(ids, int) else set(ids)


def _layer_tensor(array: Array, num_tokens: int, dtype: Any, device: Any) -> Any:
    """[kv_heads, tokens, dim] -> a torch tensor [1, kv_heads, num_tokens, dim]."""
    tensor = _to_torch(array)[None, :, :num_tokens]
    # A copy of its own: generate() appends to the cache.
    made = tensor.to(device=device, dtype=dtype, copy=True)
    if made.dtype is torch.float16 and not bool(torch.isfinite(made).all()):
        raise ValueError(f"a value of the {array.dtype} KV cache does not fit float16")
    return made


def _to_torch(array: Array) -> Any:
    """A torch tensor that shares memory with `array`."""
    if array.dtype == dtypes.BF16:  # torch does not know ml_dtypes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch_dtype(dtype: np.dtype[Any]) -> Any:
    return {
        dtypes.F32: torch.float32,
        dtypes.F16: torch.float16,
        dtypes.BF16: torch.bfloat16,
    }[dtype]
