"""Refusals of the gateway: an HTTP status, and a text that says what to do.

| the node says | status | type |
|---|---|---|
| INVALID_ARGUMENT, OUT_OF_RANGE | 400 | invalid_request_error |
| NOT_FOUND | 404 | not_found_error |
| ABORTED, FAILED_PRECONDITION | 409 | conflict_error |
| RESOURCE_EXHAUSTED, with Retry-After | 503 | overloaded_error |
| UNAVAILABLE, CANCELLED | 503 | unavailable_error |
| DEADLINE_EXCEEDED | 504 | timeout_error |
| UNIMPLEMENTED | 501 | unimplemented_error |
| anything else | 500 | internal_error |
"""

from __future__ import annotations

import math
from typing import Any

from pbs_client.errors import (
    AbortedError,
    CallCancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PbsError,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
)

TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    500: "internal_error",
    501: "unimplemented_error",
    503: "overloaded_error",
    504: "timeout_error",
}
RETRY_SECONDS = 1.0  # where the node states no time


class RefusedError(Exception):
    """A request that gets an error instead of a token.

    Attributes:
        status: of HTTP.
        message: names field, value and limit, and says what to do; it has no part of a
            prompt.
        param: the field at fault; None when it is none.
        retry_after: seconds after which the same request can succeed.
        kind: the error's `type`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.kind = kind or TYPES[status]

    def alone(self) -> RefusedError:
        """The same without its traceback and causes, whose frames hold the body."""
        return RefusedError(
            self.status,
            self.message,
            param=self.param,
            retry_after=self.retry_after,
            kind=self.kind,
        )

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.status,
            }
        }

    def headers(self) -> dict[str, str]:
        """Retry-After, in whole seconds, where there is a time."""
        if self.retry_after is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after)))}


def bad(param: str | None, message: str) -> RefusedError:
    """A refusal of the request's own content."""
    return RefusedError(400, message, param=param)


def unavailable(message: str) -> RefusedError:
    """A refusal because nothing is prefilled here now."""
    return RefusedError(
        503, message, kind="unavailable_error", retry_after=RETRY_SECONDS
    )


_STATUS: tuple[tuple[type[PbsError], int], ...] = (
    (InvalidArgumentError, 400),
    (NotFoundError, 404),
    (FailedPreconditionError, 409),
    (AbortedError, 409),
    (DeadlineExceededError, 504),
    (UnimplementedError, 501),
)


def from_node(error: PbsError) -> RefusedError:
    """The refusal of a request that the node refused or failed."""
    if isinstance(error, ResourceExhaustedError):
        after = RETRY_SECONDS if error.retry_after is None else error.retry_after
        return RefusedError(503, error.message, retry_after=after)
    if isinstance(error, (UnavailableError, CallCancelledError)):
        return unavailable(f"the prefill node is not available: {error.message}")
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return RefusedError(status, error.message)
    return RefusedError(500, f"the prefill node failed: {error.message}")
