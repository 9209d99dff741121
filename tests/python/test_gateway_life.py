"""pbs-gateway while clients leave, nodes are busy or stop, and it stops itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from fake_server import fake_server, never_answered, replies
from gateway_process import (
    RunningGateway,
    eventually,
    figures,
    read_reply,
    running_gateway,
)
from pbs_client import Client, _messages
from pbs_client._transport import channel_options
from pbs_client.gateway import admission
from pbs_client.gateway.errors import RefusedError
from pbs_client.kv_params import KvTransferParams
from real_server import RECALL_MODEL, RunningServer, running_server
from starlette.requests import Request

PREFILL = "/pbs.v1.Prefill/Prefill"
LIST_MODELS = "/pbs.v1.Prefill/ListModels"
RELEASE = "/pbs.v1.KvSource/Release"
CHECK = "/grpc.health.v1.Health/Check"
PATH = "/v1/completions"
IDS = json.loads((RECALL_MODEL / "prompt_8k.json").read_text())
LEASED = {"prompt": [5, 6, 7], "max_tokens": 1}
NO_LEASE = {"kv_transfer_params": {"do_remote_decode": False}}
SHORT = {**LEASED, **NO_LEASE}
LONG = {"prompt": IDS, "max_tokens": 1, "pbs_attention": "dense"}
# On plain loops and one thread the long prompt takes ten seconds.
SLOW = ("--threads", "1", "--set", "cpu.isa=scalar")
METRICS = ("--metrics-listen", "127.0.0.1:0")
MODEL = ("--model", f"recall={RECALL_MODEL}")


@pytest.fixture(scope="module")
def slow_node() -> Iterator[RunningServer]:
    with running_server(*MODEL, *METRICS, *SLOW) as running:
        yield running


@pytest.fixture(scope="module")
def slow(slow_node) -> Iterator[RunningGateway]:
    flags = ("--node-metrics", slow_node.metrics, "--requests-max", "4")
    with running_gateway(slow_node.target, *flags) as running:
        yield running


def metric(gateway: RunningGateway, name: str) -> float:
    return gateway.metrics()[name]


def is_running(gateway: RunningGateway) -> bool:
    return metric(gateway, "pbs_requests_running") == 1


def is_idle(gateway: RunningGateway) -> bool:
    found = gateway.metrics()
    names = ("pbs_requests_running", "pbs_requests_waiting", "pbs_kv_leases")
    return (
        not any(found[name] for name in names)
        and not found['pbs_kv_held_bytes{tier="host"}']
    )


def started(gateway: RunningGateway, body=LONG):
    """A connection with a request under way at the node."""
    connection = gateway.connect()
    connection.request("POST", PATH, json.dumps(body))
    eventually(lambda: is_running(gateway), "the prefill runs")
    return connection


def given_up(node: RunningServer) -> list[dict]:
    """Prefills that ended by the gateway's cancellation or, if that came first, release."""
    lines = (json.loads(line) for line in list(node.log) if line.startswith("{"))
    calls = (line for line in lines if line["event"] == "call")
    ends = ("CANCELLED", "ABORTED")
    return [c for c in calls if c["rpc"] == "prefill" and c["code"] in ends]


def test_a_client_that_leaves_cancels_its_prefill(slow, slow_node):
    before = len(given_up(slow_node))
    started(slow).close()
    eventually(lambda: len(given_up(slow_node)) > before, "the node's call ends")
    eventually(lambda: is_idle(slow), "the node holds nothing")
    name = f'pbs_gateway_requests_total{{route="{PATH}",status="499"}}'
    eventually(lambda: slow.metrics().get(name), "the gateway counts it")


def test_a_client_that_leaves_the_queue_cancels_its_prefill(slow, slow_node):
    first = started(slow)
    second = slow.connect()
    second.request("POST", PATH, json.dumps(SHORT))
    eventually(lambda: metric(slow, "pbs_requests_waiting") == 1, "the second waits")
    before = len(given_up(slow_node))
    second.close()
    eventually(lambda: len(given_up(slow_node)) > before, "the second ends")
    assert is_running(slow)
    first.close()
    eventually(lambda: is_idle(slow), "the node holds nothing")


