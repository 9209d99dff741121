"""What a result says about its origin: machine, commits, command and time."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pbs_client import _version
from pbs_client.client import Client

_CPU_FLAGS = {"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}
# What a run itself writes changes no figure.
_UNMEASURED = (":(exclude)docs", ":(exclude)README.md")


def origin(client: Client, command: list[str] | None = None) -> dict[str, Any]:
    """Machine, client's commit, server's commit, command and time.

    Args:
        client: of the server that runs the experiments.
        command: words of the command; None is PBS_BENCH_COMMAND, or this process's.
    """
    words = os.environ.get("PBS_BENCH_COMMAND")
    if command is not None or words is None:
        words = shlex.join(command or [Path(sys.argv[0]).name, *sys.argv[1:]])
    info = client.info()
    return {
        "machine": machine(),
        "commit": commit(),
        "server_commit": info.commit,
        "server": {b.name: b.isa for b in info.backends},
        "command": words,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine() -> dict[str, Any]:
    """The machine of the client, which is that of the server in a local experiment."""
    found: dict[str, Any] = {"system": platform.platform(), "cpus": os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "flags"):
            found.setdefault(key.strip(), value.strip())
    found["flags"] = sorted(_CPU_FLAGS & set(str(found.get("flags", "")).split()))
    return found


def commit() -> str:
    """The commit of this package's checkout, "+changes" if it differs; else its version."""
    folder = Path(__file__).resolve().parent
    try:
        root = _git(folder, "rev-parse", "--show-toplevel")
        changed = _git(
            Path(root), "status", "--porcelain", "--untracked-files=no", "--", ".",
            *_UNMEASURED,
        )  # fmt: skip
        return _git(folder, "rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {_version.__version__}"


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(  # noqa: S603
        ["git", "-C", str(folder), *words],  # noqa: S607
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()
