"""Captured heads: the server's queries, their files, and the commands that use them."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pbs_client
import pytest
from attention_reference import attention
from pbs_client import (
    Attention,
    Capture,
    CaptureError,
    HeadsOfLayer,
    KvFormat,
    Lease,
    safetensors_file,
)
from pbs_client import capture as captures
from pbs_client.cli import main
from real_server import RECALL_MODEL, running_server

PROMPT = json.loads((RECALL_MODEL / "prompt_8k.json").read_text())[:700]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


@pytest.fixture(scope="module")
def heads(server) -> Capture:
    with pbs_client.Client(server.target) as client:
        return client.capture("recall", PROMPT, [0, 1])


# ---- the server's queries


def test_a_capture_has_the_heads_of_the_chosen_layers(client, heads):
    (model,) = client.models()
    assert list(heads.layers) == [0, 1]
    assert heads.model == "recall"
    assert heads.model_digest == model.model_digest
    assert heads.num_tokens == len(PROMPT)
    assert heads.scale == HEAD_DIM**-0.5
    for layer in heads.layers.values():
        assert layer.q.shape == (model.num_heads, len(PROMPT), HEAD_DIM)
        assert layer.k.shape == layer.v.shape == (KV_HEADS, len(PROMPT), HEAD_DIM)
        assert layer.group == model.num_heads // KV_HEADS


def test_keys_and_values_are_those_of_the_cache(client, heads):
    cache = client.prefill("recall", PROMPT, "dense", delivery="inline").kv
    for layer in (0, 1):
        np.testing.assert_array_equal(heads.layers[layer].k, cache.k[layer])
        np.testing.assert_array_equal(heads.layers[layer].v, cache.v[layer])


def test_attention_of_captured_heads_is_that_of_their_definition(client, heads):
    layer = heads.layers[1]
    q, k, v = (x.astype(np.float32) for x in (layer.q, layer.k, layer.v))
    result = client.attend(q[None], k[None], v[None], "dense")
    expected, _ = attention(q, k, v)
    np.testing.assert_allclose(result.o[0], expected, atol=2e-4)


def test_captured_queries_may_be_fetched_token_by_token_and_converted(client, heads):
    lease = Lease(capture_query_layers=[1])
    ticket = client.prefill("recall", PROMPT, "dense", delivery=lease).ticket
    found = client.describe(ticket)
    assert found.query_layers == (1,)
    assert found.num_query_heads == heads.layers[1].q.shape[0]
    assert found.query_bytes == heads.layers[1].q.nbytes
    turned = client.fetch_queries(ticket, 1, kv_format=KvFormat("f32", "NHD"))
    assert turned.dtype == np.float32
    expected = heads.layers[1].q.astype(np.float32)
    np.testing.assert_array_equal(turned.transpose(1, 0, 2), expected)
    with pytest.raises(ValueError, match="layer 0 were not captured; those of layers 1"):
        client.fetch_queries(ticket, 0)
    client.release(ticket)


def test_a_lease_without_a_capture_has_no_queries(client):
    ticket = client.prefill("recall", PROMPT[:50], delivery="lease").ticket
    assert client.describe(ticket).query_layers == ()
    with pytest.raises(ValueError, match="those of layers none were"):
        client.fetch_queries(ticket, 0)
    client.release(ticket)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2], r"capture_query_layers\[0\] 2 is outside \[0, 1\]"),
        ([1, 0], "is not above the layer before it"),
        ([0, 0], "is not above the layer before it"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(client, layers, message):
    with pytest.raises(pbs_client.InvalidArgumentError, match=message):
        client.capture("recall", PROMPT, layers)


def test_no_layers_and_no_integers_are_refused_before_any_traffic():
    with pbs_client.Client("127.0.0.1:1") as nobody:
        with pytest.raises(ValueError, match="layers is empty"):
            nobody.capture("recall", PROMPT, [])
        with pytest.raises(ValueError, match="capture_query_layers is not a list"):
            nobody.capture("recall", PROMPT, [0.5])


def test_a_capture_in_sparse_attention_is_that_of_the_sparse_model(client, heads):
    sparse = client.capture(
        "recall", PROMPT, [0, 1], Attention("pbs", dense_fallback=False)
    )
    np.testing.assert_array_equal(sparse.layers[0].q, heads.layers[0].q)
    assert not np.array_equal(sparse.layers[1].q, heads.layers[1].q)


# ---- files


def small(tokens=8, dtype=np.float32) -> Capture:
    rng = np.random.default_rng(3)

    def make(count: int) -> np.ndarray:
        return rng.standard_normal((count, tokens, HEAD_DIM)).astype(dtype)

    layers = {n: HeadsOfLayer(make(HEADS), make(KV_HEADS), make(KV_HEADS)) for n in (0, 7)}
    return Capture(layers, "m", "digest")


def test_a_file_holds_all_of_a_capture(tmp_path):
    made, path = small(dtype=ml_dtypes.bfloat16), tmp_path / "heads.safetensors"
    made.write(path)
    read = captures.read(path)
    assert read.metadata() == made.metadata()
    for layer, heads in made.layers.items():
        for kind in "qkv":
            np.testing.assert_array_equal(
                getattr(read.layers[layer], kind), getattr(heads, kind)
            )


def test_single_layers_of_a_file_can_be_read(tmp_path):
    path = tmp_path / "heads.safetensors"
    small().write(path)
    assert list(captures.read(path, [7]).layers) == [7]
    with pytest.raises(CaptureError, match="layer 3 was not captured; layers 0, 7 were"):
        captures.read(path, [3])


def changed(path, tensors=None, **metadata):
    """A file whose tensors or metadata are changed; None takes one away."""
    made = small()
    arrays = {
        f"layers.{n}.{kind}": getattr(heads, kind)
        for n, heads in made.layers.items()
        for kind in "qkv"
    }
    arrays = {n: a for n, a in {**arrays, **(tensors or {})}.items() if a is not None}
    words = {**made.metadata(), **metadata}
    safetensors_file.write(
        path, arrays, {n: w for n, w in words.items() if w is not None}
    )
    return path


ZEROS = np.zeros((HEADS, 8, HEAD_DIM), np.float32)
NAN = np.full((KV_HEADS, 8, HEAD_DIM), np.nan, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"format": None}, "metadata lacks format", id="no format"),
        pytest.param({"format": "x"}, "format 'x' is not", id="other format"),
        pytest.param({"model_digest": ""}, "model_digest is empty", id="no digest"),
        pytest.param({"layers": "7,0"}, "are not ascending", id="order"),
        pytest.param({"layers": "0,x"}, "are not ascending", id="word"),
        pytest.param({"layers": "0,0x7"}, "are not ascending", id="hex"),
        pytest.param({"layers": "0"}, "belongs to no captured layer", id="fewer layers"),
        pytest.param({"layers": "0,7,8"}, "is missing", id="more layers"),
        pytest.param({"layers": ",".join(map(str, range(2000)))}, "more than 1024",
                     id="too many layers"),
        pytest.param({"tokens": "9"}, "metadata says 9 tokens, q has 8", id="tokens"),
        pytest.param({"scale": "1"}, "scale 1 is not 1 / sqrt", id="scale"),
        pytest.param({"scale": "nan"}, "scale nan is not", id="no scale"),
        pytest.param({"tensors": {"layers.7.v": None}}, "layers.7.v is missing", id="v"),
        pytest.param({"tensors": {"o": ZEROS}}, "tensor o belongs", id="another"),
        pytest.param({"tensors": {"layers.0.q": ZEROS[:3]}}, "do not belong together",
                     id="heads"),
        pytest.param({"tensors": {"layers.0.q": ZEROS[0]}}, "not \\[heads, tokens",
                     id="dimensions"),
        pytest.param({"tensors": {"layers.0.q": ZEROS[:, :0]}}, "not \\[heads, tokens",
                     id="empty"),
        pytest.param({"tensors": {"layers.7.q": ZEROS[:2]}}, "other shapes than layer 0",
                     id="layers differ"),
        pytest.param({"tensors": {"layers.0.q": ZEROS.astype(np.float64)}},
                     "has dtype float64", id="f64"),
        pytest.param({"tensors": {"layers.0.q": ZEROS.astype(np.float16)}},
                     "different dtypes", id="mixed dtypes"),
        pytest.param({"tensors": {"layers.7.k": NAN}}, "holds NaN", id="nan"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_capture_is_refused_by_name(tmp_path, change, message):
    path = changed(tmp_path / "bad.safetensors", **change)
    with pytest.raises(CaptureError, match=message) as caught:
        captures.read(path)
    assert str(caught.value).startswith(str(path))


def test_any_damage_is_a_capture_error_or_another_capture(tmp_path):
    path = tmp_path / "heads.safetensors"
    small(tokens=2).write(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(11)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(0, header))] = int(rng.integers(0, 256))
        path.write_bytes(bytes(damaged[: int(rng.integers(header, len(whole) + 1))]))
        try:
            captures.read(path)
        except CaptureError:
            continue


# ---- commands


def test_the_commands_capture_heads_and_attend_to_a_layer(server, tmp_path, capsys):
    tokens, path = tmp_path / "tokens.json", tmp_path / "heads.safetensors"
    tokens.write_text(json.dumps(PROMPT))
    flags = ["--server", server.target]
    asked = ["--tokens", str(tokens), "--layers", "1", "--output", str(path)]
    assert main(["capture", *flags, *asked]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["layers"], line["tokens"]) == ("1", str(len(PROMPT)))
    words = ["--input", str(path), "--layer", "1", "--method", "pbs"]
    assert main(["attend", *flags, *words, "--coverage-rows", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["coverage"] > 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layer 3", "layer 3 was not captured; layers 0, 7 were"),
        ("--layer 7 --use-order --method pbs", "leave out --layer"),
        ("", "has no tensor q"),
    ],
)
def test_attend_refuses_what_a_capture_does_not_hold(tmp_path, capsys, words, message):
    path = tmp_path / "heads.safetensors"
    small().write(path)
    command = ["attend", "--server", "127.0.0.1:1", "--input", str(path)]
    assert main([*command, *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_layers_must_be_a_list_of_numbers(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["capture", "--tokens", "t", "--layers", "1,x", "--output", "o"])
    assert caught.value.code == 2
    assert "is not a list of layers such as 0,5,10" in capsys.readouterr().err


def test_a_capture_that_exceeds_the_budget_is_refused_and_nothing_stays():
    flags = ["--model", f"recall={RECALL_MODEL}"]
    with running_server(*flags) as server, pbs_client.Client(server.target) as client:
        need = client.prefill("recall", PROMPT, "dense").stats.planned_bytes
    budget = ["--set", f"admission.memory_bytes_max={need + 1000}"]
    with running_server(*flags, *budget) as server:
        with pbs_client.Client(server.target) as client:
            for _ in range(3):
                with pytest.raises(
                    pbs_client.InvalidArgumentError, match="more than memory_bytes_max"
                ):
                    client.capture("recall", PROMPT, [0, 1])
            assert client.prefill("recall", PROMPT, "dense").first_token >= 0
