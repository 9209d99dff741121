"""Raw attention on the real server, against attention by its definition."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pbs_client
import pytest
from attention_reference import allowed_by, attention
from pbs_client import (
    Attention,
    Client,
    Dense,
    Given,
    MeanPooling,
    Packed,
    Pbs,
    Synthetic,
    Timing,
    safetensors_file,
)
from pbs_client.cli import main

# |o - reference|. f32: sums of a few hundred terms of size 1, reordered. f16 and bf16:
# the output's rounding, 2^-11 and 2^-8 of values up to 4, and as much again for
# probabilities rounded to the input's dtype.
OUTPUT_ERROR_MAX = {"f32": 2e-6, "f16": 4e-3, "bf16": 3.2e-2}
LSE_ERROR_MAX = {"f32": 2e-6, "f16": 2e-5, "bf16": 2e-5}  # logits accumulate in f32
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def tensors(heads, kv_heads, q_len, k_len, dim, dtype="f32", batch=1, seed=1):
    """Random q, k, v [batch, heads, len, dim]."""
    rng = np.random.default_rng(seed)
    shapes = ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    return tuple(
        rng.standard_normal((batch, h, length, dim)).astype(DTYPES[dtype])
        for h, length in shapes
    )


def assert_close(actual, expected, tolerance) -> None:
    error = np.abs(np.asarray(actual, np.float64) - expected).max(initial=0)
    assert error <= tolerance, f"off by {error:.3g}, more than {tolerance:.3g}"


DENSE_CASES = [
    # name, batch, heads, kv_heads, q_len, k_len, dim
    ("whole blocks", 1, 2, 2, 256, 256, 64),
    ("odd length, grouped heads", 1, 4, 2, 333, 333, 128),
    ("one token", 1, 2, 1, 1, 1, 32),
    ("one query behind a prompt", 1, 4, 2, 1, 300, 64),
    ("query offset inside a block", 2, 2, 1, 100, 333, 96),
    ("two sequences", 2, 2, 2, 130, 130, 256),
    ("no query", 1, 2, 1, 0, 64, 64),
    ("no token", 1, 2, 1, 0, 0, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [pytest.param(case[1:], id=case[0]) for case in DENSE_CASES]
)
def test_dense_attention_is_what_its_definition_says(client, case, dtype):
    batch, heads, kv_heads, q_len, k_len, dim = case
    q, k, v = tensors(heads, kv_heads, q_len, k_len, dim, dtype, batch)
    result = client.attend(q, k, v, Dense(), want=("o", "lse"))
    assert result.o.dtype == DTYPES[dtype]
    assert result.stats.method_run == "dense"
    for index in range(batch):
        o, lse = attention(q[index], k[index], v[index])
        assert_close(result.o[index], o, OUTPUT_ERROR_MAX[dtype])
        assert_close(result.lse[index], lse, LSE_ERROR_MAX[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_of_different_lengths_stay_apart(client, dtype):
    q_ends, k_ends = [0, 5, 5, 140, 141], [0, 200, 201, 336, 437]
    q, k, v = (a[0] for a in tensors(4, 2, q_ends[-1], k_ends[-1], 64, dtype))
    result = client.attend(
        q, k, v, Dense(), packed=Packed(q_ends, k_ends), want=("o", "lse")
    )
    for index in range(4):
        own_q = slice(q_ends[index], q_ends[index + 1])
        own_k = slice(k_ends[index], k_ends[index + 1])
        o, lse = attention(q[:, own_q], k[:, own_k], v[:, own_k])
        assert_close(result.o[:, own_q], o, OUTPUT_ERROR_MAX[dtype])
        assert_close(result.lse[:, own_q], lse, LSE_ERROR_MAX[dtype])


@pytest.mark.parametrize("scope", ["kv_head", "query_head"])
@pytest.mark.parametrize("q_len", [700, 150])
def test_pbs_reads_exactly_the_blocks_and_the_order_it_reports(client, scope, q_len):
    q, k, v = tensors(4, 2, q_len, 700, 64)
    method = Pbs(block_size=64, segment_size=128, threshold=0.5, scope=scope)
    result = client.attend(q, k, v, method, want=("o", "order", "block_mask"))
    assert result.stats.method_run == "pbs"
    assert 0 < result.stats.density < 1
    assert result.order.shape == (1, 4 if scope == "query_head" else 2, 700)
    order = np.repeat(result.order[0], 4 // result.order.shape[1], 0)
    np.testing.assert_array_equal(np.sort(order, 1), np.tile(np.arange(700), (4, 1)))
    assert not np.array_equal(order[0], np.arange(700))
    allowed = allowed_by(result.block_mask[0], order, q_len, 700, 64)
    o, _ = attention(q[0], k[0], v[0], allowed)
    assert_close(result.o[0], o, OUTPUT_ERROR_MAX["f32"])


def test_pbs_with_a_threshold_of_one_equals_dense(client):
    q, k, v = tensors(2, 1, 600, 600, 64)
    sparse = client.attend(q, k, v, Pbs(threshold=1.0)).o
    dense, _ = attention(q[0], k[0], v[0])
    assert_close(sparse[0], dense, OUTPUT_ERROR_MAX["f32"])


def test_mean_pooling_reads_exactly_the_blocks_it_reports(client):
    q, k, v = tensors(4, 2, 700, 700, 64)
    method = MeanPooling(block_size=64, threshold=0.5)
    result = client.attend(q, k, v, method, want=("o", "block_mask"))
    allowed = allowed_by(result.block_mask[0], None, 700, 700, 64)
    o, _ = attention(q[0], k[0], v[0], allowed)
    assert_close(result.o[0], o, OUTPUT_ERROR_MAX["f32"])


def test_given_order_and_blocks_are_used_as_they_are(client):
    q, k, v = tensors(2, 1, 400, 400, 64)
    method = Pbs(block_size=64, segment_size=128)
    rng = np.random.default_rng(5)
    order = np.concatenate(
        [begin + rng.permutation(128) for begin in (0, 128, 256)]
        + [np.arange(384, 400)]
    )[None, None]
    mask = np.zeros((1, 2, 7, 7), np.uint8)
    for block in range(7):  # the own segment, and one earlier block
        begin = block // 2 * 2
        mask[:, :, block, begin : begin + 2] = 1
        mask[:, 1, block, block // 3] = 1
    given = Given(order=order, block_mask=mask)
    result = client.attend(
        q, k, v, method, given=given, want=("o", "order", "block_mask")
    )
    np.testing.assert_array_equal(result.order, order)
    np.testing.assert_array_equal(result.block_mask, mask)
    allowed = allowed_by(mask[0], np.repeat(order[0], 2, 0), 400, 400, 64)
    o, _ = attention(q[0], k[0], v[0], allowed)
    assert_close(result.o[0], o, OUTPUT_ERROR_MAX["f32"])


def test_lists_and_mask_of_packed_sequences_come_back_as_they_were_given(client):
    packed = Packed([0, 100, 420])
    q, k, v = (a[0] for a in tensors(2, 1, 420, 420, 64))
    method = MeanPooling(block_size=64)
    first = client.attend(
        q, k, v, method, packed=packed, want=("o", "lists", "block_mask")
    )
    assert [mask.shape for mask in first.block_mask] == [(2, 2, 2), (2, 5, 5)]
    for given in (Given(lists=first.lists), Given(block_mask=first.block_mask)):
        again = client.attend(
            q, k, v, method, packed=packed, given=given, want=("o", "lists")
        )
        np.testing.assert_array_equal(again.lists.indices, first.lists.indices)
        np.testing.assert_array_equal(again.lists.offsets, first.lists.offsets)
        np.testing.assert_array_equal(again.o, first.o)


def test_the_size_of_chunks_does_not_change_the_result(server, client):
    q, k, v = tensors(2, 1, 500, 500, 64)
    expected = client.attend(q, k, v, Pbs()).o
    with Client(server.target, chunk_bytes=1000) as small:
        np.testing.assert_array_equal(small.attend(q, k, v, Pbs()).o, expected)


def test_progress_climbs_to_all_bytes_both_ways(client):
    q, k, v = tensors(2, 1, 500, 500, 64)
    seen = {"upload": [], "download": []}
    client.attend(q, k, v, progress=lambda way, *done: seen[way].append(done))
    for way, total in (
        ("upload", q.nbytes + k.nbytes + v.nbytes),
        ("download", q.nbytes),
    ):
        assert seen[way][-1] == (total, total)
        assert seen[way] == sorted(seen[way])


def test_strided_and_transposed_tensors_are_read_as_numpy_does(client):
    q, k, v = tensors(2, 2, 130, 130, 64)
    expected = client.attend(q, k, v).o
    turned = (a.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3) for a in (q, k, v))
    np.testing.assert_array_equal(client.attend(*turned).o, expected)


def test_synthetic_tensors_are_a_matter_of_their_seed(client):
    shape = {"num_heads": 4, "num_kv_heads": 2, "seq_len": 600, "head_dim": 64}
    want = ("o", "lse", "block_mask")
    first, again, other = (
        client.attend_synthetic(
            Synthetic(seed=seed, dtype="bf16", **shape), Pbs(), want=want
        )
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.o, again.o)
    assert not np.array_equal(first.o, other.o)
    assert first.o.shape == (1, 4, 600, 64)
    assert first.o.dtype == ml_dtypes.bfloat16
    assert first.block_mask.shape == (1, 4, 5, 5)
    assert first.stats.causal_blocks == 4 * 15


def test_every_repetition_is_timed(client):
    stats = client.attend_synthetic(
        Synthetic(num_heads=2, num_kv_heads=1, seq_len=300, head_dim=64),
        timing=Timing(warmup=1, repetitions=3),
    ).stats
    assert len(stats.iterations) == 3
    assert all(times.attend_seconds > 0 for times in stats.iterations)
    assert stats.backend == "cpu"
    assert stats.isa


def test_coverage_is_measured_on_request(client):
    q, k, v = tensors(2, 1, 600, 600, 64)
    measured = Attention(Pbs(threshold=0.5), coverage_rows=8)
    stats = client.attend(q, k, v, measured).stats
    assert stats.coverage_rows == 2 * 8
    assert 0.5 < stats.coverage < 1


REFUSED = [
    ("threshold of 2", Pbs(threshold=2.0), {}, "threshold 2"),
    ("block of 100", Pbs(block_size=100), {}, "block_size 100"),
    ("segment of 200", Pbs(segment_size=200), {}, "segment_size 200"),
    ("1025 coverage rows", Attention(Dense(), coverage_rows=1025), {}, "1025"),
    ("101 warm-ups", Dense(), {"timing": Timing(warmup=101)}, "101"),
    (
        "an order across segments",
        Pbs(segment_size=128),
        {"given": Given(order=np.arange(300)[::-1].reshape(1, 1, 300))},
        "order",
    ),
    (
        "a row that does not read itself",
        MeanPooling(),
        {"given": Given(block_mask=np.zeros((1, 2, 3, 3), np.uint8))},
        "block",
    ),
]


@pytest.mark.parametrize(
    ("attention", "arguments", "message"),
    [pytest.param(*case[1:], id=case[0]) for case in REFUSED],
)
def test_a_refusal_names_the_value_and_the_server_goes_on(
    client, attention, arguments, message
):
    q, k, v = tensors(2, 1, 300, 300, 64)
    with pytest.raises(pbs_client.InvalidArgumentError, match=message):
        client.attend(q, k, v, attention, **arguments)
    assert client.health() == "SERVING"


def test_a_nan_is_refused_with_its_position_unless_allowed(client):
    q, k, v = tensors(2, 1, 300, 300, 64)
    v[0, 0, 7, 3] = np.nan
    where = f"tensor V element {7 * 64 + 3} is NaN"
    with pytest.raises(pbs_client.InvalidArgumentError, match=where):
        client.attend(q, k, v, Dense())
    result = client.attend(q, k, v, Dense(), allow_non_finite=True)
    assert np.isnan(result.o[:, :, 7:, 3]).all()


# ---- the console script


def run_script(capsys, server, path, *words) -> tuple[dict, dict]:
    """Runs `pbs-client attend` on a file; gives its line and the tensors written."""
    out = path.with_name("out.safetensors")
    files = ["--input", str(path), "--output", str(out)]
    capsys.readouterr()
    assert main(["attend", "--server", server.target, *files, *words]) == 0
    return json.loads(capsys.readouterr().out), safetensors_file.read(out)


def test_the_script_times_repetitions(capsys, server, tmp_path):
    path = tmp_path / "in.safetensors"
    q, k, v = tensors(2, 1, 300, 300, 64)
    safetensors_file.write(path, {"q": q, "k": k, "v": v})
    once, _ = run_script(capsys, server, path, "--method", "pbs")
    assert "iterations" not in once
    thrice, _ = run_script(
        capsys, server, path, "--method", "pbs", "--repetitions", "3"
    )
    assert len(thrice["iterations"]) == 3
    assert thrice["stages"]["attend"] > 0
    assert thrice["method_run"] == "pbs"
    assert 0 < thrice["lower_density"] <= thrice["density"]


def test_the_script_casts_packs_and_takes_its_own_mask_back(capsys, server, tmp_path):
    path = tmp_path / "in.safetensors"
    q, k, v = (a[0] for a in tensors(2, 1, 420, 420, 64, "f16"))
    ends = np.array([0, 100, 420], np.int64)
    given = {"q": q, "k": k, "v": v, "cu_seqlens": ends}
    safetensors_file.write(path, given)
    words = ["--method", "mean_pooling", "--block-size", "64", "--dtype", "bf16"]
    words += ["--want", "o,lse,block_mask"]
    line, first = run_script(capsys, server, path, *words)
    assert first["o"].dtype == ml_dtypes.bfloat16
    assert first["lse"].shape == (2, 420)
    assert first["block_mask"].shape == (2 * (2 * 2 + 5 * 5),)
    safetensors_file.write(path, {**given, "block_mask": first["block_mask"]})
    again, second = run_script(capsys, server, path, *words, "--use-block-mask")
    assert again["density"] == line["density"]
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)
