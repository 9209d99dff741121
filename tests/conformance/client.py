"""A client written from docs/PROTOCOL.md alone: what it cannot do, the page does not say.

It uses the published descriptor set, grpcio, protobuf and numpy, and nothing of this
project's clients. Every check is one promise of the page.

    python tests/conformance/client.py --server 127.0.0.1:50051 --model recall

Exit status: 0 when all promises hold, 1 when one does not, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import uuid
from collections.abc import Callable, Iterator

import grpc
import numpy as np
from e4m3 import check_page
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 120


class Protocol:
    """The messages and calls of a descriptor set."""

    def __init__(self, descriptor_set: pathlib.Path, channel: grpc.Channel) -> None:
        files = descriptor_pb2.FileDescriptorSet.FromString(descriptor_set.read_bytes())
        self._pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self._pool.Add(file)
        self._channel = channel

    def message(self, name: str):
        found = self._pool.FindMessageTypeByName(f"pbs.v1.{name}")
        return message_factory.GetMessageClass(found)

    def number(self, enum: str, name: str) -> int:
        found = self._pool.FindEnumTypeByName(f"pbs.v1.{enum}")
        return found.values_by_name[name].number

    def call(self, service: str, method: str):
        found = self._pool.FindServiceByName(f"pbs.v1.{service}")
        call = found.methods_by_name[method]
        kind = "stream" if call.client_streaming else "unary"
        kind += "_stream" if call.server_streaming else "_unary"
        reply = message_factory.GetMessageClass(call.output_type)
        stub = getattr(self._channel, kind)(
            f"/pbs.v1.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        return lambda request: stub(request, timeout=TIMEOUT_SECONDS)


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli): reflected polynomial 0x82F63B78, begun and ended with ~0."""
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ _CRC_TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC_TABLE = _crc_table()


