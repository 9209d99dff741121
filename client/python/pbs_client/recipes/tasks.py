"""Prompts with known answers, and their file: what the recipe synthetic-task asks.

A file is a JSON list of objects: `tokens`, the prompt, a list of token ids; `answer`, the
token ids that count as its right first token; and `kind`, a word by which results are
grouped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_BYTES_MAX = 64 << 20
TASKS_MAX = 10_000
ANSWERS_MAX = 64
KIND_CHARACTERS_MAX = 64
TOKEN_ID_MAX = (1 << 32) - 1


class TaskError(ValueError):
    """The file holds no tasks."""


@dataclass(frozen=True)
class Task:
    """A prompt and the ids of its right next token."""

    tokens: tuple[int, ...]
    answer: tuple[int, ...]
    kind: str


def read(path: str | os.PathLike[str]) -> tuple[Task, ...]:
    """Reads and checks a file of tasks.

    Raises:
        TaskError: names the file, the task and what is wrong.
        OSError: from the system.
    """
    with Path(path).open("rb") as file:
        text = file.read(FILE_BYTES_MAX + 1)
    try:
        return _parse(text)
    except TaskError as error:
        raise TaskError(f"{os.fspath(path)}: {error}") from None


def _parse(text: bytes) -> tuple[Task, ...]:
    if len(text) > FILE_BYTES_MAX:
        raise TaskError(f"more than {FILE_BYTES_MAX} bytes")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"not JSON: {str(error)[:100]}") from None
    if not isinstance(value, list) or not 1 <= len(value) <= TASKS_MAX:
        raise TaskError(f"not a list of 1 to {TASKS_MAX} tasks")
    return tuple(_task(index, item) for index, item in enumerate(value))


def _task(index: int, value: Any) -> Task:
    if not isinstance(value, dict) or set(value) != {"tokens", "answer", "kind"}:
        raise TaskError(f"task {index} has not exactly tokens, answer and kind")
    kind = value["kind"]
    if not isinstance(kind, str) or not 1 <= len(kind) <= KIND_CHARACTERS_MAX:
        raise TaskError(
            f"task {index}: kind has not 1 to {KIND_CHARACTERS_MAX} characters"
        )
    tokens = _ids(index, "tokens", value["tokens"])
    answer = _ids(index, "answer", value["answer"])
    if len(answer) > ANSWERS_MAX:
        raise TaskError(f"task {index}: answer has more than {ANSWERS_MAX} tokens")
    return Task(tokens, answer, kind)


def _ids(index: int, name: str, value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not value
        or any(type(item) is not int or not 0 <= item <= TOKEN_ID_MAX for item in value)
    ):
        raise TaskError(f"task {index}: {name} is not a list of token ids")
    return tuple(value)


def write(path: str | os.PathLike[str], tasks: Sequence[Task]) -> None:
    """Writes a file that read() reads."""
    lines = [{"tokens": t.tokens, "answer": t.answer, "kind": t.kind} for t in tasks]
    Path(path).write_text(json.dumps(lines) + "\n")
