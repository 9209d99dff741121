"""safetensors without its library: everything it writes is read, nothing broken is."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import struct
import tempfile
import threading
import tty
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from pbs_client import safetensors_file
from pbs_client.safetensors_file import SafetensorsError

ALL_DTYPES = [
    np.bool_,
    np.uint8,
    np.int8,
    np.uint16,
    np.int16,
    np.uint32,
    np.int32,
    np.uint64,
    np.int64,
    np.float16,
    ml_dtypes.bfloat16,
    np.float32,
    np.float64,
]


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin=0, end=8, dtype="F32", shape=(2,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_every_dtype_and_shape_survives_a_round_trip(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {}
    for number, dtype in enumerate(ALL_DTYPES):
        for shape in ((3, 5), (), (0, 4), (1,)):
            values = rng.integers(0, 2, shape)
            tensors[f"{number}.{shape}"] = np.asarray(values).astype(dtype)
    path = tmp_path / "all.safetensors"
    safetensors_file.write(path, tensors, {"made by": "a test"})
    read = safetensors_file.read(path)
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        assert read[name].tobytes() == array.tobytes()
        assert read[name].flags.owndata or read[name].base is not None


def test_a_strided_tensor_is_written_in_order(tmp_path):
    path = tmp_path / "strided.safetensors"
    array = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]
    safetensors_file.write(path, {"a": array})
    np.testing.assert_array_equal(safetensors_file.read(path)["a"], array)


def test_only_the_named_tensors_are_read(tmp_path):
    path = tmp_path / "two.safetensors"
    safetensors_file.write(path, {"a": np.zeros(2), "b": np.ones(3)})
    assert list(safetensors_file.read(path, ["b", "c"])) == ["b"]


def test_files_of_other_writers_are_read():
    golden = Path(__file__).resolve().parents[1] / "golden"
    tensors = safetensors_file.read(golden / "pbs_struct_700_d64_bf16.safetensors")
    assert tensors["q"].dtype == ml_dtypes.bfloat16
    assert tensors["q"].shape == (1, 4, 700, 64)
    assert tensors["order"].dtype == np.int16


def test_misaligned_data_is_read(tmp_path):
    header = {"a": entry(0, 1, "U8", (1,)), "b": entry(1, 9)}
    path = write_raw(tmp_path / "odd", header, b"\x07" + np.float32([1, 2]).tobytes())
    assert safetensors_file.read(path)["b"].tolist() == [1, 2]


def test_a_failed_write_leaves_no_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "kept.safetensors"
    safetensors_file.write(path, {"a": np.zeros(1)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="complex128"):
        safetensors_file.write(path, {"a": np.zeros(1, complex)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


HOSTILE_HEADERS = [
    ("not JSON", b"{", b"", "not JSON"),
    ("not UTF-8", b'{"\xff":1}', b"", "not JSON"),
    ("a list", [], b"", "not a JSON object"),
    ("nested too deep", b"[" * 200_000, b"", "not JSON"),
    ("a number of 10,000 digits", b'{"a":' + b"9" * 10_000 + b"}", b"", "JSON"),
    ("NaN", b'{"a":NaN}', b"", "only integers"),
    ("a key twice", b'{"a":1,"a":2}', b"", "twice"),
    (
        "a field twice",
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        "twice",
    ),
    ("metadata of numbers", {"__metadata__": {"a": 1}}, b"", "strings"),
    ("an entry that is a list", {"a": []}, b"", "exactly"),
    ("no dtype", {"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "exactly"),
    ("an extra field", {"a": {**entry(), "b": 1}}, bytes(8), "exactly"),
    ("an unknown dtype", {"a": entry(dtype="F7")}, bytes(8), "'F7'"),
    ("a dtype that is a list", {"a": entry(dtype=[])}, bytes(8), "unknown"),
    ("a negative size", {"a": entry(shape=(-2,))}, bytes(8), "sizes"),
    ("a size that is true", {"a": entry(0, 4, shape=(True,))}, bytes(4), "sizes"),
    ("a size that is a float", {"a": entry(shape=(2.0,))}, bytes(8), "only integers"),
    ("a huge size", {"a": entry(shape=(1 << 63,))}, bytes(8), "sizes"),
    ("17 dimensions", {"a": entry(0, 4, shape=(1,) * 17)}, bytes(4), "sizes"),
    ("a shape that overflows", {"a": entry(shape=(1 << 62, 4))}, bytes(8), "take"),
    ("empty and absurd", {"a": entry(0, 0, shape=(0, 1 << 62))}, b"", "tensor a"),
    ("fewer bytes than the shape", {"a": entry(0, 4)}, bytes(4), "take 8 bytes"),
    ("begin past end", {"a": entry(8, 0)}, bytes(8), "begin, end"),
    ("one offset", {"a": {**entry(), "data_offsets": [0]}}, bytes(8), "begin, end"),
    ("a negative offset", {"a": entry(-8, 0)}, bytes(8), "begin, end"),
    ("past the end", {"a": entry()}, bytes(4), "take 8 bytes, the file has 4"),
    ("trailing bytes", {"a": entry()}, bytes(9), "the file has 9"),
    ("a hole", {"a": entry(), "b": entry(9, 17)}, bytes(17), r"\[8, 9\)"),
    ("a hole at the start", {"a": entry(1, 9)}, bytes(9), r"\[0, 1\)"),
    ("an overlap", {"a": entry(), "b": entry(4, 12)}, bytes(12), "overlaps"),
    ("a bool of 2", {"a": entry(0, 1, "BOOL", (1,))}, b"\x02", "BOOL"),
]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [pytest.param(*case[1:], id=case[0]) for case in HOSTILE_HEADERS],
)
def test_a_hostile_header_is_refused(tmp_path, header, data, message):
    path = write_raw(tmp_path / "hostile.safetensors", header, data)
    with pytest.raises(SafetensorsError, match=message):
        safetensors_file.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "0 bytes", id="empty file"),
        pytest.param(b"\x01" * 7, "7 bytes", id="7 bytes"),
        pytest.param(struct.pack("<Q", 9) + b"{}", "exceeds 2", id="header past end"),
        pytest.param(struct.pack("<Q", 2**64 - 1), "exceeds 0", id="huge header"),
    ],
)
def test_a_cut_file_is_refused(tmp_path, content, message):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorsError, match=message):
        safetensors_file.read(path)


def test_a_header_above_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", safetensors_file.HEADER_BYTES_MAX + 1))
        file.truncate(8 + safetensors_file.HEADER_BYTES_MAX + 1)  # sparse
    with pytest.raises(SafetensorsError, match=f"{safetensors_file.HEADER_BYTES_MAX}$"):
        safetensors_file.read(path)


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(SafetensorsError, match="regular file"):
        safetensors_file.read(path)


TENSORS = {"x": np.arange(6, dtype=np.float32)}


def written_bytes(tmp_path: Path) -> bytes:
    path = tmp_path / "expected"
    safetensors_file.write(path, TENSORS)
    return path.read_bytes()


@contextlib.contextmanager
def fifo(path: Path) -> Iterator[list[bytes]]:
    """A pipe with a name, and what its reader got by the end of the block."""
    os.mkfifo(path)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    yield got
    reader.join()


@contextlib.contextmanager
def terminal(path: Path) -> Iterator[list[bytes]]:
    """A link to a character device, and what was written to that."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    path.symlink_to(os.ttyname(theirs))
    got: list[bytes] = []
    yield got
    got.append(os.read(ours, 4096))
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("make", [fifo, terminal], ids=lambda make: make.__name__)
def test_what_is_no_regular_file_is_written_to_and_stays(tmp_path, make):
    path, expected = tmp_path / "special", written_bytes(tmp_path)
    with make(path) as got:
        before = path.lstat()
        safetensors_file.write(path, TENSORS)
    assert got == [expected]
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert sorted(os.listdir(tmp_path)) == ["expected", "special"]