def attention(q, k, v, reads=None):
    """Outputs and LSE of [heads, q_len, dim] and [kv_heads, k_len, dim], in f64.

    The queries are the last of the positions; query head h reads KV head
    h // (heads / kv_heads). `reads` [heads, q_len, k_len] says which keys a row reads.
    """
    heads, q_len, dim = q.shape
    k_len = k.shape[1]
    group = heads // k.shape[0]
    keys = np.repeat(k, group, axis=0).astype(np.float64)
    values = np.repeat(v, group, axis=0).astype(np.float64)
    logits = q.astype(np.float64) @ keys.transpose(0, 2, 1) / np.sqrt(dim)
    position = np.arange(k_len - q_len, k_len)[:, None]
    seen = np.broadcast_to(np.arange(k_len)[None] <= position, logits.shape)
    logits = np.where(seen if reads is None else seen & reads, logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    return weights / total @ values, (np.log(total) + top)[..., 0]


class Client:
    """One method for each promise that takes more than a line to try."""

    def __init__(self, protocol: Protocol, model: str) -> None:
        self.protocol = protocol
        self.model = model
        listed = protocol.call("Prefill", "ListModels")(
            protocol.message("ListModelsRequest")()
        )
        self.info = next(info for info in listed.models if info.name == model)
        self.prompt = [
            (7 * i + 3) % self.info.vocab_size
            for i in range(min(300, self.info.tokens_max))
        ]

    # ---- Attend

    def attend(self, arrays: dict[str, np.ndarray], want=(), **options):
        """Uploads arrays in chunks of odd sizes, in turn, and returns what comes back."""
        message, number = self.protocol.message, self.protocol.number
        dtypes = {"float32": "F32", "int32": "I32", "int64": "I64", "uint16": "U16"}
        header = message("AttendHeader")(
            want=[number("TensorName", name) for name in want],
            cu_seqlens=options.pop("cu_seqlens", []),
            options=message("AttentionOptions")(**options),
        )
        for name, array in arrays.items():
            header.tensors.add(
                tensor=number("TensorName", name),
                dtype=number("DType", dtypes[array.dtype.name]),
                shape=array.shape,
            )

        def requests() -> Iterator:
            request = message("AttendRequest")
            yield request(header=header)
            data = {name: array.tobytes() for name, array in arrays.items()}
            for at in range(0, max(map(len, data.values())), 100_003):
                for name, held in data.items():
                    if at < len(held):
                        yield request(
                            chunk=message("TensorChunk")(
                                tensor=number("TensorName", name),
                                offset=at,
                                data=held[at : at + 100_003],
                            )
                        )

        return self._collect(self.protocol.call("Attention", "Attend")(requests()))

    def _collect(self, replies):
        numpy_types = {1: "<f4", 2: "<f2", 4: "<i4", 5: "<u2", 6: "<i8"}
        names = self.protocol._pool.FindEnumTypeByName("pbs.v1.TensorName")
        specs, data, stats = {}, {}, None
        for reply in replies:
            kind = reply.WhichOneof("message")
            if kind == "header":
                for spec in reply.header.tensors:
                    name = names.values_by_number[spec.tensor].name
                    specs[name], data[name] = spec, bytearray()
            elif kind == "chunk":
                held = data[names.values_by_number[reply.chunk.tensor].name]
                assert reply.chunk.offset == len(held), "a gap between chunks"
                held += reply.chunk.data
            else:
                stats = reply.stats
        arrays = {
            name: np.frombuffer(bytes(data[name]), numpy_types[spec.dtype]).reshape(
                spec.shape
            )
            for name, spec in specs.items()
        }
        return arrays, stats

    # ---- Prefill and the hand-off

    def prefill(self, key: str = "", tokens=None, lease: bool = True, **fields):
        message = self.protocol.message
        delivery = message("KvDelivery")()
        if lease:
            delivery.lease.ttl_seconds = 30
        else:
            delivery.inline.SetInParent()
        attention = message("AttentionOptions")()
        attention.dense.SetInParent()
        request = message("PrefillRequest")(
            model=self.model,
            token_ids=self.prompt if tokens is None else tokens,
            attention=fields.pop("attention", attention),
            delivery=delivery,
            idempotency_key=key,
            **fields,
        )
        events = list(self.protocol.call("Prefill", "Prefill")(request))
        return events, events[-1].done

    def fetch(self, ticket, **ranges):
        request = self.protocol.message("FetchRequest")(ticket=ticket, **ranges)
        return list(self.protocol.call("KvSource", "Fetch")(request))

    def assemble(self, chunks, layout: str = "HND", tokens: int | None = None):
        """{(layer, kind): f32 array} of chunks, checked as the page says."""
        arrays: dict[tuple[int, int], bytearray] = {}
        digests: dict[int, bytes] = {}
        for chunk in chunks:
            held = arrays.setdefault((chunk.layer, chunk.kind), bytearray())
            assert chunk.byte_offset == len(held), "chunks do not follow each other"
            assert chunk.crc32c == crc32c(chunk.scales + chunk.payload), "crc32c"
            held += chunk.payload
            seen = digests.get(chunk.layer, b"")
            digests[chunk.layer] = seen + chunk.crc32c.to_bytes(4, "little")
            if chunk.HasField("layer_digest"):
                expected = crc32c(digests[chunk.layer])
                assert chunk.layer_digest == expected, "layer_digest"
        count = len(self.prompt) if tokens is None else tokens
        heads, dim = self.info.num_kv_heads, self.info.head_dim
        shape = (heads, count, dim) if layout == "HND" else (count, heads, dim)
        return {
            key: np.frombuffer(bytes(held), "<f4").reshape(shape)
            for key, held in arrays.items()
        }


def _tensors(heads=4, kv_heads=2, q_len=520, k_len=600, dim=64):
    random = np.random.default_rng(1)
    q = random.standard_normal((1, heads, q_len, dim), np.float32)
    k = random.standard_normal((1, kv_heads, k_len, dim), np.float32)
    v = random.standard_normal((1, kv_heads, k_len, dim), np.float32)
    return {"Q": q, "K": k, "V": v}


def _close(actual, expected, limit=2e-5) -> None:
    error = float(np.abs(actual - expected).max())
    assert error <= limit, f"off by {error:.2e}, limit {limit:.0e}"


def dense_attention(client: Client) -> None:
    """Scale, grouped heads, causal mask at the end of the keys, natural logarithm."""
    sent = _tensors()
    arrays, stats = client.attend(sent, want=("O", "LSE"), dense=_dense(client))
    outputs, lse = attention(*(array[0] for array in sent.values()))
    _close(arrays["O"][0], outputs)
    _close(arrays["LSE"][0], lse)
    assert stats.density == 1


def packed_sequences(client: Client) -> None:
    """cu_seqlens: sequences side by side that do not see each other."""
    sent = _tensors(q_len=300, k_len=300)
    packed = {name: array[0] for name, array in sent.items()}
    arrays, _ = client.attend(
        packed, want=("O",), cu_seqlens=[0, 100, 300], dense=_dense(client)
    )
    for begin, end in ((0, 100), (100, 300)):
        parts = (array[:, begin:end] for array in packed.values())
        _close(arrays["O"][:, begin:end], attention(*parts)[0])


def orders_and_lists(client: Client) -> None:
    """What ORDER, LIST_OFFSETS and LIST_INDICES count, by computing with them."""
    sent = _tensors()
    pbs = client.protocol.message("PbsOptions")(
        block_size=64, segment_size=128, threshold=0.5
    )
    want = ("O", "ORDER", "LIST_OFFSETS", "LIST_INDICES")
    arrays, _ = client.attend(sent, want=want, pbs=pbs)
    q_len, k_len, block, segment = 520, 600, 64, 128
    order = arrays["ORDER"][0]
    for head in order:
        for begin in range(0, k_len - segment + 1, segment):
            inside = np.sort(head[begin : begin + segment])
            assert (inside == np.arange(begin, begin + segment)).all()
        whole = k_len // segment * segment
        assert (head[whole:] == np.arange(whole, k_len)).all()
    offsets, indices = arrays["LIST_OFFSETS"], arrays["LIST_INDICES"]
    first = (k_len - q_len) // block  # the block of the first query
    rows = (k_len + block - 1) // block - first
    assert len(offsets) == 4 * rows + 1
    reads = np.zeros((4, q_len, k_len), bool)
    for head in range(4):
        positions = order[head // 2]  # KV_HEAD scope: the order of its KV head
        for row in range(rows):
            blocks = indices[slice(*offsets[head * rows + row :][:2])]
            begin = max(0, (first + row) * block - (k_len - q_len))
            end = min(q_len, (first + row + 1) * block - (k_len - q_len))
            for index in blocks:
                slots = positions[index * block : (index + 1) * block]
                reads[head, begin:end, slots] = True
    outputs, _ = attention(*(array[0] for array in sent.values()), reads)
    _close(arrays["O"][0], outputs)


def an_upload_without_a_tensor_is_refused(client: Client) -> None:
    sent = _tensors()
    del sent["V"]
    _refused(lambda: client.attend(sent, dense=_dense(client)), "INVALID_ARGUMENT")


def fetched_equals_inline(client: Client) -> None:
    """Layers in order, keys before values, checksums; one delivery as the other."""
    _, done = client.prefill()
    f32 = client.protocol.number("DType", "F32")
    fetched = client.assemble(client.fetch(done.ticket, dtype=f32))
    assert list(fetched) == [
        (layer, kind) for layer in range(client.info.num_layers) for kind in (1, 2)
    ]
    events, _ = client.prefill(lease=False)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "admitted" and kinds[-1] == "done"
    inline = [event.kv for event in events if event.WhichOneof("event") == "kv"]
    if client.info.kv_dtype == f32:
        for key, array in client.assemble(inline).items():
            assert (array == fetched[key]).all()


def a_fetch_is_taken_up_by_layer_and_token(client: Client) -> None:
    _, done = client.prefill()
    f32 = client.protocol.number("DType", "F32")
    whole = client.assemble(client.fetch(done.ticket, dtype=f32))
    last = client.info.num_layers - 1
    rest = client.fetch(done.ticket, dtype=f32, layer_begin=last, token_begin=100)
    resumed = client.assemble(rest, tokens=len(client.prompt) - 100)
    assert list(resumed) == [(last, 1), (last, 2)]
    for key, array in resumed.items():
        assert (array == whole[key][:, 100:]).all()
    chunk, *_ = client.fetch(done.ticket, dtype=f32, resume={"kind": "V", "token": 100})
    assert whole[0, 2][0, 100:].tobytes().startswith(chunk.payload)


def f8_e4m3_is_a_byte_and_a_scale(client: Client) -> None:
    _, done = client.prefill()
    f32, fp8 = (client.protocol.number("DType", name) for name in ("F32", "F8_E4M3"))
    held = client.assemble(client.fetch(done.ticket, dtype=f32))
    for c in client.fetch(done.ticket, dtype=fp8, page_tokens=len(client.prompt)):
        check_page(c, held[c.layer, c.kind][c.head_begin :][: c.head_count])


def layouts_differ_by_a_transposition(client: Client) -> None:
    _, done = client.prefill()
    number = client.protocol.number
    f32, nhd = number("DType", "F32"), number("KvLayout", "NHD")
    hnd = client.assemble(client.fetch(done.ticket, dtype=f32))
    other = client.assemble(client.fetch(done.ticket, dtype=f32, layout=nhd), "NHD")
    for key, array in other.items():
        assert (array.transpose(1, 0, 2) == hnd[key]).all()


def pages_begin_at_multiples(client: Client) -> None:
    _, done = client.prefill()
    for chunk in client.fetch(done.ticket, page_tokens=64, chunk_bytes=65536):
        assert chunk.token_begin % 64 == 0
        end = chunk.token_begin + chunk.token_count
        assert end % 64 == 0 or end == len(client.prompt)


def renew_counts_from_now(client: Client) -> None:
    """It may shorten a lease."""
    _, done = client.prefill()
    renew = client.protocol.call("KvSource", "Renew")
    request = client.protocol.message("RenewRequest")
    longer = renew(request(ticket=done.ticket, ttl_seconds=60)).expires_unix_ms
    shorter = renew(request(ticket=done.ticket, ttl_seconds=5)).expires_unix_ms
    assert shorter < longer


def a_released_ticket_is_unknown(client: Client) -> None:
    _, done = client.prefill()
    release = client.protocol.message("ReleaseRequest")(ticket=done.ticket)
    client.protocol.call("KvSource", "Release")(release)
    _refused(lambda: client.fetch(done.ticket), "NOT_FOUND")
    stranger = client.protocol.message("KvTicket")(handle="0" * 32, epoch=1)
    _refused(lambda: client.fetch(stranger), "NOT_FOUND")


def equal_keys_are_one_piece_of_work(client: Client) -> None:
    key = uuid.uuid4().hex
    _, first = client.prefill(key)
    _, second = client.prefill(key)
    assert first.ticket == second.ticket
    other = client.prompt[:-1]
    _refused(lambda: client.prefill(key, other), "INVALID_ARGUMENT")


def requests_beyond_a_limit_are_refused(client: Client) -> None:
    vocab = client.info.vocab_size
    for tokens, fields in (
        ([], {}),
        ([vocab], {}),
        (None, {"top_logits": 101}),
        (None, {"priority": 101}),
        (None, {"logit_positions": list(range(257))}),
        (None, {"request_id": "x" * 129}),
    ):
        _refused(
            lambda t=tokens, f=fields: client.prefill("", t, **f), "INVALID_ARGUMENT"
        )


def methods_run_or_are_unimplemented_as_the_server_says(client: Client) -> None:
    message, number = client.protocol.message, client.protocol.number
    server = client.protocol.call("Prefill", "GetServerInfo")(
        message("GetServerInfoRequest")()
    )
    methods = message("AttentionOptions").DESCRIPTOR.oneofs_by_name["method"].fields
    for name in (field.name for field in methods):
        options = message("AttentionOptions")(dense_fallback=False)
        getattr(options, name).block_size = 64
        method = number("Method", name.upper())
        if method in server.methods:
            _, done = client.prefill(attention=options)
            ran = set(done.stats.layer_method)
            # A short prompt runs dense.
            assert ran <= {method, number("Method", "DENSE")}, f"{name} ran as {ran}"
        else:
            _refused(lambda o=options: client.prefill(attention=o), "UNIMPLEMENTED")


def reserved_names_are_unimplemented(client: Client) -> None:
    ticket = client.protocol.message("KvTicket")(handle="0" * 32)
    _refused(lambda: client.prefill(prefix_ticket=ticket), "UNIMPLEMENTED")


def an_unknown_model_is_not_found(client: Client) -> None:
    request = client.protocol.message("PrefillRequest")(model="nobody", token_ids=[1])
    call = client.protocol.call("Prefill", "Prefill")
    _refused(lambda: list(call(request)), "NOT_FOUND")


def the_first_token_is_the_most_likely_one(client: Client) -> None:
    _, done = client.prefill(top_logits=3, all_logits_last_token=True)
    logits = np.frombuffer(done.last_token_logits, "<f4")
    assert len(logits) == client.info.vocab_size
    assert done.first_token_id == int(logits.argmax()) == done.top_logits[0].token_id
    shifted = logits.astype(np.float64) - logits.max()
    expected = -np.log(np.exp(shifted).sum())
    _close(done.top_logits[0].log_probability, expected, 1e-4)


def _dense(client: Client):
    return client.protocol.message("DenseOptions")()


def _refused(attempt: Callable[[], object], code: str) -> None:
    try:
        attempt()
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode[code], f"{error.code()} instead of {code}"
        return
    raise AssertionError(f"was not refused with {code}")


CHECKS = (
    dense_attention,
    packed_sequences,
    orders_and_lists,
    an_upload_without_a_tensor_is_refused,
    fetched_equals_inline,
    a_fetch_is_taken_up_by_layer_and_token,
    f8_e4m3_is_a_byte_and_a_scale,
    layouts_differ_by_a_transposition,
    pages_begin_at_multiples,
    renew_counts_from_now,
    a_released_ticket_is_unknown,
    equal_keys_are_one_piece_of_work,
    requests_beyond_a_limit_are_refused,
    methods_run_or_are_unimplemented_as_the_server_says,
    reserved_names_are_unimplemented,
    an_unknown_model_is_not_found,
    the_first_token_is_the_most_likely_one,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True, help="host:port")
    parser.add_argument("--model", required=True, help="a model that it serves")
    parser.add_argument(
        "--descriptor-set", type=pathlib.Path, default=ROOT / "proto/pbs_v1.binpb"
    )
    arguments = parser.parse_args()
    failures = 0
    with grpc.insecure_channel(arguments.server) as channel:
        client = Client(Protocol(arguments.descriptor_set, channel), arguments.model)
        for check in CHECKS:
            try:
                check(client)
            except (AssertionError, grpc.RpcError) as error:
                failures += 1
                print(f"FAILED  {check.__name__}: {error}")
            else:
                print(f"ok      {check.__name__}")
    print(f"{len(CHECKS) - failures} of {len(CHECKS)} promises hold")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
