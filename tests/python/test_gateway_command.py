"""The command line of pbs-gateway: its flags, its first line, its exit status."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys

import pytest
from gateway_process import eventually
from pbs_client.gateway.cli import listen_at

COMMAND = (sys.executable, "-m", "pbs_client.gateway")


def said(*flags: str, code: int) -> str:
    done = subprocess.run(
        [*COMMAND, *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    return done.stderr


NODE = ("--node", "127.0.0.1:50051")
USAGE = {
    "no node": ((), "--node"),
    "a node without a port": (("--node", "localhost"), "not HOST:PORT"),
    "a fallback node without a port": (
        (*NODE, "--fallback-node", "x"),
        "--fallback-node: ",
    ),
    "metrics without a port": ((*NODE, "--node-metrics", "x"), "not HOST:PORT"),
    "no tokenizer there": ((*NODE, "--tokenizer", "/nowhere"), "/nowhere/tokenizer.json"),
    "a template alone": ((*NODE, "--chat-template", "x"), "needs --tokenizer"),
    "a limit of 0": ((*NODE, "--requests-max", "0"), "0 is less than 1"),
    "a limit in words": ((*NODE, "--requests-max", "many"), "'many' is not an integer"),
    "bodies larger than all": (
        (*NODE, "--body-bytes-max", "2000", "--buffer-bytes-max", "1000"),
        "--buffer-bytes-max 1000",
    ),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_exits_with_2(name):
    flags, message = USAGE[name]
    assert message in said(*flags, code=2)


def test_a_busy_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        message = said(*NODE, "--listen", address, code=1)
    assert f"--listen {address}" in message
    assert "choose another" in message


def test_a_small_reply_is_not_held_back_by_nagles_algorithm():
    with listen_at("127.0.0.1:0") as listener:
        assert listener.proto == socket.IPPROTO_TCP  # by which asyncio decides


@pytest.mark.parametrize("listen", ["nowhere", "127.0.0.1:x", "127.0.0.1:70000"])
def test_a_wrong_address_to_listen_is_named(listen):
    assert f"--listen {listen}" in said(*NODE, "--listen", listen, code=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_a_quiet_log_has_nothing_more(number, gateway_node):
    process = subprocess.Popen(
        [*COMMAND, "--node", gateway_node.target, "--listen", "127.0.0.1:0",
         "--log-level", "error"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"pbs-gateway \S+ serving on (\S+), node (\S+)\n", line)
    assert found
    assert found[2] == gateway_node.target
    connection = http.client.HTTPConnection(found[1], timeout=30)
    connection.request("POST", "/v1/completions", b"{")
    assert connection.getresponse().status == 400
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    connection.close()
    assert (process.returncode, out, err) == (0, "", "")


def test_a_log_line_has_the_form_of_the_nodes(gateway, gateway_node):
    body = {"prompt": [5], "n": 2, "max_tokens": 1}
    gateway.call("/v1/completions", body, {"x-request-id": "its form"})

    def is_ours(line) -> bool:
        return line["request_id"] == "its form"

    (ours,) = eventually(lambda: [*filter(is_ours, gateway.events("request"))], "our line")
    calls = eventually(lambda: [x for x in gateway_node.log if '"call"' in x], "its line")
    theirs = json.loads(calls[0])
    assert list(ours)[:3] == list(theirs)[:3] == ["time", "level", "event"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", ours["time"])
    assert (ours["route"], ours["status"]) == ("/v1/completions", 400)
    assert "n 2 is not 1" in ours["message"]
