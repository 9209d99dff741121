"""The plan of a prefill against the memory that the server process takes."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pbs_client
import pytest
from pbs_client import Pbs, _messages
from real_server import RECALL_MODEL, REPOSITORY, running_server

TOKENS = 16384
# Allocator, threads and gRPC beside a plan of some 200 MiB: far below it.
TOLERANCE = 0.05
# 256 unread fetches; what they leave is a matter of the allocator, and small.
UNREAD_BYTES_MIN = 128 << 20
KEPT_BYTES_MAX = 48 << 20
SECONDS_MAX = 60
# A connection of its own, and 64 KiB per call that nobody reads.
NARROW = (("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1))


def process_bytes(pid: int, field: str) -> int:
    """A field of /proc/PID/status, such as VmHWM: the most that was ever resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) << 10


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """Few weights, wide activations: quick, and its memory is that of the request."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    sizes = {
        "hidden-size": 512,
        "intermediate-size": 512,
        "layers": 2,
        "heads": 8,
        "kv-heads": 4,
        "head-dim": 64,
        "vocab-size": 512,
        "positions": TOKENS,
    }
    subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "tests" / "models" / "make_random_model.py"),
            *(word for k, v in sizes.items() for word in (f"--{k}", str(v))),
            *("--dtype", "f32", "--out", str(folder)),
        ],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.mark.parametrize("delivery", [None, "lease"])
def test_the_planned_bytes_are_what_the_process_takes(wide_model, delivery):
    tokens = np.random.default_rng(1).integers(0, 512, TOKENS)
    flags = ("--model", f"wide={wide_model}", "--threads", "2")
    with running_server(*flags) as server, pbs_client.Client(server.target) as client:
        pid = server.process.pid
        client.prefill("wide", tokens[:1])  # what stays: threads, kernels, pools
        before = process_bytes(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM starts from here
        sparse = pbs_client.Attention(Pbs(threshold=0.1), dense_fallback=False)
        result = client.prefill("wide", tokens, sparse, delivery=delivery)
        measured = process_bytes(pid, "VmHWM") - before
        if result.ticket is not None:
            client.release(result.ticket)
    planned = result.stats.planned_bytes
    assert measured == pytest.approx(planned, rel=TOLERANCE), (
        f"planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB"
    )


def wait_until(condition) -> None:
    """Waits for the server; only a failure takes long."""
    end = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"


def test_what_unread_fetches_held_goes_back_when_no_call_is_open():
    """As NHD every chunk is laid out anew, in memory of its own."""
    flags = ("--model", f"recall={RECALL_MODEL}")
    with running_server(*flags) as server, pbs_client.Client(server.target) as client:
        ticket = client.prefill("recall", [7] * 8192, delivery="lease").ticket
        client.fetch(ticket, kv_format=pbs_client.KvFormat(layout="NHD"))
        pid = server.process.pid
        before = process_bytes(pid, "VmRSS")
        request = _messages.FetchRequest(ticket=ticket.to_message(), layout="NHD")
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                channel = stack.enter_context(grpc.insecure_channel(server.target, NARROW))
                fetch = channel.unary_stream("/pbs.v1.KvSource/Fetch")
                calls = [fetch(request.SerializeToString()) for _ in range(64)]
                for call in calls:
                    stack.callback(call.cancel)
                    call.initial_metadata()
            wait_until(lambda: process_bytes(pid, "VmRSS") - before > UNREAD_BYTES_MIN)
            client.models()  # nobody is in its way
        client.release(ticket)
        wait_until(lambda: process_bytes(pid, "VmRSS") - before < KEPT_BYTES_MAX)
