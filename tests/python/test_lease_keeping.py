"""A fetch keeps its lease: in the Python client, and in the C++ client of pbs-decode."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from fake_server import fake_server, forward, replies
from kv_chunks import EPOCH, Cache
from pbs_client import Client, KvTicket, _messages
from real_server import RECALL_MODEL, program, running_server

RenewRequest = _messages.RenewRequest
KvLease = _messages.KvLease
KvDescriptor = _messages.KvDescriptor

DESCRIBE = "/pbs.v1.KvSource/Describe"
FETCH = "/pbs.v1.KvSource/Fetch"
RENEW = "/pbs.v1.KvSource/Renew"
RELEASE = "/pbs.v1.KvSource/Release"
MODELS = "/pbs.v1.Prefill/ListModels"
PREFILL = "/pbs.v1.Prefill/Prefill"

TTL_SECONDS = 1  # the shortest there is
WAIT_SECONDS_MAX = 30  # only a failure takes so long
TICKET = KvTicket("0" * 32, EPOCH, "m", "exact")
CACHE = Cache.random(layers=2, heads=1, tokens=3, dim=4)


def descriptor(state: str = "COMPLETE", ttl_seconds: int = TTL_SECONDS):
    return KvDescriptor(
        lease={"ticket": TICKET.to_message(), "ttl_seconds": ttl_seconds},
        num_layers=2,
        num_kv_heads=1,
        head_dim=4,
        num_tokens=3,
        dtype="F32",
        bytes=2 * 2 * 3 * 4 * 4,
        state=state,
    )


class Renewals:
    """Answers Renew, and holds a fetch back until there were enough of them."""

    def __init__(self, wanted: int) -> None:
        self.requests: list = []
        self._wanted = wanted
        self._enough = threading.Event()

    def handler(self, answer):
        def handle(requests, context):
            (request,) = requests
            self.requests.append(RenewRequest.FromString(request))
            if len(self.requests) >= self._wanted:
                self._enough.set()
            yield from answer(iter([request]), context)

        return handle

    def held_back(self, answer):
        def handle(requests, context):
            given = list(requests)
            if not self._enough.wait(WAIT_SECONDS_MAX):
                context.abort(grpc.StatusCode.NOT_FOUND, "the lease was not renewed")
            yield from answer(iter(given), context)

        return handle


def fetch(renewals: Renewals, describe, renew=None) -> None:
    """Fetches CACHE through the Python client."""
    renewed = KvLease(ticket=TICKET.to_message(), ttl_seconds=TTL_SECONDS)
    handlers = {
        DESCRIBE: describe,
        RENEW: renewals.handler(renew or replies(renewed)),
        FETCH: renewals.held_back(replies(*CACHE.chunks())),
    }
    with fake_server(handlers) as target, Client(target) as client:
        kv = client.fetch(TICKET)
    np.testing.assert_array_equal(kv.v[1], CACHE.arrays[1]["V"])


def test_a_fetch_that_outlasts_its_lease_renews_it_for_the_time_it_has():
    renewals = Renewals(wanted=4)  # the last 1.5 times the lease after the first
    fetch(renewals, replies(descriptor()))
    assert {request.ticket.handle for request in renewals.requests} == {TICKET.handle}
    assert {request.ttl_seconds for request in renewals.requests} == {TTL_SECONDS}


def test_a_lease_that_somebody_else_made_longer_stays_so():
    answers = iter([descriptor(), descriptor(ttl_seconds=600)])

    def describe(requests, _):
        list(requests)
        yield next(answers).SerializeToString()

    renewals = Renewals(wanted=2)
    fetch(renewals, describe)
    assert [request.ttl_seconds for request in renewals.requests] == [TTL_SECONDS, 600]


def test_a_lease_is_not_renewed_while_its_prefill_runs():
    states = ["RUNNING", "RUNNING", "COMPLETE"]
    described = []

    def describe(requests, _):
        list(requests)
        described.append(states[len(described)])
        yield descriptor(described[-1]).SerializeToString()

    renewals = Renewals(wanted=1)
    fetch(renewals, describe)
    assert described == states


def test_a_renewal_that_fails_is_tried_again_and_does_not_end_the_fetch():
    def refuse(requests, context):
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        yield b""

    renewals = Renewals(wanted=3)
    fetch(renewals, replies(descriptor()), refuse)
    assert len(renewals.requests) >= 3


# ---- pbs-decode


@pytest.fixture(scope="module")
def short_leases():
    flags = ["--model", f"recall={RECALL_MODEL}", "--threads", "1"]
    with running_server(
        *flags, "--set", f"lease.ttl_seconds_default={TTL_SECONDS}"
    ) as server:
        yield server


@contextlib.contextmanager
def between(server, changes) -> Iterator[str]:
    """A proxy before `server`; `changes` makes handlers of the server's own."""
    with grpc.insecure_channel(server.target) as channel:
        methods = (DESCRIBE, FETCH, RENEW, RELEASE, MODELS, PREFILL)
        handlers = {method: forward(channel, method) for method in methods}
        with fake_server({**handlers, **changes(handlers)}) as target:
            yield target


