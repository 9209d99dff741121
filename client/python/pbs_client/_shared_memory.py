"""The shared memory of a held cache, as a client on the server's host sees it.

The server gives a descriptor of the memory over its Unix socket. It takes the memory
away when the lease ends: a mapping then reads zeros, and no access faults. So a reader
copies first, and then checks the copy: by checksum, or by asking for the lease.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Iterator

import grpc

from pbs_client._wire import KvChunk
from pbs_client.errors import (
    CorruptDataError,
    NotFoundError,
    PbsError,
    ResourceExhaustedError,
    UnavailableError,
    error_of_code,
)
from pbs_client.kv import KvTicket

# proto/wire/region_handover.h
_REQUEST = struct.Struct("<4sI32sQ")
_REPLY = struct.Struct("<4sIIIQ")
_MAGIC, _VERSION = b"PBSR", 1
_CODES = {code.value[0]: code for code in grpc.StatusCode}

# <fcntl.h>; Python names them from 3.8 on some systems only.
_F_GET_SEALS = 1034
_SEALS = 1 | 2 | 4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
_CONNECT_SECONDS_MAX = 5.0


class SharedRegion:
    """The mapped memory of one cache, for reading. Not thread-safe."""

    def __init__(self, mapping: mmap.mmap) -> None:
        """Takes ownership of the mapping."""
        self._mapping = mapping
        self._view = memoryview(mapping)

    def close(self) -> None:
        """Unmaps it; with the last view where there are views of it."""
        with contextlib.suppress(BufferError):
            self._view.release()
            self._mapping.close()

    def with_payload(self, chunk: KvChunk, row_bytes: int) -> KvChunk:
        """The chunk with the place that it names as its payload.

        Raises:
            CorruptDataError: the chunk has a payload, or its place is not inside.
        """
        # Counts are below 2^31, and Python's numbers have no end.
        size = chunk.token_count * chunk.head_count * row_bytes
        begin, region = chunk.region_offset, self._view.nbytes
        if chunk.payload.nbytes or size < 0 or not 0 <= begin <= region - size:
            raise CorruptDataError(
                f"chunk of KV layer {chunk.layer} with {chunk.payload.nbytes} payload "
                f"bytes names {size} bytes at region_offset {begin} of shared memory "
                f"that has {region}",
                chunk.layer,
                None,
                chunk.byte_offset,
            )
        return chunk._replace(payload=self._view[begin : begin + size])


def map_region(path: str, ticket: KvTicket, size: int, seconds: float) -> SharedRegion:
    """Asks the server at `path` for the memory of the ticket's cache and maps it.

    Args:
        path: the server's shared_memory_socket.
        ticket: of the cache.
        size: bytes of the cache.
        seconds: the most time to wait.

    Raises:
        UnavailableError: no server answers there; the message has the path.
        NotFoundError: the server there has no lease with the ticket.
        CorruptDataError: what comes is not a sealed region of `size` bytes.
    """
    with _asked(path, ticket, seconds) as (stated, descriptor):
        _check_region(path, descriptor, stated, size)
        try:
            return SharedRegion(
                mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)
            )
        except OSError as error:
            raise ResourceExhaustedError(
                f"cannot map {size} bytes of the shared memory from {path}: {error}",
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            ) from None


@contextlib.contextmanager
def _asked(path: str, ticket: KvTicket, seconds: float) -> Iterator[tuple[int, int]]:
    """The stated size and the descriptor, which is closed at the end of the block."""
    handle = ticket.handle.encode()
    if len(handle) != 32:
        raise _refusal(path, grpc.StatusCode.NOT_FOUND)
    request = _REQUEST.pack(_MAGIC, _VERSION, handle, ticket.epoch)
    descriptors: list[int] = []
    try:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.settimeout(max(0.001, min(seconds, _CONNECT_SECONDS_MAX)))
                peer.connect(path)
                # It fails where the server has refused already: then the reply says why.
                with contextlib.suppress(BrokenPipeError):
                    peer.sendall(request)
                record = _receive(peer, descriptors)
        except OSError as error:
            raise _no_answer(path, str(error)) from None
        if not record:
            raise _no_answer(path, "the connection was closed")
        yield _read_reply(path, record), descriptors[0] if descriptors else -1
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _receive(peer: socket.socket, descriptors: list[int]) -> bytes:
    """The record, to its length or the end; descriptors that come are appended."""
    record = b""
    while len(record) < _REPLY.size:
        part, ancillary, _, _ = peer.recvmsg(
            _REPLY.size - len(record),
            socket.CMSG_SPACE(4),
            socket.MSG_CMSG_CLOEXEC,
        )
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) // 4 * 4])
                descriptors.extend(numbers)
        if not part:
            break
        record += part
    return record


def _read_reply(path: str, record: bytes) -> int:
    """The stated size."""
    wrong = CorruptDataError(f"what answers at {path} is not a pbs-prefilld")
    if len(record) != _REPLY.size:
        raise wrong
    magic, version, number, zero, stated = _REPLY.unpack(record)
    code = _CODES.get(number)
    if (magic, version, zero) != (_MAGIC, _VERSION, 0) or code is None:
        raise wrong
    if code is not grpc.StatusCode.OK:
        raise _refusal(path, code)
    return int(stated)


def _check_region(path: str, descriptor: int, stated: int, size: int) -> None:
    """A region that could shrink would fault; one of another size is another's."""
    try:
        seals = fcntl.fcntl(descriptor, _F_GET_SEALS)
        actual = os.fstat(descriptor).st_size
    except (OSError, ValueError):
        seals, actual = 0, 0
    if seals & _SEALS != _SEALS:
        raise CorruptDataError(
            f"the shared memory from {path} is not sealed against other sizes"
        )
    if (actual, stated) != (size, size):
        raise CorruptDataError(
            f"the shared memory from {path} has {actual} bytes and is said to have "
            f"{stated}; the cache has {size}"
        )


def _no_answer(path: str, why: str) -> UnavailableError:
    return UnavailableError(
        f"no server gives shared memory at {path}: {why}; start pbs-prefilld on this "
        "host and as this user, with shared_memory_socket",
        grpc.StatusCode.UNAVAILABLE,
    )


def _refusal(path: str, code: grpc.StatusCode) -> PbsError:
    if code is grpc.StatusCode.NOT_FOUND:
        return NotFoundError(
            f"no lease has this ticket at {path}: it is unknown, expired or released, "
            "or another server holds it",
            code,
        )
    return error_of_code(
        f"the server at {path} gives no shared memory: {code.name}", code
    )
