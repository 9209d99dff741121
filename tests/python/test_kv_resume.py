"""A broken fetch goes on at the first row that is missing, and no row comes twice."""

from __future__ import annotations

import json
import random

import grpc
import numpy as np
import pytest
from cutting_relay import cutting_relay
from kv_chunks import EPOCH, Cache
from pbs_client import (
    Client,
    KvFormat,
    KvPart,
    Lease,
    Pbs,
    _kv_transfer,
    _messages,
    _wire,
)
from pbs_client._kv_receiver import KvReceiver, KvShape
from pbs_client.errors import CorruptDataError
from pbs_client.kv import Span
from real_server import RECALL_MODEL

FETCH = "/pbs.v1.KvSource/Fetch"
LAYERS, HEADS, TOKENS, DIM = 2, 3, 8, 4
PROMPT = json.loads((RECALL_MODEL / "prompt_8k.json").read_text())[:1200]
KvChunk = _messages._message_class("pbs.v1.KvChunk")


def shape(layout: str) -> KvShape:
    return KvShape(
        layers=Span(0, LAYERS),
        tokens=Span(0, TOKENS),
        heads=Span(0, HEADS),
        head_dim=DIM,
        dtype=np.dtype(np.float32),
        layout=layout,
        epoch=EPOCH,
        checksums=True,
    )


def chunks_of(cache: Cache, layout: str, step: int):
    return [
        _wire.decode_kv_chunk(chunk.SerializeToString())
        for chunk in cache.chunks(tokens_per_chunk=step, layout=layout)
    ]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_the_place_is_that_of_the_next_chunk_wherever_a_stream_breaks(layout):
    cache = Cache.random(LAYERS, HEADS, TOKENS, DIM)
    chunks = chunks_of(cache, layout, 3)
    for cut, coming in enumerate(chunks):
        receiver = KvReceiver(shape(layout))
        for chunk in chunks[:cut]:
            receiver.add(chunk)
        receiver.resume()
        assert receiver.next_layer == coming.layer
        place = receiver.place
        if place is None:
            assert (coming.kind, coming.byte_offset) == (KvChunk.K, 0)
        else:
            found = (KvChunk.Kind.Value(place.kind), place.head, place.token)
            assert found == (coming.kind, coming.head_begin, coming.token_begin)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_server_that_does_not_know_resume_begins_the_layer_again(layout):
    cache = Cache.random(LAYERS, HEADS, TOKENS, DIM)
    chunks = chunks_of(cache, layout, 3)
    per_layer = len(chunks) // LAYERS
    for cut in range(len(chunks)):
        receiver = KvReceiver(shape(layout))
        for chunk in chunks[:cut]:
            receiver.add(chunk)
        receiver.resume()
        for chunk in chunks[receiver.next_layer * per_layer :]:
            receiver.add(chunk)
        k, _ = receiver.finish()
        order = (1, 0, 2) if layout == "NHD" else (0, 1, 2)
        np.testing.assert_array_equal(k[1], cache.arrays[1]["K"].transpose(order))


def test_only_the_first_chunk_after_a_break_may_begin_the_layer_again():
    chunks = chunks_of(Cache.random(LAYERS, HEADS, TOKENS, DIM), "HND", 3)
    receiver = KvReceiver(shape("HND"))
    for chunk in chunks[:4]:
        receiver.add(chunk)
    with pytest.raises(CorruptDataError, match="byte_offset is 0"):
        receiver.add(chunks[0])
    receiver.resume()
    with pytest.raises(CorruptDataError, match="byte_offset is"):
        receiver.add(chunks[2])


# ---- the real server


@pytest.fixture(scope="module")
def ticket(server):
    with Client(server.target) as client:
        leased = client.prefill("recall", PROMPT, Pbs(), delivery="lease")
        yield leased.ticket
        client.release(leased.ticket)


FORMATS = {
    "HND as held": KvFormat(),
    "HND f16": KvFormat("f16"),
    "NHD": KvFormat(layout="NHD"),
    "NHD, pages of 16": KvFormat(layout="NHD", page_tokens=16),
    "f8_e4m3": KvFormat(wire_dtype="f8_e4m3"),
    "f8_e4m3 NHD, pages of 128": KvFormat(
        layout="NHD", wire_dtype="f8_e4m3", page_tokens=128
    ),
}


