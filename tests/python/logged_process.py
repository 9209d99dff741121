"""Runs a program that logs JSON lines, from its event `serving` to SIGTERM."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_START_SECONDS_MAX = 120
_STOP_SECONDS_MAX = 60


@dataclass(frozen=True)
class LoggedProcess:
    """A program that serves: its process, its event `serving`, its lines so far."""

    process: subprocess.Popen[str]
    serving: dict[str, Any]
    log: list[str]


@contextlib.contextmanager
def serving(
    name: str, command: Sequence[str], *, code: int = 0, **streams: int
) -> Iterator[LoggedProcess]:
    """Starts the program and waits until it serves; stops it after.

    Args:
        name: for messages, such as "the server".
        command: of the program.
        code: the exit status that it must have.
        streams: stdout and stderr of Popen; the one that is a pipe has the log.
    """
    process = subprocess.Popen(command, text=True, **streams)
    found: queue.Queue[dict[str, Any] | None] = queue.Queue()
    log: list[str] = []
    reader = threading.Thread(target=_read_log, args=(process, log, found))
    reader.start()
    try:
        event = found.get(timeout=_START_SECONDS_MAX)
        assert event is not None, f"{name} stopped:\n" + "".join(log)
        yield LoggedProcess(process, event, log)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS_MAX)
        finally:
            process.kill()
            reader.join()
    assert process.returncode == code, f"{name} did not drain:\n" + "".join(log)


def _read_log(
    process: subprocess.Popen[str], log: list[str], found: queue.Queue[Any]
) -> None:
    pipe = process.stdout or process.stderr
    assert pipe is not None
    for line in pipe:
        log.append(line)
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if event.get("event") == "serving":
                found.put(event)
    found.put(None)
