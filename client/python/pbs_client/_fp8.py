"""Chunks of F8_E4M3: their scales checked, their numbers widened.

A byte is a number of e4m3: a sign, 4 bits of exponent, 3 of mantissa, no infinities. A
page is `page_tokens` tokens of one head, counted from token 0, and has one scale.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from pbs_client._wire import KvChunk

Array = np.ndarray[Any, np.dtype[Any]]

_SCALE = np.dtype("<f4")
_BLOCK_ELEMENTS = 1 << 15  # that are widened at once: they stay in a CPU's caches


def _numbers() -> Array:
    """The number of each byte."""
    magnitude = np.arange(128)
    exponent, mantissa = magnitude >> 3, magnitude & 7
    normal = np.ldexp(8.0 + mantissa, exponent - 10)
    positive = np.where(exponent == 0, np.ldexp(1.0 * mantissa, -9), normal)
    positive[127] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


_NUMBERS = _numbers()


@functools.cache
def _pairs() -> Array:
    """The numbers of each two bytes, as 64 bits: half as many look-ups."""
    low, high = np.arange(256), np.arange(256)[:, np.newaxis]
    both = np.stack(np.broadcast_arrays(_NUMBERS[low], _NUMBERS[high]), axis=-1)
    return np.ascontiguousarray(both).reshape(-1).view(np.uint64)


def _look_up(payload: Array, numbers: Array) -> None:
    """Writes the number of each byte, as float32."""
    if payload.size % 2:
        numbers[:] = _NUMBERS[payload]
        return
    two, pairs = payload.view("<u2"), numbers.view(np.uint64)
    np.take(_pairs(), two, out=pairs, mode="clip")  # none is clipped


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
    payload = np.frombuffer(chunk.payload, np.uint8)
    dim = payload.size // len(rows)
    step = max(1, _BLOCK_ELEMENTS // dim)
    scratch = np.empty(min(step, len(rows)) * dim, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for row in range(0, len(rows), step):
            some = slice(row * dim, min(row + step, len(rows)) * dim)
            numbers = scratch[: some.stop - some.start]
            _look_up(payload[some], numbers)
            values = numbers.reshape(-1, dim)
            np.multiply(values, rows[row : row + step], out=values)
            target[some] = numbers


def _pages(chunk: KvChunk, page_tokens: int) -> int:
    """Pages that have a token of the chunk."""
    last = (chunk.token_begin + chunk.token_count - 1) // page_tokens
    return last - chunk.token_begin // page_tokens + 1
