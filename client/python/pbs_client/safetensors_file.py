"""Reads and writes safetensors files with NumPy only, bfloat16 included.

A file is a little-endian u64 header length, a JSON header and the data. The reader
checks a file before it allocates memory: sizes against the file, shapes against bytes,
and the data for overlaps, holes and trailing bytes. Tensors are read into owned memory.

Errors: SafetensorsError (a ValueError) names the defect of the file; OSError comes from
the system.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from pbs_client import dtypes

Array = np.ndarray[Any, np.dtype[Any]]

HEADER_BYTES_MAX = 16 << 20
DIMENSIONS_MAX = 16
# Links to what is open: others hold the file that they lead to, not its name.
_OPEN_ALREADY = ("/dev/fd", "/dev/stdin", "/dev/stdout", "/dev/stderr", "/proc")
_SIZE_MAX = 1 << 62  # of a dimension or an offset: far beyond any file

_NUMPY_BY_NAME: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": dtypes.F16,
    "BF16": dtypes.BF16,
    "F32": dtypes.F32,
    "F64": np.dtype(np.float64),
}
_NAME_BY_NUMPY = {dtype: name for name, dtype in _NUMPY_BY_NAME.items()}


class SafetensorsError(ValueError):
    """The file is not a safetensors file that this reader accepts."""


@dataclass(frozen=True)
class TensorEntry:
    """Position of a tensor; `begin` counts from the start of the data."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def read(
    path: str | os.PathLike[str], names: Iterable[str] | None = None
) -> dict[str, Array]:
    """Reads tensors into memory.

    Args:
        path: a regular file.
        names: the tensors to read, without those that the file lacks; None is all.

    Returns:
        name -> array, in the order of the file.
    """
    wanted = None if names is None else set(names)
    with _open(path) as file:
        found, _, data_begin = _read_header(file)
        return {
            name: _read_tensor(file, data_begin, name, entry)
            for name, entry in found.items()
            if wanted is None or name in wanted
        }


