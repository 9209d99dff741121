"""Caches that travel as F8_E4M3: within the stated error, in about half the bytes."""

from __future__ import annotations

import json
import struct

import google_crc32c
import grpc
import ml_dtypes
import numpy as np
import pbs_client
import pytest
from kv_chunks import EPOCH
from pbs_client import (
    Client,
    Inline,
    KvFormat,
    KvPart,
    _messages,
    _wire,
    safetensors_file,
)
from pbs_client._kv_receiver import KvReceiver, KvShape
from pbs_client.cli import main
from pbs_client.errors import CorruptDataError
from pbs_client.kv import Span
from real_server import RECALL_MODEL

FETCH = "/pbs.v1.KvSource/Fetch"
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
KvChunk = _messages._message_class("pbs.v1.KvChunk")
PROMPT = json.loads((RECALL_MODEL / "prompt_8k.json").read_text())[:1003]
FP8 = KvFormat(wire_dtype="f8_e4m3")


def scales_of(array: np.ndarray, page: int) -> np.ndarray:
    """The scale of each page of [heads, tokens, dim]: [heads, pages], f32."""
    heads, tokens, _ = array.shape
    magnitude = np.abs(array.astype(np.float32)).max(axis=2)
    starts = range(0, tokens, page)
    return np.stack(
        [magnitude[:, s : s + page].max(axis=1) / np.float32(448) for s in starts], 1
    ).reshape(heads, len(starts))


