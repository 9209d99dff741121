"""Runs pbs-gateway for tests, and speaks HTTP to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from logged_process import serving

_CALL_SECONDS_MAX = 60
_POLL_SECONDS_MAX = 30


@dataclass(frozen=True)
class Reply:
    """A reply: its body as JSON, if it is JSON, else as text."""

    status: int
    headers: dict[str, str]
    body: Any

    @property
    def message(self) -> str:
        """Of an error."""
        text: str = self.body["error"]["message"]
        return text


@dataclass(frozen=True)
class RunningGateway:
    """A gateway that serves: HOST:PORT, its process, and its log lines so far."""

    address: str
    process: subprocess.Popen[str]
    log: list[str]

    def call(
        self,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        method: str | None = None,
    ) -> Reply:
        """POST of a body, which is sent as JSON unless it is bytes; GET without one."""
        connection = self.connect()
        try:
            sent = body if body is None or isinstance(body, bytes) else json.dumps(body)
            verb = method or ("GET" if body is None else "POST")
            connection.request(verb, path, sent, headers or {})
            return read_reply(connection)
        finally:
            connection.close()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, timeout=_CALL_SECONDS_MAX)

    def metrics(self) -> dict[str, float]:
        """The figures of /metrics by name and labels."""
        return figures(self.call("/metrics").body)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of an event, so far."""
        lines = [json.loads(line) for line in list(self.log)]
        return [line for line in lines if line["event"] == name]


def read_reply(connection: http.client.HTTPConnection) -> Reply:
    response = connection.getresponse()
    text = response.read().decode()
    headers = {name.lower(): value for name, value in response.getheaders()}
    is_json = headers.get("content-type") == "application/json"
    return Reply(response.status, headers, json.loads(text) if is_json else text)


def figures(page: str) -> dict[str, float]:
    """A page of metrics by name and labels."""
    lines = (line for line in page.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines)}


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of a condition; fails after _POLL_SECONDS_MAX."""
    end = time.monotonic() + _POLL_SECONDS_MAX
    pause = threading.Event()
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        pause.wait(0.02)
    raise AssertionError(f"{what}: not within {_POLL_SECONDS_MAX} s")


@contextlib.contextmanager
def running_gateway(node: str, *flags: str, code: int = 0) -> Iterator[RunningGateway]:
    """Starts a gateway on a free port; stops it after. `code` is its exit status."""
    command = [sys.executable, "-m", "pbs_client.gateway", "--node", node]
    command += ["--listen", "127.0.0.1:0", *flags]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with serving("the gateway", command, code=code, **streams) as running:
        yield RunningGateway(running.serving["listen"], running.process, running.log)
