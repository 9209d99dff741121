"""Models of transformers: loading them, and whether a server has the same one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pbs_client import dtypes
from pbs_client.hf.caches import (
    IncompatibleCacheError,
    cache_argument,
    kv_shape,
    to_torch,
)
from pbs_client.kv import Array, KvCache
from pbs_client.results import ModelInfo

# Allowed relative error between the server's key of the first layer and this model's.
# bf16 in either of them gives up to .01; another rotary base, other weights or another
# token give about 1.
_FIRST_LAYER_ERROR_MAX = 0.05
_FP8_ERROR_MAX = 1 / 16  # of a cache that travelled as f8_e4m3


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
            **{cache_argument(model): made},
        )
    layer = made.layers[0]
    limit = _FIRST_LAYER_ERROR_MAX + (_FP8_ERROR_MAX if cache.wire_dtype else 0)
    for name, here, there in (
        ("K", layer.keys, cache.k[0]),
        ("V", layer.values, cache.v[0]),
    ):
        ours = here[0, :, 0].float().cpu()
        theirs = to_torch(np.ascontiguousarray(there[:, last])).float()
        error = float((ours - theirs).norm() / ours.norm().clamp_min(1e-30))
        if not error <= limit:
            raise IncompatibleCacheError(
                f"{name} of the first layer and last token is not this model's: off by "
                f"{error:.3g} (limit {limit}): the server has other "
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
            rotary positions differs; it is named.
    """
    config = getattr(model, "config", model)
    kv_heads, head_dim = kv_shape(config)
    for name, here, there in (
        ("architecture", config.model_type, info.architecture),
        ("vocab_size", config.vocab_size, info.vocab_size),
        ("hidden_size", config.hidden_size, info.hidden_size),
        ("num_layers", config.num_hidden_layers, info.num_layers),
        ("num_heads", config.num_attention_heads, info.num_heads),
        ("num_kv_heads", kv_heads, info.num_kv_heads),
        ("head_dim", head_dim, info.head_dim),
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
        "; transformers ignores the attn_factor of this model, so start the server "
        "with models[].yarn_attn_factor ignored"
    )


def _torch_dtype(dtype: np.dtype[Any]) -> Any:
    return {
        dtypes.F32: torch.float32,
        dtypes.F16: torch.float16,
        dtypes.BF16: torch.bfloat16,
    }[dtype]
