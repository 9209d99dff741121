"""A KV transfer is stored exactly, or refused with layer, kind and offset."""

from __future__ import annotations

import numpy as np
import pytest
from kv_chunks import EPOCH, Cache
from pbs_client import _wire
from pbs_client._kv_receiver import KvReceiver, KvShape
from pbs_client.errors import CorruptDataError
from pbs_client.kv import Span

LAYERS, HEADS, TOKENS, DIM = 2, 3, 8, 4
ROW = DIM * 4


def shape(**changes) -> KvShape:
    fields = {
        "layers": Span(0, LAYERS),
        "tokens": Span(0, TOKENS),
        "heads": Span(0, HEADS),
        "head_dim": DIM,
        "dtype": np.dtype(np.float32),
        "layout": "HND",
        "epoch": EPOCH,
        "checksums": True,
    }
    return KvShape(**{**fields, **changes})


def receive(receiver: KvReceiver, chunks):
    for chunk in chunks:
        receiver.add(_wire.decode_kv_chunk(chunk.SerializeToString()))
    return receiver.finish()


@pytest.fixture
def cache() -> Cache:
    return Cache.random(LAYERS, HEADS, TOKENS, DIM)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("tokens_per_chunk", [1, 3, 8])
@pytest.mark.parametrize("checksums", [True, False])
def test_whole_caches_arrive_as_they_were(cache, layout, tokens_per_chunk, checksums):
    receiver = KvReceiver(shape(layout=layout, checksums=checksums))
    k, v = receive(
        receiver,
        cache.chunks(
            tokens_per_chunk=tokens_per_chunk, layout=layout, checksums=checksums
        ),
    )
    for layer, arrays in enumerate(cache.arrays):
        for kind, received in (("K", k[layer]), ("V", v[layer])):
            expected = arrays[kind]
            if layout == "NHD":
                expected = expected.transpose(1, 0, 2)
            np.testing.assert_array_equal(received, expected)


def test_one_chunk_may_hold_all_heads(cache):
    def merged(kind):
        return [c for c in chunks if c.kind == {"K": 1, "V": 2}[kind]]

    chunks = list(Cache(cache.arrays[:1]).chunks(tokens_per_chunk=TOKENS))
    whole = []
    for kind in "KV":
        first, *rest = merged(kind)
        first.head_count = HEADS
        first.payload += b"".join(c.payload for c in rest)
        whole.append(first)
    receiver = KvReceiver(shape(layers=Span(0, 1), checksums=False))
    k, _ = receive(receiver, whole)
    np.testing.assert_array_equal(k[0], cache.arrays[0]["K"])


def test_each_layer_is_announced_when_it_is_whole(cache):
    seen = []
    receiver = KvReceiver(shape(), lambda layer, k, v: seen.append((layer, k, v)))
    chunks = list(cache.chunks(tokens_per_chunk=TOKENS))
    half = len(chunks) // 2
    for chunk in chunks[:half]:
        assert not seen
        receiver.add(_wire.decode_kv_chunk(chunk.SerializeToString()))
    assert [layer for layer, _, _ in seen] == [0]
    np.testing.assert_array_equal(seen[0][2], cache.arrays[0]["V"])
    receive(receiver, chunks[half:])
    assert [layer for layer, _, _ in seen] == [0, 1]


def test_received_bytes_climb_to_the_total(cache):
    seen = []
    receiver = KvReceiver(
        shape(), on_bytes=lambda done, total: seen.append((done, total))
    )
    receive(receiver, cache.chunks())
    total = 2 * LAYERS * HEADS * TOKENS * ROW
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


