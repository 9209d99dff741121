"""Sinks that fail, lie, die or do nothing: the prefill fails, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from eventually import WAIT_SECONDS_MAX, until
from fake_server import fake_server, never_answered
from pbs_client import Client
from push_world import (
    CHUNK_BYTES,
    LAYERS,
    fails,
    is_as_new,
    metric,
    prompt,
    pushing_server,
    raw_sink,
    socket_server,
)
from real_server import RunningServer

STALL_SECONDS_MAX = 1  # of the impatient server


@pytest.fixture(scope="module")
def impatient(push_model, push_targets) -> Iterator[RunningServer]:
    limit = f"transport.write_stall_seconds_max={STALL_SECONDS_MAX}"
    with pushing_server(push_model, push_targets, "--set", limit) as running:
        yield running


# ---- sinks that fail


def says_disk_full(raw, context):
    yield raw.ack()
    raw.read()
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the disk is full")


def breaks(raw, context):
    yield raw.ack()
    raw.read()
    context.abort(grpc.StatusCode.INTERNAL, "a bug\nof the sink")


def refuses_the_model(raw, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another model")
    yield b""


def ends_early(raw, context):
    yield raw.ack()
    raw.read()


def ends_at_once(raw, context):
    return
    yield b""


def confirms_less_than_all(raw, context):
    yield raw.ack()
    while raw.read():
        pass
    yield raw.ack(raw.received - 1)


def names_another_transfer(raw, context):
    yield raw.ack(handle="0" * 32)
    raw.read()


def confirms_too_much(raw, context):
    yield raw.ack(received=1)
    raw.read()


def confirms_less_than_before(raw, context):
    yield raw.ack()
    raw.read()
    raw.read()
    yield raw.ack(raw.received)
    yield raw.ack(raw.received - 1)
    raw.read()


def sends_garbage(raw, context):
    yield b"\xff\xff\xff"
    raw.read()


def sends_a_book(raw, context):
    yield bytes(1 << 20)
    raw.read()


BAD_SINKS = {
    # code of the prefill, a part of its message
    says_disk_full: ("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED: the disk is full"),
    breaks: ("UNAVAILABLE", "INTERNAL: a bug\\nof the sink"),
    refuses_the_model: ("FAILED_PRECONDITION", "FAILED_PRECONDITION: another model"),
    ends_early: ("FAILED_PRECONDITION", "with OK when it had confirmed 0 of "),
    ends_at_once: ("FAILED_PRECONDITION", "with OK when it had confirmed 0 of "),
    confirms_less_than_all: ("FAILED_PRECONDITION", "with OK when it had confirmed "),
    names_another_transfer: ("FAILED_PRECONDITION", "the handle of its acknowledgement"),
    confirms_too_much: ("FAILED_PRECONDITION", "acknowledged bytes_received 1, but only"),
    confirms_less_than_before: ("FAILED_PRECONDITION", " after "),
    sends_garbage: ("FAILED_PRECONDITION", "it sent what is no KvAck"),
    sends_a_book: ("RESOURCE_EXHAUSTED", "larger than max"),
}


@pytest.mark.parametrize("behave", BAD_SINKS, ids=lambda sink: sink.__name__)
def test_a_sink_that_fails_fails_the_prefill_with_its_reason(
    pushing, pusher, target, behave
):
    failed = metric(pushing, "pbs_kv_transfer_failures_total", '{reason="sink"}')
    with raw_sink(behave, target):
        code, message = fails(pusher, target)
    expected_code, part = BAD_SINKS[behave]
    assert (code, part in message) == (expected_code, True), message
    assert message.startswith(f"push to {target}: ")
    now = metric(pushing, "pbs_kv_transfer_failures_total", '{reason="sink"}')
    assert now in (failed, failed + 1)  # the former: no chunk was made yet
    is_as_new(pushing, pusher, target)


def test_a_server_that_is_no_sink_fails_the_prefill(pushing, pusher, target):
    with fake_server({}, target):
        code, message = fails(pusher, target)
    assert (code, "UNIMPLEMENTED" in message) == ("UNAVAILABLE", True)
    is_as_new(pushing, pusher, target)


def test_a_target_that_does_not_listen_fails_the_prefill_at_once(pushing, pusher, target):
    begin = time.monotonic()
    code, message = fails(pusher, target)
    assert (code, "Connection refused" in message) == ("UNAVAILABLE", True)
    assert time.monotonic() - begin < 4  # less than the limit of a connection
    is_as_new(pushing, pusher, target)


def test_a_target_that_accepts_and_is_silent_fails_the_prefill(pushing, pusher, target):
    with socket_server(target, lambda connection: None):
        code, message = fails(pusher, target)
    said = ("before receiving SETTINGS frame", "it took no call within 5 seconds")
    assert code == "UNAVAILABLE" and message.startswith(f"push to {target}: ")
    assert message.endswith(said), message  # gRPC's reason, unless the machine is slow
    is_as_new(pushing, pusher, target)


def test_a_target_of_another_protocol_fails_the_prefill(pushing, pusher, target):
    with socket_server(target, lambda c: c.sendall(b"SSH-2.0-x\r\n" * 10)):
        code, message = fails(pusher, target)
    assert code == "UNAVAILABLE" and message.startswith(f"push to {target}: ")
    is_as_new(pushing, pusher, target)


DYING_SINK = """
import os, signal, sys
from pbs_client import KvSink
kill = lambda header, layer, k, v: layer == int(sys.argv[2]) and os.kill(
    os.getpid(), signal.SIGKILL)
