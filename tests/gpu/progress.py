"""What a run of the suite has found so far, in its results file. A kernel that hangs or
faults takes the process with it: the next process, on the same file, carries on behind the
call that did, without that call."""

from __future__ import annotations

import json
import math
import os
import pathlib

ENDED = "the process ended in this call"
PART = ("inputs", "tokens", "head_dim")


def plain(value):
    """`value` without what JSON cannot hold: NaN and infinities are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


class Progress:
    """`result` is the file's content: `golden` and `timings` are rows; `parts` are done;
    `running` is the call that has begun, of a golden case or of a part. `part_keys` name
    a part."""

    def __init__(self, path: pathlib.Path, facts: dict, part_keys: tuple[str, ...] = PART):
        self.path = path
        self.part_keys = part_keys
        self.result = {"golden": [], "timings": [], "parts": [], "running": None, "done": False}
        if path.exists():
            before = json.loads(path.read_text())
            if not before.get("done", True):
                self.result = before
        self.result |= facts
        if self.result["running"] is not None:
            self._lose(self.result["running"])

    def _lose(self, call: dict) -> None:
        why = call.get("error", ENDED)
        if "case" in call:
            self.result["golden"].append({"case": call["case"], "right": False, "failed": why})
        else:
            self.result["timings"].append(call | {"error": why, "ended": True})
            if call["name"] is None:
                self.result["parts"].append({key: call[key] for key in self.part_keys})
        self.end()

    def begin(self, call: dict) -> None:
        """Before a call: {"case"}, or a part with the name of a call in it. Name None is
        everything of a part that is no call by itself: when that is lost, so is the part."""
        self.result["running"] = call
        self.save()

    def end(self) -> None:
        """After what could end the process."""
        self.result["running"] = None
        self.save()

    def stop(self, error: Exception) -> None:
        """Ends the process, where nothing runs any more: the CUDA context is lost."""
        self.result["running"]["error"] = first_line(error)
        self.save()
        os._exit(4)

    def is_barred(self, head_dim: int, name: str) -> bool:
        """Whether this call ended a process before."""
        return any(
            row.get("ended") and row["head_dim"] == head_dim and row["name"] == name
            for row in self.result["timings"]
        )

    def is_right(self) -> bool:
        """Whether no figure is of wrong results, and no call of ours ended a process."""
        ended = [row["name"] or "pbs" for row in self.result["timings"] if row.get("ended")]
        rows = self.result["golden"] + self.result["timings"]
        return all(row.get("right", True) for row in rows) and not any(
            name.startswith("pbs") for name in ended
        )

    def has_case(self, name: str) -> bool:
        """Of the golden ones."""
        return any(case["case"] == name for case in self.result["golden"])

    def finish(self, part: dict, rows: list[dict]) -> None:
        """A part is done."""
        self.result["timings"] += [part | row for row in rows]
        self.result["parts"].append(part)
        self.end()

    def save(self) -> None:
        """At once or not at all: the process may be killed while it writes."""
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(plain(self.result), indent=1) + "\n")
        os.replace(draft, self.path)


def first_line(error: Exception) -> str:
    """Of what it says; some say nothing."""
    return ((str(error) or repr(error)).splitlines() or [""])[0][:160]
