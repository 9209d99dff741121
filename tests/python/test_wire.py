"""The hand-written codec reads and writes exactly what protobuf does."""

from __future__ import annotations

import random

import pytest
from pbs_client import _messages, _wire
from pbs_client.errors import CorruptDataError

AttendRequest = _messages._message_class("pbs.v1.AttendRequest")
AttendResponse = _messages._message_class("pbs.v1.AttendResponse")
KvChunk = _messages._message_class("pbs.v1.KvChunk")
PrefillEvent = _messages._message_class("pbs.v1.PrefillEvent")
TensorChunk = _messages._message_class("pbs.v1.TensorChunk")

INT32 = (0, 1, -1, 127, 128, 2**31 - 1, -(2**31))
UINT64 = (0, 1, 2**32, 2**63, 2**64 - 1)
UINT32 = (0, 1, 0xDEADBEEF, 2**32 - 1)
PAYLOAD_BYTES = (0, 1, 127, 128, 16_384, 70_000)


def random_kv_chunk(rng: random.Random):
    chunk = KvChunk(
        ticket_epoch=rng.choice(UINT64),
        layer=rng.choice(INT32),
        kind=rng.choice((0, 1, 2, 9)),
        token_begin=rng.choice(INT32),
        token_count=rng.choice(INT32),
        head_begin=rng.choice(INT32),
        head_count=rng.choice(INT32),
        dtype=rng.choice((0, 1, 2, 3, -1)),
        layout=rng.choice((0, 1, 2)),
        byte_offset=rng.choice(UINT64),
        payload=rng.randbytes(rng.choice(PAYLOAD_BYTES)),
    )
    if rng.random() < 0.5:
        chunk.crc32c = rng.choice(UINT32)
    if rng.random() < 0.5:
        chunk.layer_digest = rng.choice(UINT32)
    return chunk


def assert_same_chunk(read: _wire.KvChunk, expected) -> None:
    for name in _wire.KvChunk._fields:
        value = getattr(read, name)
        if name in ("crc32c", "layer_digest"):
            present = expected.HasField(name)
            assert value == (getattr(expected, name) if present else None), name
        else:
            assert value == getattr(expected, name), name


def split_fields(data: bytes) -> list[bytes]:
    """The encoded fields of a message, one by one (no groups)."""
    view, fields, pos = memoryview(data), [], 0
    while pos < len(data):
        begin = pos
        tag, pos = _wire._read_tag(view, pos)
        _, pos = _wire._read_value(view, pos, tag & 7)
        fields.append(data[begin:pos])
    return fields


# One of each wire type, with numbers that no message of pbs.v1 uses; the fourth is a
# group that holds a varint and another group.
UNKNOWN_FIELDS = (
    b"\xa0\x06\x96\x01",
    b"\xa1\x06" + bytes(8),
    b"\xa2\x06\x03abc",
    b"\xa3\x06\x08\x01\xab\x06\xac\x06\xa4\x06",
    b"\xa5\x06" + bytes(4),
)


@pytest.mark.parametrize("seed", range(200))
def test_a_kv_chunk_is_read_as_protobuf_reads_it(seed):
    expected = random_kv_chunk(random.Random(seed))
    assert_same_chunk(_wire.decode_kv_chunk(expected.SerializeToString()), expected)


@pytest.mark.parametrize("seed", range(200))
def test_fields_may_come_in_any_order_among_unknown_ones(seed):
    rng = random.Random(seed)
    expected = random_kv_chunk(rng)
    fields = [*split_fields(expected.SerializeToString()), *UNKNOWN_FIELDS]
    rng.shuffle(fields)
    shuffled = b"".join(fields)
    assert_same_chunk(_wire.decode_kv_chunk(shuffled), KvChunk.FromString(shuffled))


@pytest.mark.parametrize("seed", range(50))
def test_of_a_field_that_comes_twice_the_last_counts(seed):
    rng = random.Random(seed)
    parts = [random_kv_chunk(rng).SerializeToString() for _ in range(2)]
    twice = b"".join(parts)
    assert_same_chunk(_wire.decode_kv_chunk(twice), KvChunk.FromString(twice))


def test_a_known_field_of_another_wire_type_is_ignored():
    odd = b"\x12\x01a" + b"\x78\x05" + b"\x5d" + bytes(4)  # layer, payload, crc32c
    assert_same_chunk(_wire.decode_kv_chunk(odd), KvChunk.FromString(odd))


