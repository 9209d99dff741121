"""Checks of a call's arguments, before any traffic."""

from __future__ import annotations

import dataclasses
import operator
import reprlib
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pbs_client import dtypes

if TYPE_CHECKING:
    from pbs_client.kv import Array

Uint64 = int  # as the annotation of a field: an integer that is sent as uint64

_INT32 = (-(1 << 31), (1 << 31) - 1)
_UINT32 = (0, (1 << 32) - 1)
_UINT64 = (0, (1 << 64) - 1)
_SHOWN_BITS_MAX = 128  # of an integer whose digits are shown


def expect(kind: type, name: str, value: Any) -> None:
    """TypeError for an argument that is neither a `kind` nor None."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} {_shown(value)} is not {kind.__name__}(...)")


def int_tuple(
    name: str, values: Sequence[int] | Array, kind: str = "int"
) -> tuple[int, ...]:
    """The integers of a list, an array or a tensor of one dimension.

    Args:
        name: for messages.
        values: the integers.
        kind: "int", "Uint32" or "Uint64": how they are sent.

    Raises:
        ValueError: it is none of these, or one cannot be sent.
    """
    array = dtypes.as_array(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} is not a list of integers")
    return tuple(
        checked(kind, f"{name}[{index}]", value) for index, value in enumerate(array)
    )


def check_fields(value: Any) -> None:
    """Checks the fields of a frozen dataclass by their annotations.

    An annotation is one of int (sent as int32), Uint64, float (sent as float32), bool
    and str, also with "| None". Fields with other annotations are not checked. A field
    becomes Python's own type: an int from a NumPy integer, for example.

    Raises:
        TypeError: a value has another type; the message names Class.field.
        ValueError: a number cannot be sent in 32 bits.
    """
    for field in dataclasses.fields(value):
        kind, _, rest = str(field.type).partition(" | ")
        given = getattr(value, field.name)
        if kind not in _CHECKS or rest not in ("", "None") or (rest and given is None):
            continue
        name = f"{type(value).__name__}.{field.name}"
        object.__setattr__(value, field.name, checked(kind, name, given))


def checked(kind: str, name: str, value: Any) -> Any:
    """`value` as Python's own type of an annotation; errors as check_fields()."""
    return _CHECKS[kind](name, value)


def _integer(name: str, value: Any, limits: tuple[int, int]) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} {_shown(value)} is not an integer") from None
    if not limits[0] <= number <= limits[1]:
        low, high = limits
        raise ValueError(f"{name} {_shown(number)} is outside [{low}, {high}]")
    return number


def _int32(name: str, value: Any) -> int:
    return _integer(name, value, _INT32)


def _uint32(name: str, value: Any) -> int:
    return _integer(name, value, _UINT32)


def _uint64(name: str, value: Any) -> int:
    return _integer(name, value, _UINT64)


def _float32(name: str, value: Any) -> float:
    try:
        others = (bool, np.bool_, str, bytes, complex)
        if isinstance(value, others) or getattr(value, "ndim", 0):
            raise TypeError
        number = float(value)
        (sent,) = struct.unpack("<f", struct.pack("<f", number))
    except TypeError:
        raise TypeError(f"{name} {_shown(value)} is not a number") from None
    except OverflowError:
        raise ValueError(
            f"{name} {_shown(value)} is beyond a float32, at most 3.4028235e+38"
        ) from None
    if number != 0 and sent == 0:
        raise ValueError(
            f"{name} {_shown(value)} would be 0 as a float32, which is at least 1.4e-45"
        )
    return number


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} {_shown(value)} is not True or False")
    return bool(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} {_shown(value)} is not a string")
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "int": _int32,
    "Uint32": _uint32,
    "Uint64": _uint64,
    "float": _float32,
    "bool": _truth,
    "str": _text,
}


def _shown(value: Any) -> str:
    """A value in a message; a long one is cut."""
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS_MAX:
        return f"of {value.bit_length()} bits"
    return reprlib.repr(value)
