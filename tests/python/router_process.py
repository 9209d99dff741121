"""Runs vllm-router for tests, in front of gateways and a decode worker."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from eventually import until
from vllm_server import free_port

_STOP_SECONDS_MAX = 30


@contextlib.contextmanager
def routing(
    prefill: Sequence[str], decode: str, log: Path, *flags: str
) -> Iterator[str]:
    """Starts a router; yields its HOST:PORT when it knows its workers."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [
        str(Path(sys.executable).parent / "vllm-router"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-port", str(free_port()), "--vllm-pd-disaggregation"),
        *(word for one in prefill for word in ("--prefill", f"http://{one}")),
        *("--decode", f"http://{decode}", "--policy", "round_robin"),
        *("--worker-startup-check-interval", "1", *flags),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(address, timeout=5)
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            finally:
                connection.close()
        return False

    try:
        until(is_ready)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS_MAX)
        finally:
            process.kill()
            process.wait()
