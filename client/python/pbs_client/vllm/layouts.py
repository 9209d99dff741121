"""Writes keys and values into vLLM's blocks, in the layouts that its backends use.

A backend says in no place how it reads a cache tensor. The layouts below are known from
its shape and name; any other is refused when the engine starts, with both.

| layout | tensor | backends |
|---|---|---|
| packed | [blocks, heads, tokens, 2 * dim], packed for an instruction set | CPU_ATTN |
| joined | [blocks, heads, tokens, keys then values] | see JOINED |
| planes | [2, blocks, tokens, heads, dim] or [blocks, 2, ...] | see PLANES |

vLLM 0.32 has the first two. Strides are arbitrary: NHD and HND are the same tensor with
other strides. One block of the scheduler may be several consecutive ones of the tensor.

Threading: several threads may write to different blocks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from pbs_client.kv import Array

PACKED = ("CPU_ATTN",)
JOINED = ("FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION", "TRITON_ATTN")
PLANES = ("FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION", "TRITON_ATTN", "XFORMERS")

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class UnknownLayoutError(ValueError):
    """The backend's cache has a layout that the connector does not know."""


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of one layer's cache on this rank.

    Attributes:
        num_blocks: of the scheduler.
        block_size: tokens of such a block.
        num_heads: KV heads of this rank.
        head_dim: of a head.
    """

    num_blocks: int
    block_size: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache: its attention backend, its tensor, and the CPU's packing."""

    backend: str
    tensor: torch.Tensor
    isa: str | None = None


# Writes k and v, [tokens, heads, dim] each, to slots.
Writer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class PagedBlocks:
    """The caches of all layers of this rank; a fetching.Blocks."""

    def __init__(self, layers: Mapping[int, LayerCache], sizes: BlockSizes) -> None:
        """Probes the layout of each layer.

        Raises:
            UnknownLayoutError: the connector does not know it.
        """
        self.block_size = sizes.block_size
        self._writers = {
            layer: writer_of(cache, sizes) for layer, cache in layers.items()
        }
        self._tensors = {layer: cache.tensor for layer, cache in layers.items()}
        self._streams = threading.local()

    def write(self, layer: int, k: Array, v: Array, slots: Array) -> None:
        """See fetching.Blocks."""
        target = self._tensors[layer]
        with self._stream(target.device) as stream:
            self._writers[layer](
                _to_torch(k, target), _to_torch(v, target), _moved(slots, target)
            )
            if stream is not None:
                stream.synchronize()  # k and v are the caller's again

    def _stream(self, device: torch.device) -> AbstractContextManager[Any]:
        """A stream of this thread, beside that of the engine; None on the CPU."""
        if device.type == "cpu":
            return contextlib.nullcontext()
        if not hasattr(self._streams, "stream"):
            self._streams.stream = torch.cuda.Stream(device)
        return _entered(self._streams.stream)


def writer_of(cache: LayerCache, sizes: BlockSizes) -> Writer:
    """The writer of a layer's layout. UnknownLayoutError: there is none."""
    shape = tuple(cache.tensor.shape)
    if cache.tensor.dtype not in DTYPES:
        raise UnknownLayoutError(
            f"attention backend {cache.backend} has a cache of {cache.tensor.dtype}; "
            "the connector writes float32, float16 and bfloat16, so start vLLM with "
            "--kv-cache-dtype auto"
        )
    if cache.backend in PACKED and _is_joined(shape, sizes):
        return _packed_writer(cache, sizes)
    if cache.backend in JOINED and _is_joined(shape, sizes):
        return _indexed_writer(*_split_joined(cache.tensor, sizes))
    planes = [dim for dim in (0, 1) if shape == _planes_shape(dim, sizes)]
    if cache.backend in PLANES and len(planes) == 1:
        k, v = cache.tensor.unbind(planes[0])
        return _indexed_writer(k, v)
    reason = "are ambiguous" if len(planes) > 1 else "have no layout that it knows"
    raise UnknownLayoutError(
        f"the connector cannot write the cache of attention backend {cache.backend}: "
        f"shape {shape} and strides {cache.tensor.stride()} {reason}, for "
        f"{sizes}; choose another backend with --attention-backend"
    )


def _is_joined(shape: tuple[int, ...], sizes: BlockSizes) -> bool:
    if len(shape) != 4 or shape[0] % sizes.num_blocks:
        return False
    parts = shape[0] // sizes.num_blocks  # kernel blocks of one block
    heads, tokens, width = shape[1:]
    return parts > 0 and (heads, tokens * parts, width) == (
        sizes.num_heads,
        sizes.block_size,
        2 * sizes.head_dim,
    )


def _planes_shape(dim: int, sizes: BlockSizes) -> tuple[int, ...]:
    shape = [sizes.num_blocks, sizes.block_size, sizes.num_heads, sizes.head_dim]
    shape.insert(dim, 2)
    return tuple(shape)


def _split_joined(
    tensor: torch.Tensor, sizes: BlockSizes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as [blocks, tokens, heads, dim] views."""
    by_token = tensor.transpose(1, 2)
    return by_token[..., : sizes.head_dim], by_token[..., sizes.head_dim :]


def _indexed_writer(keys: torch.Tensor, values: torch.Tensor) -> Writer:
    """A writer to [blocks, tokens, heads, dim] views."""
    block_size = keys.shape[1]

    def write(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        block = torch.div(slots, block_size, rounding_mode="floor")
        offset = slots % block_size
        keys[block, offset] = k
        values[block, offset] = v

    return write


def _packed_writer(cache: LayerCache, sizes: BlockSizes) -> Writer:
    """A writer by vLLM's own operation, which packs for an instruction set."""
    from vllm import _custom_ops

    isa = cache.isa
    if isa is None:
        raise UnknownLayoutError(
            f"attention backend {cache.backend} does not say for which instruction set "
            "it packs its cache; this release of vLLM is not known to the connector"
        )
    blocks, heads, tokens, _ = cache.tensor.shape
    joined = cache.tensor.view(blocks, heads, 2 * tokens, sizes.head_dim)
    keys, values = joined.chunk(2, dim=2)

    def write(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        _custom_ops.cpu_attn_reshape_and_cache(k, v, keys, values, slots, isa)

    return write


def _to_torch(array: Array, target: torch.Tensor) -> torch.Tensor:
    """[heads, tokens, dim] as [tokens, heads, dim] where `target` is."""
    if target.dtype == torch.bfloat16:  # NumPy's is ml_dtypes', which torch lacks
        tensor = torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.transpose(0, 1).to(target.device)


def _moved(slots: Array, target: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(slots).to(target.device)


@contextlib.contextmanager
def _entered(stream: Any) -> Any:
    with torch.cuda.stream(stream):
        yield stream
