"""Queries, keys and values of a model's heads, as a prefill made them, and their files.

A file is safetensors with layers.N.q [heads, tokens, head_dim] and layers.N.k, layers.N.v
[kv_heads, tokens, head_dim] for every captured layer N, after rotation, in token order.
Its metadata says what they are: format, model, model_digest, layers, tokens and scale.
Attention of query head h reads KV head h // (heads // kv_heads); a logit is scale times
the dot product.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbs_client import dtypes, safetensors_file
from pbs_client.kv import Array

FORMAT = "pbs-capture-1"
LAYERS_MAX = 1024
_LAYER_NUMBER_MAX = 1 << 20
_METADATA = ("format", "model", "model_digest", "layers", "tokens", "scale")
_KINDS = ("q", "k", "v")


class CaptureError(ValueError):
    """The file is not a capture, or it was not asked for what it holds."""


@dataclass(frozen=True, eq=False)
class HeadsOfLayer:
    """q [heads, tokens, head_dim] and k, v [kv_heads, tokens, head_dim] of a layer."""

    q: Array
    k: Array
    v: Array

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return int(self.q.shape[0] // self.k.shape[0])


@dataclass(frozen=True, eq=False)
class Capture:
    """The heads of chosen layers of one prompt.

    Attributes:
        layers: by the layer's index, ascending.
        model: its name at the server.
        model_digest: see KvTicket.
    """

    layers: dict[int, HeadsOfLayer]
    model: str
    model_digest: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return int(self._first.q.shape[1])

    @property
    def head_dim(self) -> int:
        """Width of a query."""
        return int(self._first.q.shape[2])

    @property
    def scale(self) -> float:
        """Factor of the dot products."""
        return 1 / math.sqrt(self.head_dim)

    @property
    def _first(self) -> HeadsOfLayer:
        return next(iter(self.layers.values()))

    def metadata(self) -> dict[str, str]:
        """What a file says about it."""
        return {
            "format": FORMAT,
            "model": self.model,
            "model_digest": self.model_digest,
            "layers": ",".join(map(str, self.layers)),
            "tokens": str(self.num_tokens),
            "scale": repr(self.scale),
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that read() reads."""
        tensors = {
            f"layers.{layer}.{kind}": getattr(heads, kind)
            for layer, heads in self.layers.items()
            for kind in _KINDS
        }
        safetensors_file.write(path, tensors, self.metadata())


def read(path: str | os.PathLike[str], layers: Sequence[int] | None = None) -> Capture:
    """Reads and checks a capture.

    Args:
        path: a file of Capture.write().
        layers: those to read; None is all.

    Raises:
        CaptureError: names the file and what is wrong, or the layers that it has.
        OSError: from the system.
    """
    try:
        return _read(path, layers)
    except (CaptureError, safetensors_file.SafetensorsError) as error:
        raise CaptureError(f"{os.fspath(path)}: {error}") from None


def _read(path: str | os.PathLike[str], layers: Sequence[int] | None) -> Capture:
    entries, metadata = safetensors_file.header(path)
    found = _check_header(entries, metadata)
    for layer in layers or ():
        if layer not in found:
            names = ", ".join(map(str, found))
            raise CaptureError(f"layer {layer} was not captured; layers {names} were")
    wanted = [layer for layer in found if layers is None or layer in layers]
    names = [f"layers.{layer}.{kind}" for layer in wanted for kind in _KINDS]
    tensors = safetensors_file.read(path, names)
    for name, array in tensors.items():
        if not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise CaptureError(f"tensor {name} holds NaN or infinity")
    return Capture(
        {
            layer: HeadsOfLayer(*(tensors[f"layers.{layer}.{k}"] for k in _KINDS))
            for layer in wanted
        },
        metadata["model"],
        metadata["model_digest"],
    )


def _check_header(entries: dict[str, Any], metadata: dict[str, str]) -> list[int]:
    """The layers of a file whose tensors and metadata agree."""
    for name in _METADATA:
        if name not in metadata:
            raise CaptureError(f"this is no capture: its metadata lacks {name}")
    if metadata["format"] != FORMAT:
        raise CaptureError(f"format {metadata['format'][:32]!r} is not {FORMAT!r}")
    if not metadata["model_digest"]:
        raise CaptureError("model_digest is empty")
    layers = _layers_of(metadata["layers"])
    expected = {f"layers.{layer}.{kind}" for layer in layers for kind in _KINDS}
    if set(entries) != expected:
        odd = min(set(entries) ^ expected)
        what = "is missing" if odd in expected else "belongs to no captured layer"
        raise CaptureError(f"tensor {odd[:64]} {what}")
    first = entries[f"layers.{layers[0]}.q"], entries[f"layers.{layers[0]}.k"]
    for layer in layers:
        q, k, v = (entries[f"layers.{layer}.{kind}"] for kind in _KINDS)
        _check_layer(layer, q, k, v)
        if (q.shape, k.shape) != (first[0].shape, first[1].shape):
            raise CaptureError(f"layer {layer} has other shapes than layer {layers[0]}")
    _, tokens, head_dim = first[0].shape
    if metadata["tokens"] != str(tokens):
        raise CaptureError(
            f"metadata says {metadata['tokens'][:32]} tokens, q has {tokens}"
        )
    _check_scale(metadata["scale"], head_dim)
    return layers


def _layers_of(text: str) -> list[int]:
    """The ascending layers of a list such as 0,5,10."""
    parts = text.split(",", LAYERS_MAX)
    if len(parts) > LAYERS_MAX:
        raise CaptureError(f"more than {LAYERS_MAX} layers")
    layers: list[int] = []
    for part in parts:
        number = (
            int(part) if part.isascii() and part.isdecimal() and len(part) < 8 else -1
        )
        if not (layers[-1] if layers else -1) < number <= _LAYER_NUMBER_MAX:
            raise CaptureError(f"layers {text[:64]!r} are not ascending numbers")
        layers.append(number)
    return layers


def _check_layer(layer: int, q: Any, k: Any, v: Any) -> None:
    for kind, entry in zip(_KINDS, (q, k, v)):
        if entry.dtype not in dtypes.FLOAT_DTYPES.values():
            raise CaptureError(
                f"layers.{layer}.{kind} has dtype {entry.dtype}, not f32, f16 or bf16"
            )
        if len(entry.shape) != 3 or 0 in entry.shape:
            raise CaptureError(
                f"layers.{layer}.{kind} has shape {list(entry.shape)}, not "
                "[heads, tokens, head_dim]"
            )
    if k.shape != v.shape or q.shape[1:] != k.shape[1:] or q.shape[0] % k.shape[0]:
        raise CaptureError(
            f"layer {layer}: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} "
            "do not belong together"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise CaptureError(f"layer {layer}: q, k and v have different dtypes")


def _check_scale(text: str, head_dim: int) -> None:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not math.isclose(scale, 1 / math.sqrt(head_dim), rel_tol=1e-6):
        raise CaptureError(
            f"scale {text[:32]} is not 1 / sqrt(head_dim {head_dim}), the scale of Attend"
        )
