"""How calls end by real clocks: status, log and metrics of a running server.

tests/integration/outcomes_test.cc has the table of all outcomes, by a clock of its own.
"""

from __future__ import annotations

import json
import time
import urllib.request

import grpc
import numpy as np
import pbs_client
import pytest
from pbs_client import Client
from real_server import RECALL_MODEL, running_server

LONG_PROMPT = np.random.default_rng(1).integers(2, 250, 8000)
WAIT_SECONDS_MAX = 30


@pytest.fixture(scope="module")
def server():
    flags = ("--model", f"recall={RECALL_MODEL}", "--metrics-listen", "127.0.0.1:0")
    with running_server(*flags) as running:
        yield running


def series(server) -> dict[str, float]:
    """Every series of /metrics."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


def events(server) -> list[dict]:
    """The server's log. What is no JSON object fails."""
    lines = [line for line in server.log if not line.startswith("pbs-prefilld ")]
    return [json.loads(line) for line in lines]


def eventually(condition):
    """The first true value of condition()."""
    give_up = time.monotonic() + WAIT_SECONDS_MAX
    while not (value := condition()):
        assert time.monotonic() < give_up, "it never came"
    return value


def test_a_deadline_that_passes_is_no_cancellation(server):
    with Client(server.target) as client, pytest.raises(pbs_client.DeadlineExceededError):
        sparse = pbs_client.Attention(dense_fallback=False)
        client.prefill("recall", LONG_PROMPT, sparse, request_id="late", timeout=0.25)
    (call,) = eventually(
        lambda: [e for e in events(server) if e.get("request_id") == "late"]
    )
    assert call["code"] == "DEADLINE_EXCEEDED"
    assert "the deadline passed" in call["message"]
    counted = series(server)
    assert counted['pbs_requests_total{code="DEADLINE_EXCEEDED",rpc="prefill"}'] == 1
    assert counted['pbs_requests_total{code="CANCELLED",rpc="prefill"}'] == 0
    assert counted['pbs_prefill_tokens_wasted_total{reason="cancelled"}'] == 0


def test_what_libraries_say_is_an_event_too(server):
    # A name that is not UTF-8: protobuf writes a line about it.
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_stream("/pbs.v1.Prefill/Prefill")
        with pytest.raises(grpc.RpcError) as refused:
            list(call(b"\x12\x02\xff\xfe"))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (line,) = eventually(
        lambda: [e for e in events(server) if e["event"] == "library_line"]
    )
    assert line["library"] == "protobuf"
    assert "UTF-8" in line["message"]


def test_the_process_tells_of_itself(server):
    counted = series(server)
    assert counted["process_resident_memory_bytes"] > 1 << 20
    assert counted["process_cpu_seconds_total"] > 0
    assert abs(counted["process_start_time_seconds"] - time.time()) < 600
    assert 0 < counted["process_open_fds"] < counted["process_max_fds"]
    (age,) = (v for n, v in counted.items() if n.startswith("pbs_device_progress_age"))
    assert age == 0


def test_queue_times_of_an_idle_server_are_resolved(server):
    with Client(server.target) as client:
        for _ in range(10):
            client.prefill("recall", LONG_PROMPT[:20], timeout=30)
    name = "pbs_request_queue_time_seconds"
    counted = series(server)
    bounds = [v for n, v in counted.items() if n.startswith(f"{name}_bucket")]
    below_a_millisecond = counted[f'{name}_bucket{{le="0.001"}}']
    assert len(bounds) > 25
    assert bounds[0] < below_a_millisecond, "all in the first bucket"
