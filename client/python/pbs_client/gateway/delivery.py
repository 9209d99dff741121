"""Sends a reply so that it is known whether the client could have got all of it.

The last byte is sent apart, after a look at the connection: a client that had left by
then has no complete reply. ASGI tells of a closed connection some turns of the loop
later, and a client that has its reply may close at once, so the socket itself is asked.
"""

from __future__ import annotations

import asyncio
import select
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pbs_client.gateway.admission import ClientGoneError

ABORT_SECONDS_MAX = 1.0  # until ASGI tells of it
_TRANSPORT = "pbs.transport"  # in the scope


class WithTransport:
    """Puts uvicorn's transport into the scope of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        # send() is a method of uvicorn's object for one request and response.
        scope[_TRANSPORT] = getattr(getattr(send, "__self__", None), "transport", None)
        await self._app(scope, receive, send)


async def deliver(
    response: Response, scope: Scope, send: Send, gone: asyncio.Future[None]
) -> None:
    """Sends a response. ClientGoneError: the client had left before its last byte."""
    start = {"type": "http.response.start", "status": response.status_code}
    await send({**start, "headers": response.raw_headers})
    body = bytes(response.body)
    await send({"type": "http.response.body", "body": body[:-1], "more_body": True})
    transport = scope.get(_TRANSPORT)
    if gone.done() or _has_left(transport):
        if transport is not None:
            transport.abort()  # uvicorn takes half a reply for a fault otherwise
            await asyncio.wait({gone}, timeout=ABORT_SECONDS_MAX)
        raise ClientGoneError
    await send({"type": "http.response.body", "body": body[-1:], "more_body": False})


def _has_left(transport: Any) -> bool:
    """Whether the other side closed, half-closed or reset the connection."""
    if transport is None:
        return False
    if transport.is_closing():
        return True
    poll = select.poll()
    poll.register(transport.get_extra_info("socket"), select.POLLRDHUP)
    return bool(poll.poll(0))