def sent_bytes(array: np.ndarray, page: int) -> tuple[np.ndarray, np.ndarray]:
    """(E4M3 numbers, the scale of each of their rows) by ml_dtypes' own rounding."""
    scales = scales_of(array, page)
    of_rows = scales[:, np.arange(array.shape[1]) // page][..., None]
    divisor = np.where(of_rows > 0, of_rows, np.float32(1))
    return (array.astype(np.float32) / divisor).astype(E4M3), of_rows


def widened(array: np.ndarray, page: int) -> np.ndarray:
    """What a consumer must get of `array`, in f32."""
    numbers, of_rows = sent_bytes(array, page)
    return numbers.astype(np.float32) * of_rows


def assert_within_bound(got: np.ndarray, held: np.ndarray, page: int) -> None:
    scale = scales_of(held, page)[:, np.arange(held.shape[1]) // page][..., None]
    held, got = held.astype(np.float64), got.astype(np.float64)
    bound = np.maximum(np.abs(held) / 16, scale.astype(np.float64) * 2.0**-10)
    assert np.all(np.abs(got - held) <= bound * (1 + 2.0**-20))


@pytest.fixture(scope="module")
def ticket(server):
    with Client(server.target) as client:
        leased = client.prefill("recall", PROMPT, "dense", delivery="lease")
        yield leased.ticket
        client.release(leased.ticket)


@pytest.fixture(scope="module")
def held(server, ticket):
    with Client(server.target) as client:
        return client.fetch(ticket)


# ---- the real server


@pytest.mark.parametrize("page", [1, 16, 128, 4096])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_cache_arrives_as_its_rounded_numbers(client, ticket, held, page, layout):
    kv_format = KvFormat(
        "f32", layout=layout, wire_dtype="f8_e4m3", page_tokens=page
    )
    got = client.fetch(ticket, kv_format=kv_format)
    assert got.wire_dtype == "f8_e4m3"
    assert got.dtype == np.float32
    order = (1, 0, 2) if layout == "NHD" else (0, 1, 2)
    for one, other in zip(got.k + got.v, held.k + held.v):
        one = one.transpose(order)
        np.testing.assert_array_equal(one, widened(other, page))
        assert_within_bound(one, other, page)


@pytest.mark.parametrize("dtype", [None, "f16", "bf16"])
def test_the_arrays_have_the_asked_dtype_rounded_once(client, ticket, held, dtype):
    got = client.fetch(ticket, kv_format=KvFormat(dtype, wire_dtype="f8_e4m3"))
    expected = held.dtype if dtype is None else pbs_client.dtypes.FLOAT_DTYPES[dtype]
    assert got.dtype == expected
    for one, other in zip(got.k + got.v, held.k + held.v):
        np.testing.assert_array_equal(one, widened(other, 16).astype(expected))


def test_a_part_has_the_scales_of_the_whole(client, ticket, held):
    part = KvPart((1, 1), (37, 601), (1, 1))
    got = client.fetch(ticket, part=part, kv_format=FP8)
    whole = widened(held.k[1], 16).astype(held.dtype)
    np.testing.assert_array_equal(got.k[0], whole[1:, 37:638])


def test_an_inline_cache_equals_a_fetched_one(client, ticket):
    inline = client.prefill(
        "recall", PROMPT, "dense", delivery=Inline(wire_dtype="f8_e4m3", page_tokens=32)
    ).kv
    fetched = client.fetch(
        ticket, kv_format=KvFormat(wire_dtype="f8_e4m3", page_tokens=32)
    )
    assert inline.wire_dtype == "f8_e4m3"
    for one, other in zip(inline.k + inline.v, fetched.k + fetched.v):
        np.testing.assert_array_equal(one, other)


def wire_bytes(target: str, ticket, **fields) -> int:
    request = _messages.FetchRequest(ticket=ticket.to_message(), **fields)
    with grpc.insecure_channel(target) as channel:
        stream = channel.unary_stream(FETCH)(request.SerializeToString())
        return sum(len(data) for data in stream)


def test_pages_of_16_take_at_most_52_percent_of_the_bytes_of_bf16(server, ticket):
    bf16 = wire_bytes(server.target, ticket, dtype="BF16", page_tokens=16)
    fp8 = wire_bytes(server.target, ticket, dtype="F8_E4M3", page_tokens=16)
    assert fp8 <= 0.52 * bf16


def test_queries_do_not_travel_so(server, client):
    lease = pbs_client.Lease(capture_query_layers=(0,))
    leased = client.prefill("recall", PROMPT[:100], "dense", delivery=lease)
    with pytest.raises(ValueError, match="queries do not travel as f8_e4m3"):
        client.fetch_queries(leased.ticket, 0, kv_format=FP8)
    with pytest.raises(grpc.RpcError, match="dtype F8_E4M3 of queries is not one of"):
        wire_bytes(server.target, leased.ticket, dtype="F8_E4M3", queries=True)
    client.release(leased.ticket)


@pytest.mark.parametrize("make", [KvFormat, Inline])
def test_an_unknown_form_is_refused_by_name(make):
    with pytest.raises(ValueError, match="wire_dtype 'f8_e5m2' is not f8_e4m3"):
        make(wire_dtype="f8_e5m2")
    with pytest.raises(ValueError, match="page_tokens 0 is below 1"):
        make(page_tokens=0)
    with pytest.raises(TypeError, match="wire_dtype 8 is not a string"):
        make(wire_dtype=8)


@pytest.mark.parametrize("words", [(), ("--lease",)], ids=["inline", "leased"])
def test_the_script_writes_what_came(server, held, tmp_path, capsys, words):
    tokens, out = tmp_path / "tokens.json", tmp_path / "kv.safetensors"
    tokens.write_text(json.dumps(PROMPT))
    options = ("--wire-dtype", "f8_e4m3", "--page-tokens", "64", "--kv-dtype", "f32")
    line = ("prefill", "--server", server.target, "--tokens", str(tokens))
    arguments = (*line, "--method", "dense", "--kv", str(out), *options, *words)
    assert main(arguments) == 0
    capsys.readouterr()
    got = safetensors_file.read(out, ["layers.0.k", "layers.1.v"])
    for name, array in (("layers.0.k", held.k[0]), ("layers.1.v", held.v[1])):
        np.testing.assert_array_equal(dict(got)[name], widened(array, 64))


# ---- chunks of a server of another hand


def page_cases(dtype) -> dict[str, np.ndarray]:
    """[heads, tokens, dim] of each kind of page, in `dtype`."""
    random = np.random.default_rng(5)
    normal = random.standard_normal((2, 21, 8))
    outlier = normal.copy()
    outlier[:, ::5, 3] = 3e4
    cases = {
        "random": normal,
        "tiny": normal * 1e-6,
        "huge": normal * 1e4,
        "zero": normal * 0,
        "an outlier in each page": outlier,
    }
    return {name: values.astype(dtype) for name, values in cases.items()}


def shape(dtype, **changes) -> KvShape:
    fields = {
        "layers": Span(0, 1),
        "tokens": Span(0, 21),
        "heads": Span(0, 2),
        "head_dim": 8,
        "dtype": np.dtype(dtype),
        "layout": "HND",
        "epoch": EPOCH,
        "checksums": True,
        "wire_dtype": "f8_e4m3",
        "page_tokens": 4,
    }
    return KvShape(**{**fields, **changes})


def layer_of(array: np.ndarray, page: int = 4):
    """K and V of one layer, both `array`, in a chunk each."""
    heads, tokens, _ = array.shape
    chunks, digest = [], 0
    for kind in "KV":
        chunk = KvChunk(
            ticket_epoch=EPOCH,
            kind=kind,
            token_count=tokens,
            head_count=heads,
            dtype="F8_E4M3",
            layout="HND",
            scales=scales_of(array, page).astype("<f4").tobytes(),
            payload=sent_bytes(array, page)[0].tobytes(),
        )
        chunk.crc32c = google_crc32c.value(chunk.scales + chunk.payload)
        digest = google_crc32c.extend(digest, struct.pack("<I", chunk.crc32c))
        chunks.append(chunk)
    chunks[-1].layer_digest = digest
    return chunks


def receive(receiver: KvReceiver, chunks):
    for chunk in chunks:
        receiver.add(_wire.decode_kv_chunk(chunk.SerializeToString()))
    return receiver.finish()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("case", page_cases(np.float32))
def test_every_kind_of_page_arrives_within_the_bound(dtype, case):
    held = page_cases(dtype)[case]
    (k,), (v,) = receive(KvReceiver(shape(np.float32)), layer_of(held))
    np.testing.assert_array_equal(k, v)
    np.testing.assert_array_equal(k, widened(held, 4))
    assert_within_bound(k, held, 4)


def test_nan_stays_nan():
    held = np.ones((2, 21, 8), np.float32)
    chunks = layer_of(held)
    for chunk in chunks:
        chunk.payload = b"\x7f\xff" + chunk.payload[2:]
    (k,), _ = receive(KvReceiver(shape(np.float16, checksums=False)), chunks)
    assert np.isnan(k[0, 0, :2]).all()
    assert np.isfinite(k).sum() == k.size - 2


def _scales(values):
    def change(chunk):
        chunk.scales = np.asarray(values, "<f4").tobytes()

    return change


def _set(**fields):
    def change(chunk):
        for name, value in fields.items():
            setattr(chunk, name, value)

    return change


FAULTS = {
    "too few scales": (_scales([1] * 11), "44 bytes of scales, not 48"),
    "a negative scale": (_scales([1] * 11 + [-1]), "negative or not finite"),
    "an infinite scale": (_scales([np.inf] + [1] * 11), "negative or not finite"),
    "a NaN scale": (_scales([np.nan] + [1] * 11), "negative or not finite"),
    "a changed scale": (_scales([1] * 12), "crc32c is"),
    "a changed byte": (_set(payload=b"\x00" * 336), "crc32c is"),
    "another dtype": (_set(dtype=3), "dtype is 3, not 7"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_chunk_is_refused(change, message):
    chunks = layer_of(page_cases(np.float32)["random"])
    change(chunks[0])
    with pytest.raises(CorruptDataError, match=message) as caught:
        receive(KvReceiver(shape(np.float32)), chunks)
    assert (caught.value.layer, caught.value.kind, caught.value.offset) == (0, "K", 0)


def test_scales_beside_another_dtype_are_refused():
    chunk = layer_of(page_cases(np.float32)["random"])[0]
    chunk.dtype, chunk.payload = 1, bytes(336 * 4)
    with pytest.raises(CorruptDataError, match="scales, which only F8_E4M3 has"):
        receive(KvReceiver(shape(np.float32, wire_dtype=None)), [chunk])


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_every_byte_is_the_number_of_ml_dtypes(dim):
    held = np.zeros((2, 21, dim), np.float32)
    payload = np.resize(np.arange(256, dtype=np.uint8), held.shape)
    chunks = layer_of(held)
    for chunk in chunks:
        chunk.payload = payload.tobytes()
        chunk.scales = np.ones(12, "<f4").tobytes()
    receiver = KvReceiver(shape(np.float32, head_dim=dim, checksums=False))
    (k,), _ = receive(receiver, chunks)
    np.testing.assert_array_equal(k, payload.view(E4M3).astype(np.float32))
