"""Encodes and decodes chunks in protobuf's wire format without protobuf's copies.

A sent chunk is its few small fields joined with the payload. Of a received chunk the
fields are parsed, and the payload stays a view of the received bytes. The decoder reads
all that a protobuf peer may send: fields in any order, unknown fields, a repeated
member of a oneof (equal members merge, else the last wins).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple, Union

from google.protobuf.message import DecodeError

from pbs_client.errors import CorruptDataError

Buffer = Union[bytes, memoryview]
FieldValue = Union[int, memoryview]

_VARINT, _FIXED64, _LENGTH, _START_GROUP, _END_GROUP, _FIXED32 = range(6)
_GROUP_DEPTH_MAX = 64

# AttendRequest.chunk and its fields.
_REQUEST_CHUNK_TAG = 2 << 3 | _LENGTH
_TENSOR_TAG = 1 << 3 | _VARINT
_OFFSET_TAG = 2 << 3 | _VARINT
_DATA_TAG = 15 << 3 | _LENGTH
_REQUEST_HEADER_TAG = 1 << 3 | _LENGTH


class TensorChunk(NamedTuple):
    """pbs.v1.TensorChunk."""

    tensor: int
    offset: int
    data: memoryview


class KvChunk(NamedTuple):
    """pbs.v1.KvChunk. `crc32c` and `layer_digest` are None when absent."""

    ticket_epoch: int
    layer: int
    kind: int
    token_begin: int
    token_count: int
    head_begin: int
    head_count: int
    dtype: int
    layout: int
    byte_offset: int
    crc32c: int | None
    layer_digest: int | None
    payload: memoryview
    scales: memoryview = memoryview(b"")
    region_offset: int = 0


def encode_attend_header(header: bytes) -> bytes:
    """AttendRequest around a serialized AttendHeader."""
    return b"".join((_prefix(_REQUEST_HEADER_TAG, len(header)), header))


def encode_attend_chunk(tensor: int, offset: int, data: memoryview) -> bytes:
    """AttendRequest around TensorChunk {tensor, offset, data}; copies `data` once."""
    fields = bytearray()
    _append_varint(fields, _TENSOR_TAG, tensor)
    _append_varint(fields, _OFFSET_TAG, offset)
    if data.nbytes:
        fields += _prefix(_DATA_TAG, data.nbytes)
    outer = _prefix(_REQUEST_CHUNK_TAG, len(fields) + data.nbytes)
    return b"".join((outer, fields, data))


def encode_string(field: int, value: str) -> bytes:
    """A message whose only field is a string."""
    text = value.encode()
    return _prefix(field << 3 | _LENGTH, len(text)) + text if text else b""


def parse(message_class: Any, data: Buffer) -> Any:
    """Parses `data` as a message of a class. CorruptDataError when it is not one."""
    try:
        return message_class.FromString(bytes(data))
    except DecodeError as error:
        name = message_class.DESCRIPTOR.name
        raise CorruptDataError(f"malformed {name}: {error}") from None


def decode_oneof(buffer: Buffer, name: str) -> tuple[int, memoryview]:
    """The set member of a message whose only field is a oneof of messages.

    Returns:
        (field number, the member's bytes); (0, empty) when no member is set.

    Raises:
        CorruptDataError: `buffer` is not a message; the error contains `name`.
    """
    member = 0
    parts: list[memoryview] = []
    for field, wire_type, value in _fields(memoryview(buffer), name):
        if wire_type != _LENGTH:
            continue
        assert isinstance(value, memoryview)
        if field != member:
            member, parts = field, []
        parts.append(value)
    if len(parts) == 1:
        return member, parts[0]
    return member, memoryview(b"".join(parts))  # equal members merge


def decode_tensor_chunk(buffer: Buffer) -> TensorChunk:
    """Reads a TensorChunk. CorruptDataError when it is not one."""
    numbers = {1: 0, 2: 0}
    data = memoryview(b"")
    for field, wire_type, value in _fields(memoryview(buffer), "TensorChunk"):
        if isinstance(value, memoryview):
            if field == 15:
                data = value
        elif wire_type == _VARINT and field in numbers:
            numbers[field] = value
    return TensorChunk(_int32(numbers[1]), numbers[2], data)


# KvChunk: field number -> wire type of the numeric fields.
_KV_WIRE_TYPES = {
    1: _FIXED64,
    **dict.fromkeys(range(2, 11), _VARINT),
    11: _FIXED32,
    12: _FIXED32,
    14: _VARINT,
}


def decode_kv_chunk(buffer: Buffer) -> KvChunk:
    """Reads a KvChunk. CorruptDataError when it is not one."""
    numbers: dict[int, int] = {}
    payload = scales = memoryview(b"")
    for field, wire_type, value in _fields(memoryview(buffer), "KvChunk"):
        if isinstance(value, memoryview):
            if field == 15:
                payload = value
            elif field == 13:
                scales = value
        elif _KV_WIRE_TYPES.get(field) == wire_type:
            numbers[field] = value
    return KvChunk(
        ticket_epoch=numbers.get(1, 0),
        layer=_int32(numbers.get(2, 0)),
        kind=_int32(numbers.get(3, 0)),
        token_begin=_int32(numbers.get(4, 0)),
        token_count=_int32(numbers.get(5, 0)),
        head_begin=_int32(numbers.get(6, 0)),
        head_count=_int32(numbers.get(7, 0)),
        dtype=_int32(numbers.get(8, 0)),
        layout=_int32(numbers.get(9, 0)),
        byte_offset=numbers.get(10, 0),
        crc32c=numbers.get(11),
        layer_digest=numbers.get(12),
        payload=payload,
        scales=scales,
        region_offset=numbers.get(14, 0),
    )


def decode_varint_field(buffer: Buffer, field: int, name: str) -> int:
    """The varint field `field` of a message; 0 when absent."""
    result = 0
    for number, wire_type, value in _fields(memoryview(buffer), name):
        if number == field and wire_type == _VARINT:
            assert isinstance(value, int)
            result = value
    return result


def _append_varint(out: bytearray, tag: int, value: int) -> None:
    if value:  # proto3: a field without presence is absent at 0
        out.append(tag)
        out += _varint(value)


def _prefix(tag: int, length: int) -> bytes:
    return bytes((tag,)) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _int32(value: int) -> int:
    """The int32 in a varint: its low 32 bits, signed."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


class _MalformedError(Exception):
    """Internal: the bytes are not a message."""


def _fields(data: memoryview, name: str) -> Iterator[tuple[int, int, FieldValue]]:
    """Yields (field number, wire type, value) of every field; groups are skipped."""
    pos, end = 0, len(data)
    try:
        while pos < end:
            tag, pos = _read_tag(data, pos)
            field, wire_type = tag >> 3, tag & 7
            if wire_type == _START_GROUP:
                pos = _skip_group(data, pos, field, _GROUP_DEPTH_MAX)
                continue
            value, pos = _read_value(data, pos, wire_type)
            yield field, wire_type, value
    except _MalformedError:
        raise CorruptDataError(
            f"malformed {name} of {end} bytes near byte {pos}"
        ) from None


def _read_tag(data: memoryview, pos: int) -> tuple[int, int]:
    tag, pos = _read_varint(data, pos)
    if tag >> 32 or tag >> 3 == 0:
        raise _MalformedError
    return tag, pos


def _read_varint(data: memoryview, pos: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if pos >= len(data):
            raise _MalformedError
        byte = data[pos]
        pos += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result & 0xFFFFFFFFFFFFFFFF, pos
    raise _MalformedError


def _read_value(data: memoryview, pos: int, wire_type: int) -> tuple[FieldValue, int]:
    if wire_type == _VARINT:
        return _read_varint(data, pos)
    if wire_type == _LENGTH:
        length, pos = _read_varint(data, pos)
        if length > len(data) - pos:
            raise _MalformedError
        return data[pos : pos + length], pos + length
    if wire_type == _FIXED64 and len(data) - pos >= 8:
        return struct.unpack_from("<Q", data, pos)[0], pos + 8
    if wire_type == _FIXED32 and len(data) - pos >= 4:
        return struct.unpack_from("<I", data, pos)[0], pos + 4
    raise _MalformedError  # truncated; a stray end of a group; wire type 6 or 7


def _skip_group(data: memoryview, pos: int, group: int, depth_left: int) -> int:
    if depth_left == 0:
        raise _MalformedError
    while True:
        tag, pos = _read_tag(data, pos)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == _END_GROUP:
            if field != group:
                raise _MalformedError
            return pos
        if wire_type == _START_GROUP:
            pos = _skip_group(data, pos, field, depth_left - 1)
        else:
            _, pos = _read_value(data, pos, wire_type)
