"""A gRPC server that answers what a test says: for faults no real server has."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

# Gets the request messages and the call's context; yields reply messages.
Handler = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, handlers: dict[str, Handler]) -> None:
        self._handlers = handlers

    def service(self, details: Any) -> Any:
        handler = self._handlers.get(details.method)
        return handler and grpc.stream_stream_rpc_method_handler(handler)


@contextlib.contextmanager
def fake_server(
    handlers: dict[str, Handler], target: str = "127.0.0.1:0"
) -> Iterator[str]:
    """Serves `handlers` by full method name; gives the target to connect to."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    server.add_generic_rpc_handlers((_Handlers(handlers),))
    port = server.add_insecure_port(target)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


def never_answered(
    requests: Iterator[bytes], context: grpc.ServicerContext
) -> Iterator[bytes]:
    """A handler that waits until the caller is gone."""
    ended = threading.Event()
    context.add_callback(ended.set)
    ended.wait()
    return
    yield b""


def forward(channel: grpc.Channel, method: str) -> Handler:
    """A handler that passes a call of one request on to another server."""

    def handle(
        requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        (request,) = requests
        try:
            yield from channel.unary_stream(method)(request)
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())

    return handle


def replies(*messages: Any) -> Handler:
    """A handler that reads the whole request and then sends `messages`."""

    def handle(requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in requests:
            pass
        for message in messages:
            yield message if isinstance(message, bytes) else message.SerializeToString()

    return handle
