"""Servers that push, and sinks that break the rules of a push."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pbs_client
from eventually import WAIT_SECONDS_MAX, until
from fake_server import fake_server
from pbs_client import Attention, Client, KvSink, Pbs, PbsError, Push, _messages, _wire
from pbs_client.kv import KvCache
from real_server import REPOSITORY, RunningServer, running_server

RECEIVE = "/pbs.v1.KvSink/Receive"
MODEL, LAYERS, VOCABULARY = "random", 6, 512
SPARSE = Attention(Pbs(threshold=0.7), dense_fallback=False)
HELD = ("pbs_memory_charged_bytes", "pbs_kv_held_bytes", "pbs_kv_leases")
PORTS = 120  # each test takes fresh ones
CHUNK_BYTES = 65536
_LOW, _HIGH = 20_000, 32_000  # below those that the system gives to connections


def free_ports(count: int) -> list[str]:
    """Targets on this machine where nothing listens."""
    found: list[str] = []
    first = np.random.default_rng().integers(_LOW, _HIGH - 10 * count)
    for port in range(int(first), _HIGH):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(f"127.0.0.1:{port}")
        if len(found) == count:
            return found
    raise AssertionError("too few free ports")


def make_model(path: Path) -> Path:
    """A random model of six layers."""
    script = REPOSITORY / "tests" / "models" / "make_random_model.py"
    sizes = ["--preset", "tiny", "--layers", str(LAYERS), "--positions", str(1 << 16)]
    subprocess.run([sys.executable, script, *sizes, "--out", path], check=True)
    return path


@contextlib.contextmanager
def pushing_server(
    model: Path, targets: list[str], *flags: str
) -> Iterator[RunningServer]:
    """A server that may push to the targets."""
    allowed: list[str] = []
    for index, target in enumerate(targets):
        allowed += ["--set", f"push_targets.{index}={target}"]
    common = ("--model", f"{MODEL}={model}", "--metrics-listen", "127.0.0.1:0")
    with running_server(*common, *allowed, *flags) as running:
        yield running


def prompt(length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, VOCABULARY, length)


def bytes_of(cache: KvCache) -> list[bytes]:
    return [array.tobytes() for array in (*cache.k, *cache.v)]


def inline(client: Client, tokens, method="dense") -> list[bytes]:
    """The cache of a prompt by inline delivery."""
    kv = client.prefill(MODEL, tokens, method, delivery="inline").kv
    assert kv is not None
    return bytes_of(kv)


def metric(node: RunningServer, name: str, labels: str = "{.*}") -> float:
    """The sum over the labels of a metric."""
    with urllib.request.urlopen(f"http://{node.metrics}/metrics", timeout=30) as page:
        text = page.read().decode()
    values = re.findall(rf"^{name}(?:{labels})? (\S+)$", text, re.M)
    assert values, f"there is no metric {name}"
    return sum(map(float, values))


def holds_nothing(node: RunningServer) -> bool:
    return all(metric(node, name) == 0 for name in HELD)


def push(client: Client, target: str, tokens, method="dense", **options):
    chunks = {"chunk_bytes": CHUNK_BYTES, **options}
    return client.prefill(MODEL, tokens, method, delivery=Push(target, **chunks))


def fails(client: Client, target: str, tokens=None, **options) -> tuple[str, str]:
    """Code and message of a push that fails."""
    try:
        push(client, target, prompt(2000) if tokens is None else tokens, **options)
    except PbsError as error:
        return error.code.name, error.message
    raise AssertionError("the push did not fail")


def is_as_new(node: RunningServer, client: Client, target: str) -> None:
    """Nothing is held, and the next push is right."""
    until(lambda: holds_nothing(node))
    tokens = prompt(700, seed=9)
    with KvSink(target) as sink:
        reached = []

        def reaches() -> bool:
            """A target that just refused a connection is tried again a little later."""
            try:
                reached.append(push(client, target, tokens))
            except pbs_client.UnavailableError as error:
                assert "failed to connect" in error.message, error
            return bool(reached)

        until(reaches)
        assert bytes_of(sink.take(WAIT_SECONDS_MAX).cache) == inline(client, tokens)
    until(lambda: holds_nothing(node))


# ---- sinks that break the rules


class RawPush:
    """A push as a sink without our code sees it."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self._requests = requests
        self.header = _messages.KvChunk.FromString(next(requests)).push_header
        self.received = 0

    def read(self) -> bool:
        """Reads a chunk; False at the end."""
        message = next(self._requests, None)
        if message is None:
            return False
        self.received += _wire.decode_kv_chunk(message).payload.nbytes
        return True

    def ack(self, received: int | None = None, credit: int = 1 << 40, **other) -> bytes:
        """An acknowledgement; of what was read unless `received` says other bytes."""
        fields = {"handle": self.header.transfer_id, "credit_bytes": credit, **other}
        fields["bytes_received"] = self.received if received is None else received
        return bytes(_messages.KvAck(**fields).SerializeToString())


RawSink = Callable[[RawPush, Any], Iterator[bytes]]


def raw_sink(behave: RawSink, target: str) -> contextlib.AbstractContextManager[str]:
    """A sink that does what `behave` says with each push."""
    return fake_server(
        {RECEIVE: lambda requests, context: behave(RawPush(requests), context)}, target
    )


@contextlib.contextmanager
def socket_server(target: str, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Accepts connections and lets `serve` have each, without HTTP/2."""
    host, _, port = target.rpartition(":")
    with socket.create_server((host, int(port))) as listener:
        connections: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connections.append(connection)
                    serve(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()
