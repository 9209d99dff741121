"""What a step has found so far, in its results file. A kernel that hangs or faults takes
the process with it: the next process, on the same file, carries on behind the call that
did, without that call."""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
from collections.abc import Callable

# Exit statuses of a step beside 0. LOST: another process can carry on.
WRONG, LOST = 3, 4


def ended(call: dict) -> dict:
    """The row of a call that ended its process."""
    return {"error": "the process ended in this call", "ended": True} | call


def is_wrong(row: dict) -> bool:
    """Of ours: a figure of wrong results, or a call that ended its process. What is wrong
    of a peer is told, and its time counts for nothing."""
    return not row.get("peer") and bool(row.get("right") is False or row.get("ended"))


def plain(value):
    """`value` without what JSON cannot hold: NaN and infinities are null."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def first_line(error: Exception) -> str:
    """Of what it says; some say nothing."""
    return ((str(error) or repr(error)).splitlines() or [""])[0][:160]


class Progress:
    """`rows`: what was found. A row has what its call was named by; one of a peer is
    nothing of ours. `facts`: of the machine. Lines said are for who watches."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.found = {"rows": [], "facts": {}, "said": [], "running": None}
        if path.exists():
            self.found = json.loads(path.read_text())
        self.rows, self.facts = self.found["rows"], self.found["facts"]
        if self.found["running"] is not None:
            self.end(ended(self.found["running"]))

    def begin(self, **call) -> None:
        """Before what could end the process."""
        self.found["running"] = call
        self.save()

    def end(self, *rows: dict) -> None:
        """After it."""
        self.found["running"] = None
        self.rows.extend(rows)
        self.save()

    def stop(self, error: Exception) -> None:
        """Ends the process, where nothing runs any more: device or server are lost."""
        if self.found["running"] is not None:
            self.found["running"]["error"] = first_line(error)
        self.save()
        os._exit(LOST)

    def say(self, text: str) -> None:
        """A line for who watches."""
        self.found["said"].append(text)
        self.save()
        print(text, flush=True)

    def has(self, **call) -> bool:
        """Whether there is a row of a call."""
        return any(all(row.get(k) == v for k, v in call.items()) for row in self.rows)

    def status(self) -> int:
        """WRONG when a row is."""
        return WRONG if any(map(is_wrong, self.rows)) else 0

    def save(self) -> None:
        """At once or not at all: the process may be killed while it writes."""
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(plain(self.found), indent=1) + "\n")
        os.replace(draft, self.path)


def run_part_of(manual: str, parts: dict[str, Callable[[Progress, float], None]]) -> int:
    """The command line of a script of steps: what to run, into which file, for how long."""
    parser = argparse.ArgumentParser(description=manual.splitlines()[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    progress = Progress(arguments.out)
    parts[arguments.part](progress, arguments.seconds)
    progress.save()
    return progress.status()