@pytest.mark.parametrize("seed", range(100))
def test_an_uploaded_chunk_is_encoded_as_protobuf_does(seed):
    rng = random.Random(seed)
    tensor, offset = rng.choice((0, 1, 8)), rng.choice(UINT64)
    data = rng.randbytes(rng.choice(PAYLOAD_BYTES))
    encoded = _wire.encode_attend_chunk(tensor, offset, memoryview(data))
    expected = AttendRequest(chunk={"tensor": tensor, "offset": offset, "data": data})
    assert encoded == expected.SerializeToString()


def test_an_attend_header_is_wrapped_as_protobuf_does():
    header = _messages.AttendHeader(request_id="r" * 200, warmup=3)
    encoded = _wire.encode_attend_header(header.SerializeToString())
    assert encoded == AttendRequest(header=header).SerializeToString()


@pytest.mark.parametrize("seed", range(50))
def test_a_tensor_chunk_of_a_reply_is_read_as_protobuf_reads_it(seed):
    rng = random.Random(seed)
    expected = TensorChunk(
        tensor=rng.choice((0, 4, 99)),
        offset=rng.choice(UINT64),
        data=rng.randbytes(rng.choice(PAYLOAD_BYTES)),
    )
    reply = AttendResponse(chunk=expected).SerializeToString()
    member, body = _wire.decode_oneof(reply, "AttendResponse")
    assert member == 2
    read = _wire.decode_tensor_chunk(body)
    assert (read.tensor, read.offset, read.data) == (
        expected.tensor,
        expected.offset,
        expected.data,
    )


def test_equal_members_of_a_oneof_merge_and_else_the_last_wins():
    layer = PrefillEvent(layer={"index": 3}).SerializeToString()
    density = PrefillEvent(layer={"density": 0.5}).SerializeToString()
    other = PrefillEvent(done={"first_token_id": 7}).SerializeToString()
    for joined in (layer + density, other + layer + density, layer + density + other):
        expected = PrefillEvent.FromString(joined)
        member, body = _wire.decode_oneof(joined, "PrefillEvent")
        name = expected.WhichOneof("event")
        assert PrefillEvent.DESCRIPTOR.fields_by_number[member].name == name
        assert type(getattr(expected, name)).FromString(body.tobytes()) == getattr(
            expected, name
        )


def test_a_message_without_a_member_is_member_zero():
    assert _wire.decode_oneof(b"", "PrefillEvent") == (0, b"")


def test_the_payload_is_a_view_of_what_was_received():
    received = KvChunk(payload=b"x" * 1000).SerializeToString()
    assert _wire.decode_kv_chunk(received).payload.obj is received


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x7a\x05abc", id="payload longer than the message"),
        pytest.param(b"\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", id="huge length"),
        pytest.param(b"\x10", id="tag without value"),
        pytest.param(b"\x10\x80", id="cut varint"),
        pytest.param(b"\x10" + b"\x80" * 10 + b"\x01", id="varint of 11 bytes"),
        pytest.param(b"\x5d\x01\x02", id="cut fixed32"),
        pytest.param(b"\x09\x01\x02", id="cut fixed64"),
        pytest.param(b"\x00\x00", id="field number 0"),
        pytest.param(b"\x16\x00", id="wire type 6"),
        pytest.param(b"\x17\x00", id="wire type 7"),
        pytest.param(b"\xa4\x06", id="end of no group"),
        pytest.param(b"\xa3\x06\x08\x01", id="group without end"),
        pytest.param(b"\xa3\x06\xac\x06", id="end of another group"),
        pytest.param(b"\xa3\x06" * 100, id="groups too deep"),
        pytest.param(b"\x80\x80\x80\x80\x80\x80\x01\x00", id="tag beyond 32 bits"),
    ],
)
def test_malformed_bytes_are_corrupt_data(data):
    for read in (_wire.decode_kv_chunk, _wire.decode_tensor_chunk):
        with pytest.raises(CorruptDataError, match="malformed"):
            read(data)


def test_any_bytes_are_read_or_refused_as_corrupt():
    rng = random.Random(1)
    for _ in range(5000):
        base = bytearray(random_kv_chunk(rng).SerializeToString()[:100])
        for _ in range(rng.randrange(4)):
            if base:
                base[rng.randrange(len(base))] = rng.randrange(256)
        try:
            _wire.decode_kv_chunk(bytes(base))
        except CorruptDataError:
            continue
