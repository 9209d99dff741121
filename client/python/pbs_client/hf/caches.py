"""KV caches as transformers has them."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import transformers

from pbs_client import dtypes
from pbs_client.kv import Array, KvCache


class IncompatibleCacheError(ValueError):
    """The KV cache was not made by this model, or not for this prompt."""


def kv_shape(config: Any) -> tuple[int, int]:
    """KV heads and head dim of a model by its config."""
    heads = config.num_attention_heads
    return (
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
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
    kv_heads, head_dim = kv_shape(config)
    expected = {
        "layers": config.num_hidden_layers,
        "KV heads": kv_heads,
        "head_dim": head_dim,
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


def dynamic_cache(
    cache: KvCache, num_tokens: int, *, dtype: Any = None, device: Any = "cpu"
) -> Any:
    """The first tokens of a KV cache as a transformers DynamicCache.

    Args:
        cache: whole layers and heads, from token 0.
        num_tokens: tokens to take, 1 .. cache.tokens.count. The package's docstring
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


class LeftPadded:
    """The cache of a batch of prompts, padded on the left as their ids are.

    A batch that is `width` tokens wide gets a cache of width - 1: the model computes
    the last token of every prompt. Padding is 0; the attention mask hides it.
    """

    def __init__(self, model: Any, rows: int, width: int) -> None:
        """Prepares; the memory is allocated with the first cache.

        Args:
            model: whose dtype and device the cache has.
            rows: prompts of the batch.
            width: of the batch, in tokens; at least 2.
        """
        self._model = model
        self._rows, self._columns = rows, width - 1
        self._layers: list[tuple[Any, Any]] = []

    def set_row(self, row: int, cache: KvCache) -> None:
        """Copies all but the last token of a prompt's cache into its row.

        Raises:
            ValueError: a value does not fit the model's dtype.
        """
        if not self._layers:
            self._layers = [self._zeros(k) for k in cache.k]
        tokens = cache.tokens.count - 1
        for ours, theirs in zip(self._layers, zip(cache.k, cache.v)):
            for target, array in zip(ours, theirs):
                part = target[row, :, self._columns - tokens :]
                part.copy_(to_torch(array)[:, :tokens])
                check_finite(part, array)

    def _zeros(self, k: Array) -> tuple[Any, Any]:
        """K and V of a layer."""
        model, shape = self._model, (self._rows, k.shape[0], self._columns, k.shape[2])
        k_zeros, v_zeros = (
            torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in "kv"
        )
        return k_zeros, v_zeros

    def finish(self, repeats: int = 1) -> Any:
        """The DynamicCache; each row `repeats` times, as generate() repeats its ids."""
        made = transformers.DynamicCache()
        for layer in range(len(self._layers)):
            k, v = self._layers[layer]
            self._layers[layer] = (None, None)  # at most one layer is held twice
            made.update(k, v, layer)
        if repeats > 1:
            made.batch_repeat_interleave(repeats)
        return made


def cache_argument(model: Any) -> str:
    """The name of the cache argument in the model's transformers release.

    Up to 5.23 it is `past_key_values`, which ends with 5.40.
    """
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _layer_tensor(array: Array, num_tokens: int, dtype: Any, device: Any) -> Any:
    """[kv_heads, tokens, dim] -> a torch tensor [1, kv_heads, num_tokens, dim]."""
    tensor = to_torch(array)[None, :, :num_tokens]
    # A copy of its own: generate() appends to the cache.
    made = tensor.to(device=device, dtype=dtype, copy=True)
    check_finite(made, array)
    return made


def check_finite(made: Any, array: Array) -> None:
    """ValueError when a value of `array` became infinite as float16."""
    if made.dtype is torch.float16 and not bool(torch.isfinite(made).all()):
        raise ValueError(f"a value of the {array.dtype} KV cache does not fit float16")


def to_torch(array: Array) -> Any:
    """A torch tensor that shares memory with `array`."""
    if array.dtype == dtypes.BF16:  # torch does not know ml_dtypes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
