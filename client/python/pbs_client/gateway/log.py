"""The gateway's log: JSON lines on stderr, in the form of the node's log.

A line has a time, a level, an event and the fields of the event. Prompts, messages and
token ids never appear: an exception is logged by its class and place, without its text.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any

LEVELS = ("debug", "info", "warning", "error")

_LOGGER = logging.getLogger("pbs_gateway")


class _Formatter(logging.Formatter):
    """A record as a line; one of a library has the event library_line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        when = datetime.fromtimestamp(record.created, timezone.utc)
        fields = getattr(record, "pbs_fields", None)
        if fields is None:
            event = "library_line"
            fields = {"library": record.name, "message": record.getMessage()}
            if record.exc_info and record.exc_info[1] is not None:
                # The text of an exception may quote the request.
                fields = {"library": record.name, **describe(record.exc_info[1])}
        else:
            event = record.getMessage()
        return json.dumps(
            {
                "time": when.isoformat(timespec="microseconds").replace("+00:00", "Z"),
                "level": record.levelname.lower(),
                "event": event,
                **fields,
            },
            separators=(",", ":"),
        )


def set_up(level: str) -> None:
    """Sends the gateway's and its libraries' lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    _LOGGER.setLevel(level.upper())


def event(name: str, level: str = "info", **fields: Any) -> None:
    """Writes one line."""
    number = logging.getLevelName(level.upper())
    _LOGGER.log(number, name, extra={"pbs_fields": fields})


def describe(error: BaseException) -> dict[str, str]:
    """Class and place of an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return {"exception": type(error).__name__, "where": where}
