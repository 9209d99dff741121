"""Every status code becomes the exception that says what to do."""

from __future__ import annotations

import threading

import grpc
import numpy as np
import pbs_client
import pytest
from fake_server import fake_server, never_answered
from google.protobuf import duration_pb2
from pbs_client import _messages, _transport, errors

MODELS = "/pbs.v1.Prefill/ListModels"


def failing(code: grpc.StatusCode, message: str, details: bytes | None = None):
    def handle(requests, context):
        if details is not None:
            context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(code, message)
        yield b""

    return handle


def call_failing(*status) -> pbs_client.PbsError:
    handlers = {MODELS: failing(*status)}
    with fake_server(handlers) as target, pbs_client.Client(target) as client:
        with pytest.raises(pbs_client.PbsError) as caught:
            client.models()
        return caught.value


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", errors.InvalidArgumentError),
        ("OUT_OF_RANGE", errors.InvalidArgumentError),
        ("NOT_FOUND", errors.NotFoundError),
        ("FAILED_PRECONDITION", errors.FailedPreconditionError),
        ("RESOURCE_EXHAUSTED", errors.ResourceExhaustedError),
        ("UNAVAILABLE", errors.UnavailableError),
        ("DEADLINE_EXCEEDED", errors.DeadlineExceededError),
        ("UNIMPLEMENTED", errors.UnimplementedError),
        ("ABORTED", errors.AbortedError),
        ("CANCELLED", errors.CallCancelledError),
        ("DATA_LOSS", errors.CorruptDataError),
        ("INTERNAL", errors.InternalError),
        ("UNKNOWN", errors.InternalError),
        ("PERMISSION_DENIED", errors.InternalError),
    ],
)
def test_a_status_code_has_its_exception(code, kind):
    error = call_failing(grpc.StatusCode[code], "seq_len 9 exceeds 8")
    assert type(error) is kind
    assert error.code.name == code
    assert error.message == "seq_len 9 exceeds 8"
    assert error.retry_after is None
    assert str(error) == f"{code}: seq_len 9 exceeds 8"


def retry_details(seconds: int, nanos: int) -> bytes:
    delay = duration_pb2.Duration(seconds=seconds, nanos=nanos).SerializeToString()
    retry = _messages.RetryInfo()
    retry.retry_delay.MergeFromString(delay)
    status = _messages.RpcStatus(code=8, message="full")
    status.details.add(type_url="type.googleapis.com/google.rpc.DebugInfo", value=b"")
    status.details.add(
        type_url="type.googleapis.com/google.rpc.RetryInfo",
        value=retry.SerializeToString(),
    )
    return status.SerializeToString()


@pytest.mark.parametrize(
    ("details", "retry_after"),
    [
        pytest.param(retry_details(2, 500_000_000), 2.5, id="seconds and nanos"),
        pytest.param(retry_details(0, 0), 0.0, id="at once"),
        pytest.param(retry_details(-5, 0), 0.0, id="negative"),
        pytest.param(b"", None, id="empty details"),
        pytest.param(b"\xff\xff", None, id="malformed details"),
    ],
)
def test_the_server_says_when_to_come_back(details, retry_after):
    error = call_failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", details)
    assert error.retry_after == retry_after


def test_a_server_that_is_not_there_is_unavailable():
    with fake_server({}) as target:
        pass  # now nobody listens there
    with (
        pbs_client.Client(target) as client,
        pytest.raises(pbs_client.UnavailableError),
    ):
        client.info()


LATE = {
    "a call with one reply": (lambda c, t: c.models(timeout=t), "ListModels"),
    "a stream of replies": (lambda c, t: c.prefill("m", [1], timeout=t), "Prefill"),
    "a stream both ways": (
        lambda c, t: c.attend(Q, Q, Q, "dense", timeout=t), "Attend"
    ),
}  # fmt: skip
Q = np.ones((1, 1, 4, 32), np.float32)


