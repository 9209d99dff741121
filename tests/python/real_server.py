"""Runs the real pbs-prefilld for tests."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logged_process import serving

REPOSITORY = Path(__file__).resolve().parents[2]
RECALL_MODEL = REPOSITORY / "tests" / "data" / "recall-llama"
# On what the served tests run, and flags that this takes (where its libraries are).
BACKEND = os.environ.get("PBS_TEST_BACKEND", "cpu")
BACKEND_FLAGS = shlex.split(os.environ.get("PBS_TEST_SERVER_FLAGS", ""))

_START_SECONDS_MAX = 120
_DRAIN_SECONDS_MAX = 5  # a test that leaves a lease must not hold up the rest


@dataclass(frozen=True)
class RunningServer:
    """A server that serves: where it listens, its process, and its lines so far."""

    target: str
    process: subprocess.Popen[str]
    metrics: str  # "off" unless flags say otherwise
    log: list[str]  # lines, as they come

    def event(self, name: str) -> dict[str, Any]:
        """The first log line of an event that came before the server served."""
        for line in self.log:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == name:
                    return event
        raise AssertionError(f"no event {name} in:\n" + "".join(self.log))


def program(name: str) -> Path:
    """A built program: in PBS_BIN, or that of the default build."""
    folder = Path(os.environ.get("PBS_BIN", REPOSITORY / "build" / "bin"))
    if not (folder / name).exists():
        raise FileNotFoundError(f"{folder / name} does not exist: build it")
    return folder / name


def server_binary() -> Path:
    """PBS_PREFILLD, or program("pbs-prefilld")."""
    if "PBS_PREFILLD" not in os.environ:
        return program("pbs-prefilld")
    binary = Path(os.environ["PBS_PREFILLD"])
    if not binary.exists():
        raise FileNotFoundError(f"PBS_PREFILLD {binary} does not exist")
    return binary


def refused_start(*flags: str, prefix: Sequence[str] = ()) -> str:
    """What pbs-prefilld says that ends with exit status 1 before it serves."""
    ended = subprocess.run(
        [*prefix, *_command(), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_START_SECONDS_MAX,
    )
    assert ended.returncode == 1, ended.stdout
    return ended.stdout


def _command() -> list[str]:
    return [
        *(str(server_binary()), "--backend", BACKEND, *BACKEND_FLAGS),
        *("--listen", "127.0.0.1:0", "--metrics-listen", "off"),
        *("--set", f"drain_seconds_max={_DRAIN_SECONDS_MAX}"),
    ]


@contextlib.contextmanager
def running_server(*flags: str, prefix: Sequence[str] = ()) -> Iterator[RunningServer]:
    """Starts pbs-prefilld on free ports and waits until it serves; stops it after.

    `prefix` is a command that runs it, such as prlimit.
    """
    command = [*prefix, *_command(), *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with serving("the server", command, **streams) as running:
        event = running.serving
        yield RunningServer(event["listen"], running.process, event["metrics"], running.log)


@contextlib.contextmanager
def mortal_server(*flags: str) -> Iterator[RunningServer]:
    """A server that the test may kill."""
    try:
        with running_server(*flags) as node:
            yield node
    except AssertionError as error:
        if "did not drain" not in str(error):
            raise