def test_a_broken_transfer_resumes_at_the_first_layer_that_is_not_whole(cache):
    receiver = KvReceiver(shape())
    chunks = list(cache.chunks())
    for chunk in chunks[: len(chunks) * 3 // 4]:
        receiver.add(_wire.decode_kv_chunk(chunk.SerializeToString()))
    assert receiver.next_layer == 1
    receiver.restart_layer()
    _, v = receive(receiver, cache.chunks(first_layer=1))
    np.testing.assert_array_equal(v[0], cache.arrays[0]["V"])
    np.testing.assert_array_equal(v[1], cache.arrays[1]["V"])


def _flip_payload(chunks, at):
    payload = bytearray(chunks[at].payload)
    payload[5] ^= 1
    chunks[at].payload = bytes(payload)


def _set(**fields):
    def change(chunks, at):
        for name, value in fields.items():
            setattr(chunks[at], name, value)

    return change


def _drop(chunks, at):
    del chunks[at]


def _repeat(chunks, at):
    chunks.insert(at, chunks[at])


def _swap(chunks, at):
    chunks[at], chunks[at + 1] = chunks[at + 1], chunks[at]


def _overlap(chunks, at):
    chunks[at].byte_offset -= ROW
    chunks[at].token_begin -= 1


def _clear(name):
    return lambda chunks, at: chunks[at].ClearField(name)


def _grow(chunks, at):
    chunks[at].payload += bytes(2 * ROW)


# HND with 3 tokens a chunk: 3 chunks a head, 9 an array, 18 a layer.
FAULTS = [
    ("a flipped bit", _flip_payload, 10, 0, "V", ROW * 3, "crc32c is"),
    ("another crc", _set(crc32c=1), 0, 0, "K", 0, "not 0x00000001"),
    ("no crc", _clear("crc32c"), 0, 0, "K", 0, "no crc32c"),
    ("a lost chunk", _drop, 1, 0, "K", ROW * 3, "byte_offset is"),
    ("a chunk twice", _repeat, 1, 0, "K", ROW * 6, "byte_offset is"),
    ("chunks swapped", _swap, 1, 0, "K", ROW * 3, "byte_offset is"),
    ("an overlap", _overlap, 1, 0, "K", ROW * 3, "byte_offset is"),
    ("another layer", _set(layer=1), 3, 0, "K", ROW * 8, "layer is 1, not 0"),
    ("another kind", _set(kind=2), 2, 0, "K", ROW * 6, "kind is 2, not 1"),
    ("another epoch", _set(ticket_epoch=5), 0, 0, "K", 0, "ticket_epoch is 5"),
    ("another dtype", _set(dtype=3), 0, 0, "K", 0, "dtype is 3, not 1"),
    ("another layout", _set(layout=1), 0, 0, "K", 0, "layout is 1, not 2"),
    ("a wrong token", _set(token_begin=1), 0, 0, "K", 0, "not the bytes it holds"),
    ("a wrong count", _set(token_count=2), 0, 0, "K", 0, "not the bytes it holds"),
    ("a wrong head", _set(head_begin=1), 0, 0, "K", 0, "not the bytes it holds"),
    ("no heads", _set(head_count=0), 0, 0, "K", 0, "not the bytes it holds"),
    ("an empty payload", _set(payload=b""), 18, 1, "K", 0, "has 0 bytes"),
    ("bytes past the end", _grow, 8, 0, "K", ROW * 22, "bytes where"),
    ("a wrong digest", _set(layer_digest=3), 17, 0, "V", ROW * 24, "layer digest is 3"),
    ("no digest", _clear("layer_digest"), 17, 0, "V", ROW * 24, "digest is None"),
    ("a lost end", _drop, 35, 1, "V", ROW * 22, "ended before"),
]


@pytest.mark.parametrize(
    ("change", "at", "layer", "kind", "offset", "message"),
    [pytest.param(*fault[1:], id=fault[0]) for fault in FAULTS],
)
def test_a_fault_is_refused_with_its_place(
    cache, change, at, layer, kind, offset, message
):
    chunks = list(cache.chunks())
    change(chunks, at)
    with pytest.raises(CorruptDataError, match=message) as caught:
        receive(KvReceiver(shape()), chunks)
    assert (caught.value.layer, caught.value.kind, caught.value.offset) == (
        layer,
        kind,
        offset,
    )


def test_a_chunk_after_the_last_one_is_refused(cache):
    chunks = list(cache.chunks())
    with pytest.raises(CorruptDataError, match="after the last"):
        receive(KvReceiver(shape()), [*chunks, chunks[-1]])


def test_a_rectangle_of_part_of_the_heads_needs_all_tokens(cache):
    chunks = list(cache.chunks(tokens_per_chunk=4))
    chunks[0].head_count, chunks[0].token_count = 2, 2  # as many bytes, another place
    with pytest.raises(CorruptDataError, match="not the bytes it holds"):
        receive(KvReceiver(shape()), chunks)