@pytest.mark.parametrize(("call", "name"), LATE.values(), ids=LATE)
def test_a_call_that_is_not_answered_ends_and_says_its_time_limit(call, name):
    handlers = dict.fromkeys(
        (MODELS, "/pbs.v1.Prefill/Prefill", "/pbs.v1.Attention/Attend"), never_answered
    )
    with (
        fake_server(handlers) as target,
        pbs_client.Client(target) as client,
        pytest.raises(pbs_client.DeadlineExceededError) as caught,
    ):
        call(client, 0.2)
    assert caught.value.message == f"{name} did not end within its time limit of 0.2 s"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("needs 9 s, 8 s are left", "needs 9 s, 8 s are left"),
        (
            "the deadline passed while the request ran",
            "ListModels did not end within its time limit of 30 s: "
            "the deadline passed while the request ran",
        ),
    ],
)
def test_a_server_that_is_out_of_time_keeps_its_figures_or_gets_the_limit(said, message):
    assert call_failing(grpc.StatusCode.DEADLINE_EXCEEDED, said).message == message


@pytest.mark.parametrize(
    ("timeout", "text"),
    [
        (3600, "3600 s"),
        (np.float32(59.9987), "60 s"),
        (1.25, "1.2 s"),
        (0.0001, "0.0001 s"),
        (0, "0 s"),
    ],
)
def test_a_time_limit_is_said_for_people(timeout, text):
    error = errors.with_limit("Deadline Exceeded", "Attend", timeout)
    assert error == f"Attend did not end within its time limit of {text}"


def test_a_method_the_server_lacks_is_unimplemented():
    with (
        fake_server({}) as target,
        pbs_client.Client(target) as client,
        pytest.raises(pbs_client.UnimplementedError),
    ):
        client.info()


@pytest.mark.parametrize(
    "target",
    ["", "localhost", "localhost:", "localhost:0", "localhost:65536", ":50051"],
)
def test_a_target_without_host_and_port_is_refused_before_any_traffic(target):
    with pytest.raises(ValueError, match="HOST:PORT"):
        pbs_client.Client(target)


@pytest.mark.parametrize(
    ("target", "loopback"),
    [
        ("localhost:1", True),
        ("127.0.0.1:1", True),
        ("127.8.8.8:1", True),
        ("[::1]:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("ipv6:[::1]:1", True),
        ("dns:///localhost:1", True),
        ("unix:/run/pbs.sock", True),
        ("10.0.0.1:1", False),
        ("node.example:1", False),
        ("dns:///node.example:1", False),
    ],
)
def test_proxies_are_for_other_machines(target, loopback):
    assert _transport.is_loopback(target) is loopback
    options = _transport.channel_options(target)
    assert options.get("grpc.enable_http_proxy") == (0 if loopback else None)


def test_an_http_proxy_in_the_environment_does_not_stand_before_loopback(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:1")

    def no_models(requests, context):
        for _ in requests:
            pass
        yield b""

    with (
        fake_server({MODELS: no_models}) as target,
        pbs_client.Client(target) as client,
    ):
        assert client.models() == ()


def test_waiting_for_health_ends_when_the_server_serves():
    def watch(requests, context):
        yield b"\x08\x02"  # NOT_SERVING
        yield b"\x08\x01"  # SERVING
        context.abort(grpc.StatusCode.INTERNAL, "the client should have left")

    with (
        fake_server({"/grpc.health.v1.Health/Watch": watch}) as target,
        pbs_client.Client(target) as client,
    ):
        client.wait_until_serving(timeout=30)


def test_waiting_for_health_waits_for_a_server_that_is_yet_to_start():
    with fake_server({}) as target:
        pass  # now nobody listens there
    with pbs_client.Client(target) as client:
        waiter = threading.Thread(target=lambda: client.wait_until_serving(timeout=30))
        waiter.start()
        handlers = {"/grpc.health.v1.Health/Watch": lambda *_: iter([b"\x08\x01"])}
        with fake_server(handlers, target):
            waiter.join()


def test_waiting_for_health_outlives_a_connection_that_breaks():
    breaks = iter([True, True, False])

    def watch(requests, context):
        yield b"\x08\x02"  # NOT_SERVING
        if next(breaks):
            context.abort(grpc.StatusCode.UNAVAILABLE, "ping timeout")
        yield b"\x08\x01"  # SERVING

    with (
        fake_server({"/grpc.health.v1.Health/Watch": watch}) as target,
        pbs_client.Client(target) as client,
    ):
        client.wait_until_serving(timeout=30)


def test_waiting_for_health_has_an_end():
    with fake_server({}) as target:
        pass
    with (
        pbs_client.Client(target) as client,
        pytest.raises(pbs_client.DeadlineExceededError),
    ):
        client.wait_until_serving(timeout=0.2)
