"""CRC-32C of chunks and layers, as the server computes it."""

from __future__ import annotations

import struct
import warnings
from typing import Any

import google_crc32c
import numpy as np


def warn_if_slow() -> None:
    """Warns when google-crc32c runs in pure Python, 1000 times slower than in C."""
    if google_crc32c.implementation != "c":
        warnings.warn(
            "google-crc32c has no C extension here, so checking KV caches will take "
            "seconds per megabyte; install a google-crc32c wheel for this platform",
            RuntimeWarning,
            stacklevel=3,
        )


def crc32c(data: bytes | np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """CRC-32C of `data` (bytes, or a contiguous uint8 array)."""
    return int(google_crc32c.value(data))


def extend_crc32c(crc: int, data: bytes | np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """The CRC-32C `crc` of earlier bytes, continued by `data`."""
    return int(google_crc32c.extend(crc, data))


def extend_digest(digest: int, chunk_crc: int) -> int:
    """KvChunk.layer_digest continued by one chunk's crc32c; starts at 0."""
    return int(google_crc32c.extend(digest, struct.pack("<I", chunk_crc)))
