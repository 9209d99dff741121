"""Prefill and the hand-off of KV caches, on the real server with the bundled model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading

import grpc
import ml_dtypes
import numpy as np
import pbs_client
import pytest
from fake_server import fake_server
from pbs_client import (
    Attention,
    Client,
    Dense,
    KvFormat,
    KvPart,
    Lease,
    Logits,
    Pbs,
    _messages,
    safetensors_file,
)
from pbs_client.cli import main
from pbs_client.kv_params import prompt_digest
from real_server import RECALL_MODEL

KvChunk = _messages._message_class("pbs.v1.KvChunk")
LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY = 2, 2, 64, 1024
PROMPT = json.loads((RECALL_MODEL / "prompt_8k.json").read_text())[:1500]
SPARSE = Pbs(threshold=0.7)


@pytest.fixture
def lease(client):
    """A leased cache of PROMPT: its ticket."""
    ticket = client.prefill("recall", PROMPT, SPARSE, delivery="lease").ticket
    yield ticket
    with contextlib.suppress(pbs_client.NotFoundError):
        client.release(ticket)


def assert_same_arrays(actual, expected) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        np.testing.assert_array_equal(one, other)


def test_the_server_says_what_it_is(client):
    info = client.info()
    assert info.protocol_version == "1.1"
    assert "pbs" in info.methods
    assert info.backends[0].name == "cpu"
    assert info.limits.tokens_max > 0
    (model,) = client.models()
    assert (model.name, model.architecture) == ("recall", "llama")
    assert (model.num_layers, model.num_kv_heads, model.head_dim) == (2, 2, 64)
    assert model.vocab_size == VOCABULARY


def test_health_knows_the_server_and_its_liveness(client):
    client.wait_until_serving(timeout=10)
    assert client.health() == "SERVING"
    assert client.health("liveness") == "SERVING"
    with pytest.raises(pbs_client.NotFoundError):
        client.health("no such service")


def test_a_prefill_returns_the_next_token_and_what_it_did(client):
    seen = []
    result = client.prefill(
        "recall",
        np.array(PROMPT, np.uint16),
        Attention(SPARSE, dense_fallback=False),
        logits=Logits(top=5, positions=[0, 700], all_of_last_token=True),
        on_layer=seen.append,
    )
    assert [layer.index for layer in seen] == [0, 1]
    assert result.last_token_logits.shape == (VOCABULARY,)
    best = np.argsort(-result.last_token_logits, kind="stable")[:5]
    assert [logit.token_id for logit in result.top_logits] == best.tolist()
    assert result.first_token == best[0]
    assert [p.position for p in result.positions] == [0, 700]
    assert all(len(p.top) == 5 for p in result.positions)
    assert result.kv is None
    assert result.ticket is None
    stats = result.stats
    assert stats.prompt_tokens == len(PROMPT)
    assert stats.layer_method == ("pbs", "pbs")
    assert stats.density == pytest.approx(np.mean(stats.layer_density))
    assert [layer.density for layer in seen] == list(stats.layer_density)
    assert stats.stages.attend > 0


def test_the_log_probabilities_are_those_of_the_logits(client):
    asked = Logits(top=3, all_of_last_token=True)
    result = client.prefill("recall", PROMPT, Dense(), logits=asked)
    logits = result.last_token_logits.astype(np.float64)
    log_sum = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
    for best in result.top_logits:
        assert best.log_probability == pytest.approx(
            logits[best.token_id] - log_sum, abs=1e-4
        )


@pytest.mark.parametrize("method", [Dense(), SPARSE], ids=["dense", "pbs"])
def test_an_inline_cache_equals_a_fetched_one(client, method):
    inline = client.prefill("recall", PROMPT, method, delivery="inline")
    ticket = client.prefill("recall", PROMPT, method, delivery="lease").ticket
    fetched = client.fetch(ticket)
    client.release(ticket)
    assert fetched.k[0].shape == (KV_HEADS, len(PROMPT), HEAD_DIM)
    assert fetched.num_layers == LAYERS
    assert_same_arrays(inline.kv.k, fetched.k)
    assert_same_arrays(inline.kv.v, fetched.v)
    assert inline.kv.model_digest == fetched.model_digest != ""
    assert inline.kv.sparsity_digest == fetched.sparsity_digest
    assert (fetched.sparsity_digest == "exact") == isinstance(method, Dense)
    assert fetched.first_token == inline.first_token == inline.kv.first_token


def test_a_cache_may_be_fetched_in_parts_that_make_the_whole(client, lease):
    whole = client.fetch(lease)
    part = client.fetch(lease, part=KvPart((1, 1), (100, 50), (1, 1)))
    assert part.k[0].shape == (1, 50, HEAD_DIM)
    np.testing.assert_array_equal(part.k[0], whole.k[1][1:, 100:150])
    np.testing.assert_array_equal(part.v[0], whole.v[1][1:, 100:150])
    assert list(part.tensors()) == ["layers.1.k", "layers.1.v"]


def test_a_cache_may_be_fetched_token_by_token(client, lease):
    whole = client.fetch(lease)
    nhd = KvFormat(layout="NHD")
    turned = client.fetch(lease, kv_format=nhd)
    assert_same_arrays([k.transpose(1, 0, 2) for k in turned.k], whole.k)
    part = client.fetch(lease, part=KvPart(heads=(1, 1), tokens=(3, 7)), kv_format=nhd)
    np.testing.assert_array_equal(part.v[1], turned.v[1][3:10, 1:])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("f32", np.float32), ("f16", np.float16), ("bf16", ml_dtypes.bfloat16)],
)
def test_the_server_converts_to_the_asked_dtype(client, lease, name, dtype):
    held = client.fetch(lease)
    converted = client.fetch(lease, kv_format=KvFormat(name))
    assert converted.dtype == dtype
    assert_same_arrays(converted.k, [k.astype(dtype) for k in held.k])


def test_each_layer_is_handed_over_as_it_arrives(client, lease):
    seen = []
    cache = client.fetch(lease, on_layer=lambda layer, k, v: seen.append((layer, k, v)))
    assert [layer for layer, _, _ in seen] == [0, 1]
    assert seen[1][2] is cache.v[1]


def test_a_fetch_may_follow_the_prefill(client):
    fetched, threads = [], []

    def follow(admitted, ticket):
        assert admitted.queue_position >= 0
        thread = threading.Thread(target=lambda: fetched.append(client.fetch(ticket)))
        threads.append(thread)
        thread.start()

    result = client.prefill(
        "recall", PROMPT, SPARSE, delivery="lease", on_admitted=follow
    )
    threads[0].join()
    assert_same_arrays(fetched[0].k, client.fetch(result.ticket).k)
    client.release(result.ticket)


def test_a_lease_is_described_and_renewed(client, lease):
    described = client.describe(lease)
    assert described.complete
    assert described.ticket == lease
    assert (described.num_layers, described.layers_ready) == (LAYERS, LAYERS)
    assert (described.num_kv_heads, described.head_dim) == (KV_HEADS, HEAD_DIM)
    assert described.num_tokens == len(PROMPT)
    assert described.prompt_digest == prompt_digest(PROMPT)
    rows = LAYERS * KV_HEADS * len(PROMPT)
    assert described.bytes == 2 * rows * HEAD_DIM * described.dtype.itemsize
    renewed = client.renew(lease, 300)
    assert renewed.ttl_seconds == 300
    assert renewed.expires_unix_seconds > described.expires_unix_seconds


def test_a_released_ticket_is_unknown_to_every_call(client, lease):
    client.release(lease)
    for use in (client.describe, client.fetch, client.renew, client.release):
        with pytest.raises(pbs_client.NotFoundError):
            use(lease)


@pytest.mark.parametrize(
    "change", [{"handle": "0" * 32}, {"epoch": 1}], ids=["handle", "epoch"]
)
def test_a_foreign_ticket_is_unknown(client, lease, change):
    with pytest.raises(pbs_client.NotFoundError):
        client.describe(dataclasses.replace(lease, **change))


def test_a_ticket_of_another_model_or_method_is_refused(client, lease):
    for digest in ("model_digest", "sparsity_digest"):
        with pytest.raises(pbs_client.FailedPreconditionError):
            client.describe(dataclasses.replace(lease, **{digest: "other"}))


def test_equal_idempotency_keys_name_one_cache(client):
    keyed = Lease(idempotency_key="a test's key")
    first = client.prefill("recall", PROMPT, SPARSE, delivery=keyed)
    second = client.prefill("recall", PROMPT, SPARSE, delivery=keyed)
    assert first.ticket == second.ticket
    client.release(first.ticket)


REFUSED = [
    ("no tokens", "recall", [], pbs_client.InvalidArgumentError, "token_ids"),
    (
        "a token past the vocabulary",
        "recall",
        [1024],
        pbs_client.InvalidArgumentError,
        "vocab_size 1024",
    ),
    ("too many tokens", "recall", [5] * 8193, pbs_client.InvalidArgumentError, "8193"),
    ("an unknown model", "gpt", [1], pbs_client.NotFoundError, "gpt"),
]


@pytest.mark.parametrize(
    ("model", "tokens", "error", "message"),
    [pytest.param(*case[1:], id=case[0]) for case in REFUSED],
)
@pytest.mark.parametrize("delivery", [None, "inline", "lease"])
def test_a_refusal_names_the_value_and_the_server_goes_on(
    client, model, tokens, error, message, delivery
):
    with pytest.raises(error, match=message):
        client.prefill(model, tokens, delivery=delivery)
    assert client.health() == "SERVING"


# ---- faults between the real server and the client

FETCH = "/pbs.v1.KvSource/Fetch"
DESCRIBE = "/pbs.v1.KvSource/Describe"


@contextlib.contextmanager
def spoiling_proxy(target: str, spoil):
    """Stands before the real server; `spoil(index, chunk)` may change a chunk."""
    with grpc.insecure_channel(target) as channel:

        def describe(requests, _):
            (request,) = requests
            yield channel.unary_unary(DESCRIBE)(request)

        def fetch(requests, _):
            (request,) = requests
            for index, data in enumerate(channel.unary_stream(FETCH)(request)):
                chunk = KvChunk.FromString(data)
                spoil(index, chunk)
                yield chunk.SerializeToString()

        with fake_server({DESCRIBE: describe, FETCH: fetch}) as proxy:
            yield proxy


def test_a_proxy_that_changes_nothing_goes_unnoticed(server, client, lease):
    with spoiling_proxy(server.target, lambda *_: None) as proxy, Client(proxy, follow_endpoints=False) as far:
        assert_same_arrays(far.fetch(lease).v, client.fetch(lease).v)


def flip_a_bit_of_v(_, chunk) -> None:
    if chunk.kind == KvChunk.V and chunk.layer == 1 and chunk.byte_offset == 0:
        chunk.payload = chunk.payload[:77] + b"\x55" + chunk.payload[78:]


def test_a_corrupted_v_chunk_is_refused_with_its_place(server, lease):
    with (
        spoiling_proxy(server.target, flip_a_bit_of_v) as proxy,
        Client(proxy, follow_endpoints=False) as far,
        pytest.raises(pbs_client.CorruptDataError, match="crc32c is") as caught,
    ):
        far.fetch(lease)
    assert (caught.value.layer, caught.value.kind, caught.value.offset) == (1, "V", 0)


def test_without_checksums_the_corruption_comes_through(server, client, lease):
    with spoiling_proxy(server.target, flip_a_bit_of_v) as proxy, Client(proxy, follow_endpoints=False) as far:
        spoiled = far.fetch(lease, kv_format=KvFormat(checksums=False))
    whole = client.fetch(lease)
    assert_same_arrays(spoiled.k, whole.k)
    assert not np.array_equal(spoiled.v[1], whole.v[1])


# ---- the console script


@pytest.fixture
def tokens_file(tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(PROMPT))
    return str(path)


def run_script(capsys, server, *words) -> dict:
    capsys.readouterr()
    assert main([words[0], "--server", server.target, *words[1:]]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_script_prints_info_and_models(capsys, server):
    assert run_script(capsys, server, "info")["protocol_version"] == "1.1"
    assert run_script(capsys, server, "models")["name"] == "recall"


@pytest.mark.parametrize("leased", [False, True], ids=["inline", "leased"])
def test_the_script_prefills_and_writes_the_cache(
    capsys, server, client, tokens_file, tmp_path, leased
):
    out = tmp_path / "kv.safetensors"
    line = run_script(
        capsys,
        server,
        *("prefill", "--model", "recall", "--tokens", tokens_file),
        *("--method", "pbs", "--threshold", "0.7", "--kv", str(out)),
        *(["--lease"] if leased else []),
    )
    expected = client.prefill("recall", PROMPT, SPARSE, delivery="inline")
    assert line["first_token"] == expected.first_token
    assert line["top_logits"][0]["token_id"] == expected.first_token
    assert line["density"] == pytest.approx(expected.stats.density)
    assert [layer["index"] for layer in line["layers"]] == [0, 1]
    assert line["stages"]["attend"] > 0
    assert line["planned_bytes"] >= expected.stats.planned_bytes
    written = safetensors_file.read(out)
    assert written.keys() == expected.kv.tensors().keys()
    for name, array in expected.kv.tensors().items():
        np.testing.assert_array_equal(written[name], array)
    if leased:
        ticket = pbs_client.KvTicket.from_json(json.dumps(line["ticket"]))
        assert client.describe(ticket).complete
        client.release(ticket)
    else:
        assert line["ticket"] is None


def test_the_script_says_what_the_server_refused(capsys, server, tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text("[1, 5000]")
    assert main(["prefill", "--server", server.target, "--tokens", str(path)]) == 3
    error = capsys.readouterr().err
    assert "token_ids[1] is not below vocab_size 1024" in error
    assert error.count("\n") == 1
