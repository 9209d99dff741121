"""The node behind the gateway, over grpc.aio.

Prefills have connections of their own: a connection carries a bounded number of calls,
and probes must not wait behind them.

Threading: of the event loop in which it was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from pbs_client import _health, _messages, _wire
from pbs_client._transport import channel_options
from pbs_client.errors import (
    CorruptDataError,
    NotFoundError,
    UnavailableError,
    from_rpc_error,
)
from pbs_client.kv import KvTicket
from pbs_client.results import ModelInfo

CONTROL_SECONDS_MAX = 5.0  # of a probe, of the list of models, of a release
CALLS_PER_CONNECTION = 32  # the node takes 64 by default
MODELS_SECONDS_MAX = 5.0  # age of the list of models
# A node answers `admitted` at once, so a ticket is known this long after the call.
ADMITTED_SECONDS_MAX = 2.0

_PREFILL = "/pbs.v1.Prefill/Prefill"
_LIST_MODELS = "/pbs.v1.Prefill/ListModels"
_RELEASE = "/pbs.v1.KvSource/Release"


@dataclass(frozen=True)
class ServedModel:
    """The model that this gateway serves.

    Attributes:
        names: by which requests may name it; the first is shown.
        info: as the node describes it.
    """

    names: tuple[str, ...]
    info: ModelInfo


class Node:
    """Calls of one node. Errors are PbsError."""

    def __init__(
        self, target: str, model: str, aliases: tuple[str, ...], calls_max: int
    ) -> None:
        """Prepares connections, without network traffic; to call in the event loop.

        Args:
            target: HOST:PORT of the node.
            model: its model; "" is its only one.
            aliases: further names of the model.
            calls_max: most prefills at once.
        """
        self.target = target
        self._model, self._aliases = model, aliases
        count = -(-calls_max // CALLS_PER_CONNECTION)
        self._work = [_connect(target) for _ in range(count)]
        self._load = [0] * count
        self._control = _connect(target)
        self._health = _Shared(self._check)
        self._served: tuple[float, ServedModel] | None = None
        self._models = _Shared(self._list_models)

    async def close(self) -> None:
        """Cancels calls under way."""
        for channel in (*self._work, self._control):
            await channel.close()

    async def health(self) -> str:
        """As Client.health(): "SERVING" when the node takes work."""
        state: str = await self._health.get()
        return state

    async def served(self) -> ServedModel:
        """The model, at most MODELS_SECONDS_MAX old.

        Raises:
            UnavailableError: the node serves no such model, or several and none was
                named.
        """
        if self._served and time.monotonic() - self._served[0] < MODELS_SECONDS_MAX:
            return self._served[1]
        models = await self._models.get()
        served = _choose(models, self._model, self._aliases)
        self._served = (time.monotonic(), served)
        return served

    @contextlib.asynccontextmanager
    async def prefill(self, request: bytes, timeout: float) -> Any:
        """A PrefillCall, which the end of the block cancels if it is under way."""
        place = self._load.index(min(self._load))
        self._load[place] += 1
        call = PrefillCall(self, self._work[place], request, timeout)
        try:
            yield call
        except NotFoundError:
            self._served = None  # the node has other models now
            raise
        finally:
            call.end()
            self._load[place] -= 1

    async def release(self, ticket: KvTicket) -> bool:
        """Frees a cache; whether there was one."""
        request = _messages.ReleaseRequest(ticket=ticket.to_message())
        try:
            await self._unary(_RELEASE, request.SerializeToString())
        except NotFoundError:
            return False
        return True

    async def _check(self) -> str:
        return _health.state(await self._unary(_health.CHECK, _health.request("")))

    async def _list_models(self) -> tuple[ModelInfo, ...]:
        reply = await self._unary(_LIST_MODELS, b"")
        models = _wire.parse(_messages.ListModelsResponse, reply).models
        return tuple(map(ModelInfo.from_message, models))

    async def _unary(self, path: str, request: bytes) -> bytes:
        call = self._control.unary_unary(path)(request, timeout=CONTROL_SECONDS_MAX)
        try:
            return bytes(await call)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, path, CONTROL_SECONDS_MAX) from None


class PrefillCall:
    """One prefill under way.

    Attributes:
        target: HOST:PORT of its node.
        ticket: of the cache, as soon as the node has admitted the prefill with a lease.
    """

    def __init__(
        self, node: Node, channel: grpc.aio.Channel, request: bytes, timeout: float
    ) -> None:
        self.ticket: KvTicket | None = None
        self.target = node.target
        self._node, self._timeout = node, timeout
        self._admitted = asyncio.Event()
        self._call = channel.unary_stream(_PREFILL)(request, timeout=timeout)
        self._result = asyncio.ensure_future(self._read())
        self._result.add_done_callback(_retrieve)

    def result(self) -> asyncio.Future[Any]:
        """The message Done; the future may be waited for, not cancelled."""
        return self._result

    def end(self) -> None:
        """Cancels the call if it is under way."""
        self._call.cancel()
        self._result.cancel()

    async def abandon(self) -> bool:
        """Cancels the prefill and frees its cache; whether one had been made.

        The prefill may end while the cancellation travels, and its lease then stays. So
        this waits for the ticket, which comes with the admission, and releases it.
        """
        waits = {self._result, asyncio.ensure_future(self._admitted.wait())}
        _, pending = await asyncio.wait(
            waits, timeout=ADMITTED_SECONDS_MAX, return_when=asyncio.FIRST_COMPLETED
        )
        for wait in pending - {self._result}:
            wait.cancel()
        self.end()
        if self.ticket is None:
            return False
        return await self._node.release(self.ticket)

    async def _read(self) -> Any:
        done = None
        try:
            async for event in self._call:
                message = _messages.PrefillEvent.FromString(event)
                kind = message.WhichOneof("event")
                if kind == "admitted":
                    self._take_ticket(message.admitted)
                elif kind == "done":
                    done = message.done
                    self._take_ticket(done)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, _PREFILL, self._timeout) from None
        except DecodeError:
            raise CorruptDataError(
                "the node sent an event that is no PrefillEvent"
            ) from None
        if done is None:
            raise CorruptDataError("the prefill ended without `done`")
        return done

    def _take_ticket(self, message: Any) -> None:
        if message.HasField("ticket"):
            self.ticket = KvTicket.from_message(message.ticket)
        self._admitted.set()


class _Shared:
    """One call for all who ask while it is under way."""

    def __init__(self, call: Callable[[], Awaitable[Any]]) -> None:
        self._call = call
        self._running: asyncio.Future[Any] | None = None

    async def get(self) -> Any:
        """The result of the call under way, or of a new one."""
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._call())
        return await asyncio.shield(self._running)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Takes note of an error, which nobody may wait for any more."""
    if not future.cancelled():
        future.exception()


def _connect(target: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        target, options=list(channel_options(target).items())
    )


def _choose(
    models: tuple[ModelInfo, ...], name: str, aliases: tuple[str, ...]
) -> ServedModel:
    matching = [model for model in models if not name or model.name == name]
    if len(matching) == 1:
        own = matching[0].name
        others = tuple(alias for alias in aliases if alias != own)
        return ServedModel((*others, own), matching[0])
    served = ", ".join(model.name for model in models) or "none"
    said = f"no model {name!r}" if name else "not one model"
    raise UnavailableError(
        f"the node serves {said}; its models are: {served}; start pbs-gateway with one "
        "of them as --model",
        grpc.StatusCode.UNAVAILABLE,
    )
