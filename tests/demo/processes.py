"""The programs of the demo: started together, watched, and stopped on every way out."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

STOP_SECONDS_MAX = 20.0  # from SIGTERM to SIGKILL
_POLL_SECONDS = 0.05
_LOG_LINES_SHOWN = 12

T = TypeVar("T")


class DemoError(Exception):
    """What went wrong, and what to do next."""

    def __init__(self, what: str, then: str) -> None:
        super().__init__(what)
        self.then = then


class Program:
    """A process with a log file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts it. It gets SIGTERM if the demo dies without stopping it."""
        self.name, self.log = name, log
        # Part of util-linux. A group of its own: Ctrl-C reaches the demo alone.
        setpriv = shutil.which("setpriv")
        prefix = [setpriv, "--pdeathsig", "TERM"] if setpriv else []
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*prefix, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def wait_for(self, value: Callable[[], T | None], seconds_max: float) -> T:
        """The first value that is not None; DemoError if the program ends before."""
        end = time.monotonic() + seconds_max
        while True:
            found = value()
            if found is not None:
                return found
            code = self.process.poll()
            if code is not None:
                raise DemoError(
                    f"{self.name} stopped with status {code}. Its last lines:\n{self.tail()}",
                    f"read {self.log}",
                )
            if time.monotonic() > end:
                raise DemoError(
                    f"{self.name} is not ready after {seconds_max:.0f} s. Its last lines:\n"
                    f"{self.tail()}",
                    f"read {self.log}; on a busy machine, try again",
                )
            time.sleep(_POLL_SECONDS)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its log lines in JSON that are of an event."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("event") == name:
                    found.append(event)
        return found

    def tail(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line[:300]}" for line in lines[-_LOG_LINES_SHOWN:])

    def kill(self) -> None:
        """Ends it as a power failure would."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def signal(self, number: int) -> None:
        """Sends a signal to the program and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Programs:
    """All programs that were started."""

    def __init__(self, folder: Path) -> None:
        """`folder` is for their logs."""
        self._folder = folder
        self._started: list[Program] = []

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ) -> Program:
        """Starts one; its log is NAME.log."""
        path = self._folder / f"{name.replace(' ', '-')}.log"
        program = Program(name, command, path, environment)
        self._started.append(program)
        return program

    def stop(self) -> None:
        """Stops all of them, the last first, and what they have started."""
        for program in reversed(self._started):
            program.signal(signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS_MAX
        for program in reversed(self._started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.process.wait(max(0.1, end - time.monotonic()))
            program.signal(signal.SIGKILL)
            program.process.wait()
        self._started.clear()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as probes:
        ports = []
        for _ in range(count):
            probe = probes.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports.append(int(probe.getsockname()[1]))
        return ports
