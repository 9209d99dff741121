"""The client believes no reply: whatever is out of place is corrupt data."""

from __future__ import annotations

import json

import grpc
import numpy as np
import pbs_client
import pytest
from fake_server import fake_server, replies
from kv_chunks import EPOCH, Cache
from pbs_client import Client, Given, _messages

AttendRequest = _messages._message_class("pbs.v1.AttendRequest")
AttendResponse = _messages._message_class("pbs.v1.AttendResponse")
PrefillEvent = _messages._message_class("pbs.v1.PrefillEvent")
Q, K, V, O, LSE = 1, 2, 3, 4, 5  # noqa: E741 - the contract's names

ATTEND = "/pbs.v1.Attention/Attend"
PREFILL = "/pbs.v1.Prefill/Prefill"
DESCRIBE = "/pbs.v1.KvSource/Describe"
FETCH = "/pbs.v1.KvSource/Fetch"

# ---- Attend

HEADER = AttendResponse(
    header={"tensors": [{"tensor": "O", "dtype": "F32", "shape": [1, 1, 2, 4]}]}
)
STATS = AttendResponse(stats={"density": 1.0, "method_run": "DENSE"})


def chunk(offset: int, size: int, tensor: str = "O"):
    return AttendResponse(
        chunk={"tensor": tensor, "offset": offset, "data": b"\x01" * size}
    )


def spec(**changes):
    fields = {"tensor": "O", "dtype": "F32", "shape": [1, 1, 2, 4], **changes}
    return AttendResponse(header={"tensors": [fields]})


def attend(client: Client, **arguments):
    array = np.ones((1, 1, 2, 4), np.float32)
    return client.attend(array, array, array, **arguments)


def test_a_whole_reply_becomes_arrays_and_stats():
    handlers = {ATTEND: replies(HEADER, chunk(0, 16), chunk(16, 16), STATS)}
    with fake_server(handlers) as target, Client(target) as client:
        result = attend(client)
    assert result.o.tobytes() == b"\x01" * 32
    assert result.stats.density == 1.0
    assert result.stats.method_run == "dense"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        pytest.param([], "without header or stats", id="nothing"),
        pytest.param([HEADER, chunk(0, 32)], "without header or stats", id="no stats"),
        pytest.param([STATS], "without header or stats", id="no header"),
        pytest.param([HEADER, STATS], "O has 0 of 32 bytes", id="no chunks"),
        pytest.param([HEADER, chunk(0, 16), STATS], "16 of 32", id="a lost end"),
        pytest.param([HEADER, chunk(16, 16), STATS], "where byte 0", id="a gap"),
        pytest.param([HEADER, chunk(0, 16), chunk(8, 16)], "byte 16", id="an overlap"),
        pytest.param([HEADER, chunk(0, 33)], "33 bytes", id="past the end"),
        pytest.param([HEADER, chunk(0, 0)], "0 bytes", id="an empty chunk"),
        pytest.param(
            [HEADER, chunk(0, 4, "LSE")], "not announced", id="unasked tensor"
        ),
        pytest.param([chunk(0, 4)], "not announced", id="chunk before header"),
        pytest.param([HEADER, HEADER], "unexpected member 1", id="two headers"),
        pytest.param([HEADER, chunk(0, 32), STATS, STATS], "goes on", id="two stats"),
        pytest.param([b""], "member 0", id="an empty message"),
        pytest.param([b"\x0a\x05a"], "malformed", id="a malformed message"),
        pytest.param([b"\x0a\x02\x0a\x05"], "malformed", id="a malformed header"),
        pytest.param([spec(tensor="Q")], "unasked", id="q in the reply"),
        pytest.param([spec(tensor=77)], "unasked", id="an unknown tensor"),
        pytest.param([spec(dtype="BF16")], "bfloat16", id="another dtype"),
        pytest.param([spec(dtype=99)], "dtype None", id="an unknown dtype"),
        pytest.param([spec(shape=[1, 1, 2, 8])], "1, 1, 2, 8", id="another shape"),
        pytest.param([spec(shape=[1 << 60])], "1152921504606846976", id="a huge shape"),
        pytest.param(
            [AttendResponse(header={})], "does not announce O", id="o missing"
        ),
    ],
)
def test_an_attend_reply_that_is_out_of_place_is_corrupt(messages, message):
    handlers = {ATTEND: replies(*messages)}
    with (
        fake_server(handlers) as target,
        Client(target) as client,
        pytest.raises(pbs_client.CorruptDataError, match=message),
    ):
        attend(client)


