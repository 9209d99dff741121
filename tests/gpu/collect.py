#!/usr/bin/env python3
"""What the parts of scripts/gpu_server_suite.sh found so far, in one results file.

    python3 tests/gpu/collect.py --parts FOLDER --out FILE.json --commit ID --seconds N
        [--status TEXT] [--model-folder FOLDER] [--done]

Needs nothing beside Python. The GPU's clocks and the host's memory are asked for every
time: `gpu` and `host_memory_bytes` are before the first part, `gpu_after` and
`host_memory_bytes_after` after the latest.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform

import machine

PARTS = ("tests", "handoff", "linear", "ttft", "concurrent")


def read(path: pathlib.Path) -> dict:
    """What a file has; nothing of one that is not there or was cut."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def main() -> None:
    """Rewrites the file, at once or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--status")
    parser.add_argument("--model-folder", help="where the model was put")
    parser.add_argument("--done", action="store_true")
    arguments = parser.parse_args()
    gpu, memory = machine.query_gpu(), machine.host_memory_bytes()
    result = read(arguments.out) or {"gpu": gpu, "host_memory_bytes": memory, "checks": []}
    result |= {
        "backend": os.environ.get("PBS_TEST_BACKEND", "cpu"),
        "commit": arguments.commit,
        "command": "scripts/gpu_server_suite.sh",
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu_after": gpu,
        "host_memory_bytes_after": memory,
        "seconds": arguments.seconds,
        "done": arguments.done,
    }
    if arguments.status:
        result["checks"].append(arguments.status)
    if arguments.model_folder:
        result["model_folder"] = arguments.model_folder
    for part in PARTS:
        if found := read(arguments.parts / f"{part}.json"):
            result[part] = found
    draft = arguments.out.with_suffix(".part")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(draft, arguments.out)


if __name__ == "__main__":
    main()