def test_an_open_file_named_by_its_descriptor_is_written_to(tmp_path):
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        safetensors_file.write(f"/proc/self/fd/{file.fileno()}", TENSORS)
        file.seek(0)
        assert file.read() == written_bytes(tmp_path)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path, exists):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if exists:
        (folder / "target").write_text("old")
    link = tmp_path / "link"
    link.symlink_to("elsewhere/target")
    safetensors_file.write(link, TENSORS)
    assert link.is_symlink()
    assert (folder / "target").read_bytes() == written_bytes(tmp_path)
    assert os.listdir(folder) == ["target"]


def test_a_folder_is_an_error_and_stays(tmp_path):
    with pytest.raises(IsADirectoryError):
        safetensors_file.write(tmp_path, TENSORS)
    assert tmp_path.is_dir()


def test_a_folder_that_does_not_exist_is_named_and_not_a_temporary_file(tmp_path):
    path = tmp_path / "none" / "t.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        safetensors_file.write(path, {"x": np.zeros(1, np.float32)})
    said = f"cannot write {path}: folder {path.parent} does not exist"
    assert str(caught.value) == said


def test_another_error_of_a_new_file_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / ("x" * 255)  # no room for the name of a temporary file
    with pytest.raises(OSError, match="File name too long") as caught:
        safetensors_file.write(path, {"x": np.zeros(1, np.float32)})
    assert caught.value.filename == str(path)