def entries(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """The checked header of a file: name -> entry, in the order of the data."""
    return header(path)[0]


def header(
    path: str | os.PathLike[str],
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """As entries(), and the file's metadata."""
    with _open(path) as file:
        found, metadata, _ = _read_header(file)
        return found, metadata


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors. A regular file is written completely or not at all.

    Args:
        path: a regular file is replaced, also one that a symbolic link leads to. Any
            other existing file, such as a pipe or a device, is opened and written to.
        tensors: name -> array of a dtype that the format has.
        metadata: strings for the header.

    Raises:
        ValueError: a dtype that the format lacks.
        OSError: from the system; a folder that does not exist is named.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Largest elements first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    offset = 0
    for name in names:
        array = tensors[name]
        if array.dtype not in _NAME_BY_NUMPY:
            raise ValueError(f"tensor {name}: safetensors has no dtype {array.dtype}")
        header[name] = {
            "dtype": _NAME_BY_NUMPY[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _output(Path(path)) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            file.write(_bytes_of(np.ascontiguousarray(tensors[name])))


@contextlib.contextmanager
def _output(path: Path) -> Iterator[BinaryIO]:
    """Opens `path` for writing; see write()."""
    if not _is_replaceable(path):
        with path.open("wb") as file:
            yield file
        return
    target = path.resolve()
    check_folder(target)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with _created(part, path) as file:
            yield file
        part.replace(target)
    finally:
        with contextlib.suppress(OSError):  # replaced, or never made
            part.unlink()


def _created(part: Path, path: Path) -> BinaryIO:
    """A new file `part`. Errors name `path`, which the caller knows."""
    try:
        return part.open("xb")
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def check_folder(path: str | os.PathLike[str]) -> None:
    """FileNotFoundError, NotADirectoryError: no file can be made at `path`."""
    folder = Path(path).resolve().parent
    if not folder.exists():
        raise FileNotFoundError(
            f"cannot write {os.fspath(path)}: folder {folder} does not exist"
        )
    if not folder.is_dir():
        raise NotADirectoryError(
            f"cannot write {os.fspath(path)}: {folder} is not a folder"
        )


def _is_replaceable(path: Path) -> bool:
    """True when another file may replace `path`."""
    absolute = Path(os.path.abspath(path))
    if any(absolute.is_relative_to(place) for place in _OPEN_ALREADY):
        return False
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return True


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens for reading; does not wait for the writer of a FIFO."""
    flag = getattr(os, "O_NONBLOCK", 0)
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | flag))


def _read_header(
    file: BinaryIO,
) -> tuple[dict[str, TensorEntry], dict[str, str], int]:
    """The checked entries, the metadata and the offset of the data."""
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise SafetensorsError("not a regular file")
    prefix = file.read(8)
    if len(prefix) < 8:
        raise SafetensorsError(f"the file has {len(prefix)} bytes, fewer than 8")
    (header_bytes,) = struct.unpack("<Q", prefix)
    limit = min(HEADER_BYTES_MAX, status.st_size - 8)
    if header_bytes > limit:
        raise SafetensorsError(f"header of {header_bytes} bytes exceeds {limit}")
    text = file.read(header_bytes)
    if len(text) != header_bytes:
        raise SafetensorsError("the file shrank while its header was read")
    tensors, metadata = _parse_header(text)
    found = {name: _entry(name, value) for name, value in tensors.items()}
    _check_layout(found, status.st_size - 8 - header_bytes)
    return found, metadata, 8 + header_bytes


def _parse_header(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The JSON object without its metadata, names unique; and the metadata."""
    try:
        header = json.loads(
            text.decode(),
            object_pairs_hook=_unique_pairs,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except SafetensorsError:
        raise
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise SafetensorsError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise SafetensorsError("__metadata__ is not an object of strings")
    return header, metadata


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise SafetensorsError("the header has a key twice in one object")
    return unique


def _refuse_number(text: str) -> NoReturn:
    raise SafetensorsError(
        f"the header holds the number {text[:32]}; only integers may"
    )


def _entry(name: str, value: Any) -> TensorEntry:
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(value, dict) or set(value) != fields:
        raise SafetensorsError(f"tensor {name}: not exactly dtype, shape, data_offsets")
    dtype = _NUMPY_BY_NAME.get(value["dtype"]) if _is_text(value["dtype"]) else None
    if dtype is None:
        raise SafetensorsError(f"tensor {name}: dtype {value['dtype']!r} is unknown")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_sizes(shape) or len(shape) > DIMENSIONS_MAX:
        raise SafetensorsError(f"tensor {name}: shape is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SafetensorsError(f"tensor {name}: data_offsets are not [begin, end]")
    size = dtype.itemsize
    for dimension in shape:
        size *= dimension  # exact: Python integers do not overflow
    if size != offsets[1] - offsets[0]:
        raise SafetensorsError(
            f"tensor {name}: shape and dtype take {size} bytes, data_offsets "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_sizes(value: Any) -> bool:
    """A list of integers in [0, _SIZE_MAX]; booleans are none."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _SIZE_MAX for item in value
    )


def _check_layout(found: dict[str, TensorEntry], data_bytes: int) -> None:
    """The tensors fill the data exactly, without overlap."""
    end = 0
    for name, entry in sorted(found.items(), key=_place):
        if entry.begin < end:
            raise SafetensorsError(f"tensor {name} overlaps the one before it")
        if entry.begin > end:
            raise SafetensorsError(f"bytes [{end}, {entry.begin}) belong to no tensor")
        end = entry.end
    if end != data_bytes:
        raise SafetensorsError(
            f"the tensors take {end} bytes, the file has {data_bytes}"
        )


def _place(item: tuple[str, TensorEntry]) -> tuple[int, int]:
    return item[1].begin, item[1].end


def _read_tensor(
    file: BinaryIO, data_begin: int, name: str, entry: TensorEntry
) -> Array:
    try:
        array: Array = np.empty(entry.shape, entry.dtype)
    except ValueError as error:  # an empty tensor of absurd dimensions
        raise SafetensorsError(f"tensor {name}: {error}") from None
    target = _bytes_of(array)
    file.seek(data_begin + entry.begin)
    done = 0
    while done < target.nbytes:
        count = file.readinto(target[done:])  # type: ignore[attr-defined]
        if not count:
            raise SafetensorsError(f"tensor {name}: the file shrank while it was read")
        done += count
    if entry.dtype == np.bool_ and np.any(array.view(np.uint8) > 1):
        raise SafetensorsError(f"tensor {name}: a BOOL is neither 0 nor 1")
    return array


def _bytes_of(array: Array) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8).data)