def test_a_full_gateway_refuses_with_503_and_a_time(slow):
    connections = [started(slow)]
    for _ in range(3):
        connection = slow.connect()
        connection.request("POST", PATH, json.dumps(LONG))
        connections.append(connection)
    eventually(lambda: metric(slow, "pbs_gateway_requests_running") == 4, "four run")
    reply = slow.call(PATH, SHORT)
    assert reply.status == 503
    assert reply.headers["retry-after"] == "1"
    assert "requests_max is 4" in reply.message
    assert slow.call("/health").status == 200
    for connection in connections:
        connection.close()
    eventually(lambda: is_idle(slow), "the node holds nothing")


def test_a_full_node_gives_503_and_its_own_time():
    with (
        running_server(
            *MODEL, *METRICS, *SLOW, "--set", "admission.queue_requests_max=1"
        ) as node,
        running_gateway(node.target, "--node-metrics", node.metrics) as gateway,
    ):
        first = started(gateway)
        second = gateway.connect()
        second.request("POST", PATH, json.dumps(LONG))
        eventually(lambda: metric(gateway, "pbs_requests_waiting") == 1, "one waits")
        reply = gateway.call(PATH, SHORT)
        assert reply.status == 503
        assert reply.body["error"]["type"] == "overloaded_error"
        assert int(reply.headers["retry-after"]) >= 1
        assert "queue" in reply.message
        first.close()
        second.close()
        eventually(lambda: is_idle(gateway), "the node holds nothing")


def test_a_request_that_runs_out_of_time_gets_504(slow_node):
    with running_gateway(
        slow_node.target, "--request-seconds-max", "1", "--node-metrics", slow_node.metrics
    ) as gateway:
        reply = gateway.call(PATH, LONG)
        assert reply.status == 504
        assert reply.body["error"]["type"] == "timeout_error"
        eventually(lambda: is_idle(gateway), "the node holds nothing")