def test_uploads_are_cut_into_chunks_that_ascend_without_gaps():
    received = []

    def handle(requests, _):
        received.extend(AttendRequest.FromString(r) for r in requests)
        yield HEADER.SerializeToString()
        yield chunk(0, 32).SerializeToString()
        yield STATS.SerializeToString()

    q, k, v = (np.full((1, 1, 2, 4), n, np.float32) for n in (1, 2, 3))
    with (
        fake_server({ATTEND: handle}) as target,
        Client(target, chunk_bytes=12) as client,
    ):
        client.attend(q, k, v, request_id="a test")
    header, *chunks = received
    assert header.header.request_id == "a test"
    assert [(s.tensor, s.dtype, list(s.shape)) for s in header.header.tensors] == [
        (tensor, 1, [1, 1, 2, 4]) for tensor in (Q, K, V)
    ]
    for tensor, array in ((Q, q), (K, k), (V, v)):
        own = [c.chunk for c in chunks if c.chunk.tensor == tensor]
        assert [c.offset for c in own] == [0, 12, 24]
        assert b"".join(c.data for c in own) == array.tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"want": ("p",)}, "want 'p'", id="unknown result"),
        pytest.param(
            {"given": Given(order=np.zeros((1, 1, 2)))},
            "method pbs",
            id="order, no pbs",
        ),
        pytest.param(
            {"given": Given(order=np.zeros((1, 1, 2))), "method": "pbs"},
            "float64",
            id="order of floats",
        ),
        pytest.param(
            {"given": Given(order=np.full(2, 1 << 40)), "method": "pbs"},
            "int32",
            id="order beyond int32",
        ),
        pytest.param(
            {
                "given": Given(block_mask=np.ones((1, 1, 1, 1), bool)),
                "method": "dense",
            },
            "need a method of pbs, mean_pooling",
            id="mask for dense",
        ),
        pytest.param(
            {"packed": pbs_client.Packed([0, 2])}, "total, head_dim", id="packed but 4-d"
        ),
    ],
)
def test_what_cannot_be_sent_is_refused_before_any_traffic(arguments, message):
    with Client("127.0.0.1:1") as client, pytest.raises(ValueError, match=message):
        attend(client, **arguments)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        pytest.param([(2, 4)] * 3, "fff", r"q has shape \[2, 4\]", id="2-d"),
        pytest.param([(1, 2, 4)] * 3, "fff", "need cu_seqlens", id="3-d"),
        pytest.param(
            [(1, 1, 2, 4), (1, 1, 2, 4), (1, 1, 3, 4)], "fff", "v has shape", id="v"
        ),
        pytest.param([(1, 1, 2, 4)] * 3, "ffe", "float16", id="mixed dtypes"),
        pytest.param([(1, 1, 2, 4)] * 3, "ddd", "float64 cannot be sent", id="f64"),
        pytest.param(
            [(1, 1, 3, 4), (1, 1, 2, 4), (1, 1, 2, 4)], "fff", "q_len 3", id="q_len"
        ),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(shapes, dtypes, message):
    arrays = [np.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes)]
    with Client("127.0.0.1:1") as client, pytest.raises(ValueError, match=message):
        client.attend(*arrays, pbs_client.Dense(), want=("block_mask",))


# ---- Prefill

DONE = PrefillEvent(done={"first_token_id": 7, "stats": {"prompt_tokens": 3}})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        pytest.param([], "without `done`", id="nothing"),
        pytest.param([DONE, DONE], "goes on after", id="two ends"),
        pytest.param([PrefillEvent(kv={"layer": 1})], "member 3", id="unasked kv"),
        pytest.param([b""], "member 0", id="an empty event"),
        pytest.param(
            [PrefillEvent(done={"last_token_logits": b"abc"})], "3 bytes", id="logits"
        ),
    ],
)
def test_a_prefill_stream_that_is_out_of_place_is_corrupt(messages, message):
    with (
        fake_server({PREFILL: replies(*messages)}) as target,
        Client(target) as client,
        pytest.raises(pbs_client.CorruptDataError, match=message),
    ):
        client.prefill("m", [1, 2, 3])


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        pytest.param([[1]], ValueError, "2 dimensions", id="2-d"),
        pytest.param([1.5], TypeError, "float64", id="floats"),
        pytest.param([1, -1], ValueError, "token -1 at position 1", id="negative"),
        pytest.param([1 << 32], ValueError, "4294967296 at position 0", id="too large"),
    ],
)
def test_tokens_that_are_no_ids_are_refused_before_any_traffic(tokens, error, message):
    with Client("127.0.0.1:1") as client, pytest.raises(error, match=message):
        client.prefill("m", tokens)


@pytest.mark.parametrize("delivery", ["push", "", 1, pbs_client.Lease])
def test_another_delivery_is_refused_with_a_sentence(delivery):
    sentence = "is not one of 'none', 'inline', 'lease', nor Inline"
    with Client("127.0.0.1:1") as client, pytest.raises(ValueError, match=sentence):
        client.prefill("m", [1], delivery=delivery)


# ---- Fetch

LAYERS, HEADS, TOKENS, DIM = 3, 2, 5, 4
TICKET = pbs_client.KvTicket("0" * 32, EPOCH, "m", "exact")
DESCRIPTOR = _messages.KvDescriptor(
    lease={"ticket": TICKET.to_message(), "ttl_seconds": 60},
    num_layers=LAYERS,
    num_kv_heads=HEADS,
    head_dim=DIM,
    num_tokens=TOKENS,
    dtype="F32",
    bytes=2 * LAYERS * HEADS * TOKENS * DIM * 4,
    state="COMPLETE",
    first_token_id=9,
)


