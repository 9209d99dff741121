"""The pieces of disaggregated serving: two nodes, two gateways, a router, a decode worker."""

from __future__ import annotations

import http.client
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import DemoError, Program, Programs, free_ports

_NODE_SECONDS_MAX = 120.0
_GATEWAY_SECONDS_MAX = 60.0
_VLLM_SECONDS_MAX = 1200.0  # on a busy machine
_ROUTER_SECONDS_MAX = 60.0
_REQUEST_SECONDS_MAX = 600
_PAGE_SECONDS_MAX = 10.0
_DRAIN_SECONDS_MAX = 2
_VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Node:
    """A pbs-prefilld and the addresses that it chose."""

    program: Program
    target: str
    metrics: str


@dataclass(frozen=True)
class Tiers:
    """Everything that runs. Addresses are HOST:PORT."""

    model: str
    nodes: list[Node]
    gateways: list[Program]
    gateway_addresses: list[str]
    vllm: Program
    vllm_address: str
    router: Program
    router_address: str


def start_tiers(programs: Programs, prefilld: Path, model: str, folder: Path) -> Tiers:
    """Starts all pieces and waits until each is ready; says which."""
    vllm_port, router_port, metrics_port = free_ports(3)
    # It takes the longest, so it starts first.
    vllm = programs.start("vllm", _vllm(model, folder, vllm_port), _VLLM_ENVIRONMENT)
    nodes = _start_nodes(programs, prefilld, model, folder)
    gateways, addresses = _start_gateways(programs, nodes, folder)
    vllm_address = f"127.0.0.1:{vllm_port}"
    print("vLLM decode worker: loading, a minute or more ...", flush=True)
    vllm.wait_for(lambda: _is_healthy(vllm_address), _VLLM_SECONDS_MAX)
    print(f"vLLM decode worker  http://{vllm_address}  with PbsPrefillConnector")
    router_address = f"127.0.0.1:{router_port}"
    router = programs.start(
        "router", _router(router_port, metrics_port, addresses, vllm_address)
    )
    router.wait_for(lambda: _is_healthy(router_address), _ROUTER_SECONDS_MAX)
    print(f"vllm-router         http://{router_address}  <- users send requests here")
    return Tiers(
        model, nodes, gateways, addresses, vllm, vllm_address, router, router_address
    )


def _start_nodes(
    programs: Programs, prefilld: Path, model: str, folder: Path
) -> list[Node]:
    nodes = []
    for number in (1, 2):
        program = programs.start(
            f"node {number}",
            [
                *(str(prefilld), "--backend", "cpu", "--model", f"{model}={folder}"),
                *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
                *("--set", f"drain_seconds_max={_DRAIN_SECONDS_MAX}"),
            ],
        )
        nodes.append(program)
    made = []
    for program in nodes:
        serving = program.wait_for(lambda p=program: _serving(p), _NODE_SECONDS_MAX)
        made.append(Node(program, serving["listen"], serving["metrics"]))
        print(
            f"pbs-prefilld {program.name[-1]}      grpc://{serving['listen']}", flush=True
        )
    return made


def _start_gateways(
    programs: Programs, nodes: list[Node], folder: Path
) -> tuple[list[Program], list[str]]:
    started = []
    for number, (own, other) in enumerate(((0, 1), (1, 0)), 1):
        command = [
            *(sys.executable, "-m", "pbs_client.gateway"),
            *("--node", nodes[own].target, "--fallback-node", nodes[other].target),
            *("--listen", "127.0.0.1:0", "--tokenizer", str(folder)),
            *("--node-metrics", nodes[own].metrics),
        ]
        started.append(programs.start(f"gateway {number}", command))
    addresses = []
    for number, program in enumerate(started, 1):
        serving = program.wait_for(lambda p=program: _serving(p), _GATEWAY_SECONDS_MAX)
        addresses.append(serving["listen"])
        print(
            f"pbs-gateway {number}       http://{serving['listen']}  in front of node {number}",
            flush=True,
        )
    return started, addresses


def _vllm(model: str, folder: Path, port: int) -> list[str]:
    transfer = {
        "kv_connector": "PbsPrefillConnector",
        "kv_connector_module_path": "pbs_client.vllm",
        "kv_role": "kv_consumer",
        # A cache that died with its node is computed again instead of failing.
        "kv_load_failure_policy": "recompute",
        # All requests of this worker have sparse caches of one method.
        "kv_connector_extra_config": {"endpoints": ["127.0.0.1:*"], "dedicated": True},
    }
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", model),
        *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]


def _router(port: int, metrics_port: int, prefill: list[str], decode: str) -> list[str]:
    program = Path(sys.executable).parent / "vllm-router"
    if not program.exists():
        raise DemoError(
            f"{program} does not exist",
            "run scripts/demo_disaggregated.sh, which installs it",
        )
    return [
        *(str(program), "--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-port", str(metrics_port), "--vllm-pd-disaggregation"),
        *(word for one in prefill for word in ("--prefill", f"http://{one}")),
        *("--decode", f"http://{decode}", "--policy", "round_robin"),
        *("--worker-startup-check-interval", "1"),
        # A gateway that is gone gets no requests after two seconds.
        *("--health-check-interval-secs", "1", "--health-failure-threshold", "1"),
        *("--request-timeout-secs", str(_REQUEST_SECONDS_MAX)),
    ]


def _serving(program: Program) -> dict[str, Any] | None:
    return next(iter(program.events("serving")), None)


def _is_healthy(address: str) -> bool | None:
    try:
        return get(address, "/health")[0] == 200 or None
    except (OSError, http.client.HTTPException):
        return None


def get(address: str, path: str) -> tuple[int, str]:
    """Status and text of a page."""
    connection = http.client.HTTPConnection(address, timeout=_PAGE_SECONDS_MAX)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def metric(address: str, name: str) -> float:
    """The sum of a metric over its labels."""
    page = get(address, "/metrics")[1]
    pattern = rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$"
    return sum(map(float, re.findall(pattern, page, re.M)))
