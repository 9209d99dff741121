"""The state of a long run: one JSON line per measurement, so that a run can go on.

The first line says what the measurements are of. A log of something else (another server,
other prompts, another method of measuring) is refused, because its records would not be
comparable. A last line that is cut short, as an ended process leaves it, is dropped.

Threading: one process writes.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

Key = tuple[str, int, str, int]  # setting, length, kind of prompt, index of the prompt


class OtherRunError(ValueError):
    """The log is of another server or other prompts."""


class RunLog:
    """Measurements by key, in memory and in a file."""

    def __init__(self, path: pathlib.Path, identity: dict[str, Any], fresh: bool = False):
        """Reads the log, or begins one.

        Args:
            path: the file; its folder is made.
            identity: what all its records have in common.
            fresh: begin anew, whatever there is.

        Raises:
            OtherRunError: the log has another identity.
        """
        self._path, self.records = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [] if fresh or not path.exists() else _whole_lines(path)
        if lines:
            there = lines[0]
            if there != identity:
                differs = sorted(
                    k for k in {*there, *identity} if there.get(k) != identity.get(k)
                )
                raise OtherRunError(f"{path} differs in {', '.join(differs)}")
            for line in lines[1:]:
                self.records[_key(line)] = line
        # Written anew, so that what follows a cut line begins a line.
        whole = path.with_suffix(".new")
        whole.write_text("".join(_line(x) for x in [identity, *self.records.values()]))
        whole.replace(path)

    def has(self, key: Key) -> bool:
        """Whether this was measured."""
        return key in self.records

    def add(self, key: Key, figures: dict[str, Any]) -> None:
        """Keeps a measurement, on disk when this returns."""
        setting, length, kind, index = key
        record = {"setting": setting, "length": length, "kind": kind, "index": index}
        record |= figures
        self.records[key] = record
        with self._path.open("a") as file:
            file.write(_line(record))


def _key(record: dict[str, Any]) -> Key:
    return record["setting"], record["length"], record["kind"], record["index"]


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"


def _whole_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    *whole, _ = path.read_text().split("\n")  # behind the last newline nothing is whole
    return [json.loads(line) for line in whole]
