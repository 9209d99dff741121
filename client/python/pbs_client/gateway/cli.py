"""The console script `pbs-gateway`: flags, and the process from start to SIGTERM.

A stop finishes what is answered: /health and new requests get 503, and the process ends
with status 0 when the last reply is sent, or with 1 after drain_seconds_max. A second
signal ends it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn
from prometheus_client import disable_created_metrics

from pbs_client import _version
from pbs_client._transport import check_target
from pbs_client.gateway import log
from pbs_client.gateway.app import Gateway, Settings

CONNECTIONS_MAX = 1024
HEADER_BYTES_MAX = 64 << 10
# Longer than routers keep an unused connection, so that none is closed under a request.
KEEP_ALIVE_SECONDS = 330
_LISTEN_DEFAULT = "127.0.0.1:8100"
_USAGE = 2

_DESCRIPTION = """\
Serves one pbs-prefill node over HTTP as a prefill worker, for routers that split prefill
and decode: /v1/completions, /v1/chat/completions, /inference/v1/generate, /v1/models,
/health, /metrics. A reply has one token and kv_transfer_params, by which a decode worker
fetches the prompt's KV cache from the node."""

_EPILOG = """\
examples:
  pbs-gateway --node 127.0.0.1:50051 --listen 127.0.0.1:8100 --tokenizer /models/llama
  pbs-gateway --node 127.0.0.1:50051 --node-metrics 127.0.0.1:9464
  curl 127.0.0.1:8100/v1/completions -d '{"prompt": [1, 2, 3], "max_tokens": 1}'

exit codes:
  0  stopped by SIGTERM or SIGINT, every request answered
  1  cannot listen, or requests were cut off after --drain-seconds-max
  2  wrong usage, or a wrong tokenizer folder"""


_HELP = {
    "node": "gRPC address of the node",
    "fallback-node": "node that takes over where --node is not available; may be repeated",
    "listen": f"HTTP address; port 0 picks a free port [{_LISTEN_DEFAULT}]",
    "node-metrics": "the node's metrics address; /metrics includes its page [none]",
    "model": "the node's model that is served [its only one]",
    "served-model-name": "further name of the model in requests; may be repeated",
    "tokenizer": "folder with tokenizer.json, in Hugging Face form [none: ids only]",
    "chat-template": "Jinja file [the tokenizer folder's]",
}
_DEFAULTS = Settings(node="")
# Flags with a number, at least 1: default and help.
_NUMBERS: dict[str, tuple[int | None, str]] = {
    "lease-seconds": (None, "time to fetch the cache or renew its lease [the node's]"),
    "request-seconds-max": (_DEFAULTS.request_seconds_max, "time of a request"),
    "requests-max": (_DEFAULTS.requests_max, "requests at once; others get 503"),
    "prompt-tokens-max": (_DEFAULTS.prompt_tokens_max, "longest prompt"),
    "body-bytes-max": (_DEFAULTS.body_bytes_max, "longest body"),
    "buffer-bytes-max": (_DEFAULTS.buffer_bytes_max, "all bodies together"),
    "drain-seconds-max": (60, "time from SIGTERM to the end"),
}


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="pbs-gateway",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"pbs-gateway {_version.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument(
        "--node", required=True, metavar="HOST:PORT", help=_HELP["node"]
    )
    parser.add_argument(
        "--fallback-node",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help=_HELP["fallback-node"],
    )
    for name in ("listen", "node-metrics", "model"):
        kind = "NAME" if name == "model" else "HOST:PORT"
        default = _LISTEN_DEFAULT if name == "listen" else ""
        parser.add_argument(
            f"--{name}", default=default, metavar=kind, help=_HELP[name]
        )
    parser.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help=_HELP["served-model-name"],
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help=_HELP["tokenizer"]
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help=_HELP["chat-template"]
    )
    for name, (number, text) in _NUMBERS.items():
        parser.add_argument(
            f"--{name}",
            type=_number,
            default=number,
            metavar="S" if "seconds" in name else "N",
            help=text if number is None else f"{text} [{number}]",
        )
    parser.add_argument(
        "--log-level", choices=log.LEVELS, default="info", help="[info]"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal; returns the exit code."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    log.set_up(arguments.log_level)
    # A second series for every counter is of no use.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        _check_address("--node", arguments.node)
        for address in arguments.fallback_node:
            _check_address("--fallback-node", address)
        if arguments.node_metrics:
            _check_address("--node-metrics", arguments.node_metrics)
        gateway = Gateway(_settings(arguments))
    except ValueError as error:
        print(f"pbs-gateway: {error}", file=sys.stderr)
        return _USAGE
    try:
        listener = listen_at(arguments.listen)
    except (OSError, ValueError) as error:
        print(
            f"pbs-gateway: --listen {arguments.listen}: {error}; choose another address",
            file=sys.stderr,
        )
        return 1
    return asyncio.run(_serve(gateway, listener, arguments.drain_seconds_max))


def _check_address(flag: str, address: str) -> None:
    try:
        check_target(address)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.chat_template is not None and arguments.tokenizer is None:
        raise ValueError("--chat-template needs --tokenizer")
    if arguments.body_bytes_max > arguments.buffer_bytes_max:
        raise ValueError(
            f"--body-bytes-max {arguments.body_bytes_max} is more than "
            f"--buffer-bytes-max {arguments.buffer_bytes_max}; raise that one, too"
        )
    return Settings(
        node=arguments.node,
        fallback_nodes=tuple(arguments.fallback_node),
        node_metrics=arguments.node_metrics,
        tokenizer=arguments.tokenizer,
        chat_template=arguments.chat_template,
        model=arguments.model,
        aliases=tuple(arguments.served_model_name),
        lease_seconds=arguments.lease_seconds,
        request_seconds_max=arguments.request_seconds_max,
        requests_max=arguments.requests_max,
        prompt_tokens_max=arguments.prompt_tokens_max,
        body_bytes_max=arguments.body_bytes_max,
        buffer_bytes_max=arguments.buffer_bytes_max,
    )


def _number(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def listen_at(address: str) -> socket.socket:
    """A listening socket. ValueError, OSError: it cannot be had."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError("it is not HOST:PORT")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where it reads that the protocol is TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(CONNECTIONS_MAX)
    except OSError:
        listener.close()
        raise
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would end by the signal, not with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(gateway: Gateway, listener: socket.socket, drain_seconds: int) -> int:
    config = uvicorn.Config(
        gateway.app(),
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS_MAX,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,  # what is left then has been cut off
        h11_max_incomplete_event_size=HEADER_BYTES_MAX,
    )
    server = _Server(config)
    stop = asyncio.Event()
    _on_signals(stop, server)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    node = gateway.settings.node
    print(
        f"pbs-gateway {_version.__version__} serving on {address}, node {node}",
        flush=True,
    )
    log.event("serving", listen=address, node=node)
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finished = await gateway.drain(drain_seconds)
    server.should_exit = True
    await serving
    return 0 if finished else 1


def _on_signals(stop: asyncio.Event, server: uvicorn.Server) -> None:
    def first() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first)