def breaking_fetch(cache: Cache, chunks_before_break: int, requests_seen: list):
    """Serves `cache` but cuts the connection after that many chunks, every time."""

    def handle(requests, context):
        (request,) = [_messages.FetchRequest.FromString(r) for r in requests]
        requests_seen.append(request)
        chunks = cache.chunks(first_layer=request.layer_begin)
        for count, made in enumerate(chunks):
            if count == chunks_before_break:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
            yield made.SerializeToString()

    return {DESCRIBE: replies(DESCRIPTOR), FETCH: handle}


def test_a_fetch_goes_on_at_the_layer_where_the_connection_broke():
    cache, seen = Cache.random(LAYERS, HEADS, TOKENS, DIM), []
    with (
        fake_server(breaking_fetch(cache, 10, seen)) as target,
        Client(target) as client,
    ):
        kv = client.fetch(TICKET, resumes=3)
    assert [(r.layer_begin, r.layer_count) for r in seen] == [(0, 3), (1, 2), (2, 1)]
    for layer, arrays in enumerate(cache.arrays):
        np.testing.assert_array_equal(kv.k[layer], arrays["K"])
        np.testing.assert_array_equal(kv.v[layer], arrays["V"])
    assert kv.first_token == 9


def test_a_fetch_gives_up_after_the_resumes_it_was_given():
    cache, seen = Cache.random(LAYERS, HEADS, TOKENS, DIM), []
    with (
        fake_server(breaking_fetch(cache, 1, seen)) as target,
        Client(target) as client,
        pytest.raises(pbs_client.UnavailableError, match="connection broke"),
    ):
        client.fetch(TICKET, resumes=2)
    assert len(seen) == 3


def test_a_corrupt_chunk_is_not_fetched_again_but_refused():
    chunks = list(Cache.random(LAYERS, HEADS, TOKENS, DIM).chunks())
    chunks[5].payload = bytes(len(chunks[5].payload))
    handlers = {DESCRIBE: replies(DESCRIPTOR), FETCH: replies(*chunks)}
    with (
        fake_server(handlers) as target,
        Client(target) as client,
        pytest.raises(pbs_client.CorruptDataError, match="KV layer 0 V") as caught,
    ):
        client.fetch(TICKET)
    assert (caught.value.layer, caught.value.kind) == (0, "V")


def test_a_fetch_that_ends_early_is_corrupt():
    chunks = list(Cache.random(LAYERS, HEADS, TOKENS, DIM).chunks())
    handlers = {DESCRIBE: replies(DESCRIPTOR), FETCH: replies(*chunks[:-1])}
    with (
        fake_server(handlers) as target,
        Client(target) as client,
        pytest.raises(pbs_client.CorruptDataError, match=r"layer 2 V .* ended before"),
    ):
        client.fetch(TICKET)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("head_dim", -1),
        ("num_tokens", 0),
        ("dtype", 4),
        ("bytes", 0),
        ("bytes", 2 * LAYERS * HEADS * TOKENS * DIM * 4 - 1),
    ],
)
def test_an_absurd_descriptor_is_corrupt(field, value):
    absurd = _messages.KvDescriptor()
    absurd.CopyFrom(DESCRIPTOR)
    setattr(absurd, field, value)
    with (
        fake_server({DESCRIBE: replies(absurd)}) as target,
        Client(target) as client,
        pytest.raises(pbs_client.CorruptDataError, match=field),
    ):
        client.fetch(TICKET)


@pytest.mark.parametrize(
    "ranges",
    [{"layers": (0, 4)}, {"tokens": (5, 1)}, {"heads": (-1, 1)}, {"heads": (0, 0)}],
    ids=str,
)
def test_a_range_outside_the_cache_is_refused(ranges):
    with (
        fake_server({DESCRIBE: replies(DESCRIPTOR)}) as target,
        Client(target) as client,
        pytest.raises(ValueError, match="are not inside"),
    ):
        client.fetch(TICKET, part=pbs_client.KvPart(**ranges))


def test_a_ticket_survives_json():
    assert pbs_client.KvTicket.from_json(TICKET.to_json()) == TICKET


def test_a_tickets_epoch_is_a_string_in_json():
    assert json.loads(TICKET.to_json())["epoch"] == str(EPOCH)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[]", id="a list"),
        pytest.param("{}", id="an empty object"),
        pytest.param("{", id="no JSON"),
        pytest.param(TICKET.to_json().replace('"0', '0, "x": "0'), id="an extra field"),
        pytest.param(TICKET.to_json().replace(f'"{EPOCH}"', "5"), id="a number"),
        pytest.param(TICKET.to_json().replace(str(EPOCH), "-1"), id="a negative epoch"),
        pytest.param(TICKET.to_json().replace(str(EPOCH), str(1 << 64)), id="65 bits"),
    ],
)
def test_text_that_is_no_ticket_is_refused(text):
    with pytest.raises(ValueError, match=r"ticket|Expecting"):
        pbs_client.KvTicket.from_json(text)
