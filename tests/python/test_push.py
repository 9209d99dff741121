"""Push delivery: the server sends caches to a KvSink, by the real both ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pbs_client
import pytest
from eventually import WAIT_SECONDS_MAX, until
from pbs_client import Client, KvFormat, KvSink, PbsError, Push
from pbs_client.kv_params import prompt_digest
from push_world import (
    CHUNK_BYTES,
    LAYERS,
    MODEL,
    SPARSE,
    RawPush,
    bytes_of,
    fails,
    holds_nothing,
    inline,
    is_as_new,
    metric,
    prompt,
    push,
    pushing_server,
    raw_sink,
)
from real_server import running_server

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
    "f8_e4m3": {"wire_dtype": "f8_e4m3"},
    "f8_e4m3_pages_of_64_nhd": {
        "wire_dtype": "f8_e4m3", "page_tokens": 64, "layout": "NHD",
    },
}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("length", [1, 255, 3000])
def test_a_pushed_cache_equals_a_fetched_one(pusher, target, form, length):
    tokens = prompt(length, seed=length)
    ticket = pusher.prefill(MODEL, tokens, "dense", delivery="lease").ticket
    names = ("dtype", "layout", "wire_dtype", "page_tokens")
    known = {name: form[name] for name in names if name in form}
    expected = pusher.fetch(ticket, kv_format=KvFormat(**known))
    pusher.release(ticket)
    with KvSink(target) as sink:
        push(pusher, target, tokens, **form)
        cache = sink.take(WAIT_SECONDS_MAX).cache
    assert bytes_of(cache) == bytes_of(expected)
    names = ("layers", "tokens", "heads", "prompt_tokens", "layout", "model_digest", "wire_dtype")
    for name in names:
        assert getattr(cache, name) == getattr(expected, name)
    assert cache.sparsity_digest == expected.sparsity_digest == "exact"
    assert cache.first_token is None


@pytest.mark.parametrize("method", ["dense", SPARSE], ids=["dense", "pbs"])
def test_a_pushed_cache_equals_an_inline_one_and_its_header_names_it(
    pusher, target, method
):
    tokens = prompt(1000)
    expected = pusher.prefill(MODEL, tokens, method, delivery="inline")
    delivery = Push(target, chunk_bytes=CHUNK_BYTES)
    with KvSink(target) as sink:
        result = pusher.prefill(
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


def test_a_push_is_charged_as_an_inline_delivery(pusher, target):
    tokens, form = prompt(1000), {"dtype": "bf16"}
    with KvSink(target):
        pushed = pusher.prefill(MODEL, tokens, "dense", delivery=Push(target, **form))
    sent = pusher.prefill(
        MODEL, tokens, "dense", delivery=pbs_client.Inline(**form)
    )
    assert pushed.stats.planned_bytes == sent.stats.planned_bytes


def test_the_sink_has_the_first_layer_while_later_ones_are_computed(pusher, target):
    at: dict[str, float] = {}

    def arrived(header, layer, k, v):
        at[f"sink {layer}"] = time.monotonic()

    with KvSink(target, on_layer=arrived) as sink:
        pusher.prefill(
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


def test_two_pushes_at_once_arrive_whole(pusher, target):
    prompts = [prompt(2000, seed) for seed in (1, 2)]
    expected = {prompt_digest(tokens): inline(pusher, tokens) for tokens in prompts}
    together = threading.Barrier(2)

    def meet(header, layer, k, v):
        if layer == 0:
            together.wait(WAIT_SECONDS_MAX)  # both are under way

    with KvSink(target, on_layer=meet) as sink, ThreadPoolExecutor() as pool:
        pushes = [pool.submit(push, pusher, target, tokens) for tokens in prompts]
        caches = [sink.take(WAIT_SECONDS_MAX) for _ in prompts]
        for one in pushes:
            one.result()
    found = {one.header.prompt_digest: bytes_of(one.cache) for one in caches}
    assert found == expected


def test_a_push_counts_as_a_transfer(pushing, pusher, target):
    names = ("pbs_kv_transfer_bytes_total", "pbs_kv_transfer_time_seconds_count")
    before = [metric(pushing, name) for name in names]
    with KvSink(target) as sink:
        push(pusher, target, prompt(500))
        size = sink.take(WAIT_SECONDS_MAX).header.bytes
    assert [metric(pushing, name) for name in names] == [before[0] + size, before[1] + 1]


# ---- credit


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_server_never_sends_beyond_the_credit(pusher, target, chunks):
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
        push(pusher, target, prompt(3000))
    assert 0 < max(seen) <= window


def test_a_chunk_larger_than_the_credit_waits_for_it(pushing, pusher, target):
    waits, came = threading.Event(), []
    name = "pbs_kv_transfer_bytes_total"  # counts a chunk that waits
    before = metric(pushing, name)

    def grants_a_byte_too_little(raw: RawPush, context) -> Iterator[bytes]:
        yield raw.ack(credit=CHUNK_BYTES - 1)
        reader = threading.Thread(target=lambda: came.append(raw.read()))
        reader.start()
        until(lambda: metric(pushing, name) == before + CHUNK_BYTES)
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
        push(pusher, target, prompt(3000))
    assert waits.is_set()


def test_a_slow_consumer_holds_back_the_server(pushing, pusher, target):
    """The window of a KvSink counts what on_layer has not returned from."""
    window, release = 2 * CHUNK_BYTES, threading.Event()
    name = "pbs_kv_transfer_bytes_total"
    before = metric(pushing, name)
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
        running = pool.submit(pusher.prefill, MODEL, prompt(2000), "dense", **arguments)
        try:
            assert reached.wait(WAIT_SECONDS_MAX)
            assert computed.wait(WAIT_SECONDS_MAX)  # and the server cannot send all
            sent = metric(pushing, name) - before
        finally:
            release.set()
        running.result(WAIT_SECONDS_MAX)
        sink.take(WAIT_SECONDS_MAX)
    # One chunk more is made, and waits.
    assert sent <= layer_bytes + window + CHUNK_BYTES


# ---- targets


def test_only_the_targets_of_the_configuration_are_reached(pusher, target):
    port = target.rpartition(":")[2]
    others = (
        *(f"localhost:{port}", f"127.0.0.1:0{port}", f" {target}", f"dns:///{target}"),
        *(f"ipv4:{target}", f"{target}/", "127.0.0.1:1", "169.254.169.254:80", "x"),
    )
    with KvSink(target) as sink:
        for other in others:
            code, message = fails(pusher, other)
            assert code == "INVALID_ARGUMENT"
            assert message == (
                f'delivery.push.target "{other}" is not one of this server\'s push_targets'
            )
        code, message = fails(pusher, "")
        assert (code, "is empty" in message) == ("INVALID_ARGUMENT", True)
        with pytest.raises(pbs_client.DeadlineExceededError):
            sink.take(timeout=0)


def test_a_server_without_targets_pushes_nowhere(push_model, target):
    flags = ("--model", f"{MODEL}={push_model}")
    with running_server(*flags) as pushing, Client(pushing.target) as pusher, KvSink(target):
        assert fails(pusher, target)[0] == "INVALID_ARGUMENT"


# ---- the caller and the server


def test_a_caller_that_leaves_ends_the_push(pushing, pusher, target):
    class LeaveError(Exception):
        pass

    def leave(news):
        if news.index == 1:
            raise LeaveError

    failures: list[PbsError] = []
    with KvSink(target, on_failure=lambda _, error: failures.append(error)):
        with pytest.raises(LeaveError):
            pusher.prefill(
                MODEL, prompt(8000), "dense", delivery=Push(target), on_layer=leave
            )
        until(lambda: bool(failures))
        assert failures[0].code is grpc.StatusCode.CANCELLED
    is_as_new(pushing, pusher, target)


def test_a_deadline_ends_the_push(pushing, pusher, target):
    failures: list[PbsError] = []
    blocked = threading.Event()

    def wait(header, layer, k, v):
        blocked.wait(WAIT_SECONDS_MAX)

    with KvSink(
        target, on_layer=wait, on_failure=lambda _, error: failures.append(error)
    ):
        with pytest.raises(pbs_client.DeadlineExceededError):
            pusher.prefill(
                MODEL, prompt(1000), "dense", delivery=Push(target), timeout=1
            )
        until(lambda: holds_nothing(pushing))
        blocked.set()
        until(lambda: bool(failures))
    is_as_new(pushing, pusher, target)


def test_a_drain_lets_a_push_finish(push_model, target):
    """SIGTERM comes in the midst of a push whose sink goes on when the drain is on."""
    with pushing_server(push_model, [target]) as pushing, Client(pushing.target) as pusher:
        tokens = prompt(3000)
        expected = inline(pusher, tokens)
        refused: list[tuple[str, str]] = []

        def stop_server(header, layer, k, v):
            if layer == 0:
                pushing.process.terminate()
                until(lambda: any('"draining"' in line for line in pushing.log))
                refused.append(fails(pusher, target))

        with KvSink(target, on_layer=stop_server, credit_bytes=CHUNK_BYTES) as sink:
            push(pusher, target, tokens)
            assert bytes_of(sink.take(WAIT_SECONDS_MAX).cache) == expected
        assert refused == [("UNAVAILABLE", "draining: this server takes no new work")]
        assert pushing.process.wait(WAIT_SECONDS_MAX) == 0


def test_a_sink_that_comes_back_gets_the_next_push(pushing, pusher, target):
    assert fails(pusher, target)[0] == "UNAVAILABLE"
    is_as_new(pushing, pusher, target)
    assert fails(pusher, target)[0] == "UNAVAILABLE"
    is_as_new(pushing, pusher, target)


def test_a_drain_ends_a_push_that_does_not_go_on(push_model, target):
    """After drain_seconds_max, which is 5 here."""
    blocked = threading.Event()

    def wait(header, layer, k, v):
        blocked.wait(2 * WAIT_SECONDS_MAX)

    with (
        pushing_server(push_model, [target]) as pushing,
        Client(pushing.target) as pusher,
        KvSink(target, on_layer=wait, credit_bytes=CHUNK_BYTES),
        ThreadPoolExecutor() as pool,
    ):
        running = pool.submit(fails, pusher, target, prompt(3000))
        try:
            until(lambda: metric(pushing, "pbs_kv_transfer_bytes_total") > 0)
            pushing.process.terminate()
            assert running.result(WAIT_SECONDS_MAX)[0] in ("UNAVAILABLE", "CANCELLED")
            assert pushing.process.wait(WAIT_SECONDS_MAX) == 0
        finally:
            blocked.set()
