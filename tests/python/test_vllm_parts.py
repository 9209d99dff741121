"""Which heads, layers and blocks a rank of vLLM loads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from pbs_client import KvTicket
from pbs_client.kv import KvDescriptor, Span
from pbs_client.vllm.handoff import HandoffError
from pbs_client.vllm.parts import (
    EngineShape,
    blocks_of_tokens,
    check_descriptor,
    groups_of_layers,
    heads_of_rank,
    layers_of_rank,
    slots_of_tokens,
)

ENGINE = EngineShape(4, 2, 64, Span(0, 4), Span(0, 2), "bf16")
DESCRIPTOR = KvDescriptor(
    ticket=KvTicket("0" * 32, 1, "m", "exact"),
    expires_unix_seconds=None,
    ttl_seconds=60,
    model="m",
    complete=True,
    num_layers=4,
    layers_ready=4,
    num_kv_heads=2,
    head_dim=64,
    num_tokens=100,
    dtype=np.dtype(np.float32),
    bytes=1,
    first_token=1,
    prompt_digest="sha256:a",
)


@pytest.mark.parametrize(
    ("heads", "ranks", "expected"),
    [
        (8, 1, [(0, 8)]),
        (8, 2, [(0, 4), (4, 4)]),
        (8, 8, [(head, 1) for head in range(8)]),
        (2, 4, [(0, 1), (0, 1), (1, 1), (1, 1)]),
        (2, 8, [(rank // 4, 1) for rank in range(8)]),
        (1, 4, [(0, 1)] * 4),
    ],
)
def test_the_heads_of_a_rank_are_those_that_vllm_puts_there(heads, ranks, expected):
    shares = [heads_of_rank(heads, ranks, rank) for rank in range(ranks)]
    assert [(share.begin, share.count) for share in shares] == expected


@pytest.mark.parametrize(
    ("heads", "ranks", "rank"), [(8, 3, 0), (3, 2, 0), (8, 2, 2), (8, 2, -1)]
)
def test_heads_that_cannot_be_divided_are_refused(heads, ranks, rank):
    with pytest.raises(ValueError, match="rank"):
        heads_of_rank(heads, ranks, rank)


def test_a_pipeline_rank_has_a_range_of_layers():
    assert layers_of_rank([3, 2], 4) == Span(2, 2)


@pytest.mark.parametrize("indices", [[], [0, 2], [0, 0, 1], [3, 4]])
def test_layers_that_are_no_range_of_the_model_are_refused(indices):
    with pytest.raises(ValueError, match="layer"):
        layers_of_rank(indices, 4)


def test_the_cache_of_the_engines_model_is_accepted():
    check_descriptor(DESCRIPTOR, ENGINE, 100, "sha256:a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 5}, "layers 5, the engine's model 4"),
        ({"num_kv_heads": 4}, "KV heads 4"),
        ({"head_dim": 128}, "head_dim 128"),
        ({"num_tokens": 99}, "99 tokens"),
        ({"prompt_digest": "sha256:b"}, "of another prompt's cache"),
    ],
)
def test_the_cache_of_another_model_is_refused_by_name(changes, message):
    with pytest.raises(HandoffError, match=message):
        changed = dataclasses.replace(DESCRIPTOR, **changes)
        check_descriptor(changed, ENGINE, 100, "sha256:a")


@pytest.mark.parametrize(
    ("layers", "bytes_max", "expected"),
    [
        # A token has 2 * 2 * 64 * 2 = 512 bytes in a layer, 10 of them 5120.
        (Span(0, 4), 1 << 20, [(0, 4)]),
        (Span(0, 4), 2 * 5120, [(0, 2), (2, 2)]),
        (Span(0, 4), 3 * 5120 + 1, [(0, 3), (3, 1)]),
        (Span(2, 2), 5120, [(2, 1), (3, 1)]),
    ],
)
def test_no_fetch_has_more_bytes_than_its_limit(layers, bytes_max, expected):
    engine = dataclasses.replace(ENGINE, layers=layers)
    assert groups_of_layers(engine, 10, bytes_max) == expected


def test_a_layer_beyond_the_limit_is_refused_with_what_to_raise():
    with pytest.raises(HandoffError, match=r"5120 bytes, more than 5119.*load_bytes"):
        groups_of_layers(ENGINE, 10, 5119)


@pytest.mark.parametrize(
    ("tokens", "blocks", "slots"),
    [
        (Span(0, 3), (9,), [36, 37, 38]),
        (Span(0, 4), (9,), [36, 37, 38, 39]),
        (Span(0, 5), (9, 2), [36, 37, 38, 39, 8]),
        (Span(4, 4), (2,), [8, 9, 10, 11]),
        (Span(4, 5), (2, 7), [8, 9, 10, 11, 28]),
        (Span(6, 1), (2,), [10]),
    ],
)
def test_tokens_go_to_their_blocks(tokens, blocks, slots):
    found = blocks_of_tokens([9, 2, 7], tokens, 4)
    assert found == blocks
    assert slots_of_tokens(found, tokens, 4).tolist() == slots


def test_tokens_beyond_the_blocks_are_refused():
    with pytest.raises(ValueError, match="4 blocks are needed"):
        blocks_of_tokens([9, 2, 7], Span(0, 13), 4)
