"""Caches through shared memory: the same bytes, and never other ones."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from eventually import until
from pbs_client import Client, KvPart, Lease, _messages
from pbs_client._shared_memory import map_region
from pbs_client.errors import (
    InvalidArgumentError,
    NotFoundError,
    PbsError,
    UnavailableError,
)
from pbs_client.kv import KvFormat, KvTicket
from real_server import (
    REPOSITORY,
    RunningServer,
    mortal_server,
    program,
    refused_start,
    running_server,
)

MODEL, LAYERS, VOCABULARY = "random", 6, 512
PERMISSION_DENIED = 7


def prompt(length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, VOCABULARY, length)


def arrays_of(cache) -> list[bytes]:
    return [array.tobytes() for array in (*cache.k, *cache.v)]


def metric(node: RunningServer, name: str, label: str = "") -> float:
    """The sum over the labels of a metric, or over those with `label`."""
    with urllib.request.urlopen(f"http://{node.metrics}/metrics", timeout=30) as page:
        text = page.read().decode()
    values = re.findall(rf"^{name}(?:{{.*{label}.*}})? (\S+)$", text, re.M)
    assert values, f"there is no metric {name}"
    return sum(map(float, values))


def requests_with(node: RunningServer, result: str) -> float:
    return metric(node, "pbs_kv_shared_memory_requests_total", f'result="{result}"')


def holds_nothing(node: RunningServer) -> bool:
    names = "pbs_memory_charged_bytes", "pbs_kv_held_bytes", "pbs_kv_leases"
    return all(metric(node, name) == 0 for name in names)


def shared_bytes(node: RunningServer) -> int:
    """Resident shared memory of the server."""
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    (kib,) = re.findall(r"^RssShmem:\s+(\d+) kB$", status, re.M)
    return int(kib) << 10


def descriptors(node: RunningServer) -> int:
    return len(os.listdir(f"/proc/{node.process.pid}/fd"))


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> tuple[str, ...]:
    """The flags of a node with a random model, without a socket."""
    folder = tmp_path_factory.mktemp("models") / "six layers"
    script = REPOSITORY / "tests" / "models" / "make_random_model.py"
    sizes = ["--preset", "tiny", "--layers", str(LAYERS), "--positions", str(1 << 18)]
    subprocess.run([sys.executable, script, *sizes, "--out", folder], check=True)
    return ("--model", f"{MODEL}={folder}", "--metrics-listen", "127.0.0.1:0")


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder for sockets, whose path is short."""
    folder = Path(tempfile.mkdtemp(prefix="pbs-"))
    yield folder
    shutil.rmtree(folder)


def sharing(path: Path) -> tuple[str, str]:
    return ("--set", f"shared_memory_socket={path}")


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    """The socket of `node`."""
    folder = Path(tempfile.mkdtemp(prefix="pbs-"))
    yield folder / "socket"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def node(flags, path) -> Iterator[RunningServer]:
    with running_server(*flags, *sharing(path)) as running:
        yield running


@pytest.fixture
def plain(node) -> Iterator[Client]:
    with Client(node.target) as connected:
        yield connected


@pytest.fixture
def client(node, path) -> Iterator[Client]:
    with Client(node.target, shared_memory_socket=str(path)) as connected:
        yield connected


def hold(client: Client, tokens, **lease) -> KvTicket:
    ticket = client.prefill(MODEL, tokens, "dense", delivery=Lease(**lease)).ticket
    assert ticket is not None
    return ticket


# ---- the same bytes


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(KvPart(), id="whole"),
        pytest.param(KvPart(layers=(2, 3)), id="layers"),
        pytest.param(KvPart(heads=(1, 1)), id="a head"),
        pytest.param(KvPart(tokens=(7, 700)), id="tokens"),
        pytest.param(KvPart((5, 1), (999, 1), (0, 1)), id="one row"),
    ],
)
def test_the_bytes_are_those_of_a_plain_fetch(plain, client, part, checksums):
    ticket = hold(plain, prompt(1000))
    kv_format = KvFormat(checksums=checksums)
    want = plain.fetch(ticket, part=part)
    got = client.fetch(ticket, part=part, kv_format=kv_format)
    assert arrays_of(got) == arrays_of(want)
    plain.release(ticket)


