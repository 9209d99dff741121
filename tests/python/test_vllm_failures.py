"""No fault of a hand-off gives vLLM a wrong token, stops it, or keeps a lease."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import grpc
import pytest
from eventually import WAIT_SECONDS_MAX, until
from fake_server import Handler, fake_server, forward
from pbs_client import NotFoundError, Pbs, _messages
from real_server import RECALL_MODEL

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed: scripts/check.sh vllm")

from vllm_server import RUNNING, SLOTS, connector, refused_start  # noqa: E402
from vllm_world import World, params_of  # noqa: E402

FETCH = "/pbs.v1.KvSource/Fetch"
PASSED_ON = (
    "/pbs.v1.KvSource/Describe",
    "/pbs.v1.KvSource/Renew",
    "/pbs.v1.KvSource/Release",
    "/pbs.v1.Prefill/ListModels",
)
KvChunk = _messages._message_class("pbs.v1.KvChunk")

BOTH_POLICIES = pytest.mark.parametrize(
    "world", ["llama, fail", "qwen2, recompute"], indirect=True
)
RECALL = pytest.mark.parametrize("world", ["recall, fail, two ranks"], indirect=True)


@contextlib.contextmanager
def between(world: World, fetch: Handler) -> Iterator[str]:
    """A server between vLLM and the real one, with its own Fetch."""
    with grpc.insecure_channel(world.prefill.target) as channel:
        handlers = {name: forward(channel, name) for name in PASSED_ON}
        with fake_server({**handlers, FETCH: fetch}) as target:
            yield target
            # The release passes through it, after the answer.
            until(lambda: world.leases() == 0)


def check_failed(world: World, answer, prompt) -> None:
    """The policy was kept: an error and no tokens, or vLLM's own tokens."""
    if world.policy == "fail":
        assert answer.status == 500, answer
    else:
        assert answer.tokens == world.expected(prompt)
    # The engine lives, and nothing wrong is in its caches.
    assert world.vllm.complete(prompt, cache_salt="common").tokens == world.expected(
        prompt
    )


# ---- tickets


def released(world, ticket, prompt):
    world.client.release(ticket)
    return params_of(ticket, prompt)


def expired(world, ticket, prompt):
    world.client.renew(ticket, 1)
    until(lambda: not world.is_held(ticket))
    return params_of(ticket, prompt)


def old_epoch(world, ticket, prompt):
    return params_of(dataclasses.replace(ticket, epoch=ticket.epoch ^ 1), prompt)


def unknown(world, ticket, prompt):
    return params_of(dataclasses.replace(ticket, handle="f" * 32), prompt)


def of_another_prompt(world, ticket, prompt):
    return params_of(ticket, [*prompt[:-1], prompt[-1] ^ 1])


def of_another_prompt_with_a_false_digest(world, ticket, prompt):
    other, _ = world.handoff(world.prompt(9, len(prompt) + 1), ttl_seconds=20)
    return params_of(other, prompt)


def out_of_range(world, ticket, prompt):
    return params_of(ticket, prompt, tokens=len(prompt) + 1)


def of_fewer_tokens(world, ticket, prompt):
    return params_of(ticket, prompt[:-1])


def of_another_model(world, ticket, prompt):
    return params_of(dataclasses.replace(ticket, model_digest="other"), prompt)


def of_another_method(world, ticket, prompt):
    return params_of(dataclasses.replace(ticket, sparsity_digest="exact-0"), prompt)


def without_a_field(world, ticket, prompt):
    params = params_of(ticket, prompt)
    del params["prompt_digest"]
    return params


def with_a_wrong_type(world, ticket, prompt):
    return params_of(ticket, prompt, ticket=[1])


def at_a_server_that_is_not_listed(world, ticket, prompt):
    return params_of(ticket, prompt, endpoint="localhost:1")


def at_a_port_that_nobody_listens_on(world, ticket, prompt):
    return params_of(ticket, prompt, endpoint="127.0.0.1:9")


def at_no_server(world, ticket, prompt):
    return params_of(ticket, prompt, endpoint="")


@BOTH_POLICIES
@pytest.mark.parametrize(
    "change",
    [
        *(released, expired, old_epoch, unknown, of_another_prompt),
        *(of_another_prompt_with_a_false_digest, out_of_range, of_fewer_tokens),
        *(of_another_model, of_another_method, without_a_field, with_a_wrong_type),
        *(at_a_server_that_is_not_listed, at_a_port_that_nobody_listens_on),
        at_no_server,
    ],
)
def test_a_ticket_that_cannot_be_used_gives_no_wrong_token(world, change):
    prompt = world.prompt(200, 300)
    ticket, _ = world.handoff(prompt, ttl_seconds=20)
    params = change(world, ticket, prompt)
    answer = world.vllm.complete(prompt, params)
    check_failed(world, answer, prompt)
    assert ticket.handle not in world.vllm.log()
    with contextlib.suppress(NotFoundError):  # some changes hide it from vLLM
        world.client.release(ticket)


# ---- faults of the transfer


