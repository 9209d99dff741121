"""What such systems got wrong in public, and what the hand-off does instead."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pbs_client
import pytest
from pbs_client import Attention, Client, KvPart, KvTicket, Lease, Pbs, _messages, _wire
from pbs_client._kv_receiver import KvReceiver
from pbs_client._kv_transfer import FetchPlan
from pbs_client.kv import KvCache, KvFormat
from real_server import REPOSITORY, RunningServer, running_server

FETCH = "/pbs.v1.KvSource/Fetch"
MODEL, LAYERS, VOCABULARY = "random", 6, 512
POSITIONS = 1 << 18  # of the models
SECONDS_MAX = 60  # only a failure takes so long
SPARSE = Attention(Pbs(threshold=0.7), dense_fallback=False)
NOTHING_HELD = dict.fromkeys(
    ("pbs_memory_charged_bytes", "pbs_kv_held_bytes", "pbs_kv_leases"), 0.0
)


def eventually(check: Callable[[], bool], seconds: float = SECONDS_MAX) -> bool:
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def prompt(length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, VOCABULARY, length)


def arrays_of(cache: KvCache) -> list[bytes]:
    return [array.tobytes() for array in (*cache.k, *cache.v)]


def metric(node: RunningServer, name: str) -> float:
    """The sum over the labels of a metric."""
    with urllib.request.urlopen(f"http://{node.metrics}/metrics", timeout=30) as page:
        text = page.read().decode()
    values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M)
    assert values, f"there is no metric {name}"
    return sum(map(float, values))


def holds_nothing(node: RunningServer) -> bool:
    return {name: metric(node, name) for name in NOTHING_HELD} == NOTHING_HELD


def random_model(path: Path, layers: int) -> tuple[str, ...]:
    """The flags of a node with a random model."""
    script = REPOSITORY / "tests" / "models" / "make_random_model.py"
    sizes = ["--preset", "tiny", "--layers", str(layers), "--positions", str(POSITIONS)]
    subprocess.run([sys.executable, script, *sizes, "--out", path], check=True)
    return ("--model", f"{MODEL}={path}", "--metrics-listen", "127.0.0.1:0")


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("models") / "six layers"
    with running_server(*random_model(folder, LAYERS)) as running:
        yield running


@pytest.fixture
def client(node) -> Iterator[Client]:
    with Client(node.target) as connected:
        yield connected


def hold(client: Client, tokens, method="dense", **lease) -> KvTicket:
    ticket = client.prefill(MODEL, tokens, method, delivery=Lease(**lease)).ticket
    assert ticket is not None
    return ticket


# ---- tickets that are not good


def raw_fetch(node: RunningServer, ticket: KvTicket, **fields) -> tuple[str, list[bytes]]:
    """The status of a Fetch that nothing was asked before, and what came."""
    request = _messages.FetchRequest(ticket=ticket.to_message(), **fields)
    messages: list[bytes] = []
    with grpc.insecure_channel(node.target) as channel:
        try:
            messages.extend(channel.unary_stream(FETCH)(request.SerializeToString()))
        except grpc.RpcError as error:
            return error.code().name, messages
    return "OK", messages


def released(node, client, ticket):
    client.release(ticket)
    return ticket


def expired(node, client, ticket):
    client.release(ticket)
    short = hold(client, prompt(100), ttl_seconds=1)
    assert eventually(lambda: holds_nothing(node))
    return short


def of_an_old_epoch(node, client, ticket):
    return dataclasses.replace(ticket, epoch=ticket.epoch - 1)


def of_another_handle(node, client, ticket):
    first = "1" if ticket.handle[0] == "0" else "0"
    return dataclasses.replace(ticket, handle=first + ticket.handle[1:])


def of_another_method(node, client, ticket):
    other = client.prefill(MODEL, prompt(1000), SPARSE).sparsity_digest
    assert other != ticket.sparsity_digest
    return dataclasses.replace(ticket, sparsity_digest=other)


def of_another_model(node, client, ticket):
    return dataclasses.replace(ticket, model_digest="xxh3-128:" + "0" * 32)


def as_it_is(node, client, ticket):
    return ticket


BAD_TICKETS = {
    # how it is made of a good one, further fields of the request, status
    "released": (released, {}, "NOT_FOUND"),
    "expired": (expired, {}, "NOT_FOUND"),
    "of_an_old_epoch": (of_an_old_epoch, {}, "NOT_FOUND"),
    "of_another_handle": (of_another_handle, {}, "NOT_FOUND"),
    "of_another_method": (of_another_method, {}, "FAILED_PRECONDITION"),
    "of_another_model": (of_another_model, {}, "FAILED_PRECONDITION"),
    "for_a_longer_prompt": (as_it_is, {"token_count": 101}, "INVALID_ARGUMENT"),
    "for_tokens_past_the_end": (
        as_it_is,
        {"token_begin": 100, "token_count": 1},
        "INVALID_ARGUMENT",
    ),
    "for_a_layer_past_the_end": (as_it_is, {"layer_begin": LAYERS}, "INVALID_ARGUMENT"),
    "for_a_head_past_the_end": (
        as_it_is,
        {"head_begin": 1, "head_count": 2},
        "INVALID_ARGUMENT",
    ),
    "for_a_negative_token": (
        as_it_is,
        {"token_begin": -1, "token_count": 5},
        "INVALID_ARGUMENT",
    ),
}


@pytest.mark.parametrize(
    ("change", "fields", "status"), BAD_TICKETS.values(), ids=BAD_TICKETS
)
def test_a_bad_ticket_gets_an_error_and_no_byte(node, client, change, fields, status):
    good = hold(client, prompt(100))
    bad = change(node, client, good)
    before = metric(node, "pbs_kv_transfer_bytes_total")
    assert raw_fetch(node, bad, **fields) == (status, [])
    assert metric(node, "pbs_kv_transfer_bytes_total") == before
    if change is not released and change is not expired:
        client.release(good)
    assert eventually(lambda: holds_nothing(node))


def test_the_ticket_of_another_prompt_gives_the_cache_of_that_prompt_alone(client):
    tokens = prompt(300)
    expected = arrays_of(client.prefill(MODEL, tokens, "dense", delivery="inline").kv)
    tickets = [hold(client, prompt(300, seed)) for seed in range(1, 4)]
    caches = [arrays_of(client.fetch(ticket)) for ticket in tickets]
    for ticket in tickets:
        client.release(ticket)
    assert caches[0] == expected
    assert len({b"".join(cache) for cache in caches}) == len(caches)


# ---- lengths at the edges of pages and segments

PAGES = (16, 64)
SEGMENT = 256  # of pbs
LENGTHS = sorted(
    {
        size * count + less
        for size in (*PAGES, SEGMENT)
        for count in (1, 2, 3)
        for less in (-1, 0)
    }
)


@pytest.mark.parametrize("method", ["dense", SPARSE], ids=["dense", "pbs"])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_at_the_edge_of_a_page_or_segment_is_whole(node, client, length, method):
    tokens = prompt(length)
    expected = client.prefill(MODEL, tokens, method, delivery="inline").kv
    ticket = hold(client, tokens, method)
    for page in PAGES:
        cache = fetch_pages(node, client, ticket, page)
        assert arrays_of(cache) == arrays_of(expected)
    if length > 1:  # a decode tier may compute the last token again
        part = client.fetch(ticket, part=KvPart(tokens=(0, length - 1)))
        assert [k.tobytes() for k in part.k] == [k[:, :-1].tobytes() for k in expected.k]
        assert [v.tobytes() for v in part.v] == [v[:, :-1].tobytes() for v in expected.v]
    client.release(ticket)


def fetch_pages(node, client: Client, ticket: KvTicket, page: int) -> KvCache:
    """The cache in chunks of whole pages."""
    plan = FetchPlan.of(client.describe(ticket), KvPart(), KvFormat())
    receiver = KvReceiver(plan.shape)
    status, messages = raw_fetch(node, ticket, page_tokens=page, chunk_bytes=65536)
    assert status == "OK"
    for message in messages:
        chunk = _wire.decode_kv_chunk(message)
        end = chunk.token_begin + chunk.token_count
        assert chunk.token_begin % page == 0
        assert end % page == 0 or end == plan.shape.tokens.end
        receiver.add(chunk)
    return plan.cache(receiver)


# ---- fetches while the work runs


def begin_prefill(
    pool: ThreadPoolExecutor, client: Client, tokens, method="dense", **arguments
) -> tuple[KvTicket, Future]:
    """A prefill that has begun, and its ticket."""
    admitted: Future[KvTicket] = Future()

    def run():
        return client.prefill(
            MODEL,
            tokens,
            method,
            delivery="lease",
            on_admitted=lambda _, ticket: admitted.set_result(ticket),
            **arguments,
        )

    running = pool.submit(run)
    return admitted.result(SECONDS_MAX), running


PARTS = {
    "the_whole": KvPart(),
    "the_last_layer": KvPart(layers=(LAYERS - 1, 1)),
    "a_rectangle": KvPart(layers=(1, 3), tokens=(100, 700), heads=(1, 1)),
}


@pytest.mark.parametrize("method", ["dense", SPARSE], ids=["dense", "pbs"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_fetch_during_the_work_equals_one_after_it(client, part, method):
    with ThreadPoolExecutor() as pool:
        ticket, running = begin_prefill(pool, client, prompt(3000), method)
        assert not client.describe(ticket).complete
        during = client.fetch(ticket, part=part)
        running.result()
    after = client.fetch(ticket, part=part)
    client.release(ticket)
    assert arrays_of(during) == arrays_of(after)


class LeaveError(Exception):
    """Ends a prefill at a layer."""


@pytest.mark.parametrize("layer", [0, 2, LAYERS - 2])
def test_a_producer_that_fails_at_a_layer_ends_open_fetches_within_a_second(
    node, client, layer
):
    failed_at = []

    def fail(progress):
        if progress.index == layer:
            failed_at.append(time.monotonic())
            raise LeaveError

    def fetch(ticket):
        with pytest.raises(pbs_client.PbsError) as caught:
            client.fetch(ticket, resumes=0)
        return time.monotonic(), caught.value.code.name

    with ThreadPoolExecutor() as pool:
        ticket, running = begin_prefill(pool, client, prompt(6000), on_layer=fail)
        fetches = [pool.submit(fetch, ticket) for _ in range(3)]
        with pytest.raises(LeaveError):
            running.result(SECONDS_MAX)
        for one in fetches:
            ended_at, code = one.result(SECONDS_MAX)
            assert code in ("UNAVAILABLE", "NOT_FOUND")  # the latter: it came too late
            assert ended_at - failed_at[0] < 1
    assert eventually(lambda: holds_nothing(node))


# ---- cancelled prompts


def test_three_hundred_cancelled_prompts_leave_nothing_behind(node, client):
    """In four rounds, each with more prompts than the queue takes at once."""
    tokens = prompt(1000, seed=9)
    expected = arrays_of(client.prefill(MODEL, tokens, "dense", delivery="inline").kv)
    ended = {"cancelled": 0, "refused": 0, "done": 0}
    lock = threading.Lock()

    def cancelled(number: int) -> None:
        rng = np.random.default_rng(number)
        length, after = int(rng.integers(1, 3000)), float(rng.uniform(0.001, 0.1))
        delivery = (Lease(ttl_seconds=1), "inline", None)[number % 3]
        how = "done"
        try:
            result = client.prefill(
                MODEL, prompt(length, number), "dense", delivery=delivery, timeout=after
            )
            if result.ticket is not None:
                client.release(result.ticket)
        except pbs_client.DeadlineExceededError:
            how = "cancelled"
        except pbs_client.ResourceExhaustedError:
            how = "refused"
        with lock:
            ended[how] += 1

    for begin in range(0, 300, 75):
        with ThreadPoolExecutor(75) as pool:
            list(pool.map(cancelled, range(begin, begin + 75)))
        assert eventually(lambda: holds_nothing(node))  # leases of lost replies, too
        probe = hold(client, tokens)
        assert arrays_of(client.fetch(probe)) == expected
        client.release(probe)
    assert sum(ended.values()) == 300
    assert ended["cancelled"] > 150


# ---- silence

KEEPALIVE_SECONDS = 1
IMPATIENT = tuple(
    (f"grpc.{name}", 1000 * KEEPALIVE_SECONDS)
    for name in ("keepalive_time_ms", "keepalive_timeout_ms", "http2.ping_timeout_ms")
)
SILENCE_SECONDS_MIN = 4 * KEEPALIVE_SECONDS  # 30 s and 2 minutes, scaled


def test_a_long_silent_prefill_loses_no_connection(tmp_path):
    """Both sides ping after a second and give up after another; a layer takes longer."""
    flags = [*random_model(tmp_path / "two layers", layers=2), "--threads", "1"]
    for name in ("keepalive_seconds", "keepalive_timeout_seconds"):
        flags += ["--set", f"transport.{name}={KEEPALIVE_SECONDS}"]
    with (
        running_server(*flags) as node,
        Client(node.target, channel_options=IMPATIENT) as prefiller,
        Client(node.target, channel_options=IMPATIENT) as fetcher,
        ThreadPoolExecutor() as pool,
    ):
        length, silence = 8192, 0.0
        while silence < SILENCE_SECONDS_MIN:
            silence = silence_of(pool, prefiller, fetcher, prompt(length))
            # Nearly all the time is attention, which takes the square of the length.
            longer = min(4.0, 1.1 * (SILENCE_SECONDS_MIN / silence) ** 0.5)
            length = min(int(length * longer), POSITIONS)


def silence_of(pool, prefiller: Client, fetcher: Client, tokens) -> float:
    """Seconds for which both connections of a prefill and its fetch were silent."""
    heard, fetched = [time.monotonic()], []
    ticket, running = begin_prefill(
        pool, prefiller, tokens, on_layer=lambda _: heard.append(time.monotonic())
    )
    cache = fetcher.fetch(
        ticket, resumes=0, on_layer=lambda *_: fetched.append(time.monotonic())
    )
    running.result()
    fetcher.release(ticket)
    assert cache.tokens.count == len(tokens)
    return min(heard[1] - heard[0], fetched[1] - fetched[0])