def test_no_byte_goes_over_the_network_and_all_count_as_transferred(node, plain, client):
    ticket = hold(plain, prompt(1000))
    size = plain.describe(ticket).bytes
    before = metric(node, "pbs_kv_transfer_bytes_total")
    client.fetch(ticket)
    assert metric(node, "pbs_kv_transfer_bytes_total") == before + size
    assert metric(node, "pbs_kv_export_outstanding_bytes") == 0
    request = _messages.FetchRequest(ticket=ticket.to_message(), shared_memory=True)
    with grpc.insecure_channel(node.target) as channel:
        fetch = channel.unary_stream("/pbs.v1.KvSource/Fetch")
        sent = list(fetch(request.SerializeToString()))
    assert sum(map(len, sent)) < size / 100
    plain.release(ticket)


def test_a_fetch_follows_a_prefill_that_runs(plain, client):
    events: list[str] = []
    admitted: Future[KvTicket] = Future()
    with ThreadPoolExecutor() as pool:
        fetched = pool.submit(
            lambda: client.fetch(
                admitted.result(60), on_layer=lambda layer, *_: events.append(f"{layer}")
            )
        )
        result = plain.prefill(
            MODEL,
            prompt(12_000),
            "dense",
            delivery="lease",
            on_admitted=lambda _, ticket: admitted.set_result(ticket),
        )
        events.append("done")
        got = fetched.result(60)
    assert events.index("0") < events.index("done")
    assert arrays_of(got) == arrays_of(plain.fetch(result.ticket))
    plain.release(result.ticket)


def test_captured_queries_come_over_the_network(plain, client):
    ticket = hold(plain, prompt(300), capture_query_layers=(1,))
    assert np.array_equal(client.fetch_queries(ticket, 1), plain.fetch_queries(ticket, 1))
    plain.release(ticket)


def test_everything_else_works_as_without_the_setting(node, plain):
    tokens = prompt(500)
    ticket = hold(plain, tokens)
    held = plain.fetch(ticket, kv_format=KvFormat(dtype="f16", layout="NHD"))
    inline = plain.prefill(MODEL, tokens, "dense", delivery="inline").kv
    assert held.k[0].shape == (500, inline.k[0].shape[0], inline.k[0].shape[2])
    assert arrays_of(inline) == arrays_of(plain.fetch(ticket))
    plain.release(ticket)
    until(lambda: holds_nothing(node))


