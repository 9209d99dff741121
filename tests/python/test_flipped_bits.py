"""No bit that changes on the way of a cache makes a wrong cache: every bit is tried."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import grpc
import pbs_client
import pytest
from fake_server import fake_server, forward, replies
from kv_chunks import EPOCH, Cache
from pbs_client import Client, KvPart, PbsError, _messages, _wire
from pbs_client._kv_receiver import KvReceiver, KvShape
from pbs_client.kv import Span
from real_server import RECALL_MODEL, program

KvDescriptor = _messages.KvDescriptor
DESCRIBE = "/pbs.v1.KvSource/Describe"
FETCH = "/pbs.v1.KvSource/Fetch"
RENEW = "/pbs.v1.KvSource/Renew"
PROMPT = [0, *range(16, 20)]
LAYERS, HEADS, TOKENS, DIM = 2, 2, 3, 4


def with_one_bit_flipped(message: bytes) -> Iterator[bytes]:
    for place in range(8 * len(message)):
        changed = bytearray(message)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)


def bytes_of(k, v) -> list[bytes]:
    return [array.tobytes() for array in (*k, *v)]


@pytest.mark.parametrize("at", range(2 * LAYERS * HEADS))
def test_a_flipped_bit_of_a_chunk_is_refused_or_changes_no_byte(at):
    cache = Cache.random(LAYERS, HEADS, TOKENS, DIM)
    expected = bytes_of(*([a[kind] for a in cache.arrays] for kind in "KV"))
    shape = KvShape(
        layers=Span(0, LAYERS),
        tokens=Span(0, TOKENS),
        heads=Span(0, HEADS),
        head_dim=DIM,
        dtype=cache.arrays[0]["K"].dtype,
        layout="HND",
        epoch=EPOCH,
        checksums=True,
    )
    messages = [
        chunk.SerializeToString() for chunk in cache.chunks(tokens_per_chunk=TOKENS)
    ]
    refused = 0
    for changed in with_one_bit_flipped(messages[at]):
        receiver = KvReceiver(shape)
        try:
            for message in (*messages[:at], changed, *messages[at + 1 :]):
                receiver.add(_wire.decode_kv_chunk(message))
            assert bytes_of(*receiver.finish()) == expected
        except pbs_client.CorruptDataError:
            refused += 1
    assert refused >= 8 * TOKENS * DIM * 4  # each bit of the payload


@pytest.fixture(scope="module")
def held(server) -> Iterator[tuple[str, bytes, list[bytes], pbs_client.KvTicket]]:
    """A lease, its description on the wire, and the bytes of its cache."""
    with Client(server.target) as client:
        ticket = client.prefill("recall", PROMPT, "dense", delivery="lease").ticket
        cache = client.fetch(ticket)
        with grpc.insecure_channel(server.target) as channel:
            described = channel.unary_unary(DESCRIBE)(
                ticket.to_message().SerializeToString()
            )
        yield server.target, described, bytes_of(cache.k, cache.v), ticket
        client.release(ticket)


PARTS = {"of_the_whole": None, "of_a_layer": KvPart(layers=(1, 1))}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_flipped_bit_of_a_description_is_refused_or_changes_no_byte(held, part):
    target, described, whole, ticket = held
    expected = whole if part is None else [whole[1], whole[3]]
    replies = with_one_bit_flipped(described)

    def describe(requests, _):
        list(requests)
        yield next(replies)

    refused = 0
    with grpc.insecure_channel(target) as channel:
        handlers = {method: forward(channel, method) for method in (FETCH, RENEW)}
        with (
            fake_server({**handlers, DESCRIBE: describe}) as between,
            Client(between, follow_endpoints=False) as client,
        ):
            for _ in range(8 * len(described)):
                try:
                    cache = client.fetch(ticket, part=part, resumes=0, timeout=30)
                except PbsError:
                    refused += 1
                    continue
                assert bytes_of(cache.k, cache.v) == expected
                assert cache.prompt_tokens == len(PROMPT)
    assert refused > 0


def test_pbs_decode_refuses_a_description_with_too_few_layers(held, tmp_path):
    target, described, _, ticket = held
    path = tmp_path / "ticket.json"
    path.write_text(ticket.to_json())
    changed = KvDescriptor.FromString(described)
    changed.num_layers = 1  # of 2
    with grpc.insecure_channel(target) as channel:
        methods = (FETCH, RENEW, "/pbs.v1.Prefill/ListModels")
        handlers = {method: forward(channel, method) for method in methods}
        with fake_server({**handlers, DESCRIBE: replies(changed)}) as between:
            command = [program("pbs-decode"), "--server", between, "--ticket", path]
            command += ["--model-path", RECALL_MODEL, "--max-new-tokens", "1"]
            command += ["--ignore-endpoint", "--keep-lease", "--json"]
            done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, json.loads(done.stdout)["tokens"]
    assert "DATA_LOSS" in done.stderr
