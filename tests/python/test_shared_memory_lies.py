"""The client believes no server about shared memory."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pbs_client._shared_memory import SharedRegion, map_region
from pbs_client._wire import KvChunk
from pbs_client.errors import (
    CorruptDataError,
    NotFoundError,
    PbsError,
    UnavailableError,
)
from pbs_client.kv import KvTicket

F_ADD_SEALS = 1033  # <fcntl.h>
ALL_SEALS, SIZE = 1 | 2 | 4, 5000


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder for sockets, whose path is short."""
    folder = Path(tempfile.mkdtemp(prefix="pbs-"))
    yield folder
    shutil.rmtree(folder)


def sealed(size: int, seals: int) -> int:
    region = os.memfd_create("fake", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(region, size)
    fcntl.fcntl(region, F_ADD_SEALS, seals)
    return region


@contextlib.contextmanager
def lying(path: Path, record: bytes, region: int | None) -> Iterator[None]:
    """A server that answers one request with `record` and a descriptor."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer():
            peer, _ = listener.accept()
            with peer:
                peer.recv(100)
                if record:
                    socket.send_fds(peer, [record], [] if region is None else [region])

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        thread.join(30)
    if region is not None:
        os.close(region)


def reply(code: int, size: int) -> bytes:
    return struct.pack("<4sIIIQ", b"PBSR", 1, code, 0, size)


@pytest.mark.parametrize(
    ("record", "size", "seals", "error", "message"),
    [
        pytest.param(reply(0, SIZE), SIZE - 1, 7, CorruptDataError, "has 4999", id="short"),
        pytest.param(reply(0, SIZE), SIZE + 1, 7, CorruptDataError, "has 5001", id="long"),
        pytest.param(reply(0, 1), SIZE, 7, CorruptDataError, "said to have 1;", id="said"),
        pytest.param(reply(0, SIZE), SIZE, 0, CorruptDataError, "not sealed", id="open"),
        pytest.param(reply(0, SIZE), SIZE, 5, CorruptDataError, "not sealed", id="shrinks"),
        pytest.param(reply(0, SIZE), SIZE, 3, CorruptDataError, "not sealed", id="unsealed"),
        pytest.param(reply(0, SIZE), None, 0, CorruptDataError, "not sealed", id="none"),
        pytest.param(reply(5, 0), None, 0, NotFoundError, "no lease", id="no lease"),
        pytest.param(reply(7, 0), SIZE, 7, PbsError, "PERMISSION", id="refused"),
        pytest.param(reply(99, 0), None, 0, CorruptDataError, "not a pbs", id="no code"),
        pytest.param(b"x" * 24, None, 0, CorruptDataError, "not a pbs", id="garbage"),
        pytest.param(reply(0, 1)[:-1], SIZE, 7, CorruptDataError, "not a pbs", id="cut"),
        pytest.param(b"", None, 0, UnavailableError, "closed", id="closed"),
    ],
)
def test_a_lying_server_is_refused(sockets, record, size, seals, error, message):
    path = sockets / "socket"
    ticket = KvTicket("a" * 32, 9, "m", "exact")
    region = None if size is None else sealed(size, seals)
    before = len(os.listdir("/proc/self/fd"))
    with lying(path, record, region):
        with pytest.raises(error, match=message) as refused:
            map_region(str(path), ticket, SIZE, 20)
    assert str(path) in str(refused.value)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_place_outside_the_memory_is_corrupt():
    region = sealed(SIZE, ALL_SEALS)
    mapping = mmap.mmap(region, SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(region)
    shared = SharedRegion(mapping)
    numbers = dict.fromkeys(KvChunk._fields, 0)
    numbers |= {"token_count": 10, "head_count": 1, "payload": memoryview(b"")}
    chunk = KvChunk(**numbers)._replace(region_offset=SIZE - 640)
    assert shared.with_payload(chunk, 64).payload.nbytes == 640
    for change in (
        {"region_offset": SIZE - 639},
        {"region_offset": 2**64 - 1},
        {"token_count": -1},
        {"token_count": 2**31 - 1},
        {"payload": memoryview(b"x")},
    ):
        with pytest.raises(CorruptDataError, match="region_offset"):
            shared.with_payload(chunk._replace(**change), 64)
    shared.close()
