"""The plan of a prefill against the memory that the server process takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pbs_client
import pytest
from pbs_client import Pbs
from real_server import REPOSITORY, running_server

TOKENS = 16384
# Allocator, threads and gRPC beside a plan of some 200 MiB: far below it.
TOLERANCE = 0.05


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
            str(REPOSITORY / "scripts" / "make_random_model.py"),
            *(word for k, v in sizes.items() for word in (f"--{k}", str(v))),
            *("--dtype", "f32", "--out", str(folder)),
        ],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.mark.parametrize("delivery", ["none", "lease"])
def test_the_planned_bytes_are_what_the_process_takes(wide_model, delivery):
    tokens = np.random.default_rng(1).integers(0, 512, TOKENS)
    flags = ("--model", f"wide={wide_model}", "--threads", "2")
    with running_server(*flags) as server, pbs_client.Client(server.target) as client:
        pid = server.process.pid
        client.prefill("wide", tokens[:1])  # what stays: threads, kernels, pools
        before = process_bytes(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM starts from here
        result = client.prefill(
            "wide", tokens, Pbs(threshold=0.1), delivery=delivery, dense_fallback=False
        )
        measured = process_bytes(pid, "VmHWM") - before
        if result.ticket is not None:
            client.release(result.ticket)
    planned = result.stats.planned_bytes
    assert measured == pytest.approx(planned, rel=TOLERANCE), (
        f"planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB"
    )
