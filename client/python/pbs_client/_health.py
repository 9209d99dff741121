"""The two messages of grpc.health.v1, encoded here: one field each."""

from __future__ import annotations

from pbs_client import _wire

CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"

_STATES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def request(service: str) -> bytes:
    """HealthCheckRequest {service}; "" is the whole server."""
    return _wire.encode_string(1, service)


def state(reply: bytes) -> str:
    """The status of a HealthCheckResponse, by name."""
    number = _wire.decode_varint_field(reply, 1, "HealthCheckResponse")
    return _STATES[number] if number < len(_STATES) else "UNKNOWN"
