"""Settings of evaluations as files: methods, benchmarks and models of the paper.

A file is a JSON object with some of these fields; all but `about` become arguments of
the harness's command, which what is on the command line overrides:

    about                what it is, in words
    tasks                a list of tasks
    model_args           a dict: arguments of the model `pbs`
    gen_kwargs           a dict: arguments of generate()
    metadata             a dict: arguments of tasks
    batch_size           a number
    apply_chat_template  true: prompts are in the chat template of the model
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FLAG = "--settings"
FOLDER = Path(__file__).parent / "settings"

_DICTS = ("model_args", "gen_kwargs", "metadata")
_FIELDS = {
    "about": str,
    "tasks": list,
    **dict.fromkeys(_DICTS, dict),
    "batch_size": int,
    "apply_chat_template": bool,
}


class SettingsError(ValueError):
    """A settings file is missing or wrong; the message names it."""


def names() -> list[str]:
    """The settings that the package has."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> dict[str, Any]:
    """The settings of a name, or of a file that ends in .json.

    Raises:
        SettingsError: there are none, or a field is unknown or has another type.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"settings {name!r} cannot be read ({error}); give a .json file or one of: "
            f"{', '.join(names())}"
        ) from None
    if not isinstance(found, dict):
        raise SettingsError(f"{path} is not a JSON object")
    for field, value in found.items():
        if field not in _FIELDS:
            raise SettingsError(
                f"{path} has unknown field {field!r}; known are {', '.join(_FIELDS)}"
            )
        if type(value) is not _FIELDS[field]:
            kind = _FIELDS[field].__name__
            raise SettingsError(f"{path} field {field} is not of type {kind}")
    return found


def merged(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One of several: dicts are merged, of other fields the last counts."""
    result: dict[str, Any] = {}
    for one in settings:
        for field, value in one.items():
            if field in _DICTS:
                value = {**result.get(field, {}), **value}
            result[field] = value
    return result


def expanded(words: Sequence[str]) -> list[str]:
    """The words of a command, `--settings NAME...` replaced by what it stands for.

    Raises:
        SettingsError: as load(), or a flag without a name.
    """
    rest: list[str] = []
    chosen: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word != FLAG:
            rest.append(word)
            continue
        begin = position
        while position < len(words) and not words[position].startswith("-"):
            position += 1
        if position == begin:
            raise SettingsError(f"{FLAG} needs one or more of: {', '.join(names())}")
        chosen += words[begin:position]
    if not chosen:
        return rest
    command = [rest.pop(0)] if rest and not rest[0].startswith("-") else ["run"]
    found = merged([load(name) for name in chosen])
    if {"--tasks", "-t"} & set(rest):
        found.pop("tasks", None)  # the harness would add them to those
    return command + _flags(found) + rest


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags of the harness."""
    flags = ["--model", "pbs"]
    if settings.get("apply_chat_template"):
        flags.append("--apply_chat_template")
    if "tasks" in settings:
        flags += ["--tasks", *settings["tasks"]]
    for name in _DICTS:
        if name in settings:
            flags += [f"--{name}", json.dumps(settings[name])]
    if "batch_size" in settings:
        flags += ["--batch_size", str(settings["batch_size"])]
    return flags
