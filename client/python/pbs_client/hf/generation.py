"""Decoding after one prefilled prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pbs_client.hf.caches import (
    IncompatibleCacheError,
    cache_argument,
    check_compatible,
    dynamic_cache,
)
from pbs_client.hf.models import check_first_layer
from pbs_client.kv import Array, KvCache


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
        cache_argument(model): made,
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


def _eos_ids(model: Any) -> set[int]:
    """End tokens of the model's generation settings."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return set()
    return {ids} if isinstance(ids, int) else set(ids)