def test_a_body_that_does_not_fit_the_buffer_is_refused(slow_node):
    limits = ("--body-bytes-max", "1000", "--buffer-bytes-max", "1500")
    with running_gateway(slow_node.target, *limits) as gateway:
        host, port = gateway.address.split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(
                f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{{".encode()
            )
            eventually(
                lambda: metric(gateway, "pbs_gateway_requests_running") == 1, "half a body"
            )
            reply = gateway.call(PATH, b" " * 900)
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            assert "buffer_bytes_max 1500" in reply.message
            assert gateway.call(PATH, SHORT).status == 200
        eventually(
            lambda: metric(gateway, "pbs_gateway_requests_running") == 0, "it is gone"
        )
        assert gateway.call(PATH, b" " * 900).status == 400


class Relay:
    """A node that passes calls on to a real one, and keeps a prefill's end back.

    The real node has made the lease, and the gateway does not know that yet.
    """

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(
            target, options=list(channel_options(target).items())
        )
        self.done_is_here = threading.Event()
        self.gone = threading.Event()

    def close(self) -> None:
        self._channel.close()

    def handlers(self):
        return {
            PREFILL: self._prefill,
            LIST_MODELS: self._unary(LIST_MODELS),
            RELEASE: self._unary(RELEASE),
        }

    def _unary(self, method):
        def handle(requests, _):
            (request,) = requests
            yield self._channel.unary_unary(method)(request)

        return handle

    def _prefill(self, requests, context):
        context.add_callback(self.gone.set)
        (request,) = requests
        for event in self._channel.unary_stream(PREFILL)(request):
            if _messages.PrefillEvent.FromString(event).HasField("done"):
                self.done_is_here.set()
                self.gone.wait()
            yield event


def test_a_cache_whose_reply_cannot_be_delivered_is_freed(server):
    relay = Relay(server.target)
    with fake_server(relay.handlers()) as target, running_gateway(target) as gateway:
        connection = gateway.connect()
        connection.request("POST", PATH, json.dumps(LEASED))
        assert relay.done_is_here.wait(30)
        connection.close()
        released = "pbs_gateway_leases_released_total"
        eventually(lambda: metric(gateway, released) == 1, "the lease is released")
    relay.close()


BROKEN = {
    "no `done`": (replies(_messages.PrefillEvent(admitted={})), 500),
    "no event": (replies(b"\xff\xff\xff"), 500),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_node_that_breaks_the_protocol_gives_500(name, server):
    handler, status = BROKEN[name]
    relay = Relay(server.target)
    handlers = {**relay.handlers(), PREFILL: handler}
    with fake_server(handlers) as target, running_gateway(target) as gateway:
        reply = gateway.call(PATH, SHORT)
        assert reply.status == status
        assert reply.body["error"]["type"] == "internal_error"
    relay.close()


CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
    grpc.StatusCode.OUT_OF_RANGE: (400, "invalid_request_error"),
    grpc.StatusCode.NOT_FOUND: (404, "not_found_error"),
    grpc.StatusCode.ABORTED: (409, "conflict_error"),
    grpc.StatusCode.FAILED_PRECONDITION: (409, "conflict_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (503, "overloaded_error"),
    grpc.StatusCode.UNAVAILABLE: (503, "unavailable_error"),
    grpc.StatusCode.CANCELLED: (503, "unavailable_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error"),
    grpc.StatusCode.UNIMPLEMENTED: (501, "unimplemented_error"),
    grpc.StatusCode.INTERNAL: (500, "internal_error"),
    grpc.StatusCode.DATA_LOSS: (500, "internal_error"),
    grpc.StatusCode.UNKNOWN: (500, "internal_error"),
}


def test_each_status_of_the_node_has_one_of_http(server):
    failing: list[grpc.StatusCode] = []

    def fail(_, context):
        context.abort(failing[0], "what the node says")
        yield b""

    relay = Relay(server.target)
    handlers = {**relay.handlers(), PREFILL: fail}
    with fake_server(handlers) as target, running_gateway(target) as gateway:
        for code, (status, kind) in CODES.items():
            failing[:] = [code]
            reply = gateway.call(PATH, SHORT)
            assert (reply.status, reply.body["error"]["type"]) == (status, kind), code
            assert "what the node says" in reply.message
            assert ("retry-after" in reply.headers) == (status == 503)
    relay.close()


def test_a_node_that_hangs_fails_the_health_in_time():
    handlers = {CHECK: never_answered, LIST_MODELS: never_answered}
    with fake_server(handlers) as target, running_gateway(target) as gateway:
        with ThreadPoolExecutor(20) as pool:
            found = list(pool.map(lambda _: gateway.call("/health"), range(20)))
        assert {reply.status for reply in found} == {503}


def test_health_and_requests_follow_the_node():
    with running_gateway("127.0.0.1:1") as gateway:
        assert gateway.call("/health").status == 503
        reply = gateway.call(PATH, SHORT)
        assert (reply.status, reply.body["error"]["type"]) == (503, "unavailable_error")
        assert gateway.call("/v1/models").status == 503


def test_health_follows_the_nodes_drain():
    with running_server(*MODEL) as node, running_gateway(node.target) as gateway:
        assert gateway.call("/health").status == 200
        reply = gateway.call(PATH, LEASED)
        node.process.terminate()  # the lease keeps it alive
        eventually(lambda: gateway.call("/health").status == 503, "the health")
        late = gateway.call(PATH, SHORT)
        assert late.status == 503
        assert "retry-after" in late.headers
        params = KvTransferParams.from_json_object(reply.body["kv_transfer_params"])
        with Client("127.0.0.1:1") as client:  # the ticket names its own server
            client.release(params.ticket)
        assert node.process.wait(30) == 0


def test_a_node_that_comes_back_is_used_again():
    with contextlib.ExitStack() as first:
        node = first.enter_context(running_server(*MODEL))
        with running_gateway(node.target) as gateway:
            assert gateway.call(PATH, SHORT).status == 200
            first.close()
            assert gateway.call("/health").status == 503
            assert gateway.call(PATH, SHORT).status == 503
            port = node.target.rpartition(":")[2]
            with running_server(*MODEL, "--listen", f"127.0.0.1:{port}"):
                eventually(lambda: gateway.call("/health").status == 200, "the health")
                assert gateway.call(PATH, SHORT).status == 200


def test_a_node_of_several_models_needs_a_name():
    two = (*MODEL, "--model", f"other={RECALL_MODEL}")
    with running_server(*two) as node:
        with running_gateway(node.target) as gateway:
            reply = gateway.call("/health")
            assert reply.status == 503
            assert "start pbs-gateway with one of them as --model" in reply.message
            assert gateway.call(PATH, SHORT).status == 503
        with running_gateway(node.target, "--model", "other") as gateway:
            assert gateway.call("/health").status == 200
            assert gateway.call(PATH, SHORT).body["model"] == "other"
            assert gateway.call(PATH, {**SHORT, "model": "recall"}).status == 404


def test_a_lease_lasts_as_long_as_the_flag_says(server):
    with running_gateway(server.target, "--lease-seconds", "7") as gateway:
        before = time.time()
        reply = gateway.call(PATH, LEASED)
        after = time.time()
    params = KvTransferParams.from_json_object(reply.body["kv_transfer_params"])
    assert before + 7 <= params.expires_unix_ms / 1000 + 0.001 <= after + 7.002
    with Client(server.target) as client:
        client.release(params.ticket)


def test_a_stopping_gateway_answers_what_it_has_and_refuses_the_rest(slow_node):
    with running_gateway(slow_node.target, "--node-metrics", slow_node.metrics) as gateway:
        # The default profile is faster than dense, and still takes seconds.
        admitted = started(gateway, {"prompt": IDS, "max_tokens": 1, **NO_LEASE})
        later, probe = gateway.connect(), gateway.connect()
        for connection in (later, probe):
            connection.connect()
        gateway.process.terminate()
        eventually(lambda: gateway.events("draining"), "the drain")
        later.request("POST", PATH, json.dumps(SHORT))
        refused = read_reply(later)
        assert refused.status == 503
        assert "stopping" in refused.message
        probe.request("GET", "/health")
        assert read_reply(probe).status == 503
        assert read_reply(admitted).status == 200
        gateway.process.wait(30)
        assert gateway.process.returncode == 0


def test_a_drain_ends_in_time_and_says_what_it_cut(slow_node):
    with running_gateway(
        slow_node.target, "--drain-seconds-max", "1",
        "--node-metrics", slow_node.metrics, code=1,
    ) as gateway:  # fmt: skip
        connection = started(gateway)
        gateway.process.terminate()
        cut = read_reply(connection)
        assert (cut.status, cut.body["error"]["type"]) == (503, "unavailable_error")
        gateway.process.wait(30)
        connection.close()
    assert not gateway.events("fault")
    assert gateway.events("drain_cut")[0]["requests"] == 1
    with running_gateway(slow_node.target, "--node-metrics", slow_node.metrics) as other:
        eventually(lambda: is_idle(other), "the node holds nothing")


def test_metrics_of_the_node_are_of_its_page(slow, slow_node):
    assert figures(slow.call("/metrics").body)["pbs_gateway_node_metrics_up"] == 1
    with running_gateway(slow_node.target, "--node-metrics", "127.0.0.1:1") as other:
        assert metric(other, "pbs_gateway_node_metrics_up") == 0


def resident_bytes(gateway: RunningGateway) -> int:
    lines = Path(f"/proc/{gateway.process.pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10


def test_refused_bodies_leave_no_memory_behind(slow_node):
    body = json.dumps({"prompt": [123] * 1_000_000, "max_tokens": 1}).encode()
    with running_gateway(slow_node.target) as gateway:
        found = []
        for _ in range(4):
            for _ in range(8):
                assert gateway.call(PATH, body).status == 400
            found.append(resident_bytes(gateway))
    # What is kept grows with each round of 8 bodies, an allocator with some.
    rounds = [after - before for before, after in zip(found, found[1:])]
    assert min(rounds) < len(body), found


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(admission, "BODY_SECONDS_MAX", 0.05)

    async def run() -> None:
        async def receive():
            await asyncio.Event().wait()

        scope = {"type": "http", "headers": [(b"content-length", b"10")]}
        bounds = admission.Admission(1, 100, 10)
        with pytest.raises(RefusedError) as caught:
            async with bounds.body(Request(scope, receive)):
                raise AssertionError("there is no body")
        assert caught.value.status == 408
        async with bounds.body(Request(scope, whole)) as body:  # nothing stays charged
            assert body == b"0123456789"

    async def whole():
        return {"type": "http.request", "body": b"0123456789"}

    asyncio.run(run())
