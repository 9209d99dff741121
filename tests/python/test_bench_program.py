"""pbs-bench, and with it Attend of the C++ client, believes no reply."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from fake_server import fake_server, replies
from pbs_client import _messages
from real_server import REPOSITORY, program

AttendResponse = _messages._message_class("pbs.v1.AttendResponse")
ATTEND = "/pbs.v1.Attention/Attend"
INFO = "/pbs.v1.Prefill/GetServerInfo"

SHAPE = [16, 1, 128]  # of pbs-bench's output
BYTES = 4 * 16 * 128


def bench(target: str, *flags: str, direction: str = "upload", **environment: str):
    command = [program("pbs-bench"), "transfer", "--server", target]
    command += ["--direction", direction, *flags]
    command += ["--streams", "1", "--mib", "1", "--rounds", "1"]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


def header(*tensors: str, shape=SHAPE):
    specs = [{"tensor": name, "dtype": "F32", "shape": shape} for name in tensors]
    return AttendResponse(header={"tensors": specs})


def chunk(size: int = BYTES, tensor: str = "O"):
    return AttendResponse(chunk={"tensor": tensor, "data": bytes(size)})


STATS = AttendResponse(stats={"density": 1.0})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        pytest.param([STATS], "without header or stats", id="no header"),
        pytest.param([header("O"), chunk()], "without header or stats", id="no stats"),
        pytest.param([chunk()], "result O at offset 0 does not fit", id="chunk first"),
        pytest.param([header("O"), header("O")], "a second header", id="two headers"),
        pytest.param([header("O", "O")], "O, unasked or twice", id="twice"),
        pytest.param([header("O", "LSE")], "LSE, unasked", id="unasked"),
        pytest.param([header()], "does not announce O", id="missing"),
        pytest.param([header("O"), STATS], "ended at offset 0", id="no chunks"),
        pytest.param(
            [header("O"), chunk(), STATS, STATS], "goes on after", id="two stats"
        ),
        pytest.param(
            [header("O", shape=[16, 1, 64]), chunk(BYTES // 2), STATS],
            "has 1024 values, expected 2048",
            id="another shape",
        ),
        pytest.param(
            [header("O"), chunk(), STATS],
            "attention of the uploaded tensors is wrong",
            id="zeros",
        ),
    ],
)
def test_a_reply_that_is_out_of_place_is_corrupt(messages, message):
    handlers = {INFO: replies(_messages.ServerInfo()), ATTEND: replies(*messages)}
    with fake_server(handlers) as target:
        done = bench(target)
    assert done.returncode == 1, done.stdout
    assert "DATA_LOSS" in done.stderr
    assert message in done.stderr


def test_the_report_names_the_command_that_the_script_was_called_with(server):
    done = bench(server.target, PBS_BENCH_COMMAND="scripts/bench.sh dataplane --a b")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == "scripts/bench.sh dataplane --a b"


@pytest.mark.peers
def test_downloads_are_compared_with_arrow_flight_in_the_same_run(server):
    pytest.importorskip("pyarrow.flight")
    peer = f"{sys.executable} {REPOSITORY / 'client' / 'cpp' / 'bench' / 'flight_peer.py'}"
    done = bench(
        server.target, "--peers", "flight", "--flight", peer, direction="download"
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert [cell["peer"] for cell in cells] == ["pbs", "pbs", "flight"]
    assert cells[2]["cpu_seconds_per_gb"]["median"] > 0, "of both its processes"
    assert all("ratio_to_flight" in cell for cell in cells[:2])
