#!/usr/bin/env python3
"""Prints the table of a results file of run.py, in Markdown.

python tests/faults/table.py docs/results/hand_off_faults.json
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from matrix import FAULTS  # noqa: E402

NAMES = {"right": "whole and right", "killed": "dead", "left": "nothing, as it left"}


def rows(result: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    lines = ["| fault | times | what the decode side had |", "|---|--:|---|"]
    for fault in FAULTS:
        counts = result["outcomes"].get(fault.name)
        if counts is None:  # a kind that is newer than the file
            continue
        had = {
            outcome.removeprefix("decode: "): count
            for outcome, count in counts.items()
            if outcome.startswith("decode: ")
        }
        most_first = sorted(had.items(), key=lambda item: (-item[1], item[0]))
        text = ", ".join(f"{NAMES.get(name, f'`{name}`')} {n}" for name, n in most_first)
        lines.append(f"| {fault.text} | {counts['faults']} | {text} |")
    return lines


def main() -> None:
    """Prints it."""
    (path,) = sys.argv[1:]
    print("\n".join(rows(json.loads(pathlib.Path(path).read_text()))))


if __name__ == "__main__":
    main()
