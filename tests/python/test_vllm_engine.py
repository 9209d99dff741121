"""The vLLM connector does not start with an engine whose caches it cannot fill."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch", reason="the caches are of torch tensors")

from pbs_client.vllm.worker_side import check_groups  # noqa: E402


@dataclasses.dataclass
class FullAttentionSpec:
    """As vLLM's class of this name."""

    dtype: Any = torch.float32
    sliding_window: int | None = None
    attention_chunk_size: int | None = None


class MLAAttentionSpec(FullAttentionSpec):
    """As vLLM's: latent attention."""


def check(*specs: Any, **parallel: int) -> None:
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    config = SimpleNamespace(parallel_config=SimpleNamespace(**parallel))
    check_groups(SimpleNamespace(kv_cache_groups=groups), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_of_full_attention_is_accepted(dtype):
    check(FullAttentionSpec(dtype), decode_context_parallel_size=1)


@pytest.mark.parametrize(
    ("specs", "parallel", "message"),
    [
        pytest.param([], {}, "0 groups", id="no attention"),
        pytest.param([FullAttentionSpec()] * 2, {}, "2 groups", id="hybrid"),
        pytest.param([MLAAttentionSpec()], {}, "MLAAttentionSpec", id="latent"),
        pytest.param(
            [FullAttentionSpec(sliding_window=512)], {}, "window 512", id="a window"
        ),
        pytest.param(
            [FullAttentionSpec(attention_chunk_size=512)],
            {},
            "full attention only",
            id="chunked attention",
        ),
        pytest.param(
            [FullAttentionSpec(torch.uint8)], {}, "--kv-cache-dtype auto", id="fp8"
        ),
        pytest.param(
            [FullAttentionSpec()],
            {"decode_context_parallel_size": 2},
            "decode_context_parallel_size is 2",
            id="context parallel",
        ),
    ],
)
def test_another_model_or_engine_is_refused_by_name(specs, parallel, message):
    with pytest.raises(ValueError, match=message):
        check(*specs, **parallel)