@pytest.mark.parametrize("kv_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_a_connection_cut_anywhere_repeats_no_chunk_that_had_come(
    server, client, ticket, monkeypatch, kv_format, seed
):
    part = KvPart(tokens=(3, 1150), heads=(0, 2))
    whole = client.fetch(ticket, part=part, kv_format=kv_format)
    came = []  # bytes of the payload of each chunk

    def decode(data):
        chunk = _wire_decode(data)
        came.append(chunk.payload.nbytes)
        return chunk

    _wire_decode = _wire.decode_kv_chunk
    monkeypatch.setattr(_kv_transfer._wire, "decode_kv_chunk", decode)
    draw = random.Random(seed)
    elements = whole.nbytes // whole.dtype.itemsize
    element_bytes = 1 if kv_format.wire_dtype else whole.dtype.itemsize
    total = elements * element_bytes
    cuts = [draw.randrange(1000, total * 2 // 3)]
    done = []
    with (
        cutting_relay(server.target, cuts) as relay,
        Client(relay.target, follow_endpoints=False) as far,
    ):
        pieces = far.fetch(
            ticket,
            part=part,
            kv_format=kv_format,
            progress=lambda _, have, __: done.append(have),
        )
        assert relay.connections == 2, f"seed {seed}, cut at {cuts}"
    assert done == sorted(set(done)), "what had come was discarded"
    assert sum(came) == total, f"seed {seed}, cut at {cuts}"
    for one, other in zip(pieces.k + pieces.v, whole.k + whole.v):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_broken_fetch_of_queries_goes_on_too(server, client, layout):
    lease = Lease(capture_query_layers=(1,))
    ticket = client.prefill("recall", PROMPT, "dense", delivery=lease).ticket
    kv_format = KvFormat(layout=layout)
    whole = client.fetch_queries(ticket, 1, kv_format=kv_format)
    done = []
    with (
        cutting_relay(server.target, [whole.nbytes // 2]) as relay,
        Client(relay.target, follow_endpoints=False) as far,
    ):
        pieces = far.fetch_queries(
            ticket,
            1,
            kv_format=kv_format,
            progress=lambda _, have, __: done.append(have),
        )
        assert relay.connections == 2
    client.release(ticket)
    assert done == sorted(set(done)), "what had come was discarded"
    np.testing.assert_array_equal(pieces, whole)


def fetch_from(target: str, ticket, **fields) -> list:
    request = _messages.FetchRequest(ticket=ticket.to_message(), **fields)
    with grpc.insecure_channel(target) as channel:
        stream = channel.unary_stream(FETCH)(request.SerializeToString())
        return [KvChunk.FromString(data) for data in stream]


def test_a_resumed_stream_has_what_is_missing_and_its_own_digest(server, ticket):
    whole = fetch_from(server.target, ticket, chunk_bytes=65536, page_tokens=16)
    first = next(c for c in whole if c.kind == KvChunk.V and c.token_begin > 0)
    place = {"kind": "V", "head": first.head_begin, "token": first.token_begin + 5}
    rest = fetch_from(
        server.target, ticket, chunk_bytes=65536, page_tokens=16, resume=place
    )
    begun = rest[0]
    assert (begun.layer, begun.kind) == (0, KvChunk.V)
    assert (begun.head_begin, begun.token_begin) == (place["head"], place["token"])
    assert (begun.token_begin + begun.token_count) % 16 == 0 or (
        begun.token_begin + begun.token_count == len(PROMPT)
    )
    row = len(first.payload) // first.token_count
    assert begun.byte_offset == first.byte_offset + 5 * row
    assert len(rest[0].payload) + begun.byte_offset <= len(PROMPT) * 2 * row
    data = {(layer, kind): b"" for layer in (0, 1) for kind in (1, 2)}
    again = dict(data)
    for chunk in whole:
        data[chunk.layer, chunk.kind] += chunk.payload
    for chunk in rest:
        again[chunk.layer, chunk.kind] += chunk.payload
    assert again[0, KvChunk.K] == b""
    assert again[0, KvChunk.V] == data[0, KvChunk.V][begun.byte_offset :]
    assert again[1, KvChunk.K] == data[1, KvChunk.K]
    assert again[1, KvChunk.V] == data[1, KvChunk.V]


REFUSED = {
    "a head before the range": ({"head": 0}, "resume.head 0 is outside"),
    "a token past the end": ({"token": 1200}, "resume.token 1200 is outside"),
    "a kind of queries": ({"kind": "Q"}, "resume.kind 3 is not one of K (1), V (2)"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_place_outside_the_range_is_refused_by_name(server, ticket, change, message):
    place = {"kind": "K", "head": 1, "token": 0, **change}
    with pytest.raises(grpc.RpcError) as caught:
        fetch_from(server.target, ticket, head_begin=1, resume=place)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.details()
