"""A progress bar on a stderr that is a terminal."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

_BAR_WIDTH = 30
_REDRAW_SECONDS = 0.1
_MIB = 1 << 20


class ProgressBar:
    """Draws `label [####    ] done/total`. The end of its `with` block clears the line.

    Threading: update() may be called from any thread.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """A bar on `stream`, stderr by default; silent unless that is a terminal."""
        self._stream = sys.stderr if stream is None else stream
        self.is_active = self._stream.isatty()
        self._lock = threading.Lock()
        self._drawn_at = float("-inf")
        self._label = ""

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_active:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def update(self, label: str, done: int, total: int, unit: str = "") -> None:
        """Redraws, at most every _REDRAW_SECONDS while the label stays the same."""
        if not self.is_active:
            return
        with self._lock:
            now = time.monotonic()
            is_news = label != self._label or done >= total
            if not is_news and now - self._drawn_at < _REDRAW_SECONDS:
                return
            self._drawn_at, self._label = now, label
            filled = _BAR_WIDTH * min(done, total) // max(total, 1)
            bar = "#" * filled + " " * (_BAR_WIDTH - filled)
            self._stream.write(f"\r\x1b[K{label:<10}[{bar}] {done}/{total}{unit}")
            self._stream.flush()

    def update_bytes(self, label: str, done: int, total: int) -> None:
        """Redraws in MiB; a ProgressCallback."""
        self.update(label, -(-done // _MIB), -(-total // _MIB), " MiB")