@BOTH_POLICIES
@pytest.mark.parametrize("broken", [0, 3], ids=["the first chunk", "a later chunk"])
def test_a_corrupt_chunk_gives_no_wrong_token(world, broken):
    prompt = world.prompt(210, 900)
    ticket, _ = world.handoff(prompt)

    def fetch(requests, context):
        for index, reply in enumerate(forward(channel, FETCH)(requests, context)):
            chunk = KvChunk.FromString(reply)
            if index == broken:
                payload = bytearray(chunk.payload)
                payload[len(payload) // 2] ^= 1
                chunk.payload = bytes(payload)
            yield chunk.SerializeToString()

    with (
        grpc.insecure_channel(world.prefill.target) as channel,
        between(world, fetch) as target,
    ):
        answer = world.vllm.complete(prompt, params_of(ticket, prompt, endpoint=target))
        check_failed(world, answer, prompt)
        until(lambda: not world.is_held(ticket))
    assert "crc32c" in world.vllm.log()


@BOTH_POLICIES
def test_a_server_that_fails_at_a_layer_gives_no_wrong_token(world):
    prompt = world.prompt(220, 700)
    ticket, _ = world.handoff(prompt)

    def fetch(requests, context):
        for reply in forward(channel, FETCH)(requests, context):
            if KvChunk.FromString(reply).layer == 1:
                context.abort(grpc.StatusCode.INTERNAL, "layer 1")
            yield reply

    with (
        grpc.insecure_channel(world.prefill.target) as channel,
        between(world, fetch) as target,
    ):
        answer = world.vllm.complete(prompt, params_of(ticket, prompt, endpoint=target))
        check_failed(world, answer, prompt)
        until(lambda: not world.is_held(ticket))


@BOTH_POLICIES
def test_a_broken_connection_is_resumed(world):
    prompt = world.prompt(230, 700)
    ticket, _ = world.handoff(prompt)
    calls = []

    def fetch(requests, context):
        calls.append(1)
        for reply in forward(channel, FETCH)(requests, context):
            if len(calls) == 1 and KvChunk.FromString(reply).layer == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            yield reply

    with (
        grpc.insecure_channel(world.prefill.target) as channel,
        between(world, fetch) as target,
    ):
        answer = world.vllm.complete(prompt, params_of(ticket, prompt, endpoint=target))
    assert answer.tokens == world.expected(prompt)
    assert answer.cached_tokens == len(prompt) - 1
    assert len(calls) == 2


@BOTH_POLICIES
def test_an_abort_while_loading_ends_the_load_and_releases_the_lease(world):
    prompt = world.prompt(240, 700)
    ticket, _ = world.handoff(prompt)
    begun, ended = threading.Event(), threading.Event()

    def fetch(requests, context):
        list(requests)
        context.add_callback(ended.set)
        begun.set()
        ended.wait(WAIT_SECONDS_MAX)
        return
        yield b""

    with between(world, fetch) as target:
        with world.vllm.request(prompt, params_of(ticket, prompt, endpoint=target)):
            assert begun.wait(WAIT_SECONDS_MAX)
            assert not ended.is_set()
        assert ended.wait(WAIT_SECONDS_MAX)  # the client hung up
        until(lambda: not world.is_held(ticket))
    assert world.vllm.complete(prompt).tokens == world.expected(prompt)
    until(world.is_idle)


@BOTH_POLICIES
def test_many_aborts_at_any_time_leave_nothing_behind(world):
    """Four rounds of requests whose clients hang up, then one that stays."""
    for round_number, num_running in enumerate((0, 1, 4, SLOTS)):
        prompts = [world.prompt(300 + 16 * round_number + i, 200) for i in range(16)]
        tickets = [world.handoff(prompt) for prompt in prompts]
        with contextlib.ExitStack() as requests:
            for prompt, (_, params) in zip(prompts, tickets):
                requests.enter_context(world.vllm.request(prompt, params, 500))
            until(lambda least=num_running: world.vllm.metric(RUNNING) >= least)
        until(lambda held=tickets: not any(world.is_held(t) for t, _ in held))
    prompt = world.prompt(299, 300)
    _, params = world.handoff(prompt)
    answer = world.vllm.complete(prompt, params)
    assert answer.tokens == world.expected(prompt)
    assert answer.cached_tokens == len(prompt) - 1
    until(world.is_idle)


@BOTH_POLICIES
def test_requests_that_vllm_refuses_release_their_lease(world):
    prompt = world.prompt(250, 100)
    ticket, params = world.handoff(prompt)
    answer = world.vllm.complete(prompt, params, new_tokens=1_000_000)
    assert answer.status == 400
    until(lambda: not world.is_held(ticket))


# ---- approximate caches


@RECALL
def test_an_approximate_cache_without_its_salt_is_refused(world):
    prompt = world.prompt(260, 1500)
    ticket, params = world.handoff(prompt, Pbs(threshold=0.9))
    assert ticket.sparsity_digest.startswith("pbs-")
    for salt in ("", "exact", None):
        fields = {} if salt == "" else {"cache_salt": salt}
        check_failed(world, world.vllm.complete(prompt, params, **fields), prompt)
    assert "send the request's sparsity_digest as cache_salt" in world.vllm.log()


@RECALL
def test_an_approximate_cache_stays_among_requests_of_its_salt(world):
    prompt = world.prompt(270, 1500)
    ticket, params = world.handoff(prompt, Pbs(threshold=0.9))
    salt = ticket.sparsity_digest
    first = world.vllm.complete(prompt, params, cache_salt=salt)
    assert first.cached_tokens == len(prompt) - 1
    assert world.vllm.complete(prompt, cache_salt=salt).cached_tokens > 0
    assert world.vllm.complete(prompt).cached_tokens == 0


# ---- the start


def test_a_setting_that_is_missing_stops_the_start_by_its_name():
    printed = refused_start(RECALL_MODEL, connector("fail", endpoints=[]))
    assert "kv_connector_extra_config endpoints names no server" in printed
