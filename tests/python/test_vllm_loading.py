"""The vLLM connector's leases and loads, against the real server and broken ones."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time

import numpy as np
import pytest
from eventually import WAIT_SECONDS_MAX, until
from fake_server import fake_server, never_answered, replies
from kv_chunks import EPOCH, Cache
from pbs_client import (
    Client,
    KvFormat,
    KvTicket,
    Lease,
    NotFoundError,
    PbsError,
    _messages,
)
from pbs_client.kv import Span
from pbs_client.kv_params import prompt_digest
from pbs_client.vllm.connections import CONNECTIONS_MAX, Connections
from pbs_client.vllm.fetching import Fetcher
from pbs_client.vllm.handoff import HandoffError, LoadCancelledError
from pbs_client.vllm.leases import Leases
from pbs_client.vllm.loader import Cancellation, Loader, LoadOrder
from pbs_client.vllm.parts import EngineShape
from pbs_client.vllm.settings import Settings

DESCRIBE = "/pbs.v1.KvSource/Describe"
FETCH = "/pbs.v1.KvSource/Fetch"
RENEW = "/pbs.v1.KvSource/Renew"
RELEASE = "/pbs.v1.KvSource/Release"

CALL_SECONDS_MAX = 5.0
PROMPT = np.random.default_rng(5).integers(16, 1000, 100).tolist()
RECALL = EngineShape(2, 2, 64, Span(0, 2), Span(0, 2), "f32")
SETTINGS = Settings.from_extra_config({"endpoints": ["127.0.0.1:*"]})


def is_held(client: Client, ticket: KvTicket) -> bool:
    try:
        client.describe(ticket)
    except NotFoundError:
        return False
    return True


@pytest.fixture
def ticket(server, client) -> KvTicket:
    """A lease of PROMPT that is the shortest there is."""
    made = client.prefill("recall", PROMPT, "dense", delivery=Lease(ttl_seconds=1))
    assert made.ticket is not None
    return dataclasses.replace(made.ticket, endpoint=server.target)


@pytest.fixture
def leases():
    connections = Connections()
    made = Leases(connections, CALL_SECONDS_MAX)
    yield made
    made.close()
    connections.close()


class Recorder:
    """Blocks that remember what was written."""

    block_size = 32

    def __init__(self) -> None:
        self.written: dict[int, tuple] = {}

    def write(self, layer, k, v, slots) -> None:
        self.written[layer] = (k.copy(), v.copy(), slots.copy())


def order_of(ticket: KvTicket, begin: int = 0, **changes) -> LoadOrder:
    """To load the tokens from `begin` on, but the last."""
    tokens = Span(begin, len(PROMPT) - 1 - begin)
    blocks = tuple(range(10, 10 + -(-tokens.end // 32) - tokens.begin // 32))
    made = LoadOrder(
        "r",
        tokens,
        blocks,
        len(PROMPT),
        ticket=ticket,
        prompt_digest=prompt_digest(PROMPT),
    )
    return dataclasses.replace(made, **changes)


def load(order: LoadOrder, engine=RECALL, settings=SETTINGS) -> Recorder:
    blocks = Recorder()
    Fetcher(settings, engine, blocks).load(order, Cancellation())
    return blocks


# ---- leases


def test_a_held_lease_outlives_its_time_and_ends_when_it_is_dropped(
    leases, client, ticket
):
    leases.hold(ticket)
    end = time.monotonic() + 3  # three times its time
    until(lambda: time.monotonic() > end or not is_held(client, ticket))
    assert is_held(client, ticket)
    leases.drop(ticket)
    until(lambda: not is_held(client, ticket))


def test_a_lease_of_two_requests_is_released_by_the_last(leases, client, ticket):
    leases.hold(ticket)
    leases.hold(ticket)
    leases.drop(ticket)
    end = time.monotonic() + 1.5
    until(lambda: time.monotonic() > end or not is_held(client, ticket))
    assert is_held(client, ticket)
    leases.drop(ticket)
    until(lambda: not is_held(client, ticket))


def test_all_leases_are_released_at_the_end(client, ticket):
    connections = Connections()
    leases = Leases(connections, 5.0)
    leases.hold(ticket)
    leases.close()
    connections.close()
    assert not is_held(client, ticket)


def test_the_end_does_not_wait_for_a_server_that_hangs():
    handlers = {RELEASE: never_answered, DESCRIBE: never_answered}
    with fake_server(handlers) as target:
        connections = Connections()
        leases = Leases(connections, 0.2)
        leases.hold(KvTicket("0" * 32, EPOCH, "m", "exact", target))
        begin = time.monotonic()
        leases.close()
        connections.close()
        assert time.monotonic() - begin < 5


def test_an_unknown_lease_is_dropped_without_an_error(leases, server, client, ticket):
    unknown = dataclasses.replace(ticket, handle="f" * 32)
    leases.drop(unknown)
    leases.hold(unknown)
    leases.drop(unknown)
    leases.hold(ticket)
    leases.drop(ticket)
    until(lambda: not is_held(client, ticket))


def test_a_server_that_hangs_does_not_hold_up_the_leases_of_another(
    leases, client, ticket
):
    with fake_server({DESCRIBE: never_answered}) as target:
        for number in range(100):
            leases.hold(KvTicket(f"{number:032x}", EPOCH, "m", "exact", target))
        leases.hold(ticket)
        begin = time.monotonic()
        leases.drop(ticket)
        until(lambda: not is_held(client, ticket))
        assert time.monotonic() - begin < CALL_SECONDS_MAX


def test_connections_are_bounded_and_reused():
    connections = Connections()
    with connections.client("127.0.0.1:1") as first:
        pass
    with connections.client("127.0.0.1:1") as again:
        assert again is first
    with contextlib.ExitStack() as used:
        for port in range(2, CONNECTIONS_MAX + 2):
            used.enter_context(connections.client(f"127.0.0.1:{port}"))
        with pytest.raises(HandoffError, match=f"{CONNECTIONS_MAX} prefill servers"):
            used.enter_context(connections.client("127.0.0.1:1"))
    with connections.client("127.0.0.1:1"):
        pass
    connections.close()


# ---- one load


def test_a_load_writes_the_cache_of_every_layer(client, ticket):
    expected = client.fetch(ticket)
    written = load(order_of(ticket)).written
    assert sorted(written) == [0, 1]
    for layer, (k, v, slots) in written.items():
        np.testing.assert_array_equal(k, expected.k[layer][:, :99])
        np.testing.assert_array_equal(v, expected.v[layer][:, :99])
        assert slots.tolist() == list(range(320, 419))


@pytest.mark.parametrize("rank", range(4))
def test_four_ranks_share_two_heads(client, ticket, rank):
    engine = dataclasses.replace(RECALL, heads=Span(rank // 2, 1))
    written = load(order_of(ticket), engine).written
    expected = client.fetch(ticket)
    np.testing.assert_array_equal(
        written[1][0], expected.k[1][rank // 2 : rank // 2 + 1, :99]
    )


def test_a_pipeline_rank_fetches_its_layers(ticket):
    engine = dataclasses.replace(RECALL, layers=Span(1, 1))
    assert sorted(load(order_of(ticket), engine).written) == [1]


def test_a_prefix_hit_fetches_only_the_rest(client, ticket):
    written = load(order_of(ticket, 64)).written
    expected = client.fetch(ticket)
    np.testing.assert_array_equal(written[0][1], expected.v[0][:, 64:99])
    assert written[0][2][0] == 320


def test_a_cache_beyond_the_limit_of_memory_comes_in_several_fetches(client, ticket):
    small = dataclasses.replace(SETTINGS, load_bytes_max=99 * 2 * 2 * 64 * 4)
    written = load(order_of(ticket), settings=small).written
    expected = client.fetch(ticket)
    np.testing.assert_array_equal(written[1][0], expected.k[1][:, :99])


def test_a_cache_is_converted_to_the_engines_dtype(ticket):
    engine = dataclasses.replace(RECALL, dtype="f16")
    assert load(order_of(ticket), engine).written[0][0].dtype == np.float16


def test_a_dedicated_engine_may_load_caches_that_travel_as_f8_e4m3(client, ticket):
    settings = dataclasses.replace(SETTINGS, dedicated=True, wire_dtype="f8_e4m3")
    engine = dataclasses.replace(RECALL, dtype="bf16")
    written = load(order_of(ticket), engine, settings).written
    kv_format = KvFormat("bf16", wire_dtype="f8_e4m3")
    expected = client.fetch(ticket, kv_format=kv_format)
    exact = client.fetch(ticket, kv_format=KvFormat("bf16"))
    for layer, (k, v, _) in written.items():
        np.testing.assert_array_equal(k, expected.k[layer][:, :99])
        np.testing.assert_array_equal(v, expected.v[layer][:, :99])
    assert not np.array_equal(expected.k[0], exact.k[0])


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        ({"num_layers": 3}, {}, "layers 2, the engine's model 3"),
        ({"head_dim": 32}, {}, "head_dim 64"),
        ({"num_kv_heads": 1}, {}, "KV heads 2"),
        ({}, {"prompt_tokens": 101}, "100 tokens"),
        ({}, {"prompt_digest": prompt_digest([1] * 100)}, "of another prompt's cache"),
    ],
)
def test_a_cache_that_is_not_as_expected_is_not_loaded(
    ticket, engine, changes, message
):
    blocks = Recorder()
    fetcher = Fetcher(SETTINGS, dataclasses.replace(RECALL, **engine), blocks)
    with pytest.raises(HandoffError, match=message):
        fetcher.load(order_of(ticket, **changes), Cancellation())
    assert blocks.written == {}


def test_a_server_whose_keys_are_rotated_otherwise_is_refused(ticket):
    same = dataclasses.replace(RECALL, rope_factor=1.0)
    assert sorted(load(order_of(ticket), same).written) == [0, 1]
    other = dataclasses.replace(RECALL, rope_factor=1.139)
    with pytest.raises(HandoffError, match=r"by 1, vLLM by 1\.139"):
        load(order_of(ticket), other)


@pytest.mark.parametrize(
    "changes",
    [
        {"handle": "f" * 32},
        {"epoch": 1},
        {"model_digest": "m"},
        {"sparsity_digest": "exact-0"},
    ],
    ids=str,
)
def test_a_ticket_that_is_not_the_servers_loads_nothing(ticket, changes):
    with pytest.raises(PbsError):
        load(order_of(dataclasses.replace(ticket, **changes)))


def test_a_released_ticket_loads_nothing(client, ticket):
    client.release(ticket)
    with pytest.raises(NotFoundError):
        load(order_of(ticket))


# ---- faults of a server


FAKE_TICKET = KvTicket("0" * 32, EPOCH, "m", "exact")
FAKE_ENGINE = EngineShape(2, 1, 4, Span(0, 2), Span(0, 1), "f32")
FAKE_CACHE = Cache.random(layers=2, heads=1, tokens=3, dim=4)


def fake_descriptor():
    return _messages.KvDescriptor(
        lease={"ticket": FAKE_TICKET.to_message(), "ttl_seconds": 60},
        num_layers=2,
        num_kv_heads=1,
        head_dim=4,
        num_tokens=3,
        dtype="F32",
        bytes=2 * 2 * 3 * 4 * 4,
        state="COMPLETE",
    )


def fake_order(target: str) -> LoadOrder:
    ticket = dataclasses.replace(FAKE_TICKET, endpoint=target)
    return LoadOrder("r", Span(0, 3), (1,), 3, ticket=ticket)


def fake_handlers(fetch):
    renewed = _messages.KvLease(ticket=FAKE_TICKET.to_message(), ttl_seconds=60)
    return {
        DESCRIBE: replies(fake_descriptor()),
        RENEW: replies(renewed),
        FETCH: fetch,
    }


def test_a_corrupt_chunk_of_the_second_layer_fails_the_load():
    chunks = list(FAKE_CACHE.chunks())
    chunks[-1].payload = b"\0" * len(chunks[-1].payload)
    with fake_server(fake_handlers(replies(*chunks))) as target:
        blocks = Recorder()
        fetcher = Fetcher(SETTINGS, FAKE_ENGINE, blocks)
        with pytest.raises(PbsError, match="layer 1 V"):
            fetcher.load(fake_order(target), Cancellation())
    assert sorted(blocks.written) == [0]


def test_a_load_that_waits_ends_at_once_when_it_is_cancelled():
    with fake_server(fake_handlers(never_answered)) as target:
        cancellation = Cancellation()
        timer = threading.Timer(0.2, cancellation.cancel)
        timer.start()
        fetcher = Fetcher(SETTINGS, FAKE_ENGINE, Recorder())
        begin = time.monotonic()
        with pytest.raises(PbsError):
            fetcher.load(fake_order(target), cancellation)
        assert time.monotonic() - begin < 10


def test_a_load_ends_with_its_time():
    short = dataclasses.replace(SETTINGS, load_seconds_max=0.3)
    with fake_server(fake_handlers(never_answered)) as target:
        fetcher = Fetcher(short, FAKE_ENGINE, Recorder())
        with pytest.raises(PbsError, match="time limit"):
            fetcher.load(fake_order(target), Cancellation())


# ---- threads


def results_of(loader: Loader, count: int):
    """All results, when `count` loads have ended."""
    ended, failed = set(), set()

    def is_done() -> bool:
        results = loader.take()
        ended.update(results.request_ids)
        failed.update(results.failed_blocks)
        return len(ended) >= count

    until(is_done)
    return ended, failed


def order(request_id: str, blocks: tuple[int, ...], refusal: str = "") -> LoadOrder:
    return LoadOrder(request_id, Span(0, 1), blocks, 1, refusal)


def test_every_load_has_one_result_and_failed_ones_name_their_blocks():
    def run(given: LoadOrder, _: Cancellation) -> None:
        if given.request_id in ("broken", "bug"):
            raise HandoffError("no") if given.request_id == "broken" else KeyError("x")

    loader = Loader(run, 2)
    loader.submit(order("good", (1,)))
    loader.submit(order("broken", (2, 3)))
    loader.submit(order("bug", (4,)))
    loader.submit(order("refused", (5,), "why"))
    ended, failed = results_of(loader, 4)
    assert ended == {"good", "broken", "bug", "refused"}
    assert failed == {2, 3, 4, 5}
    assert not loader.take().request_ids
    loader.close(1)


def test_a_cancelled_load_has_a_result_also_before_it_began():
    begun, may_go = threading.Event(), threading.Event()

    def run(_: LoadOrder, cancellation: Cancellation) -> None:
        cancellation.on_cancel(may_go.set)
        begun.set()
        may_go.wait(WAIT_SECONDS_MAX)
        cancellation.check()

    loader = Loader(run, 1)
    loader.submit(order("running", (1,)))
    loader.submit(order("waiting", (2,)))
    assert begun.wait(WAIT_SECONDS_MAX)
    loader.cancel(["running", "waiting", "unknown"])
    assert results_of(loader, 2) == ({"running", "waiting"}, {1, 2})
    loader.close(1)


def test_the_end_cancels_all_loads():
    begun, may_go = threading.Event(), threading.Event()

    def run(_: LoadOrder, cancellation: Cancellation) -> None:
        cancellation.on_cancel(may_go.set)
        begun.set()
        may_go.wait(WAIT_SECONDS_MAX)
        raise LoadCancelledError

    loader = Loader(run, 1)
    loader.submit(order("r", (1,)))
    assert begun.wait(WAIT_SECONDS_MAX)
    loader.close(WAIT_SECONDS_MAX)
    assert may_go.is_set()


def test_no_order_shows_its_ticket():
    assert "f" * 32 not in repr(order_of(KvTicket("f" * 32, 1, "m", "exact", "a:1")))
