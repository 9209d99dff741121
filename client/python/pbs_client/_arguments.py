"""Checks of a call's arguments, before any traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pbs_client import dtypes
from pbs_client.kv import Array


def expect(kind: type, name: str, value: Any) -> None:
    """TypeError for an argument that is neither a `kind` nor None."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} {value!r} is not {kind.__name__}(...)")


def int_tuple(name: str, values: Sequence[int] | Array) -> tuple[int, ...]:
    """The integers of a list, an array or a tensor of one dimension.

    Raises:
        ValueError: it is none of these.
    """
    array = dtypes.as_array(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} is not a list of integers")
    return tuple(int(value) for value in array)
