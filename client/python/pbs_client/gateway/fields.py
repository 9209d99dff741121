"""Typed access to the fields of a JSON body; a wrong one is refused by its name.

A field that is null is as one that is missing, as in the APIs of OpenAI.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pbs_client.gateway.errors import bad

TEXT_BYTES_MAX = 512  # of a string that is no prompt


class Fields:
    """The fields of one JSON object.

    Attributes:
        values: the object.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """`prefix` is the path of the object, for messages: "" or "outer."."""
        self.values = values
        self._prefix = prefix

    def path(self, name: str) -> str:
        """The field's name in messages."""
        return self._prefix + name

    def get(self, name: str) -> Any:
        """The value, unchecked; None when it is missing."""
        return self.values.get(name)

    def text(self, name: str) -> str | None:
        """A short string."""
        value = self.get(name)
        if value is None:
            return None
        path = self.path(name)
        if not isinstance(value, str):
            raise bad(path, f"{path} is not a string")
        length = len(checked_text(path, value).encode())
        if length > TEXT_BYTES_MAX:
            raise bad(path, f"{path} has {length} bytes, more than {TEXT_BYTES_MAX}")
        return value

    def integer(self, name: str) -> int | None:
        """An integer; 1.0 is 1, as JSON has one kind of number."""
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int)
        ):
            path = self.path(name)
            raise bad(path, f"{path} is not an integer")
        return value

    def flag(self, name: str) -> bool | None:
        """True or false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            path = self.path(name)
            raise bad(path, f"{path} is not true or false")
        return value

    def inner(self, name: str) -> Fields:
        """An object; empty when it is missing."""
        value = self.get(name)
        path = self.path(name)
        if value is not None and not isinstance(value, dict):
            raise bad(path, f"{path} is not an object")
        return Fields(value or {}, path + ".")


def parse(raw: bytearray) -> Fields:
    """The fields of a body. Refused: no JSON, no object, NaN, Infinity."""
    try:
        value = json.loads(raw.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise bad(None, "the body is not JSON in UTF-8; send a JSON object") from None
    if not isinstance(value, dict):
        raise bad(None, "the body is not a JSON object")
    return Fields(value)


def checked_text(path: str, value: str) -> str:
    """`value`, unless it has half of a surrogate pair, which is no text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad(
            path, f"{path} has half of a surrogate pair, which is no text"
        ) from None
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(name)