def test_pbs_decode_decodes_the_same(server, sockets):
    words = ["--max-new-tokens", "8", "--threads", "1", "--json", "--tokens"]
    tokens = sockets / "prompt.json"
    tokens.write_text(json.dumps(list(range(100, 400))))
    model = REPOSITORY / "tests" / "data" / "recall-llama"

    def decode(target: str, *more: object) -> list[int]:
        command = [program("pbs-decode"), "--server", target, "--model-path", model]
        output = sockets / "ids.json"
        done = subprocess.run(
            [*command, *words, tokens, "--output", output, *more],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(output.read_text())

    want = decode(server.target)
    path = sockets / "socket"
    with running_server("--model", f"recall={model}", *sharing(path)) as node:
        for checksums in ("on", "off"):
            got = decode(
                node.target, "--shared-memory-socket", path, "--checksums", checksums
            )
            assert got == want


def test_pbs_bench_measures_it(node, path):
    command = [program("pbs-bench"), "transfer", "--server", node.target]
    command += ["--direction", "download"]
    command += ["--streams", "2", "--mib", "1", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--shared-memory-socket", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    peers = ("pbs", "shm copy", "shm copy kept")
    assert [(cell["peer"], cell.get("checksums")) for cell in cells] == [
        *((peer, True) for peer in (*peers, "shm view")),
        *((peer, False) for peer in peers),
        ("tcp", None),
    ]
    assert all("ratio_to_tcp" in cell for cell in cells[:-1])


# ---- the end of a lease


@pytest.mark.parametrize("checksums", [True, False])
def test_a_lease_that_ends_in_a_fetch_gives_not_found_and_no_wrong_byte(
    node, plain, client, checksums
):
    ticket = hold(plain, prompt(2000))
    want = plain.fetch(ticket)
    layers = []

    def release_at_2(layer, k, v):
        assert (k.tobytes(), v.tobytes()) == (
            want.k[layer].tobytes(),
            want.v[layer].tobytes(),
        )
        layers.append(layer)
        if layer == 2:
            plain.release(ticket)
            until(lambda: metric(node, "pbs_kv_held_bytes") == 0)

    with pytest.raises(NotFoundError, match="expired or released"):
        client.fetch(
            ticket, kv_format=KvFormat(checksums=checksums), on_layer=release_at_2
        )
    assert layers == [0, 1, 2]


@pytest.mark.parametrize("ends", ["released", "expired"])
def test_after_a_lease_its_memory_is_free_and_an_old_mapping_reads_zeros(
    node, plain, path, ends
):
    until(lambda: holds_nothing(node))
    before = shared_bytes(node)
    ticket = hold(plain, prompt(4000), ttl_seconds=1 if ends == "expired" else 60)
    size = plain.describe(ticket).bytes
    assert shared_bytes(node) >= before + size
    region = map_region(str(path), ticket, size, 5)
    mapping = region._mapping
    assert np.count_nonzero(np.frombuffer(mapping, np.uint8)) > size / 2
    if ends == "released":
        plain.release(ticket)
    until(lambda: holds_nothing(node))
    until(lambda: shared_bytes(node) <= before)
    # Another cache comes and goes; none of it appears.
    other = hold(plain, prompt(4000, seed=2))
    assert np.count_nonzero(np.frombuffer(mapping, np.uint8)) == 0
    plain.release(other)
    assert np.count_nonzero(np.frombuffer(mapping, np.uint8)) == 0
    with pytest.raises(NotFoundError):
        map_region(str(path), ticket, size, 5)


def test_many_leases_leave_nothing(node, plain, client):
    tokens = prompt(64)
    client.fetch(ticket := hold(plain, tokens))
    plain.release(ticket)
    until(lambda: holds_nothing(node))
    before = descriptors(node), shared_bytes(node)
    for _ in range(200):
        ticket = hold(plain, tokens)
        client.fetch(ticket, kv_format=KvFormat(checksums=False))
        plain.release(ticket)
    until(lambda: holds_nothing(node))
    until(lambda: descriptors(node) <= before[0])
    assert shared_bytes(node) <= before[1]


def test_a_server_that_dies_gives_unavailable_and_no_wrong_byte(flags, sockets):
    path = sockets / "socket"
    admitted: Future[KvTicket] = Future()
    layers = []
    with mortal_server(*flags, *sharing(path)) as node, ThreadPoolExecutor() as pool:
        with Client(node.target) as plain, Client(
            node.target, shared_memory_socket=str(path)
        ) as client:

            def prefill():
                with contextlib.suppress(PbsError):
                    plain.prefill(
                        MODEL,
                        prompt(40_000),
                        "dense",
                        delivery="lease",
                        on_admitted=lambda _, ticket: admitted.set_result(ticket),
                    )

            def kill(layer, k, v):
                layers.append(layer)
                node.process.kill()

            running = pool.submit(prefill)
            with pytest.raises(UnavailableError):
                client.fetch(admitted.result(60), resumes=0, on_layer=kill)
            running.result(60)
    assert layers[0] == 0
    assert len(layers) < LAYERS
    assert path.is_socket()  # what a killed server leaves
    with running_server(*flags, *sharing(path)) as node, Client(
        node.target, shared_memory_socket=str(path)
    ) as client:
        client.fetch(hold(client, prompt(10)))
    assert not path.exists()


# ---- refusals


def test_other_formats_are_refused_and_nothing_else_is_sent_instead(plain, client):
    ticket = hold(plain, prompt(100))
    for wish, value, held in (("dtype", "f16", "F32"), ("layout", "NHD", "HND")):
        with pytest.raises(InvalidArgumentError) as refused:
            client.fetch(ticket, kv_format=KvFormat(**{wish: value}))
        assert refused.value.message == (
            f"{wish} {value.upper()} with shared_memory true: the cache is held as {held}, and "
            "only that is in shared memory"
        )
    plain.release(ticket)


def status_of(target: str, ticket: KvTicket, **fields) -> tuple[str, str]:
    request = _messages.FetchRequest(ticket=ticket.to_message(), **fields)
    with grpc.insecure_channel(target) as channel:
        fetch = channel.unary_stream("/pbs.v1.KvSource/Fetch")
        try:
            list(fetch(request.SerializeToString()))
        except grpc.RpcError as error:
            return error.code().name, error.details()
    return "OK", ""


def test_captured_queries_are_not_in_shared_memory(node, plain):
    ticket = hold(plain, prompt(100), capture_query_layers=(1,))
    assert status_of(node.target, ticket, shared_memory=True, queries=True) == (
        "INVALID_ARGUMENT",
        "queries true with shared_memory true: captured queries are not in shared memory",
    )
    plain.release(ticket)


def test_a_server_without_the_setting_says_which_it_is(node, flags, path):
    with running_server(*flags) as other, Client(other.target) as plain:
        ticket = hold(plain, prompt(100))
        assert status_of(other.target, ticket, shared_memory=True) == (
            "FAILED_PRECONDITION",
            "shared_memory true: this server holds its caches in private memory; its "
            "setting shared_memory_socket is empty",
        )
        with Client(other.target, shared_memory_socket="/nowhere/pbs") as client:
            with pytest.raises(UnavailableError, match="shared memory at /nowhere/pbs"):
                client.fetch(ticket)
        with Client(other.target, shared_memory_socket=str(path)) as client:
            with pytest.raises(NotFoundError, match="or another server holds it"):
                client.fetch(ticket)  # the socket is another server's


AS_ANOTHER_USER = """
import os, socket, sys
peer = socket.socket(socket.AF_UNIX)
os.setuid(65534)
try:
    peer.connect(sys.argv[1])
except PermissionError:
    print("file")
else:
    record = peer.recv(100)
    print(int.from_bytes(record[8:12], "little"), len(record))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_by_the_file_and_by_the_server(node, path):
    def refused() -> str:
        command = [sys.executable, "-c", AS_ANOTHER_USER, path]
        return subprocess.run(command, capture_output=True, text=True).stdout

    path.parent.chmod(0o755)
    assert refused() == "file\n"
    before = requests_with(node, "foreign")
    path.chmod(0o666)
    try:
        assert refused() == f"{PERMISSION_DENIED} 24\n"
    finally:
        path.chmod(0o600)
    assert requests_with(node, "foreign") == before + 1


def test_who_says_nothing_or_nonsense_is_cut_off_and_others_are_served(
    node, plain, client, path
):
    ticket = hold(plain, prompt(100))
    silent = [socket.socket(socket.AF_UNIX) for _ in range(80)]  # the limit is 64
    for peer in silent:
        peer.connect(str(path))
    silent[0].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n")
    assert silent[0].recv(1) == b""
    began = time.monotonic()
    client.fetch(ticket)  # after the silent ones
    assert time.monotonic() - began < 30
    assert requests_with(node, "bad_request") >= 1
    until(lambda: requests_with(node, "timeout") >= 64)
    for peer in silent:
        peer.close()
    plain.release(ticket)


def test_a_path_that_is_in_use_is_refused_at_start(node, flags, path, sockets):
    assert (
        f"shared_memory_socket {path} cannot be bound: another server listens there"
        in refused_start(*flags, *sharing(path))
    )
    file = sockets / "file"
    file.write_text("mine")
    said = refused_start(*flags, *sharing(file))
    assert "there is a file that is not a socket" in said
    assert file.read_text() == "mine"


def test_a_drain_ends_with_the_removal_of_the_socket(flags, sockets):
    path = sockets / "socket"
    with running_server(*flags, *sharing(path)) as node:
        with Client(node.target, shared_memory_socket=str(path)) as client:
            ticket = hold(client, prompt(100))
            node.process.send_signal(signal.SIGTERM)
            until(lambda: any('"draining"' in line for line in node.log))
            client.fetch(ticket)  # leases are served in a drain
            client.release(ticket)
        node.process.wait(60)
        assert not path.exists()