with KvSink(sys.argv[1], on_layer=kill) as sink:
    print("listens", flush=True)
    sink.take()
"""


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_sink_that_is_killed_fails_the_prefill(pushing, pusher, target, layer):
    command = [sys.executable, "-c", DYING_SINK, target, str(layer)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "listens\n"
        code, message = fails(pusher, target)
        assert process.wait(WAIT_SECONDS_MAX) == -signal.SIGKILL
    assert (code, target in message) == ("UNAVAILABLE", True)
    is_as_new(pushing, pusher, target)


# ---- sinks that do nothing


def grants_nothing(raw, context):
    yield raw.ack(credit=0)
    raw.read()


def grants_too_little(raw, context):
    yield raw.ack(credit=CHUNK_BYTES - 1)
    raw.read()


def says_nothing(raw, context):
    raw.read()
    yield b""


def repeats_itself(raw, context):
    """An acknowledgement that grants nothing is no progress."""
    ended = threading.Event()
    context.add_callback(ended.set)
    while not ended.wait(0.05):
        yield raw.ack(credit=0)


def reads_nothing(raw, context):
    yield raw.ack()
    yield from never_answered(iter(()), context)


def never_ends(raw, context):
    yield raw.ack()
    while raw.read():
        yield raw.ack()
    yield from never_answered(iter(()), context)


IDLE_SINKS = {
    grants_nothing: "it left the credit at 0 bytes for write_stall_seconds_max 1 ",
    grants_too_little: f"it left the credit at {CHUNK_BYTES - 1} bytes",
    says_nothing: f"; the next chunk has {CHUNK_BYTES}",
    repeats_itself: "it left the credit at 0 bytes",
    reads_nothing: "it read nothing for write_stall_seconds_max 1 seconds",
    never_ends: "it did not end the call for write_stall_seconds_max 1 seconds",
}


@pytest.mark.parametrize("behave", IDLE_SINKS, ids=lambda sink: sink.__name__)
def test_a_sink_that_does_nothing_fails_the_prefill(impatient, target, behave):
    with Client(impatient.target) as pusher:
        with raw_sink(behave, target):
            code, message = fails(pusher, target, prompt(8000))
        assert (code, IDLE_SINKS[behave] in message) == ("UNAVAILABLE", True), message
        is_as_new(impatient, pusher, target)


def test_descriptors_of_the_server_do_not_grow_with_failures(
    pushing, pusher, target
):
    tokens = prompt(100)

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{pushing.process.pid}/fd"))

    def fail_often(count: int) -> None:
        for _ in range(count):
            with raw_sink(ends_at_once, target):
                fails(pusher, target, tokens)

    fail_often(3)
    before = descriptors()
    fail_often(20)
    until(lambda: descriptors() <= before + 3)
