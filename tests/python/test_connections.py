"""One connection, many callers: the fault of one call is no other's."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from http2_peer import (
    CHECK,
    SECONDS_MAX,
    WATCH,
    Call,
    Http2Peer,
    connect,
    framed,
    http2_peer,
)
from pbs_client import (
    Client,
    Inline,
    KvFormat,
    MeanPooling,
    UnavailableError,
    _transport,
)
from real_server import (
    RECALL_MODEL,
    REPOSITORY,
    RunningServer,
    refused_start,
    running_server,
)

METADATA_BYTES_MAX = 65536
INFO = "/pbs.v1.Prefill/GetServerInfo"
PREFILL = "/pbs.v1.Prefill/Prefill"
ATTEND = "/pbs.v1.Attention/Attend"
# The longest message: 5 bytes for each of 1,048,576 tokens, and 64 KiB.
MESSAGE_BYTES_MAX = 5 * 1048576 + 65536


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server("--model", f"recall={RECALL_MODEL}") as running:
        yield running


def metadata(total: int) -> tuple[tuple[str, str], ...]:
    """Entries that take `total` bytes as HTTP/2 counts: name, value and 32 for each."""
    name, size = "x-long", 4096
    sizes = [size] * (total // size) + [total % size] * (total % size > 0)
    if sizes and sizes[-1] < 64:
        sizes[-2:] = [size - 64, sizes[-1] + 64]
    return tuple((name, "v" * (part - len(name) - 32)) for part in sizes)


@dataclass(frozen=True)
class Row:
    """What one call does, and what it alone gets."""

    path: str
    status: int
    message: str = ""  # part of the status's text
    body: bytes = framed(b"")
    metadata_bytes: int = 0
    headers: tuple[tuple[str, str], ...] = ()


ROWS = {
    "an ordinary call": Row(INFO, 0),
    "metadata of 9 KiB": Row(INFO, 0, metadata_bytes=9 << 10),
    "metadata of the limit": Row(INFO, 0, metadata_bytes=METADATA_BYTES_MAX),
    "metadata of the limit and one byte": Row(
        INFO,
        3,
        "metadata of 65537 bytes exceeds transport.metadata_bytes_max 65536; send",
        metadata_bytes=METADATA_BYTES_MAX + 1,
    ),
    "three times the metadata of a prefill": Row(
        PREFILL, 3, "transport.metadata_bytes_max", metadata_bytes=3 * METADATA_BYTES_MAX
    ),
    "three times the metadata of an attend": Row(
        ATTEND, 3, "transport.metadata_bytes_max", metadata_bytes=3 * METADATA_BYTES_MAX
    ),
    "three times the metadata of a health check": Row(
        CHECK, 0, metadata_bytes=3 * METADATA_BYTES_MAX
    ),
    "an unknown method": Row("/pbs.v1.Prefill/Nothing", 12),
    "an unknown health service": Row(CHECK, 5, body=framed(b"\x0a\x01x")),
    "a message that is no protobuf": Row(PREFILL, 3, body=framed(b"\xff\xff")),
    "a message cut short": Row(PREFILL, 3, body=framed(b"1234")[:-1]),
    "no message": Row(PREFILL, 3, body=b""),
    "two messages where one belongs": Row(PREFILL, 3, body=2 * framed(b"")),
    "a message that is too long": Row(
        PREFILL, 8, "larger than max", body=framed(bytes(MESSAGE_BYTES_MAX + 1))
    ),
    "a compressed message": Row(
        PREFILL,
        12,
        body=framed(b"x", compressed=True),
        headers=(("grpc_encoding", "gzip"),),
    ),
    "another verb": Row(INFO, 2, headers=((":method", "GET"),)),
}


def begin_watch(peer: Http2Peer) -> Call:
    """A call that goes on for as long as the server serves."""
    watch = peer.call(WATCH)
    peer.wait(lambda: watch.data != b"")
    return watch


def assert_others_go_on(peer: Http2Peer, watch: Call) -> None:
    assert peer.finish(INFO).status == 0
    assert not watch.ended
    assert peer.ended_by is None


@pytest.mark.parametrize("name", ROWS)
def test_a_call_gets_its_own_answer_and_others_of_its_connection_go_on(server, name):
    row = ROWS[name]
    with http2_peer(server.target) as peer:
        watch = begin_watch(peer)
        call = peer.finish(
            row.path, row.body, metadata(row.metadata_bytes), **dict(row.headers)
        )
        assert call.status == row.status
        assert row.message in call.message
        assert_others_go_on(peer, watch)


def test_a_call_that_is_reset_leaves_the_others_alone(server):
    with http2_peer(server.target) as peer:
        watch = begin_watch(peer)
        peer.reset(peer.call(ATTEND, b"", end=False))
        assert_others_go_on(peer, watch)


@pytest.mark.parametrize("with_call", [False, True], ids=["without_calls", "with_a_call"])
def test_no_number_of_pings_ends_a_connection(server, with_call):
    with http2_peer(server.target) as peer:
        if with_call:
            begin_watch(peer)
        peer.ping(100)
        assert peer.finish(INFO).status == 0


# ---- peers that are gone


@pytest.fixture(scope="module")
def impatient_server() -> Iterator[RunningServer]:
    flags = ("transport.keepalive_seconds=1", "transport.keepalive_timeout_seconds=1")
    with running_server(*(word for flag in flags for word in ("--set", flag))) as running:
        yield running


@pytest.mark.parametrize("with_call", [False, True], ids=["without_calls", "with_a_call"])
def test_a_peer_that_answers_no_ping_is_dropped(impatient_server, with_call):
    with http2_peer(impatient_server.target) as peer:
        if with_call:
            begin_watch(peer)
        peer.receive_nothing_until_closed()


def test_a_peer_that_answers_pings_stays(impatient_server):
    with http2_peer(impatient_server.target) as peer:
        peer.wait(lambda: peer.answered_pings >= 2)
        assert peer.finish(INFO).status == 0


def test_a_connection_that_never_says_anything_is_closed(impatient_server):
    with connect(impatient_server.target) as silent:
        while silent.recv(65536):
            pass


def test_the_default_finds_a_dead_peer_within_a_minute():
    text = (REPOSITORY / "server" / "service" / "options.h").read_text()
    seconds = re.findall(r"int32_t keepalive(?:_timeout)?_seconds = (\d+);", text)
    assert len(seconds) == 2
    assert sum(map(int, seconds)) <= 60


@contextlib.contextmanager
def frozen(server: RunningServer) -> Iterator[None]:
    server.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


# What the client sets, scaled to a test.
IMPATIENT = tuple(
    (name, 1000)
    for name in _transport.channel_options("127.0.0.1:1")
    if name.startswith("grpc.keepalive_time") or name == "grpc.http2.ping_timeout_ms"
)


def test_the_client_finds_a_frozen_server(server):
    with Client(server.target, channel_options=IMPATIENT) as client:
        assert client.health() == "SERVING"
        with frozen(server), pytest.raises(UnavailableError):
            client.models(timeout=600)
        client.wait_until_serving(timeout=60)


def test_the_client_finds_a_frozen_server_within_a_minute_by_default():
    options = _transport.channel_options("127.0.0.1:1")
    assert options["grpc.keepalive_timeout_ms"] == options["grpc.http2.ping_timeout_ms"]
    found = options["grpc.keepalive_time_ms"] + options["grpc.keepalive_timeout_ms"]
    assert found <= 60_000
    assert options["grpc.keepalive_permit_without_calls"] == 1


# ---- more peers than there is room for


def is_greeted(connection: socket.socket) -> bool:
    """Whether the server kept the connection: it sends its settings at once."""
    try:
        return connection.recv(1) != b""
    except ConnectionError:
        return False


def wait_until_accepted(target: str) -> None:
    end = time.monotonic() + SECONDS_MAX
    while True:
        with connect(target) as connection:
            if is_greeted(connection):
                return
        assert time.monotonic() < end, "the server accepts no more connections"


def test_connections_beyond_the_limit_are_closed_until_there_is_room():
    with running_server("--set", "transport.connections_max=3") as server:
        with http2_peer(server.target) as peer, contextlib.ExitStack() as stack:
            watch = begin_watch(peer)
            kept = [
                is_greeted(stack.enter_context(connect(server.target))) for _ in range(4)
            ]
            assert kept == [True, True, False, False]
            assert_others_go_on(peer, watch)
        wait_until_accepted(server.target)
    assert "connections_refused" in "".join(server.log)


def test_few_descriptors_mean_few_connections_and_no_less():
    with running_server(prefix=("prlimit", "--nofile=64:256")) as server:
        limited = server.event("connections_limited")
        limit = limited["connections_max"]
        assert 0 < limit < 256 == limited["descriptors_max"]  # the soft limit was raised
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connect(server.target)) for _ in range(300)]
            assert sum(map(is_greeted, connections)) == limit
        wait_until_accepted(server.target)
        with Client(server.target) as client:
            assert client.health() == "SERVING"


def test_too_few_descriptors_are_told_at_start():
    log = refused_start(prefix=("prlimit", "--nofile=64:64"))
    assert "the limit of 64 file descriptors leaves none for connections" in log
    assert "raise the hard limit (ulimit -Hn) to" in log


def test_the_server_accepts_again_after_it_ran_out_of_descriptors(server):
    pid = server.process.pid
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    open_now = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_now + 5, usual[1]))
    try:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connect(server.target)) for _ in range(20)]
            assert not all(map(is_greeted, connections))
        wait_until_accepted(server.target)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
    with Client(server.target) as client:
        assert client.health() == "SERVING"


# ---- messages


def test_the_largest_chunk_fits_a_client_of_default_settings():
    default_receive = (("grpc.max_receive_message_length", 4 << 20),)
    flags = ("--model", f"recall={RECALL_MODEL}")
    flags += ("--set", "transport.chunk_bytes=4194304")
    tokens = [7] * 8192
    array_bytes = 8192 * 2 * 64 * 4  # as f32: the payload that does not fit
    assert array_bytes == 4 << 20
    q = np.ones((1, 1, 32768, 64), np.float32)
    with (
        running_server(*flags) as server,
        Client(server.target, channel_options=default_receive) as client,
    ):
        leased = client.prefill("recall", tokens, delivery="lease")
        fetched = client.fetch(leased.ticket, kv_format=KvFormat("f32"))
        inline = client.prefill("recall", tokens, delivery=Inline("f32")).kv
        assert fetched.nbytes == inline.nbytes == 2 * 2 * array_bytes
        attended = client.attend(q, q, q, MeanPooling(threshold=0.01))
        assert attended.o.nbytes == 2 * array_bytes
        client.release(leased.ticket)


# ---- links that are slow

ROUND_TRIP_SECONDS = 0.5


@contextlib.contextmanager
def far_away(target: str) -> Iterator[str]:
    """An address from which what the server says first comes after a round trip."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            near, _ = listener.accept()
            with near, connect(target) as far:
                ends = {near: far, far: near}
                end = time.monotonic() + ROUND_TRIP_SECONDS
                while left := max(0.0, end - time.monotonic()):
                    select.select([], [], [], left)
                while True:
                    for ready in select.select([*ends], [], [])[0]:
                        data = ready.recv(65536)
                        if not data:
                            return
                        ends[ready].sendall(data)

        thread = threading.Thread(target=relay)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_a_server_with_a_long_round_trip_is_not_taken_for_a_dead_one(server):
    with far_away(server.target) as target, Client(target) as client:
        assert client.health() == "SERVING"
