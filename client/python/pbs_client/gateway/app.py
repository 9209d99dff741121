"""The gateway as an ASGI application: its routes, and the life of a request.

A request is admitted, its body read and made a request of the node (prepare.py), and the
prefill started. If the client leaves before it has the reply, the prefill is cancelled
and the cache freed. A reply is one JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pbs_client.errors import PbsError, UnavailableError
from pbs_client.gateway import log
from pbs_client.gateway.admission import Admission, ClientGoneError
from pbs_client.gateway.apis import APIS, Answer, Api
from pbs_client.gateway.delivery import WithTransport, deliver
from pbs_client.gateway.errors import RefusedError, from_node, unavailable
from pbs_client.gateway.metrics import CONTENT_TYPE, Metrics, NodeMetrics
from pbs_client.gateway.node import Node, PrefillCall
from pbs_client.gateway.nodes import Nodes
from pbs_client.gateway.prepare import REQUEST_ID_BYTES_MAX, Prepared, Preparer
from pbs_client.gateway.tokenizer import Tokenizer
from pbs_client.kv_params import KvTransferParams
from pbs_client.results import TokenLogit, token_logits

PREPARING_MAX = 2  # bodies that are decoded at once: a decoded one is large
CUT_SECONDS_MAX = 5.0  # for requests to end that were told to
CLIENT_GONE = 499  # in logs and metrics, for a client that left


@dataclass(frozen=True)
class Settings:
    """Settings of a gateway; cli.py describes each.

    Attributes:
        node: HOST:PORT of the node.
        fallback_nodes: HOST:PORT of nodes that take over where it is not available.
        node_metrics: HOST:PORT of its metrics; "" is none.
        tokenizer: folder; None: ids only.
        chat_template: file; None is the folder's.
        model: the node's model; "" is its only one.
        aliases: further names of the model.
        lease_seconds: None is the node's default.
    """

    node: str
    fallback_nodes: tuple[str, ...] = ()
    node_metrics: str = ""
    tokenizer: Path | None = None
    chat_template: Path | None = None
    model: str = ""
    aliases: tuple[str, ...] = ()
    lease_seconds: int | None = None
    request_seconds_max: int = 600
    requests_max: int = 64
    prompt_tokens_max: int = 1 << 20
    body_bytes_max: int = 16 << 20
    buffer_bytes_max: int = 256 << 20


class Gateway:
    """One gateway: its state and the handlers of its routes.

    Attributes:
        admission: what is answered now.
    """

    def __init__(self, settings: Settings) -> None:
        """Reads the tokenizer. ValueError: its folder is wrong."""
        tokenizer = None
        if settings.tokenizer is not None:
            tokenizer = Tokenizer(settings.tokenizer, settings.chat_template)
        self.settings = settings
        self.admission = Admission(
            settings.requests_max, settings.body_bytes_max, settings.buffer_bytes_max
        )
        self._metrics = Metrics()
        self._metrics.running.set_function(lambda: self.admission.running)
        self._preparer = Preparer(
            tokenizer, settings.prompt_tokens_max, settings.lease_seconds
        )

    def app(self) -> WithTransport:
        """The application."""
        routes = [
            Route(api.path, _Endpoint(self, api), methods=["POST"]) for api in APIS
        ]
        routes += [
            Route("/v1/models", self._models),
            Route("/health", self._health),
            Route("/metrics", self._metrics_page),
        ]
        app = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _no_route},
        )
        return WithTransport(app)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        settings = self.settings
        with (
            ThreadPoolExecutor(PREPARING_MAX, "prepare") as preparing,
            ThreadPoolExecutor(1, "metrics") as scraping,
        ):
            self._preparing = preparing
            self._cut = asyncio.get_running_loop().create_future()
            self._node_metrics = NodeMetrics(settings.node_metrics, scraping)
            targets = (settings.node, *settings.fallback_nodes)
            self._nodes = Nodes(
                targets, settings.model, settings.aliases, settings.requests_max
            )
            try:
                yield
            finally:
                await self._nodes.close()

    async def drain(self, seconds: float) -> bool:
        """Takes no more work and lets requests finish; whether all did.

        After `seconds`, those that are left get 503, and their prefills are cancelled.
        """
        self.admission.draining = True
        log.event("draining", requests=self.admission.running)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.admission.idle(), seconds)
            return True
        log.event("drain_cut", "warning", requests=self.admission.running)
        self._cut.set_result(None)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.admission.idle(), CUT_SECONDS_MAX)
        return False

    # ---- about the gateway

    async def _health(self, _: Request) -> Response:
        """200 when a prefill would be taken."""
        try:
            if self.admission.draining:
                raise unavailable("the gateway is stopping")
            reason = await self._nodes.why_not_ready()
            if reason:
                raise unavailable(reason)
        except RefusedError as refusal:
            return _refused(refusal)
        return _json(200, {"status": "SERVING"})

    async def _models(self, _: Request) -> Response:
        try:
            served = await self._nodes.served()
        except PbsError as error:
            return _refused(from_node(error))
        data = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "pbs-prefill",
                "root": served.info.name,
                "max_model_len": served.info.tokens_max,
            }
            for name in served.names
        ]
        return _json(200, {"object": "list", "data": data})

    async def _metrics_page(self, _: Request) -> Response:
        page = await self._node_metrics.text()
        self._metrics.node_metrics_up.set(page is not None)
        text = (page or b"") + self._metrics.text()
        return Response(text, headers={"content-type": CONTENT_TYPE})

    # ---- prefills

    async def answer(self, api: Api, request: Request, send: Send) -> None:
        """Runs one request, from its body to the last byte of its reply."""
        begin = time.monotonic()
        record: dict[str, Any] = {"request_id": _request_id(request)}
        response: Response | None = None
        try:
            with self.admission.request():
                await self._prefill(api, request, send, record, begin)
            status = 200
        except ClientGoneError:
            status = CLIENT_GONE
        except RefusedError as refusal:
            response = _refused(refusal)
            record["message"] = refusal.message
        except Exception as error:  # a fault of ours; its text may quote the prompt
            log.event("fault", "error", route=api.path, **log.describe(error))
            response = _refused(
                RefusedError(500, "the gateway has a fault; see its log")
            )
        if response is not None:
            status = response.status_code
            response.headers["x-request-id"] = record["request_id"]
        self._note(api, status, begin, record)
        if response is not None:
            await response(request.scope, request.receive, send)

    async def _prefill(
        self,
        api: Api,
        request: Request,
        send: Send,
        record: dict[str, Any],
        begin: float,
    ) -> None:
        """Raises RefusedError; ClientGoneError when the client left without the reply."""
        deadline = begin + self.settings.request_seconds_max
        async with self.admission.body(request) as raw:
            gone = asyncio.ensure_future(_until_gone(request))
            try:
                prepared = await self._prepare(api, raw, record["request_id"], gone)
            except BaseException:
                gone.cancel()
                raise
        del raw  # it is not charged any more
        record["prompt_tokens"] = prepared.prompt_tokens
        exchange = _Exchange(api, request, send, record["request_id"], gone)

        async def attempt(node: Node) -> None:
            left = deadline - time.monotonic()
            async with node.prefill(prepared.message, left) as call:
                await self._run(exchange, prepared, call)

        def on_failover() -> None:
            self._metrics.failovers.inc()
            record["failovers"] = record.get("failovers", 0) + 1

        try:
            await self._nodes.first_available(prepared.served, attempt, on_failover)
        except PbsError as error:
            raise from_node(error) from None
        finally:
            gone.cancel()

    async def _prepare(
        self, api: Api, raw: bytearray, request_id: str, gone: asyncio.Future[None]
    ) -> Prepared:
        """The node's request, made in a thread."""
        begin = time.monotonic()
        try:
            served = await self._nodes.served()
        except PbsError as error:
            raise from_node(error) from None
        work = asyncio.get_running_loop().run_in_executor(
            self._preparing, self._preparer.prepare, api, raw, served, request_id
        )
        limit = self.settings.request_seconds_max
        prepared: Prepared | RefusedError = await self._before_gone(work, gone, limit)
        if isinstance(prepared, RefusedError):
            raise prepared.alone()  # itself would be in a cycle with this frame
        self._metrics.prepare_seconds.observe(time.monotonic() - begin)
        return prepared

    async def _before_gone(
        self,
        work: asyncio.Future[Any],
        gone: asyncio.Future[None],
        timeout: float | None = None,
    ) -> Any:
        """The result of `work`, unless it is not needed or not waited for any more."""
        waits: set[asyncio.Future[Any]] = {work, gone, self._cut}
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if work.done() and not gone.done():
            return work.result()
        work.add_done_callback(_retrieve)
        if gone.done():
            raise ClientGoneError
        if self._cut.done():
            raise unavailable("the gateway stops before the prefill has ended")
        work.cancel()
        raise RefusedError(504, f"no time was left after {timeout:.0f} s; allow more")

    async def _run(
        self, exchange: _Exchange, prepared: Prepared, call: PrefillCall
    ) -> None:
        """Waits for the prefill and delivers the reply; else frees the cache."""
        try:
            done = await self._before_gone(call.result(), exchange.gone)
            answer = self._answer_of(prepared, done, call, exchange.request_id)
            response = _json(200, exchange.api.reply(answer))
            response.headers["x-request-id"] = exchange.request_id
            scope = exchange.request.scope
            await deliver(response, scope, exchange.send, exchange.gone)
        except UnavailableError:
            raise  # there is nobody to free it
        except BaseException:
            await self._abandon(call)
            raise
        self._metrics.prompt_tokens.inc(prepared.prompt_tokens)

    async def _abandon(self, call: PrefillCall) -> None:
        try:
            if await call.abandon():
                self._metrics.released.inc()
        except PbsError as error:
            # The lease ends by its time.
            log.event("release_failed", "warning", code=error.code.name)

    def _answer_of(
        self, prepared: Prepared, done: Any, call: PrefillCall, request_id: str
    ) -> Answer:
        request, text_of = prepared.request, self._preparer.text_of
        token = done.first_token_id
        own, top = _log_probabilities(done, request.candidates)
        skip = request.skip_special_tokens
        return Answer(
            request_id=request_id,
            created=int(time.time()),
            model=prepared.model,
            prompt_tokens=prepared.prompt_tokens,
            token_id=token,
            text=text_of(token, skip),
            is_end=token in prepared.served.info.eos_token_ids
            and not request.ignore_eos,
            own=own,
            top=top,
            texts={t.token_id: text_of(t.token_id, False) for t in (own, *top) if t},
            kv_transfer_params=_transfer_params(prepared, done, call),
        )

    def _note(
        self, api: Api, status: int, begin: float, record: dict[str, Any]
    ) -> None:
        seconds = time.monotonic() - begin
        self._metrics.requests.labels(api.path, str(status)).inc()
        self._metrics.request_seconds.labels(api.path).observe(seconds)
        fields = {"status": status, "seconds": round(seconds, 6), **record}
        log.event("request", "info", route=api.path, **fields)


