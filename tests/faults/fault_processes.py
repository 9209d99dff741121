"""The processes of the failure matrix: a node, a relay, a decode side."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "python"))
from push_world import free_ports  # noqa: E402, F401
from real_server import program, server_binary  # noqa: E402, F401

HERE = pathlib.Path(__file__).resolve().parent
REPLY_SECONDS_MAX = 120  # only a failure takes so long
START_SECONDS_MAX = 120
LEASE_SECONDS = 1  # the shortest there is
# A lease may not be made longer by a renewal that was changed on its way.
NODE_SETTINGS = (
    f"lease.ttl_seconds_default={LEASE_SECONDS}",
    f"lease.ttl_seconds_max={LEASE_SECONDS}",
    "transport.chunk_bytes=65536",
    "transport.write_stall_seconds_max=1",
    "transport.keepalive_seconds=2",
    "transport.keepalive_timeout_seconds=2",
    "drain_seconds_max=1",
)
# What a node without work must have none of.
GAUGES = (
    "pbs_memory_charged_bytes",
    "pbs_kv_held_bytes",
    "pbs_kv_leases",
    "pbs_kv_export_outstanding_bytes",
    "pbs_requests_running",
    "pbs_requests_waiting",
)


def eventually(check: Callable[[], bool], seconds: float) -> bool:
    """Whether `check` is true within `seconds`."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


class Node:
    """pbs-prefilld, which may be killed and started again on its port."""

    def __init__(self, model: pathlib.Path, name: str, *settings: str) -> None:
        self._command = [str(server_binary()), "--backend", "cpu", "--threads", "1"]
        self._command += ["--model", f"{name}={model}", "--metrics-listen", "127.0.0.1:0"]
        for setting in (*NODE_SETTINGS, *settings):
            self._command += ["--set", setting]
        self.target = self._metrics = ""
        self.log: collections.deque[str] = collections.deque(maxlen=200)
        self.start()

    def start(self) -> None:
        """Starts it, on the port that it had."""
        serving: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.process = subprocess.Popen(
            [*self._command, "--listen", self.target or "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(
            target=self._read, args=(self.process, serving), daemon=True
        )
        self._reader.start()
        event = serving.get(timeout=START_SECONDS_MAX)
        if event is None:
            raise RuntimeError("the node did not start:\n" + "".join(self.log))
        self.target, self._metrics = event["listen"], event["metrics"]

    def _read(
        self,
        process: subprocess.Popen[str],
        serving: queue.Queue[dict[str, Any] | None],
    ) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.log.append(line)
            if '"event":"serving"' in line:
                serving.put(json.loads(line))
        serving.put(None)

    def send(self, number: int) -> None:
        """Sends a signal; SIGSTOP has stopped it when this returns."""
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def end(self, number: int = signal.SIGKILL) -> int:
        """Ends it by a signal; the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(REPLY_SECONDS_MAX)
        self._reader.join()
        return status

    def metrics(self) -> str:
        """The page of metrics."""
        with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=10) as page:
            return str(page.read().decode())

    def held(self) -> dict[str, float]:
        """The gauges of GAUGES that are not 0."""
        text = self.metrics()
        left = {}
        for name in GAUGES:
            values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M)
            if not values:
                raise LookupError(f"the node has no metric {name}")
            left[name] = sum(map(float, values))
        return {name: value for name, value in left.items() if value}


class Helper:
    """A program of this folder that answers a JSON line with a JSON line."""

    def __init__(self, script: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def tell(self, do: str, **words: Any) -> None:
        """Sends a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **words}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any] | None:
        """The next reply; None when the process ended instead."""
        return self._answers.get(timeout=REPLY_SECONDS_MAX)

    def ask(self, do: str, **words: Any) -> dict[str, Any]:
        """A command and its reply; the process must not end."""
        self.tell(do, **words)
        reply = self.answer()
        if reply is None or "error" in reply:
            raise RuntimeError(f"{self.process.args} did not do {do}: {reply}")
        return reply

    def end(self) -> int:
        """Ends it, also when it is stopped; the exit status."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.kill()
        status = self.process.wait()
        self._reader.join()
        return status
