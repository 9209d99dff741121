"""Waits for a condition without a fixed time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

WAIT_SECONDS_MAX = 30.0  # only a failure takes so long


def until(condition: Callable[[], bool], seconds_max: float = WAIT_SECONDS_MAX) -> None:
    """Waits until the condition is true; AssertionError when it does not come true."""
    pause, end = threading.Event(), time.monotonic() + seconds_max
    while not condition():
        assert time.monotonic() < end, f"not true after {seconds_max} s"
        pause.wait(0.02)