@dataclass(frozen=True)
class _Exchange:
    """A request whose body has been read, and the way of its reply."""

    api: Api
    request: Request
    send: Send
    request_id: str
    gone: asyncio.Future[None]


class _Endpoint:
    """A route that sends its reply itself, to know whether it could be sent."""

    def __init__(self, gateway: Gateway, api: Api) -> None:
        self._gateway, self._api = gateway, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._gateway.answer(self._api, Request(scope, receive), send)


async def _until_gone(request: Request) -> None:
    """Waits until the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Takes note of an error that nobody waits for any more."""
    if not future.cancelled():
        future.exception()


def _transfer_params(
    prepared: Prepared, done: Any, call: PrefillCall
) -> dict[str, Any] | None:
    ticket = call.ticket
    if ticket is None:
        return None
    if not ticket.endpoint:
        ticket = dataclasses.replace(ticket, endpoint=call.target)
    params = KvTransferParams(
        ticket=ticket,
        tokens=prepared.prompt_tokens,
        prompt_digest=prepared.prompt_digest,
        expires_unix_ms=done.lease_expires_unix_ms,
        first_token_id=done.first_token_id,
    )
    return params.to_json_object()


def _log_probabilities(
    done: Any, candidates: int | None
) -> tuple[TokenLogit | None, tuple[TokenLogit, ...]]:
    """That of the token itself, and the best candidates; nothing unless asked for."""
    best = token_logits(done.top_logits)
    if candidates is None or not best:
        return None, ()
    same = [t for t in best if t.token_id == done.first_token_id]
    # Of equal log-probabilities the list may have another token.
    own = same[0] if same else TokenLogit(done.first_token_id, best[0].log_probability)
    return own, best[:candidates]


def _request_id(request: Request) -> str:
    """The header's, of which the end tells requests apart, or a new one."""
    given = request.headers.get("x-request-id", "")
    kept = "".join(c for c in given if c.isascii() and c.isprintable())
    return kept[-REQUEST_ID_BYTES_MAX:] or uuid.uuid4().hex


def _json(status: int, body: Any, headers: dict[str, str] | None = None) -> Response:
    # ASCII, because a name in the reply may have half of a surrogate pair.
    text = json.dumps(body, separators=(",", ":"))
    return Response(text, status, headers, "application/json")


def _refused(refusal: RefusedError) -> Response:
    return _json(refusal.status, refusal.body(), refusal.headers())


async def _no_route(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = (
        "there is no such route" if status == 404 else "the route has no such method"
    )
    headers = getattr(error, "headers", None)
    return _json(status, RefusedError(status, message).body(), headers)
