"""Every method on the real server, against attention by its definition."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pbs_client
import pytest
from attention_reference import allowed_by, attention
from pbs_client import (
    Attention,
    Dense,
    FlashPrefill,
    FlexPrefill,
    Given,
    MeanPooling,
    MInference,
    Pbs,
    Permute,
    Prism,
    XAttention,
    safetensors_file,
)
from pbs_client.cli import main
from pbs_client.options import METHODS

# |o - reference| in f32: sums of a few hundred terms of size 1, reordered.
OUTPUT_ERROR_MAX = 2e-6
BLOCK, TOKENS = 32, 700
BLOCKS = -(-TOKENS // BLOCK)

# Methods that select some blocks of the tensors below, not all.
SPARSE = {
    "dense": Dense(BLOCK),
    "pbs": Pbs(BLOCK, 64, 0.3),
    "mean_pooling": MeanPooling(BLOCK, 0.3),
    "xattention": XAttention(BLOCK, 8, 0.3),
    "minference": MInference(BLOCK, vertical_tokens=20, slash_tokens=64),
    "flexprefill": FlexPrefill(BLOCK, gamma=0.3),
    "prism": Prism(BLOCK, 0.3),
    "flashprefill": FlashPrefill(BLOCK, 0.9),
}
PERMUTED = [n for n, kind in METHODS.items() if kind.selects and not kind.permutes]
# minference also reads single keys of other blocks, which a mask of blocks has not.
WHOLE_BLOCKS = [n for n in METHODS if n != "minference"]
# What selects everything.
EVERYTHING = {
    "pbs": {"threshold": 1.0},
    "mean_pooling": {"threshold": 1.0},
    "xattention": {"threshold": 1.0},
    "prism": {"threshold": 1.0},
    "minference": {"vertical_tokens": TOKENS},
}


def test_every_method_has_a_case():
    assert list(SPARSE) == list(METHODS)


@pytest.fixture(scope="module")
def qkv():
    """Queries and keys with a shared direction, so that some blocks matter more."""
    rng = np.random.default_rng(3)
    q, k, v = (
        rng.standard_normal((1, heads, TOKENS, 64)).astype(np.float32)
        for heads in (4, 2, 2)
    )
    direction = rng.standard_normal(64).astype(np.float32)
    q += direction / 4
    k += direction * rng.standard_normal((1, 2, BLOCKS, 1)).repeat(BLOCK, 2)[
        :, :, :TOKENS
    ].astype(np.float32)
    return q, k, v


@pytest.fixture
def runs(client):
    """Skips methods that the server does not have; other tests say how it refuses."""
    return lambda name: name in client.info().methods or pytest.skip(f"no {name}")


def assert_reads_what_it_reports(result, qkv, block_size):
    """The output is attention over the blocks and the order of the result."""
    q, k, v = qkv
    order = result.order[0].repeat(4 // result.order.shape[1], 0)
    np.testing.assert_array_equal(np.sort(order, 1), np.tile(np.arange(TOKENS), (4, 1)))
    allowed = allowed_by(result.block_mask[0], order, TOKENS, TOKENS, block_size)
    o, _ = attention(q[0], k[0], v[0], allowed)
    error = np.abs(result.o[0] - o).max()
    assert error <= OUTPUT_ERROR_MAX, f"off by {error:.3g}"


WANT = ("o", "order", "block_mask")


@pytest.mark.parametrize("name", WHOLE_BLOCKS)
def test_a_method_reads_exactly_the_blocks_it_reports(client, runs, qkv, name):
    runs(name)
    result = client.attend(*qkv, SPARSE[name], want=WANT)
    assert result.stats.method_run == name
    assert (result.stats.density == 1) == (name == "dense")
    assert_reads_what_it_reports(result, qkv, BLOCK)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_the_server_lacks_is_refused_by_name(client, qkv, name):
    methods = client.info().methods
    if name in methods:
        runs_dense = name == "minference"  # up to slash_tokens tokens
        method_run = client.attend(*qkv, name).stats.method_run
        assert method_run == ("dense" if runs_dense else name)
        return
    message = f"method {name} is not supported by the .* which has {', '.join(methods)}"
    with pytest.raises(pbs_client.UnimplementedError, match=message):
        client.attend(*qkv, name)


@pytest.mark.parametrize("name", PERMUTED)
@pytest.mark.parametrize("scope", ["kv_head", "query_head"])
def test_every_other_method_may_sort_keys_as_pbs_does(client, runs, qkv, name, scope):
    runs(name)
    permuted = Attention(SPARSE[name], permute=Permute(64, scope))
    result = client.attend(*qkv, permuted, want=WANT)
    assert result.stats.method_run == name
    assert 0 < result.stats.density < 1
    assert not np.array_equal(result.order[0, 0], np.arange(TOKENS))
    pbs = client.attend(*qkv, Pbs(BLOCK, 64, scope=scope), want=("order",))
    np.testing.assert_array_equal(result.order, pbs.order)
    if name in WHOLE_BLOCKS:
        assert_reads_what_it_reports(result, qkv, BLOCK)


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("permute", [None, Permute(64)], ids=["plain", "permuted"])
def test_a_method_that_selects_everything_is_dense(client, runs, qkv, name, permute):
    runs(name)
    method = dataclasses.replace(SPARSE[name], **EVERYTHING[name])
    permute = None if METHODS[name].permutes else permute
    result = client.attend(*qkv, Attention(method, permute=permute))
    assert result.stats.density == 1
    dense, _ = attention(*(array[0] for array in qkv))
    assert np.abs(result.o[0] - dense).max() <= OUTPUT_ERROR_MAX


@pytest.mark.parametrize("name", [n for n in METHODS if n != "dense"])
def test_tail_sink_and_window_are_read_whatever_the_method_selects(
    client, runs, qkv, name
):
    runs(name)
    shared = Attention(SPARSE[name], dense_tail_blocks=2, sink_blocks=3, window_blocks=4)
    mask = client.attend(*qkv, shared, want=("block_mask",)).block_mask[0]
    row, column = np.mgrid[:BLOCKS, :BLOCKS]
    read = (column < 3) | (row - column < 4) | (row >= BLOCKS - 2)
    assert mask[:, read & (column <= row)].all()
    assert not mask[:, column <= row].all()


def corrected_attention(qkv, mask):
    """Attention over the blocks of a mask, [heads, blocks, blocks], keys in their order.

    A block that is not in it, and is before the query block, is one key that counts as
    often as the block has keys.
    """
    q, k, v = (array[0].astype(np.float64) for array in qkv)
    k, v = k.repeat(2, 0), v.repeat(2, 0)
    begins = np.arange(0, TOKENS, BLOCK)
    lengths = np.minimum(TOKENS, begins + BLOCK) - begins
    block = np.arange(TOKENS) // BLOCK
    means = [np.add.reduceat(x, begins, 1) / lengths[:, None] for x in (k, v)]
    earlier = np.arange(BLOCKS) < np.arange(BLOCKS)[:, None]
    as_mean = (earlier & (mask == 0))[:, block]
    seen = mask.astype(bool)[:, block][:, :, block] & np.tri(TOKENS, dtype=bool)
    exact = np.where(seen, q @ k.transpose(0, 2, 1) / 8, -np.inf)
    pooled = q @ means[0].transpose(0, 2, 1) / 8 + np.log(lengths)
    logits = np.concatenate([exact, np.where(as_mean, pooled, -np.inf)], 2)
    weights = np.exp(logits - logits.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    return weights @ np.concatenate([v, means[1]], 1)


@pytest.mark.parametrize("name", [n for n in WHOLE_BLOCKS if n not in ("dense", "pbs")])
def test_mean_correction_adds_the_means_of_the_other_blocks(client, runs, qkv, name):
    runs(name)
    corrected = Attention(SPARSE[name], mean_correction=True)
    result = client.attend(*qkv, corrected, want=("o", "block_mask"))
    expected = corrected_attention(qkv, result.block_mask[0])
    assert np.abs(result.o[0] - expected).max() <= OUTPUT_ERROR_MAX


@pytest.mark.parametrize("name", [n for n in METHODS if n != "dense"])
def test_mean_correction_comes_nearer_to_dense_attention(client, runs, qkv, name):
    runs(name)
    dense, _ = attention(*(array[0] for array in qkv))
    plain, corrected = (
        np.abs(
            client.attend(*qkv, Attention(SPARSE[name], mean_correction=on)).o[0] - dense
        ).mean()
        for on in (False, True)
    )
    assert corrected < 0.9 * plain


@pytest.mark.parametrize("name", [n for n in METHODS if n != "dense"])
def test_every_method_takes_blocks_and_with_permute_an_order(client, runs, qkv, name):
    runs(name)
    method = Attention(SPARSE[name], permute=None if name == "pbs" else Permute(64))
    first = client.attend(*qkv, SPARSE["pbs"], want=WANT)
    given = Given(order=first.order, block_mask=first.block_mask)
    again = client.attend(*qkv, method, given=given, want=WANT)
    np.testing.assert_array_equal(again.order, first.order)
    np.testing.assert_array_equal(again.block_mask, first.block_mask)
    np.testing.assert_array_equal(again.o, first.o)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("prism", Given(order=np.zeros(1)), "an order needs the method pbs, or permute"),
        (None, Given(order=np.zeros(1)), "an order needs the method pbs, or permute"),
        (
            "dense",
            Given(block_mask=np.ones((1, 4, 6, 6), np.uint8)),
            "lists and block_mask need a method of pbs, mean_pooling, xattention",
        ),
    ],
)
def test_what_a_method_cannot_take_is_refused_before_any_traffic(
    client, qkv, method, given, message
):
    with pytest.raises(ValueError, match=message):
        client.attend(*qkv, method, given=given)


def test_as_published_takes_the_values_of_the_published_code(client, runs, qkv):
    runs("flashprefill")
    published = {"sink_blocks": 2, "window_blocks": 4, "dense_tail_blocks": 2}
    method = FlashPrefill(BLOCK, 0.9)
    first, second = (
        client.attend(*qkv, attention, want=("block_mask",)).block_mask
        for attention in (
            Attention(method, as_published=True),
            Attention(method, as_published=True, **published),
        )
    )
    np.testing.assert_array_equal(first, second)
    order = client.attend(*qkv, Attention("pbs", as_published=True), want=("order",)).order
    assert order.shape[1] == 4  # one for each query head


SHARED_RANGE = r"is outside \[0, 65535\]"
REFUSED = [
    # method or attention; what the server says
    (XAttention(block_size=100), "block_size 100 is not a power of two"),
    (XAttention(block_size=8), r"block_size 8 is not a power of two in \[16, 256\]"),
    (XAttention(block_size=512), r"block_size 512 is not a power of two in \[16, 256\]"),
    (XAttention(stride=1), r"stride 1 is outside \[2, 64\]"),
    (XAttention(stride=12), "stride 12 is not a power of two"),
    (XAttention(32, stride=64), "stride 64 .* at most block_size 32"),
    (XAttention(stride=128), r"stride 128 is outside \[2, 64\]"),
    (XAttention(threshold=0.0), r"threshold 0 is outside \(0, 1\]"),
    (MInference(vertical_tokens=0), r"vertical_tokens 0 is outside \[1, 1048576\]"),
    (MInference(slash_tokens=0), r"slash_tokens 0 is outside \[1, 1048576\]"),
    (
        MInference(slash_tokens=2**20 + 1),
        r"slash_tokens 1048577 is outside \[1, 1048576\]",
    ),
    (FlexPrefill(gamma=0.0), r"gamma 0 is outside \(0, 1\]"),
    (FlexPrefill(gamma=1.5), r"gamma 1.5 is outside \(0, 1\]"),
    (FlexPrefill(tau=-0.5), r"tau -0.5 is outside \[0, 1\]"),
    (FlexPrefill(tau=1.5), r"tau 1.5 is outside \[0, 1\]"),
    (Prism(threshold=1.5), r"threshold 1.5 is outside \(0, 1\]"),
    (Prism(fast_threshold=1.5), r"fast_threshold 1.5 is outside \[0, 1\]"),
    (Prism(slow_dims=7), "slow_dims 7 is odd"),
    (Prism(slow_dims=66), "slow_dims 66 exceeds head_dim 64"),
    (Prism(fast_dims=-2), r"fast_dims -2 is outside \[0, 256\]"),
    (Prism(fast_dims=66), "fast_dims 66 exceeds head_dim 64"),
    (FlashPrefill(alpha=0.0), r"alpha 0 is outside \(0, 1\]"),
    (FlashPrefill(alpha=1.5), r"alpha 1.5 is outside \(0, 1\]"),
    (FlashPrefill(alpha=math.nan), r"alpha nan is outside \(0, 1\]"),
    (Attention("prism", dense_tail_blocks=-1), f"dense_tail_blocks -1 {SHARED_RANGE}"),
    (Attention("prism", sink_blocks=65536), f"sink_blocks 65536 {SHARED_RANGE}"),
    (Attention(window_blocks=65536), f"window_blocks 65536 {SHARED_RANGE}"),
    (
        Attention("prism", permute=Permute(segment_size=200)),
        "segment_size 200 is not a multiple of block_size 128",
    ),
    (
        Attention("prism", permute=Permute(segment_size=32768)),
        r"segment_size 32768 is outside \[1, 16384\]",
    ),
    (Attention("pbs", permute=True), "method pbs has no option permute=1; mean_pooling"),
    (
        Attention("dense", sink_blocks=2),
        "method dense has no option sink_blocks=2; pbs, mean_pooling",
    ),
    (
        Attention("dense", mean_correction=True),
        "method dense has no option mean_correction=1; pbs, mean_pooling",
    ),
    (Attention(as_published=True), "as_published needs a method"),
]


@pytest.mark.parametrize(
    ("method", "message"), REFUSED, ids=[case[1].split(" is ")[0] for case in REFUSED]
)
def test_a_refusal_names_the_option_the_value_and_the_limit(client, qkv, method, message):
    for call in (
        lambda: client.attend(*qkv, method),
        lambda: client.prefill("recall", [1, 2, 3], method),
    ):
        with pytest.raises(pbs_client.InvalidArgumentError, match=message):
            call()
    assert client.health() == "SERVING"


PROMPT = list(np.random.default_rng(2).integers(40, 90, TOKENS))


@pytest.mark.parametrize("name", METHODS)
def test_a_prefill_runs_every_method(client, runs, name):
    runs(name)
    sparse = Attention(SPARSE[name], dense_fallback=False)
    stats = client.prefill("recall", PROMPT, sparse).stats
    assert set(stats.layer_method) == {name}
    assert 0 < stats.density <= 1


# ---- the console script

SCRIPT_FLAGS = {
    "dense": "--block-size 32",
    "pbs": "--block-size 32 --segment-size 64 --threshold .3",
    "mean_pooling": "--block-size 32 --threshold .3",
    "xattention": "--block-size 32 --stride 8 --threshold .3",
    "minference": "--block-size 32 --vertical-tokens 20 --slash-tokens 64",
    "flexprefill": "--block-size 32 --gamma .3",
    "prism": "--block-size 32 --threshold .3",
    "flashprefill": "--block-size 32 --alpha .9",
}


@pytest.mark.parametrize("name", METHODS)
def test_the_script_runs_a_method_as_the_client_does(
    client, server, runs, qkv, name, tmp_path, capsys
):
    runs(name)
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    safetensors_file.write(path, dict(zip("qkv", qkv)))
    words = f"attend --server {server.target} --input {path} --output {out}"
    assert main(f"{words} --method {name} {SCRIPT_FLAGS[name]}".split()) == 0
    line = json.loads(capsys.readouterr().out)
    expected = client.attend(*qkv, SPARSE[name])
    assert line["method"] == line["method_run"] == name
    assert line["density"] == expected.stats.density
    np.testing.assert_array_equal(safetensors_file.read(out)["o"], expected.o)
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps([int(token) for token in PROMPT]))
    words = f"prefill --server {server.target} --tokens {tokens}"
    flags = f"--method {name} {SCRIPT_FLAGS[name]} --no-dense-fallback"
    assert main(f"{words} {flags}".split()) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {layer["method"] for layer in layers} == {name}


def test_the_script_prints_the_whole_default_profile(server, client, capsys):
    assert main(["info", "--server", server.target]) == 0
    printed = json.loads(capsys.readouterr().out)["default_attention"]
    profile = client.info().default_profile
    assert Attention(client.info().default_attention) == Attention(profile.method)
    assert printed == {
        "method": "xattention",
        "block_size": 64,
        "stride": 8,
        "threshold": 0.9,
        "force_first_block": True,
        "dense_fallback": None,
        "coverage_rows": 0,
        "coverage_min": 0.0,
        "dense_tail_blocks": 3,
        "sink_blocks": 0,
        "window_blocks": 8,
        "mean_correction": True,
        "as_published": False,
        "permute": None,
    }
