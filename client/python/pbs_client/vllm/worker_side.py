"""The worker's side: the shape of the engine, and the loads of one rank.

Threading: the engine's thread; the loader's threads write to the blocks of requests
that wait for them, which no step of the engine touches.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pbs_client.vllm.fetching import Fetcher
from pbs_client.vllm.layouts import DTYPES, BlockSizes, LayerCache, PagedBlocks
from pbs_client.vllm.loader import Loader, LoadOrder, Results
from pbs_client.vllm.parts import EngineShape, heads_of_rank, layers_of_rank
from pbs_client.vllm.settings import Settings


class WorkerSide:
    """Loads what the scheduler's side ordered."""

    def __init__(
        self,
        settings: Settings,
        vllm_config: Any,
        kv_cache_config: Any,
        kv_caches: Mapping[str, torch.Tensor],
    ) -> None:
        """Probes the caches and starts the loader.

        Args:
            settings: the connector's.
            vllm_config: vLLM's.
            kv_cache_config: vLLM's; check_groups() accepts it.
            kv_caches: the tensor of each attention layer.

        Raises:
            ValueError: the engine's model or caches cannot be loaded.
        """
        self._seconds = settings.call_seconds_max
        layers = {_layer_index(name): name for name in kv_caches}
        spec = spec_of(kv_cache_config)
        engine = _engine_shape(vllm_config, layers, spec)
        sizes = BlockSizes(
            kv_cache_config.num_blocks,
            spec.block_size,
            engine.heads.count,
            engine.head_dim,
        )
        contexts = vllm_config.compilation_config.static_forward_context
        caches = {
            index: _layer_cache(contexts[name], kv_caches[name])
            for index, name in layers.items()
        }
        blocks = PagedBlocks(caches, sizes)
        fetcher = Fetcher(settings, engine, blocks)
        self._loader = Loader(fetcher.load, settings.load_threads, leave_engine_cpu)

    def submit(self, orders: Iterable[LoadOrder]) -> None:
        """Starts loads."""
        for order in orders:
            self._loader.submit(order)

    def take(self, finished_request_ids: Iterable[str]) -> Results:
        """The loads that ended; those of requests that ended are cancelled."""
        self._loader.cancel(finished_request_ids)
        return self._loader.take()

    def close(self) -> None:
        """Ends all loads."""
        self._loader.close(self._seconds)


def check_groups(kv_cache_config: Any, vllm_config: Any) -> None:
    """ValueError unless every layer has full attention and one kind of block."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ValueError(
            f"the model has {len(groups)} groups of KV caches, and the connector loads "
            "models with one; it cannot serve hybrid models"
        )
    spec = groups[0].kv_cache_spec
    if (
        type(spec).__name__ != "FullAttentionSpec"
        or spec.sliding_window is not None
        or spec.attention_chunk_size is not None
    ):
        window = getattr(spec, "sliding_window", None)
        raise ValueError(
            f"the model's KV cache is a {type(spec).__name__} with sliding window "
            f"{window}; the connector loads full attention only"
        )
    if spec.dtype not in DTYPES:
        raise ValueError(
            f"vLLM's KV cache is of {spec.dtype}; the connector writes float32, "
            "float16 and bfloat16, so start vLLM with --kv-cache-dtype auto"
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size != 1:
            raise ValueError(
                f"{name} is {size}; the connector loads whole sequences: set it to 1"
            )


def leave_engine_cpu() -> None:
    """Lets this thread run on all CPUs of the parent process.

    On the CPU, vLLM binds its thread to one CPU, and threads that it starts inherit
    that: loads would then run in turn with the engine.
    """
    with contextlib.suppress(OSError, AttributeError):
        cpus = os.sched_getaffinity(os.getppid()) | os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)


def spec_of(kv_cache_config: Any) -> Any:
    """The one kind of cache; see check_groups()."""
    return kv_cache_config.kv_cache_groups[0].kv_cache_spec


def _engine_shape(
    vllm_config: Any, layers: Mapping[int, str], spec: Any
) -> EngineShape:
    from vllm.distributed.parallel_state import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    model = vllm_config.model_config
    num_layers = model.get_total_num_hidden_layers()
    num_heads = model.get_total_num_kv_heads()
    heads = heads_of_rank(
        num_heads,
        get_tensor_model_parallel_world_size(),
        get_tensor_model_parallel_rank(),
    )
    if heads.count != spec.num_kv_heads:
        raise ValueError(
            f"vLLM's cache has {spec.num_kv_heads} KV heads on this rank, where "
            f"{heads.count} of the model's {num_heads} are expected"
        )
    return EngineShape(
        num_layers=num_layers,
        num_kv_heads=num_heads,
        head_dim=spec.head_size,
        layers=layers_of_rank(layers, num_layers),
        heads=heads,
        dtype=DTYPES[spec.dtype],
        rope_factor=_rope_factor(model.hf_text_config),
    )


def _rope_factor(config: Any) -> float | None:
    """The factor that yarn has in vLLM, which reads it as transformers does."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return float(ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1])


def _layer_index(name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(name))


def _layer_cache(layer: Any, tensor: torch.Tensor) -> LayerCache:
    backend = layer.attn_backend.get_name()
    return LayerCache(backend, tensor, getattr(layer, "isa", None))
