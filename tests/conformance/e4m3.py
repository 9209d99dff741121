"""The elements of an F8_E4M3 chunk, as docs/PROTOCOL.md says."""

from __future__ import annotations

import numpy as np


def numbers(payload: bytes) -> np.ndarray:
    """The number of each byte; NaN is not among the caches of this client."""
    bits = np.frombuffer(payload, np.uint8).astype(int)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    magnitude = (8 * (exponent > 0) + mantissa) * np.exp2(np.maximum(exponent, 1) - 10)
    return np.where(bits < 128, magnitude, -magnitude)


def check_page(chunk, held: np.ndarray) -> None:
    """One page of some heads: `held` is these heads of the cache, f32."""
    scales = np.frombuffer(chunk.scales, "<f4")
    expected = np.abs(held).max((1, 2)) / np.float32(448)
    assert (scales == expected).all(), "scales"
    scale = scales[:, None, None]
    error = np.abs(numbers(chunk.payload).reshape(held.shape) * scale - held)
    bound = np.maximum(np.abs(held) / 16, scale / 1024)
    assert (error <= bound * (1 + 2.0**-20)).all(), "an element is off"
