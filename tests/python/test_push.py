"""Push delivery: the server sends caches to a KvSink, by the real both ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pbs_client
import pytest
from eventually import WAIT_SECONDS_MAX, until
from fake_server import fake_server, never_answered
from pbs_client import Client, KvFormat, KvSink, PbsError, Push
from pbs_client.kv_params import prompt_digest
from push_world import (
    LAYERS,
    MODEL,
    PORTS,
    RECEIVE,
    SPARSE,
    RawPush,
    bytes_of,
    free_ports,
    holds_nothing,
    inline,
    make_model,
    metric,
    prompt,
    pushing_server,
    raw_sink,
    socket_server,
)
from real_server import RunningServer, running_server

STALL_SECONDS_MAX = 1  # of the impatient server
CHUNK_BYTES = 65536


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "six layers")


@pytest.fixture(scope="module")
def targets() -> list[str]:
    return free_ports(PORTS)


@pytest.fixture(scope="module")
def unused(targets) -> Iterator[str]:
    return iter(targets)


@pytest.fixture
def target(unused) -> str:
    """A target that no other test uses."""
    return next(unused)


@pytest.fixture(scope="module")
def node(model, targets) -> Iterator[RunningServer]:
    with pushing_server(model, targets) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(model, targets) -> Iterator[RunningServer]:
    limit = f"transport.write_stall_seconds_max={STALL_SECONDS_MAX}"
    with pushing_server(model, targets, "--set", limit) as running:
        yield running


@pytest.fixture
def client(node) -> Iterator[Client]:
    with Client(node.target) as connected:
        yield connected


def push(client: Client, target: str, tokens, method="dense", **options):
    chunks = {"chunk_bytes": CHUNK_BYTES, **options}
    return client.prefill(MODEL, tokens, method, delivery=Push(target, **chunks))


def fails(client: Client, target: str, tokens=None, **options) -> tuple[str, str]:
    """Code and message of a push that fails."""
    with pytest.raises(PbsError) as caught:
        push(client, target, prompt(2000) if tokens is None else tokens, **options)
    return caught.value.code.name, caught.value.message


def is_as_new(node: RunningServer, client: Client, target: str) -> None:
    """Nothing is held, and the next push is right."""
    until(lambda: holds_nothing(node))
    tokens = prompt(700, seed=9)
    with KvSink(target) as sink:
        reached = []

        def reaches() -> bool:
            """A target that just refused a connection is tried again a little later."""
            try:
                reached.append(push(client, target, tokens))
            except pbs_client.UnavailableError as error:
                assert "failed to connect" in error.message, error
            return bool(reached)

        until(reaches)
        assert bytes_of(sink.take(WAIT_SECONDS_MAX).cache) == inline(client, tokens)
    until(lambda: holds_nothing(node))


# ---- what arrives

FORMATS = {
    "as_held": {},
    "bf16": {"dtype": "bf16"},
    "f16_nhd": {"dtype": "f16", "layout": "NHD"},
    "f32_nhd": {"dtype": "f32", "layout": "NHD"},
    "without_checksums": {"checksums": False},
    "pages_of_16": {"page_tokens": 16},
    "pages_of_64_nhd_bf16": {"page_tokens": 64, "layout": "NHD", "dtype": "bf16"},
    "long_chunks": {"chunk_bytes": 4 << 20},
}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("length", [1, 255, 3000])
def test_a_pushed_cache_equals_a_fetched_one(client, target, form, length):
    tokens = prompt(length, seed=length)
    ticket = client.prefill(MODEL, tokens, "dense", delivery="lease").ticket
    known = {name: form[name] for name in ("dtype", "layout") if name in form}
    expected = client.fetch(ticket, kv_format=KvFormat(**known))
    client.release(ticket)
    with KvSink(target) as sink:
        push(client, target, tokens, **form)
        cache = sink.take(WAIT_SECONDS_MAX).cache
    assert bytes_of(cache) == bytes_of(expected)
    for name in ("layers", "tokens", "heads", "prompt_tokens", "layout", "model_digest"):
        assert getattr(cache, name) == getattr(expected, name)
    assert cache.sparsity_digest == expected.sparsity_digest == "exact"
    assert cache.first_token is None


@pytest.mark.parametrize("method", ["dense", SPARSE], ids=["dense", "pbs"])
def test_a_pushed_cache_equals_an_inline_one_and_its_header_names_it(
    client, target, method
):
    tokens = prompt(1000)
    expected = client.prefill(MODEL, tokens, method, delivery="inline")
    delivery = Push(target, chunk_bytes=CHUNK_BYTES)
    with KvSink(target) as sink:
        result = client.prefill(
            MODEL, tokens, method, delivery=delivery, request_id="push 7"
        )
        pushed = sink.take(WAIT_SECONDS_MAX)
    header = pushed.header
    assert bytes_of(pushed.cache) == bytes_of(expected.kv)
    assert result.first_token == expected.first_token
    assert result.kv is None and result.ticket is None
    assert len(header.transfer_id) == 32 and header.request_id == "push 7"
    assert header.model == MODEL and header.model_digest == result.model_digest
    assert header.sparsity_digest == result.sparsity_digest == expected.sparsity_digest
    assert header.prompt_digest == prompt_digest(tokens)
    assert header.bytes == sum(map(len, bytes_of(pushed.cache)))
    assert result.stats.stages.send > 0


def test_a_push_is_charged_as_an_inline_delivery(client, target):
    tokens, form = prompt(1000), {"dtype": "bf16"}
    with KvSink(target):
        pushed = client.prefill(MODEL, tokens, "dense", delivery=Push(target, **form))
    sent = client.prefill(
        MODEL, tokens, "dense", delivery=pbs_client.Inline(**form)
    )
    assert pushed.stats.planned_bytes == sent.stats.planned_bytes


def test_the_sink_has_the_first_layer_while_later_ones_are_computed(client, target):
    at: dict[str, float] = {}

    def arrived(header, layer, k, v):
        at[f"sink {layer}"] = time.monotonic()

    with KvSink(target, on_layer=arrived) as sink:
        client.prefill(
            MODEL,
            prompt(8000),
            "dense",
            delivery=Push(target),
            on_layer=lambda news: at.update({f"done {news.index}": time.monotonic()}),
        )
        sink.take(WAIT_SECONDS_MAX)
    layers = [at[f"sink {layer}"] for layer in range(LAYERS)]
    assert layers == sorted(layers)
    assert at["sink 0"] < at[f"done {LAYERS - 1}"]


def test_two_pushes_at_once_arrive_whole(client, target):
    prompts = [prompt(2000, seed) for seed in (1, 2)]
    expected = {prompt_digest(tokens): inline(client, tokens) for tokens in prompts}
    together = threading.Barrier(2)

    def meet(header, layer, k, v):
        if layer == 0:
            together.wait(WAIT_SECONDS_MAX)  # both are under way

    with KvSink(target, on_layer=meet) as sink, ThreadPoolExecutor() as pool:
        pushes = [pool.submit(push, client, target, tokens) for tokens in prompts]
        caches = [sink.take(WAIT_SECONDS_MAX) for _ in prompts]
        for one in pushes:
            one.result()
    found = {one.header.prompt_digest: bytes_of(one.cache) for one in caches}
    assert found == expected


def test_a_push_counts_as_a_transfer(node, client, target):
    names = ("pbs_kv_transfer_bytes_total", "pbs_kv_transfer_time_seconds_count")
    before = [metric(node, name) for name in names]
    with KvSink(target) as sink:
        push(client, target, prompt(500))
        size = sink.take(WAIT_SECONDS_MAX).header.bytes
    assert [metric(node, name) for name in names] == [before[0] + size, before[1] + 1]


# ---- credit


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_server_never_sends_beyond_the_credit(client, target, chunks):
    window, seen = chunks * CHUNK_BYTES, []

    def grants_little(raw: RawPush, context) -> Iterator[bytes]:
        acked = 0
        yield raw.ack(credit=window)
        while raw.read():
            seen.append(raw.received - acked)
            if raw.received - acked > window - CHUNK_BYTES:
                acked = raw.received
                yield raw.ack(credit=window)
        yield raw.ack()

    with raw_sink(grants_little, target):
        push(client, target, prompt(3000))
    assert 0 < max(seen) <= window


def test_a_chunk_larger_than_the_credit_waits_for_it(node, client, target):
    waits, came = threading.Event(), []
    name = "pbs_kv_transfer_bytes_total"  # counts a chunk that waits
    before = metric(node, name)

    def grants_a_byte_too_little(raw: RawPush, context) -> Iterator[bytes]:
        yield raw.ack(credit=CHUNK_BYTES - 1)
        reader = threading.Thread(target=lambda: came.append(raw.read()))
        reader.start()
        until(lambda: metric(node, name) == before + CHUNK_BYTES)
        assert not came
        waits.set()
        yield raw.ack(credit=CHUNK_BYTES)
        reader.join()
        assert raw.received == CHUNK_BYTES
        yield raw.ack()
        while raw.read():
            pass
        yield raw.ack()

    with raw_sink(grants_a_byte_too_little, target):
        push(client, target, prompt(3000))
    assert waits.is_set()


def test_a_slow_consumer_holds_back_the_server(node, client, target):
    """The window of a KvSink counts what on_layer has not returned from."""
    window, release = 2 * CHUNK_BYTES, threading.Event()
    name = "pbs_kv_transfer_bytes_total"
    before = metric(node, name)
    reached, computed = threading.Event(), threading.Event()

    def slow(header, layer, k, v):
        reached.set()
        release.wait(WAIT_SECONDS_MAX)

    def tell(news):
        if news.index == LAYERS - 1:
            computed.set()

    delivery = Push(target, chunk_bytes=CHUNK_BYTES)
    arguments = {"delivery": delivery, "on_layer": tell}
    layer_bytes = 2 * 2 * 2000 * 32 * 4  # keys and values of two heads
    with (
        KvSink(target, on_layer=slow, credit_bytes=window) as sink,
        ThreadPoolExecutor() as pool,
    ):
        running = pool.submit(client.prefill, MODEL, prompt(2000), "dense", **arguments)
        try:
            assert reached.wait(WAIT_SECONDS_MAX)
            assert computed.wait(WAIT_SECONDS_MAX)  # and the server cannot send all
            sent = metric(node, name) - before
        finally:
            release.set()
        running.result(WAIT_SECONDS_MAX)
        sink.take(WAIT_SECONDS_MAX)
    # One chunk more is made, and waits.
    assert sent <= layer_bytes + window + CHUNK_BYTES


# ---- sinks that fail


def says_disk_full(raw, context):
    yield raw.ack()
    raw.read()
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the disk is full")


def breaks(raw, context):
    yield raw.ack()
    raw.read()
    context.abort(grpc.StatusCode.INTERNAL, "a bug\nof the sink")


def refuses_the_model(raw, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another model")
    yield b""


def ends_early(raw, context):
    yield raw.ack()
    raw.read()


def ends_at_once(raw, context):
    return
    yield b""


def confirms_less_than_all(raw, context):
    yield raw.ack()
    while raw.read():
        pass
    yield raw.ack(raw.received - 1)


def names_another_transfer(raw, context):
    yield raw.ack(handle="0" * 32)
    raw.read()


def confirms_too_much(raw, context):
    yield raw.ack(received=1)
    raw.read()


def confirms_less_than_before(raw, context):
    yield raw.ack()
    raw.read()
    raw.read()
    yield raw.ack(raw.received)
    yield raw.ack(raw.received - 1)
    raw.read()


def sends_garbage(raw, context):
    yield b"\xff\xff\xff"
    raw.read()


def sends_a_book(raw, context):
    yield bytes(1 << 20)
    raw.read()


BAD_SINKS = {
    # code of the prefill, a part of its message
    says_disk_full: ("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED: the disk is full"),
    breaks: ("UNAVAILABLE", "INTERNAL: a bug\\nof the sink"),
    refuses_the_model: ("FAILED_PRECONDITION", "FAILED_PRECONDITION: another model"),
    ends_early: ("FAILED_PRECONDITION", "with OK when it had confirmed 0 of "),
    ends_at_once: ("FAILED_PRECONDITION", "with OK when it had confirmed 0 of "),
    confirms_less_than_all: ("FAILED_PRECONDITION", "with OK when it had confirmed "),
    names_another_transfer: ("FAILED_PRECONDITION", "the handle of its acknowledgement"),
    confirms_too_much: ("FAILED_PRECONDITION", "acknowledged bytes_received 1, but only"),
    confirms_less_than_before: ("FAILED_PRECONDITION", " after "),
    sends_garbage: ("FAILED_PRECONDITION", "it sent what is no KvAck"),
    sends_a_book: ("RESOURCE_EXHAUSTED", "larger than max"),
}


@pytest.mark.parametrize("behave", BAD_SINKS, ids=lambda sink: sink.__name__)
def test_a_sink_that_fails_fails_the_prefill_with_its_reason(
    node, client, target, behave
):
    failed = metric(node, "pbs_kv_transfer_failures_total", '{reason="sink"}')
    with raw_sink(behave, target):
        code, message = fails(client, target)
    expected_code, part = BAD_SINKS[behave]
    assert (code, part in message) == (expected_code, True), message
    assert message.startswith(f"push to {target}: ")
    now = metric(node, "pbs_kv_transfer_failures_total", '{reason="sink"}')
    assert now in (failed, failed + 1)  # the former: no chunk was made yet
    is_as_new(node, client, target)


def test_a_server_that_is_no_sink_fails_the_prefill(node, client, target):
    with fake_server({}, target):
        code, message = fails(client, target)
    assert (code, "UNIMPLEMENTED" in message) == ("UNAVAILABLE", True)
    is_as_new(node, client, target)


def test_a_target_that_does_not_listen_fails_the_prefill_at_once(node, client, target):
    begin = time.monotonic()
    code, message = fails(client, target)
    assert (code, "Connection refused" in message) == ("UNAVAILABLE", True)
    assert time.monotonic() - begin < 4  # less than the limit of a connection
    is_as_new(node, client, target)


def test_a_target_that_accepts_and_is_silent_fails_the_prefill(node, client, target):
    with socket_server(target, lambda connection: None):
        code, message = fails(client, target)
    said = ("before receiving SETTINGS frame", "it took no call within 5 seconds")
    assert code == "UNAVAILABLE" and message.startswith(f"push to {target}: ")
    assert message.endswith(said), message  # gRPC's reason, unless the machine is slow
    is_as_new(node, client, target)


def test_a_target_of_another_protocol_fails_the_prefill(node, client, target):
    with socket_server(target, lambda c: c.sendall(b"SSH-2.0-x\r\n" * 10)):
        code, message = fails(client, target)
    assert code == "UNAVAILABLE" and message.startswith(f"push to {target}: ")
    is_as_new(node, client, target)


DYING_SINK = """
import os, signal, sys
from pbs_client import KvSink
kill = lambda header, layer, k, v: layer == int(sys.argv[2]) and os.kill(
    os.getpid(), signal.SIGKILL)
