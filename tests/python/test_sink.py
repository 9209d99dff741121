"""KvSink: what it accepts, what it refuses, and what is left after that."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pbs_client
import pytest
from eventually import WAIT_SECONDS_MAX, until
from fake_server import fake_server
from kv_chunks import EPOCH, Cache
from pbs_client import Client, KvSink, PbsError, Push, _messages
from push_world import (
    MODEL,
    RECEIVE,
    bytes_of,
    holds_nothing,
    inline,
    prompt,
)

LAYERS, HEADS, TOKENS, DIM = 2, 2, 3, 4
BYTES = 2 * LAYERS * HEADS * TOKENS * DIM * 4
DTYPES = _messages.enum_numbers("DType")
LAYOUTS = _messages.enum_numbers("KvLayout")


def header(**changes) -> bytes:
    """The first message of a push of CACHE."""
    shape = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM}
    shape.update({name: changes.pop(name) for name in shape if name in changes})
    fields = {
        "transfer_id": "0123456789abcdef" * 2,
        "model": "m",
        "model_digest": "xxh3-128:1",
        "sparsity_digest": "exact",
        "shape": {**shape, "dtype": DTYPES["F32"]},
        "num_tokens": TOKENS,
        "epoch": EPOCH,
        "dtype": DTYPES["F32"],
        "layout": LAYOUTS["HND"],
        "page_tokens": 1,
        "checksums": True,
        "bytes": BYTES,
    }
    message = _messages.KvChunk(push_header={**fields, **changes})
    return bytes(message.SerializeToString())


def messages(cache: Cache | None = None) -> list[bytes]:
    """A whole push."""
    cache = cache or Cache.random(LAYERS, HEADS, TOKENS, DIM)
    return [header(), *(chunk.SerializeToString() for chunk in cache.chunks())]


def send(sink: KvSink, sent: Iterator[bytes] | list[bytes]) -> tuple[str, str, list]:
    """Code, message and acknowledgements of a push of raw messages."""
    acks = []
    with grpc.insecure_channel(sink.target) as channel:
        try:
            for ack in channel.stream_stream(RECEIVE)(iter(sent)):
                acks.append(_messages.KvAck.FromString(ack))
        except grpc.RpcError as error:
            return error.code().name, error.details(), acks
    return "OK", "", acks


@pytest.fixture
def failures() -> list[PbsError]:
    return []


@pytest.fixture
def sink(failures) -> Iterator[KvSink]:
    with KvSink("127.0.0.1:0", on_failure=lambda _, error: failures.append(error)) as one:
        yield one


# ---- the protocol of the sink's side


def test_every_chunk_is_acknowledged_with_a_whole_window(sink):
    code, _, acks = send(sink, messages())
    received = [ack.bytes_received for ack in acks]
    assert code == "OK"
    assert received == sorted(set(received))
    assert (received[0], received[-1]) == (0, BYTES)
    assert {ack.credit_bytes for ack in acks} == {16 << 20}
    assert {ack.handle for ack in acks} == {"0123456789abcdef" * 2}


def test_a_cache_is_handed_over_with_its_header(sink):
    cache = Cache.random(LAYERS, HEADS, TOKENS, DIM)
    assert send(sink, messages(cache))[0] == "OK"
    pushed = sink.take(WAIT_SECONDS_MAX)
    assert [array.tobytes() for array in pushed.cache.k] == [
        arrays["K"].tobytes() for arrays in cache.arrays
    ]
    assert [array.tobytes() for array in pushed.cache.v] == [
        arrays["V"].tobytes() for arrays in cache.arrays
    ]
    assert (pushed.header.num_layers, pushed.header.bytes) == (LAYERS, BYTES)
    assert (pushed.header.layout, pushed.header.model) == ("HND", "m")


def chunk_with(at: int, **changes) -> list[bytes]:
    """A push with one changed message."""
    sent = messages()
    chunk = _messages.KvChunk.FromString(sent[at])
    for name, value in changes.items():
        setattr(chunk, name, value)
    return [*sent[:at], chunk.SerializeToString(), *sent[at + 1 :]]


def with_header(**changes) -> list[bytes]:
    return [header(**changes), *messages()[1:]]


WITH_PAYLOAD = _messages.KvChunk.FromString(header())
WITH_PAYLOAD.payload = b"x"

BAD_PUSHES = {
    # messages, a part of what is said
    "nothing": ([], "has no push_header"),
    "no_header": (messages()[1:], "not a push_header alone"),
    "header_with_payload": (
        [WITH_PAYLOAD.SerializeToString(), *messages()[1:]],
        "not a push_header alone",
    ),
    "garbage": ([b"\xff" * 9], "malformed KvChunk"),
    "no_transfer_id": (with_header(transfer_id=""), "transfer_id is not 32 hex digits"),
    "no_layers": (with_header(num_layers=0), "num_layers is 0"),
    "negative_heads": (with_header(num_kv_heads=-2), "num_kv_heads is -2"),
    "no_head_dim": (with_header(head_dim=0), "head_dim is 0"),
    "no_tokens": (with_header(num_tokens=0), "num_tokens is 0"),
    "unknown_dtype": (with_header(dtype=77), "unknown dtype 77"),
    "integer_dtype": (with_header(dtype=DTYPES["I32"]), "unknown dtype"),
    "unknown_layout": (with_header(layout=9), "unknown layout 9"),
    "no_layout": (with_header(layout=0), "unknown layout 0"),
    "too_few_bytes": (with_header(bytes=BYTES - 4), f"its sizes make {BYTES}"),
    "too_many_bytes": (with_header(bytes=1 << 60), f"its sizes make {BYTES}"),
    "another_length": (with_header(num_tokens=TOKENS + 1), "its sizes make"),
    "only_a_header": (messages()[:1], "ended before this byte"),
    "the_last_chunk_missing": (messages()[:-1], "ended before this byte"),
    "the_first_chunk_missing": (
        [messages()[0], *messages()[2:]],
        "layer 0 K at byte 0",
    ),
    "a_chunk_twice": ([*messages()[:2], *messages()[1:]], "byte_offset is 0"),
    "a_chunk_after_the_last": ([*messages(), messages()[-1]], "after the last one"),
    "another_epoch": (chunk_with(2, ticket_epoch=7), "ticket_epoch is 7"),
    "another_crc": (chunk_with(1, crc32c=7), "not 0x00000007"),
    "another_digest": (chunk_with(len(messages()) - 1, layer_digest=7), "layer digest"),
}


@pytest.mark.parametrize(("sent", "part"), BAD_PUSHES.values(), ids=BAD_PUSHES)
def test_a_push_with_a_fault_is_refused_and_leaves_nothing(sink, failures, sent, part):
    code, message, _ = send(sink, sent)
    assert (code, part in message) == ("DATA_LOSS", True), message
    assert [error.code.name for error in failures] == ["DATA_LOSS"]
    with pytest.raises(pbs_client.DeadlineExceededError):
        sink.take(timeout=0)
    assert sink._bytes == 0
    assert send(sink, messages())[0] == "OK"


def test_a_header_without_checksums_takes_chunks_without_them(sink):
    cache = Cache.random(LAYERS, HEADS, TOKENS, DIM)
    bare = [chunk.SerializeToString() for chunk in cache.chunks(checksums=False)]
    assert send(sink, [header(checksums=False), *bare])[0] == "OK"
    assert send(sink, [header(), *bare])[:2] == (
        "DATA_LOSS",
        "KV layer 0 K at byte 0: the chunk has no crc32c",
    )


# ---- limits


def test_bytes_beyond_the_limit_are_refused_by_name():
    with KvSink("127.0.0.1:0", bytes_max=BYTES - 1) as sink:
        code, message, _ = send(sink, messages())
    assert code == "RESOURCE_EXHAUSTED"
    assert message == (
        f"bytes {BYTES} beside 0 of other caches exceed bytes_max {BYTES - 1}"
    )


def test_a_cache_counts_until_it_is_taken():
    with KvSink("127.0.0.1:0", bytes_max=2 * BYTES - 1) as sink:
        assert send(sink, messages())[0] == "OK"
        code, message, _ = send(sink, messages())
        assert (code, f"beside {BYTES} of" in message) == ("RESOURCE_EXHAUSTED", True)
        sink.take(WAIT_SECONDS_MAX)
        assert send(sink, messages())[0] == "OK"


def test_more_pushes_at_once_than_allowed_are_refused_by_name():
    inside, leave = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        leave.wait(WAIT_SECONDS_MAX)

    with (
        KvSink("127.0.0.1:0", pushes_max=1, on_layer=wait) as sink,
        ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(send, sink, messages())
        assert inside.wait(WAIT_SECONDS_MAX)
        code, message, _ = send(sink, messages())
        leave.set()
        assert first.result()[0] == "OK"
        assert (code, message) == (
            "RESOURCE_EXHAUSTED",
            "1 pushes are under way, pushes_max 1",
        )
        assert send(sink, messages())[0] == "OK"


def test_a_push_that_stops_is_ended(failures):
    stop = threading.Event()

    def stops() -> Iterator[bytes]:
        yield from messages()[:2]
        stop.wait(WAIT_SECONDS_MAX)

    with KvSink(
        "127.0.0.1:0",
        stall_seconds_max=0.2,
        on_failure=lambda _, error: failures.append(error),
    ) as sink:
        code, message, acks = send(sink, stops())
        stop.set()
        assert (code, message) == (
            "DEADLINE_EXCEEDED",
            "nothing came for stall_seconds_max 0.2 s",
        )
        assert len(acks) == 2 and sink._bytes == 0
        assert failures[0].message == message


def test_a_push_of_another_model_is_refused():
    with KvSink("127.0.0.1:0", model_digest="xxh3-128:2") as sink:
        code, message, _ = send(sink, messages())
    assert code == "FAILED_PRECONDITION"
    assert message == "model_digest xxh3-128:1 is not xxh3-128:2"


def test_a_callback_that_raises_fails_its_push_alone(failures):
    def raises(_, layer, k, v):
        raise KeyError("a secret")

    with KvSink("127.0.0.1:0", on_layer=raises) as sink:
        code, message, _ = send(sink, messages())
        assert (code, message) == ("UNKNOWN", "on_layer failed: KeyError")
        assert sink._bytes == sink._pushes == 0


BAD_ARGUMENTS = {
    "no_port": (("127.0.0.1",), {}, ValueError, "is not HOST:PORT"),
    "no_number": (("127.0.0.1:x",), {}, ValueError, "is not HOST:PORT"),
    "high_port": (("127.0.0.1:65536",), {}, ValueError, "is not HOST:PORT"),
    "no_bytes": (("127.0.0.1:0",), {"bytes_max": 0}, ValueError, "bytes_max 0 is below"),
    "no_credit": (("127.0.0.1:0",), {"credit_bytes": 0}, ValueError, "credit_bytes 0"),
    "no_pushes": (("127.0.0.1:0",), {"pushes_max": 0}, ValueError, "pushes_max 0"),
    "text": (("127.0.0.1:0",), {"bytes_max": "8"}, TypeError, "bytes_max '8'"),
    "time": (("127.0.0.1:0",), {"stall_seconds_max": -1}, ValueError, "timeout -1"),
    "foreign_address": (("203.0.113.7:50070",), {}, OSError, "cannot listen at"),
}


@pytest.mark.parametrize(
    ("words", "options", "error", "part"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS
)
def test_a_wrong_argument_is_refused(words, options, error, part):
    with pytest.raises(error, match=part):
        KvSink(*words, **options)


def test_an_address_that_is_taken_is_an_error():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="cannot listen at"),
    ):
        KvSink(f"127.0.0.1:{taken.getsockname()[1]}")


# ---- taking


def test_iteration_gives_the_caches_until_the_sink_is_closed(sink):
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(p.header.model for p in sink))
    reader.start()
    for _ in range(3):
        assert send(sink, messages())[0] == "OK"
    until(lambda: len(found) == 3)
    sink.close()
    reader.join(WAIT_SECONDS_MAX)
    assert found == ["m"] * 3
    with pytest.raises(pbs_client.CallCancelledError):
        sink.take()
    sink.close()


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1"])
def test_a_wrong_timeout_of_take_is_refused(sink, timeout):
    with pytest.raises(ValueError, match="is not a number of seconds"):
        sink.take(timeout)


# ---- between a real server and a real sink


@contextlib.contextmanager
def disturbed(target: str, sink: KvSink, disturb) -> Iterator[None]:
    """A proxy at the target before the sink; `disturb` changes the messages."""
    with grpc.insecure_channel(
        sink.target, options=[("grpc.max_receive_message_length", -1)]
    ) as channel:

        def passes(requests, context):
            try:
                yield from channel.stream_stream(RECEIVE)(disturb(requests))
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())

        with fake_server({RECEIVE: passes}, target):
            yield


def pushed(client: Client, target: str, tokens) -> str:
    """OK, or the code and message of a push."""
    delivery = Push(target, chunk_bytes=65536)
    try:
        client.prefill(MODEL, tokens, "dense", delivery=delivery)
    except PbsError as error:
        return f"{error.code.name} {error.message}"
    return "OK"


@pytest.mark.parametrize("seed", range(12))
def test_a_bit_flipped_on_the_way_is_reported_and_fails_the_prefill(
    pushing, target, sink, failures, seed
):
    chance, tokens = random.Random(seed), prompt(2000)
    at = chance.randrange(1, 20)

    def flip(requests: Iterator[bytes]) -> Iterator[bytes]:
        for index, message in enumerate(requests):
            if index == at:
                changed = bytearray(message)
                place = chance.randrange(100, len(message))  # in the payload
                changed[place] ^= 1 << chance.randrange(8)
                message = bytes(changed)
            yield message

    with Client(pushing.target) as client:
        with disturbed(target, sink, flip):
            said = pushed(client, target, tokens)
        assert said.startswith(f"DATA_LOSS push to {target}: DATA_LOSS: KV layer "), (
            f"seed {seed}: {said}"
        )
        assert "crc32c is" in said
        assert [error.code.name for error in failures] == ["DATA_LOSS"]
        until(lambda: holds_nothing(pushing))
        with disturbed(target, sink, lambda requests: requests):
            until(lambda: pushed(client, target, tokens) == "OK")
        assert bytes_of(sink.take(WAIT_SECONDS_MAX).cache) == inline(client, tokens)


@pytest.mark.parametrize("seed", range(12))
def test_a_bit_flipped_in_the_header_makes_no_other_cache(pushing, target, sink, seed):
    chance, tokens = random.Random(seed), prompt(300)

    def flip(requests: Iterator[bytes]) -> Iterator[bytes]:
        changed = bytearray(next(requests))
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        yield bytes(changed)
        yield from requests

    with Client(pushing.target) as client:
        with disturbed(target, sink, flip):
            said = pushed(client, target, tokens)
        if said == "OK":  # a text that nothing depends on
            assert bytes_of(sink.take(WAIT_SECONDS_MAX).cache) == inline(client, tokens)
        else:
            code = said.partition(" ")[0]
            # The server sees a changed transfer_id in the acknowledgements.
            assert code in ("DATA_LOSS", "FAILED_PRECONDITION", "UNAVAILABLE"), (
                f"seed {seed}: {said}"
            )
        until(lambda: holds_nothing(pushing))


def test_a_lost_message_fails_the_prefill(pushing, target, sink):
    def lose(requests: Iterator[bytes]) -> Iterator[bytes]:
        for index, message in enumerate(requests):
            if index != 3:
                yield message

    with Client(pushing.target) as client, disturbed(target, sink, lose):
        said = pushed(client, target, prompt(2000))
    assert said.startswith("DATA_LOSS"), said
    until(lambda: holds_nothing(pushing))


def test_a_sink_that_is_closed_ends_the_pushes_under_way(pushing, target):
    inside, closed = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        closed.wait(WAIT_SECONDS_MAX)

    sink = KvSink(target, on_layer=wait)
    with Client(pushing.target) as client, ThreadPoolExecutor() as pool:
        running = pool.submit(pushed, client, target, prompt(2000))
        assert inside.wait(WAIT_SECONDS_MAX)
        closer = pool.submit(sink.close)
        said = running.result(WAIT_SECONDS_MAX)
        closed.set()
        closer.result(WAIT_SECONDS_MAX)
    assert said.startswith(f"UNAVAILABLE push to {target}: "), said
    until(lambda: holds_nothing(pushing))
