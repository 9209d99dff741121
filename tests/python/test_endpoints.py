"""Calls about a leased cache go to the server that holds it."""

from __future__ import annotations

import contextlib
import re
import urllib.request
from collections.abc import Iterator

import pbs_client
import pytest
from pbs_client import Client, Inline, Lease
from real_server import RECALL_MODEL, RunningServer, refused_start, running_server

PROMPT = [0, *range(16, 80)]
MODEL = ("--model", f"recall={RECALL_MODEL}")
METRICS = ("--metrics-listen", "127.0.0.1:0")


@pytest.fixture(scope="module")
def other_node() -> Iterator[RunningServer]:
    with running_server(*MODEL) as running:
        yield running


def hold(node: RunningServer) -> pbs_client.KvTicket:
    """The ticket of a cache that `node` holds."""
    with Client(node.target) as client:
        ticket = client.prefill("recall", PROMPT, "dense", delivery="lease").ticket
    assert ticket is not None
    return ticket


def test_a_ticket_names_the_server_that_holds_its_cache(server):
    ticket = hold(server)
    assert ticket.endpoint == server.target
    with Client(server.target) as client:
        assert client.describe(ticket).ticket == ticket
        client.release(ticket)


def test_every_call_about_a_cache_goes_to_its_server(client, other_node):
    ticket = hold(other_node)
    assert client.describe(ticket).num_tokens == len(PROMPT)
    here = client.prefill("recall", PROMPT, "dense", delivery="inline").kv
    there = client.fetch(ticket)
    assert [k.tobytes() for k in there.k] == [k.tobytes() for k in here.k]
    assert client.renew(ticket, 120).ttl_seconds == 120
    client.release(ticket)
    with Client(other_node.target) as holder, pytest.raises(pbs_client.NotFoundError):
        holder.describe(ticket)


def test_captured_queries_come_from_the_server_that_holds_them(client, other_node):
    with Client(other_node.target) as holder:
        delivery = Lease(capture_query_layers=(1,))
        ticket = holder.prefill("recall", PROMPT, "dense", delivery=delivery).ticket
    assert client.fetch_queries(ticket, 1).shape[1] == len(PROMPT)
    client.release(ticket)


def test_a_client_may_be_told_to_ignore_endpoints(server, other_node):
    ticket = hold(other_node)
    with Client(server.target, follow_endpoints=False) as client:
        with pytest.raises(pbs_client.NotFoundError):
            client.describe(ticket)
    with Client(other_node.target, follow_endpoints=False) as client:
        client.release(ticket)


def test_a_ticket_of_a_server_that_ended_is_unavailable_at_once(client):
    with running_server(*MODEL) as node:
        ticket = hold(node)
    for use in (client.describe, client.renew, client.release):
        with pytest.raises(pbs_client.UnavailableError):
            use(ticket, timeout=10)
    with pytest.raises(pbs_client.UnavailableError):
        client.fetch(ticket, timeout=10)


def test_an_endpoint_that_is_none_is_refused_before_any_traffic(client, server):
    ticket = pbs_client.KvTicket("0" * 32, 1, endpoint="nowhere")
    with pytest.raises(ValueError, match="'nowhere' is not HOST:PORT"):
        client.describe(ticket)


ADVERTISED = {
    "the_setting": (["--set", "advertise=node-7.example:9000"], "", "node-7.example:9"),
    "the_pod": ([], "10.1.2.3", "10.1.2.3:"),
    "an_ipv6_pod": ([], "fd00::7", "[fd00::7]:"),
    "every_address": (["--listen", "0.0.0.0:0"], "", ""),
}


@pytest.mark.parametrize(
    ("flags", "pod_ip", "endpoint"), ADVERTISED.values(), ids=ADVERTISED
)
def test_a_server_advertises(monkeypatch, flags, pod_ip, endpoint):
    monkeypatch.setenv("POD_IP", pod_ip)
    with running_server(*MODEL, *flags) as node:
        port = node.target.rpartition(":")[2]
        target = f"127.0.0.1:{port}"
        with Client(target, follow_endpoints=False) as client:
            ticket = client.prefill("recall", PROMPT, delivery="lease").ticket
            client.release(ticket)
        assert ticket.endpoint.startswith(endpoint)
        assert bool(ticket.endpoint) == bool(endpoint)
        if pod_ip:
            assert ticket.endpoint.endswith(f":{port}")
        assert node.event("serving")["endpoint"] == ticket.endpoint


def test_a_pod_address_that_is_none_ends_the_start(monkeypatch):
    monkeypatch.setenv("POD_IP", "pod-7")
    said = refused_start(*MODEL)
    assert re.search(r"POD_IP \W*pod-7\W* is no IP address", said)


def test_an_inline_prefill_is_one_call():
    with running_server(*MODEL, *METRICS) as node, Client(node.target) as client:
        for dtype in (None, "f32"):
            result = client.prefill("recall", PROMPT, delivery=Inline(dtype=dtype))
            assert result.kv.num_layers == 2
        with contextlib.closing(
            urllib.request.urlopen(f"http://{node.metrics}/metrics", timeout=30)
        ) as reply:
            calls = re.findall(
                r'^pbs_requests_total{.*rpc="(\w+)".*} (\d+)$',
                reply.read().decode(),
                re.MULTILINE,
            )
    assert {rpc: int(count) for rpc, count in calls if int(count)} == {"prefill": 2}