with KvSink(sys.argv[1], on_layer=kill) as sink:
    print("listens", flush=True)
    sink.take()
"""


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_sink_that_is_killed_fails_the_prefill(node, client, target, layer):
    command = [sys.executable, "-c", DYING_SINK, target, str(layer)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "listens\n"
        code, message = fails(client, target)
        assert process.wait(WAIT_SECONDS_MAX) == -signal.SIGKILL
    assert (code, target in message) == ("UNAVAILABLE", True)
    is_as_new(node, client, target)


# ---- sinks that do nothing


def grants_nothing(raw, context):
    yield raw.ack(credit=0)
    raw.read()


def grants_too_little(raw, context):
    yield raw.ack(credit=CHUNK_BYTES - 1)
    raw.read()


def says_nothing(raw, context):
    raw.read()
    yield b""


def repeats_itself(raw, context):
    """An acknowledgement that grants nothing is no progress."""
    ended = threading.Event()
    context.add_callback(ended.set)
    while not ended.wait(0.05):
        yield raw.ack(credit=0)


def reads_nothing(raw, context):
    yield raw.ack()
    yield from never_answered(iter(()), context)


def never_ends(raw, context):
    yield raw.ack()
    while raw.read():
        yield raw.ack()
    yield from never_answered(iter(()), context)


IDLE_SINKS = {
    grants_nothing: "it left the credit at 0 bytes for write_stall_seconds_max 1 ",
    grants_too_little: f"it left the credit at {CHUNK_BYTES - 1} bytes",
    says_nothing: f"; the next chunk has {CHUNK_BYTES}",
    repeats_itself: "it left the credit at 0 bytes",
    reads_nothing: "it read nothing for write_stall_seconds_max 1 seconds",
    never_ends: "it did not end the call for write_stall_seconds_max 1 seconds",
}


@pytest.mark.parametrize("behave", IDLE_SINKS, ids=lambda sink: sink.__name__)
def test_a_sink_that_does_nothing_fails_the_prefill(impatient, target, behave):
    with Client(impatient.target) as client:
        with raw_sink(behave, target):
            code, message = fails(client, target, prompt(8000))
        assert (code, IDLE_SINKS[behave] in message) == ("UNAVAILABLE", True), message
        is_as_new(impatient, client, target)


# ---- targets


def test_only_the_targets_of_the_configuration_are_reached(node, client, targets, unused):
    allowed = next(unused)
    port = allowed.rpartition(":")[2]
    others = (
        *(f"localhost:{port}", f"127.0.0.1:0{port}", f" {allowed}", f"dns:///{allowed}"),
        *(f"ipv4:{allowed}", f"{allowed}/", "127.0.0.1:1", "169.254.169.254:80", "x"),
    )
    with KvSink(allowed) as sink:
        for other in others:
            code, message = fails(client, other)
            assert code == "INVALID_ARGUMENT"
            assert message == (
                f'delivery.push.target "{other}" is not one of this server\'s push_targets'
            )
        code, message = fails(client, "")
        assert (code, "is empty" in message) == ("INVALID_ARGUMENT", True)
        with pytest.raises(pbs_client.DeadlineExceededError):
            sink.take(timeout=0)


def test_a_server_without_targets_pushes_nowhere(model, target):
    flags = ("--model", f"{MODEL}={model}")
    with running_server(*flags) as node, Client(node.target) as client, KvSink(target):
        assert fails(client, target)[0] == "INVALID_ARGUMENT"


# ---- the caller and the server


def test_a_caller_that_leaves_ends_the_push(node, client, target):
    class LeaveError(Exception):
        pass

    def leave(news):
        if news.index == 1:
            raise LeaveError

    failures: list[PbsError] = []
    with KvSink(target, on_failure=lambda _, error: failures.append(error)):
        with pytest.raises(LeaveError):
            client.prefill(
                MODEL, prompt(8000), "dense", delivery=Push(target), on_layer=leave
            )
        until(lambda: bool(failures))
        assert failures[0].code is grpc.StatusCode.CANCELLED
    is_as_new(node, client, target)


def test_a_deadline_ends_the_push(node, client, target):
    failures: list[PbsError] = []
    blocked = threading.Event()

    def wait(header, layer, k, v):
        blocked.wait(WAIT_SECONDS_MAX)

    with KvSink(
        target, on_layer=wait, on_failure=lambda _, error: failures.append(error)
    ):
        with pytest.raises(pbs_client.DeadlineExceededError):
            client.prefill(
                MODEL, prompt(1000), "dense", delivery=Push(target), timeout=1
            )
        until(lambda: holds_nothing(node))
        blocked.set()
        until(lambda: bool(failures))
    is_as_new(node, client, target)


def test_a_drain_lets_a_push_finish(model, target):
    """SIGTERM comes in the midst of a push whose sink goes on when the drain is on."""
    with pushing_server(model, [target]) as node, Client(node.target) as client:
        tokens = prompt(3000)
        expected = inline(client, tokens)
        refused: list[tuple[str, str]] = []

        def stop_server(header, layer, k, v):
            if layer == 0:
                node.process.terminate()
                until(lambda: any('"draining"' in line for line in node.log))
                refused.append(fails(client, target))

        with KvSink(target, on_layer=stop_server, credit_bytes=CHUNK_BYTES) as sink:
            push(client, target, tokens)
            assert bytes_of(sink.take(WAIT_SECONDS_MAX).cache) == expected
        assert refused == [("UNAVAILABLE", "draining: this server takes no new work")]
        assert node.process.wait(WAIT_SECONDS_MAX) == 0


def test_a_sink_that_comes_back_gets_the_next_push(node, client, target):
    assert fails(client, target)[0] == "UNAVAILABLE"
    is_as_new(node, client, target)
    assert fails(client, target)[0] == "UNAVAILABLE"
    is_as_new(node, client, target)


def test_descriptors_of_the_server_do_not_grow_with_failures(
    node, client, target
):
    tokens = prompt(100)

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{node.process.pid}/fd"))

    def fail_often(count: int) -> None:
        for _ in range(count):
            with raw_sink(ends_at_once, target):
                fails(client, target, tokens)

    fail_often(3)
    before = descriptors()
    fail_often(20)
    until(lambda: descriptors() <= before + 3)