def decode(target: str, *words: object) -> dict:
    """What pbs-decode prints of one decoded token."""
    command = [program("pbs-decode"), "--server", target, "--model-path", RECALL_MODEL]
    command += ["--max-new-tokens", "1", "--threads", "1", "--json", *words]
    command += ["--ignore-endpoint"]  # what stands between is not the server
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def prompt_file(folder):
    path = folder / "the prompt.json"
    path.write_text(json.dumps(list(range(100, 400))))
    return path


def test_pbs_decode_outlasts_the_lease(short_leases, tmp_path):
    renewals = Renewals(wanted=4)

    def changes(handlers):
        return {
            RENEW: renewals.handler(handlers[RENEW]),
            FETCH: renewals.held_back(handlers[FETCH]),
        }

    with between(short_leases, changes) as target:
        report = decode(target, "--tokens", prompt_file(tmp_path))
    assert report["prompt_tokens"] == 300
    assert {request.ttl_seconds for request in renewals.requests} == {TTL_SECONDS}


@pytest.fixture
def held(server, tmp_path):
    """A lease: the file with its ticket, and the prompt's first token."""
    with Client(server.target) as client:
        prompt = json.loads(prompt_file(tmp_path).read_text())
        result = client.prefill("recall", prompt, delivery="lease")
        path = tmp_path / "ticket.json"
        path.write_text(result.ticket.to_json())
        yield path, result.first_token
        with contextlib.suppress(Exception):
            client.release(result.ticket)


def test_pbs_decode_needs_no_lease_once_it_has_the_cache(server, held):
    ticket, first_token = held

    def changes(handlers):
        answers = iter([handlers[DESCRIBE]] * 2)  # the program's, the fetch's

        def describe(requests, context):
            for answer in answers:
                yield from answer(requests, context)
                return
            context.abort(grpc.StatusCode.NOT_FOUND, "expired")

        return {DESCRIBE: describe}

    with between(server, changes) as target:
        assert decode(target, "--ticket", ticket)["tokens"] == [first_token]


def test_pbs_decode_waits_for_the_first_token_of_a_prefill_that_runs(server, held):
    ticket, first_token = held
    states = []

    def changes(handlers):
        def describe(requests, context):
            (reply,) = handlers[DESCRIBE](requests, context)
            kv = KvDescriptor.FromString(reply)
            if len(states) < 3:
                kv.state = _messages.enum_numbers("KvState")["RUNNING"]
                kv.ClearField("first_token_id")
            states.append(kv.state)
            yield kv.SerializeToString()

        return {DESCRIBE: describe}

    with between(server, changes) as target:
        assert decode(target, "--ticket", ticket)["tokens"] == [first_token]
    assert len(states) == 4
