"""pbs-gateway with a second node, which takes over where the first is not available."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from gateway_process import RunningGateway, eventually, read_reply, running_gateway
from pbs_client import Client
from pbs_client.kv_params import KvTransferParams
from real_server import RECALL_MODEL, RunningServer, mortal_server, running_server

PATH = "/v1/completions"
IDS = json.loads((RECALL_MODEL / "prompt_8k.json").read_text())
SHORT = {"prompt": [5, 6, 7], "max_tokens": 1}
LONG = {"prompt": IDS, "max_tokens": 1, "pbs_attention": "dense"}
MODEL = ("--model", f"recall={RECALL_MODEL}")
SLOW = ("--threads", "1", "--set", "cpu.isa=scalar", "--metrics-listen", "127.0.0.1:0")


@contextlib.contextmanager
def gateway_of(first: RunningServer, second: RunningServer) -> Iterator[RunningGateway]:
    flags = ("--fallback-node", second.target)
    if first.metrics != "off":
        flags += ("--node-metrics", first.metrics)
    with running_gateway(first.target, *flags) as running:
        yield running


def home(reply) -> str:
    """Where the cache of a reply is; it is fetched and released there."""
    assert reply.status == 200, reply.body
    params = KvTransferParams.from_json_object(reply.body["kv_transfer_params"])
    with Client("127.0.0.1:1") as client:  # the ticket names its own server
        assert client.fetch(params.ticket).prompt_tokens == params.tokens
        client.release(params.ticket)
    return params.ticket.endpoint


def test_the_first_node_is_preferred():
    with running_server(*MODEL) as first, running_server(*MODEL) as second:
        with gateway_of(first, second) as gateway:
            for _ in range(5):
                assert home(gateway.call(PATH, SHORT)) == first.target
            assert gateway.metrics()["pbs_gateway_failovers_total"] == 0


def test_a_node_that_dies_in_the_midst_of_a_prefill_loses_no_request():
    with mortal_server(*MODEL, *SLOW) as first, running_server(*MODEL) as second:
        with gateway_of(first, second) as gateway:
            connection = gateway.connect()
            connection.request("POST", PATH, json.dumps(LONG))
            running = "pbs_requests_running"
            eventually(lambda: gateway.metrics()[running] == 1, "the prefill runs")
            first.process.kill()
            assert home(read_reply(connection)) == second.target
            assert gateway.metrics()["pbs_gateway_failovers_total"] == 1
            assert gateway.events("request")[-1]["failovers"] == 1
            connection.close()
            assert gateway.call("/health").status == 200
            assert gateway.call("/v1/models").status == 200
            assert home(gateway.call(PATH, SHORT)) == second.target


def test_a_node_that_dies_under_load_loses_no_request():
    with mortal_server(*MODEL) as first, running_server(*MODEL) as second:
        with gateway_of(first, second) as gateway, ThreadPoolExecutor(8) as pool:
            no_lease = {"kv_transfer_params": {"do_remote_decode": False}}
            body = {"prompt": IDS[:2000], "max_tokens": 1, **no_lease}
            calls = [pool.submit(gateway.call, PATH, body) for _ in range(24)]
            calls[5].result()
            first.process.kill()
            statuses = [call.result().status for call in calls]
            assert statuses == [200] * 24


def test_a_draining_node_sends_its_requests_on():
    with mortal_server(*MODEL) as first, running_server(*MODEL) as second:
        with gateway_of(first, second) as gateway:
            reply = gateway.call(PATH, SHORT)
            first.process.terminate()  # the lease keeps it alive
            eventually(lambda: "draining" in "".join(first.log), "the drain")
            assert home(gateway.call(PATH, SHORT)) == second.target
            assert home(reply) == first.target
            assert first.process.wait(30) == 0


def test_a_node_with_other_weights_takes_nothing_over(tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(RECALL_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = 500_000.0
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config))
    with (
        mortal_server(*MODEL) as first,
        running_server("--model", f"recall={folder}") as other,
    ):
        with gateway_of(first, other) as gateway:
            assert home(gateway.call(PATH, SHORT)) == first.target
            first.process.kill()
            first.process.wait()
            reply = gateway.call(PATH, SHORT)
            assert (reply.status, reply.body["error"]["type"]) == (503, "unavailable_error")
            eventually(lambda: gateway.events("node_differs"), "the log")


def test_an_overloaded_node_is_not_left():
    full = ("--set", "admission.queue_requests_max=1")
    with running_server(*MODEL, *SLOW, *full) as first, running_server(*MODEL) as second:
        with gateway_of(first, second) as gateway:
            connections = []
            for name in ("pbs_requests_running", "pbs_requests_waiting"):
                connection = gateway.connect()
                connection.request("POST", PATH, json.dumps(LONG))
                connections.append(connection)
                eventually(lambda name=name: gateway.metrics()[name] == 1, name)
            assert gateway.call(PATH, SHORT).status == 503
            for connection in connections:
                connection.close()


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_without_any_node_the_gateway_is_not_healthy(path):
    with running_gateway("127.0.0.1:1", "--fallback-node", "127.0.0.1:2") as gateway:
        assert gateway.call(path).status == 503
        assert gateway.call(PATH, SHORT).status == 503
