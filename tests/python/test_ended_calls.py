"""A call that fails is over: nothing of gRPC's call is left for the collector.

gRPC's call takes a lock when it is collected. At the exit of the interpreter a stopped
thread may hold this lock, and the program would never end.
"""

from __future__ import annotations

import gc
import threading

import grpc
import numpy as np
import pytest
from fake_server import fake_server, never_answered, replies
from pbs_client import (
    CallCancelledError,
    Client,
    DeadlineExceededError,
    PbsError,
    _messages,
)
from pbs_client._transport import CallScope

ATTEND = "/pbs.v1.Attention/Attend"
PREFILL = "/pbs.v1.Prefill/Prefill"
AttendResponse = _messages._message_class("pbs.v1.AttendResponse")


def refused_at_once(requests, context):
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "alpha -1 is outside (0, 1]")
    yield b""


def refused_after_the_header(requests, context):
    next(requests)
    yield from refused_at_once(requests, context)


def refused_after_the_upload(requests, context):
    for _ in requests:
        pass
    yield from refused_at_once(requests, context)


def attend(client: Client, **arguments):
    array = np.ones((1, 1, 512, 32), np.float32)
    client.attend(array, array, array, "dense", **arguments)


CALLS = {
    # what the server does with the call; the call
    "an attend that is refused at once": (refused_at_once, attend),
    "an attend that is refused after its header": (refused_after_the_header, attend),
    "an attend that is refused after its upload": (refused_after_the_upload, attend),
    "an attend that runs out of time": (
        never_answered,
        lambda client: attend(client, timeout=0.2),
    ),
    "an attend with a wrong reply": (
        replies(AttendResponse(header={}), AttendResponse(header={})),
        attend,
    ),
    "a prefill that is refused": (
        refused_at_once,
        lambda client: client.prefill("m", [1, 2]),
    ),
    "a prefill that runs out of time": (
        never_answered,
        lambda client: client.prefill("m", [1, 2], timeout=0.2),
    ),
}


@pytest.fixture
def without_collector():
    """Only what nothing refers to is freed; cycles stay."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("handler", "call"), CALLS.values(), ids=CALLS)
def test_a_failed_call_leaves_nothing_of_grpc(without_collector, handler, call):
    handlers = {ATTEND: handler, PREFILL: handler}
    with fake_server(handlers) as target, Client(target) as client:
        with pytest.raises(PbsError) as caught:
            call(client)
        left = [x for x in gc.get_objects() if issubclass(type(x), grpc.Call)]
    assert left == []
    assert caught.value.__context__ is None


def test_the_thread_that_uploads_ends_before_a_refused_attend_does():
    uploaders = set()

    def progress(step: str, done: int, total: int) -> None:
        uploaders.add(threading.current_thread())

    with (
        fake_server({ATTEND: refused_after_the_upload}) as target,
        Client(target) as client,
    ):
        for _ in range(20):
            with pytest.raises(PbsError, match="alpha -1"):
                attend(client, progress=progress)
            assert uploaders
            assert threading.current_thread() not in uploaders
            assert not any(thread.is_alive() for thread in uploaders)
            uploaders.clear()


def test_the_calls_of_a_scope_are_cancelled_together():
    scope, begun = CallScope(), threading.Barrier(3)
    errors = []

    def answer(requests, context):
        begun.wait()
        yield from never_answered(requests, context)

    def prefill(client):
        with scope.entered(), pytest.raises(CallCancelledError) as caught:
            client.prefill("m", [1, 2])
        errors.append(caught.value)

    with fake_server({PREFILL: answer}) as target, Client(target) as client:
        callers = [threading.Thread(target=prefill, args=(client,)) for _ in range(2)]
        for caller in callers:
            caller.start()
        begun.wait()
        assert not scope.wait_cancelled(0)
        scope.cancel()
        for caller in callers:
            caller.join()
        assert scope.wait_cancelled(0)
        assert len(errors) == 2


def test_a_call_of_a_cancelled_scope_ends_at_once_and_others_go_on():
    scope = CallScope()
    scope.cancel()
    handlers = {PREFILL: never_answered}
    with fake_server(handlers) as target, Client(target) as client:
        with scope.entered(), pytest.raises(CallCancelledError):
            client.prefill("m", [1, 2])
        with pytest.raises(DeadlineExceededError):  # of no scope
            client.prefill("m", [1, 2], timeout=0.2)
