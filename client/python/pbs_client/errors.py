"""Exceptions of this client, one for each reaction of the caller.

| exception | status code | what to do |
|---|---|---|
| InvalidArgumentError | INVALID_ARGUMENT, OUT_OF_RANGE | fix the request |
| NotFoundError | NOT_FOUND | no such model, or the lease has expired or was released |
| FailedPreconditionError | FAILED_PRECONDITION | do not retry: another cache or model |
| ResourceExhaustedError | RESOURCE_EXHAUSTED | wait `retry_after` seconds, try again |
| UnavailableError | UNAVAILABLE | try another server, or this one later |
| DeadlineExceededError | DEADLINE_EXCEEDED | allow more time |
| CorruptDataError | DATA_LOSS, or found by this client | transfer again |
| UnimplementedError | UNIMPLEMENTED | do without: this server lacks it |
| AbortedError | ABORTED | wait: the same work is under way; or it was released |
| CallCancelledError | CANCELLED | - |
| InternalError | INTERNAL, UNKNOWN, ... | a fault of the server: report it |

Arguments that cannot be sent raise ValueError or TypeError before any traffic.
"""

from __future__ import annotations

import re
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from pbs_client import _messages


class PbsError(Exception):
    """A request failed.

    Attributes:
        code: the grpc.StatusCode.
        message: the server's message, with value and limit, or this client's.
        retry_after: seconds after which the same request can succeed; None when the
            server did not state it.
    """

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class InvalidArgumentError(PbsError):
    """The request is wrong; `message` names field, value and limit."""


class NotFoundError(PbsError):
    """No such model; or the ticket is unknown, foreign, expired or released."""


class FailedPreconditionError(PbsError):
    """The ticket's digests are not those of the cache. Retrying cannot help."""


class ResourceExhaustedError(PbsError):
    """The server is at a limit now. Try again after `retry_after` seconds."""


class UnavailableError(PbsError):
    """The server is unreachable, loading or draining, or the connection broke."""


class DeadlineExceededError(PbsError):
    """The call's time ran out, or the server knows that it would."""


class UnimplementedError(PbsError):
    """The server does not have this method or option."""


class AbortedError(PbsError):
    """A prefill with the same idempotency key runs, or the lease was released."""


class CallCancelledError(PbsError):
    """The call was cancelled."""


class InternalError(PbsError):
    """A fault of the server."""


class CorruptDataError(PbsError):
    """Received bytes differ from the sent bytes or are in the wrong place.

    Attributes:
        layer: layer of the KV cache; None when the fault is not in a cache.
        kind: "K" or "V", or the name of an Attend tensor; None when not known.
        offset: byte offset of the chunk inside its array; None when not known.
    """

    def __init__(
        self,
        message: str,
        layer: int | None = None,
        kind: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message, grpc.StatusCode.DATA_LOSS)
        self.layer = layer
        self.kind = kind
        self.offset = offset


_CLASS_BY_CODE: dict[grpc.StatusCode, type[PbsError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
}

_DETAILS_KEY = "grpc-status-details-bin"


# When a call's time has run out, gRPC itself says only this.
_OUT_OF_TIME = re.compile(r"(stream removed \()?deadline exceeded\)?", re.IGNORECASE)
_DEADLINE_PASSED = "the deadline "  # the server begins so, and names no figure


def error_of_code(message: str, code: grpc.StatusCode) -> PbsError:
    """The PbsError of a status code."""
    if code is grpc.StatusCode.DATA_LOSS:
        return CorruptDataError(message)
    return _CLASS_BY_CODE.get(code, InternalError)(message, code)


def from_rpc_error(error: Any, path: str, timeout: Any) -> PbsError:
    """The PbsError of a failed call.

    Args:
        error: a grpc.RpcError that is also a grpc.Call.
        path: /service/method of the call.
        timeout: its time limit in seconds, for the message; None is no limit.
    """
    code = error.code()
    message = error.details() or "no message"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and timeout is not None:
        message = with_limit(message, path.rpartition("/")[2], timeout)
    if code is grpc.StatusCode.DATA_LOSS:
        return CorruptDataError(message)
    kind = _CLASS_BY_CODE.get(code, InternalError)
    return kind(message, code, _retry_after(error.trailing_metadata()))


def with_limit(message: str, call: str, timeout: Any) -> str:
    """What is said of a call without time left, with its name and its time limit."""
    limit = f"{call} did not end within its time limit of {_seconds(timeout)} s"
    if _OUT_OF_TIME.fullmatch(message):
        return limit
    return f"{limit}: {message}" if message.startswith(_DEADLINE_PASSED) else message


def _seconds(timeout: Any) -> str:
    """A time limit for people, to a tenth from a second on."""
    seconds = float(timeout)
    if seconds < 1:
        return f"{seconds:.3g}"
    return f"{seconds:.1f}".removesuffix(".0")


def _retry_after(trailing_metadata: Any) -> float | None:
    """Seconds from the RetryInfo in google.rpc error details; None without one."""
    for key, value in trailing_metadata or ():
        if key != _DETAILS_KEY:
            continue
        try:
            details = _messages.RpcStatus.FromString(value).details
            for detail in details:
                if detail.type_url.rpartition("/")[2] == "google.rpc.RetryInfo":
                    delay = _messages.RetryInfo.FromString(detail.value).retry_delay
                    return max(0.0, float(delay.seconds + delay.nanos * 1e-9))
        except DecodeError:
            return None  # not our server's details: use the status without them
    return None
