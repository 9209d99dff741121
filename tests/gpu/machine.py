"""The GPU, as its driver tells it, and the host's memory. No torch."""

from __future__ import annotations

import pathlib
import re
import subprocess

DRIVER = pathlib.Path("/proc/driver/nvidia")
MEMORY = pathlib.Path("/proc/meminfo")


def query_gpu() -> dict[str, str] | None:
    """Name, driver and clocks, if nvidia-smi is there; None where there is no driver."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        said = done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return read_driver(DRIVER)
    return dict(zip(fields.split(","), [value.strip() for value in said.split(",")]))


def host_memory_bytes() -> int | None:
    """MemTotal; it may grow while a machine runs."""
    try:
        total = re.search(r"^MemTotal:\s*(\d+) kB$", MEMORY.read_text(), re.M)
    except OSError:
        return None
    return int(total[1]) * 1024 if total else None


def read_driver(folder: pathlib.Path) -> dict[str, str] | None:
    """Name and driver, as the driver's files say; None without these."""
    try:
        versions = (folder / "version").read_text()
        models = [path.read_text() for path in sorted(folder.glob("gpus/*/information"))]
        name = re.search(r"^Model:\s*(.+)$", models[0], re.M)
        version = re.search(r"Module(?: for \S+)?\s+([\d.]+)", versions)
    except (OSError, IndexError):
        return None
    if name is None:
        return None
    return {"name": name[1].strip(), "driver_version": version[1] if version else "unknown"}
