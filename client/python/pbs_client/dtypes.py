"""Element types: converts between wire numbers, NumPy dtypes and short names.

| name | NumPy | wire |
|---|---|---|
| f32 | float32 | F32 |
| f16 | float16 | F16 |
| bf16 | ml_dtypes.bfloat16 | BF16 |

The wire also has i32 (orders), u16 and i64 (block lists). All bytes on the wire are
little-endian, and the machine must be so too.
"""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from pbs_client import _messages

if sys.byteorder != "little":
    raise ImportError("pbs_client needs a little-endian machine")

BF16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
F16: np.dtype[Any] = np.dtype(np.float16)
F32: np.dtype[Any] = np.dtype(np.float32)

# The form in which a cache may travel beside these: one byte an element and a scale for
# each page. It is widened on arrival.
F8_E4M3 = "f8_e4m3"

# dtypes of q, k, v, o and KV caches.
FLOAT_DTYPES: dict[str, np.dtype[Any]] = {"f32": F32, "f16": F16, "bf16": BF16}

_NUMPY_BY_WIRE_NAME: dict[str, np.dtype[Any]] = {
    "F32": F32,
    "F16": F16,
    "BF16": BF16,
    "I32": np.dtype(np.int32),
    "U16": np.dtype(np.uint16),
    "I64": np.dtype(np.int64),
}
_NUMBERS = _messages.enum_numbers("DType")
F8_E4M3_NUMBER = _NUMBERS["F8_E4M3"]
_WIRE_BY_NUMPY = {dtype: _NUMBERS[name] for name, dtype in _NUMPY_BY_WIRE_NAME.items()}
_NUMPY_BY_WIRE = {number: dtype for dtype, number in _WIRE_BY_NUMPY.items()}


def to_wire(dtype: np.dtype[Any]) -> int:
    """The DType number of a NumPy dtype. ValueError for one the wire lacks."""
    try:
        return _WIRE_BY_NUMPY[dtype]
    except KeyError:
        raise ValueError(
            f"dtype {dtype} cannot be sent; use float32, float16 or ml_dtypes.bfloat16"
        ) from None


def from_wire(number: int) -> np.dtype[Any] | None:
    """The NumPy dtype of a DType number; None for a number this client lacks."""
    return _NUMPY_BY_WIRE.get(number)


def float_dtype(dtype: Any) -> np.dtype[Any]:
    """f32, f16 or bf16 from its short name or any argument of np.dtype().

    Raises:
        ValueError: it is none of the three.
    """
    known = FLOAT_DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is not None:
        return known
    try:
        resolved: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype {dtype!r} is not one of f32, f16, bf16") from None
    if resolved not in FLOAT_DTYPES.values():
        raise ValueError(f"dtype {resolved} is not one of f32, f16, bf16")
    return resolved


def is_torch_tensor(values: Any) -> bool:
    """True for a torch tensor; works without torch."""
    return type(values).__module__.partition(".")[0] == "torch"


def as_array(values: Any) -> np.ndarray[Any, Any]:
    """As np.asarray(), also for torch tensors of any device and of bfloat16.

    Raises:
        ValueError: the values cannot become an array.
    """
    try:
        if not is_torch_tensor(values):
            return np.asarray(values)
        tensor = values.detach().cpu().resolve_conj().resolve_neg()
        if str(tensor.dtype) != "torch.bfloat16":
            return np.asarray(tensor.numpy())
        # torch does not know ml_dtypes: pass the bits as int16.
        bits = tensor.contiguous().view(sys.modules["torch"].int16)
        return np.asarray(bits.numpy()).view(BF16)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{type(values).__name__} makes no array ({error}); give a NumPy array or a "
            "dense torch tensor"
        ) from None


def short_name(dtype: np.dtype[Any]) -> str:
    """The short name "f32", "f16" or "bf16"; NumPy's name for any other dtype."""
    for name, known in FLOAT_DTYPES.items():
        if known == dtype:
            return name
    return dtype.name
