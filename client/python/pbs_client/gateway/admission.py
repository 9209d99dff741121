"""Bounds of what the gateway holds: requests at once, bytes of bodies, time of a body.

Threading: of the event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from starlette.requests import Request

from pbs_client.gateway.errors import RETRY_SECONDS, RefusedError, unavailable

BODY_SECONDS_MAX = 60.0  # from a request's headers to the end of its body


class ClientGoneError(Exception):
    """The client closed its connection."""


class Admission:
    """Counts what is held now, and refuses what would be too much."""

    def __init__(
        self, requests_max: int, body_bytes_max: int, buffer_bytes_max: int
    ) -> None:
        """Limits: requests at once, bytes of one body, bytes of all bodies together."""
        self._requests_max = requests_max
        self._body_bytes_max = body_bytes_max
        self._buffer_bytes_max = buffer_bytes_max
        self._bytes = 0
        self._running = 0
        self._when_idle: asyncio.Future[None] | None = None
        self.draining = False

    @property
    def running(self) -> int:
        """Requests that are answered now."""
        return self._running

    async def idle(self) -> None:
        """Waits until no request is answered."""
        if self._running:
            self._when_idle = asyncio.get_running_loop().create_future()
            await self._when_idle

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A place among the requests. RefusedError: there is none."""
        if self.draining:
            raise unavailable("the gateway is stopping; send the request elsewhere")
        if self._running >= self._requests_max:
            raise RefusedError(
                503,
                f"{self._running} requests are answered now, and requests_max is "
                f"{self._requests_max}; try again later",
                retry_after=RETRY_SECONDS,
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0 and self._when_idle and not self._when_idle.done():
                self._when_idle.set_result(None)

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """The body, which is charged as long as the block holds it.

        Raises:
            RefusedError: it is too long, too slow, or the bodies of others fill the buffer.
            ClientGoneError: the client left.
        """
        charged = self._announced(request)
        if self._bytes + charged > self._buffer_bytes_max:
            raise RefusedError(
                503,
                f"the bodies of other requests fill buffer_bytes_max "
                f"{self._buffer_bytes_max}; try again later",
                retry_after=RETRY_SECONDS,
            )
        self._bytes += charged
        try:
            yield await self._within_time(request)
        finally:
            self._bytes -= charged

    async def _within_time(self, request: Request) -> bytearray:
        try:
            return await asyncio.wait_for(self._read(request), BODY_SECONDS_MAX)
        except asyncio.TimeoutError:
            raise RefusedError(
                408, f"the body did not arrive within {BODY_SECONDS_MAX:.0f} s"
            ) from None

    def _announced(self, request: Request) -> int:
        """Bytes to charge: the announced length, or the longest that may come."""
        length = request.headers.get("content-length", "")
        if not length.isascii() or not length.isdecimal():
            return self._body_bytes_max
        if int(length[:20]) > self._body_bytes_max:
            raise self._too_long()
        return int(length)

    async def _read(self, request: Request) -> bytearray:
        body = bytearray()
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            body += message.get("body", b"")
            if len(body) > self._body_bytes_max:
                raise self._too_long()
            if not message.get("more_body", False):
                return body

    def _too_long(self) -> RefusedError:
        return RefusedError(
            413,
            f"the body has more bytes than body_bytes_max {self._body_bytes_max}; send a "
            "shorter prompt, or start pbs-gateway with a higher --body-bytes-max",
        )
