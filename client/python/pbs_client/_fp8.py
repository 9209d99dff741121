"""Chunks of F8_E4M3: their scales checked, their numbers widened.

A byte is a number of e4m3: a sign, 4 bits of exponent, 3 of mantissa, no infinities. A
page is `page_tokens` tokens of one head, counted from token 0, and has one scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pbs_client._wire import KvChunk

Array = np.ndarray[Any, np.dtype[Any]]

_SCALE = np.dtype("<f4")


def _numbers() -> Array:
    """The number of each byte."""
    magnitude = np.arange(128)
    exponent, mantissa = magnitude >> 3, magnitude & 7
    normal = np.ldexp(8.0 + mantissa, exponent - 10)
    positive = np.where(exponent == 0, np.ldexp(1.0 * mantissa, -9), normal)
    positive[127] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


_NUMBERS = _numbers()


def wrong_scales(chunk: KvChunk, page_tokens: int) -> str:
    """What is wrong with a chunk's scales; "" when nothing is."""
    pages = _pages(chunk, page_tokens)
    expected = chunk.head_count * pages * _SCALE.itemsize
    if chunk.scales.nbytes != expected:
        return f"the chunk has {chunk.scales.nbytes} bytes of scales, not {expected}"
    scales = np.frombuffer(chunk.scales, _SCALE)
    if not np.all(np.isfinite(scales) & (scales >= 0)):
        return "a scale of the chunk is negative or not finite"
    return ""


def widen(chunk: KvChunk, page_tokens: int, nhd: bool, target: Array) -> None:
    """Writes the chunk's numbers, in its order, as elements of target's dtype.

    Args:
        chunk: its tokens, heads and scales are right.
        page_tokens: of the request.
        nhd: the order of its rows is tokens, then heads; else heads, then tokens.
        target: one-dimensional, an element for each byte of the payload.
    """
    heads, begin, count = chunk.head_count, chunk.token_begin, chunk.token_count
    scales = np.frombuffer(chunk.scales, _SCALE).reshape(heads, -1)
    page = np.arange(begin, begin + count) // page_tokens - begin // page_tokens
    of_rows = scales[:, page]
    rows = (of_rows.T if nhd else of_rows).reshape(-1, 1)
    values = _NUMBERS[np.frombuffer(chunk.payload, np.uint8)].reshape(len(rows), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(values, rows, out=values)
        target[:] = values.reshape(-1)


def _pages(chunk: KvChunk, page_tokens: int) -> int:
    """Pages that have a token of the chunk."""
    last = (chunk.token_begin + chunk.token_count - 1) // page_tokens
    return last - chunk.token_begin // page_tokens + 1
