"""The vLLM connector writes into the layouts of vLLM's backends, and into no other.

The layouts of GPU backends are tested on CPU tensors of their shapes and strides.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch", reason="the layouts are of torch tensors")

from pbs_client.vllm.layouts import (  # noqa: E402
    BlockSizes,
    LayerCache,
    PagedBlocks,
    UnknownLayoutError,
    writer_of,
)

BLOCKS, TOKENS, HEADS, DIM = 7, 4, 3, 8
SIZES = BlockSizes(BLOCKS, TOKENS, HEADS, DIM)
FILL = -1.0


def strided(shape, order):
    """A tensor of `shape` whose dimensions lie in memory in `order`."""
    made = torch.full([shape[dim] for dim in order], FILL)
    return made.permute([order.index(dim) for dim in range(len(order))])


JOINED = (BLOCKS, HEADS, TOKENS, 2 * DIM)
PLANES_FIRST = (2, BLOCKS, TOKENS, HEADS, DIM)
BLOCKS_FIRST = (BLOCKS, 2, TOKENS, HEADS, DIM)

# name: (shape, order in memory, keys and values as [blocks, tokens, heads, dim])
LAYOUTS = {
    "blocks, heads, tokens, keys and values: HND": (JOINED, (0, 1, 2, 3)),
    "blocks, heads, tokens, keys and values: NHD": (JOINED, (0, 2, 1, 3)),
    "blocks, heads, tokens, keys and values: heads first": (JOINED, (1, 0, 2, 3)),
    "2, blocks, tokens, heads, dim: NHD": (PLANES_FIRST, (0, 1, 2, 3, 4)),
    "2, blocks, tokens, heads, dim: HND": (PLANES_FIRST, (0, 1, 3, 2, 4)),
    "blocks, 2, tokens, heads, dim: NHD": (BLOCKS_FIRST, (0, 1, 2, 3, 4)),
    "blocks, 2, tokens, heads, dim: HND": (BLOCKS_FIRST, (0, 1, 3, 2, 4)),
}


def read(tensor, slot):
    """Keys and values of a slot, [heads, dim] each, by plain indexing."""
    block, offset = divmod(slot, TOKENS)
    if tensor.dim() == 4:
        joined = tensor[block, :, offset]
        return joined[:, :DIM], joined[:, DIM:]
    if tensor.shape[0] == 2:
        return tensor[0, block, offset], tensor[1, block, offset]
    return tensor[block, 0, offset], tensor[block, 1, offset]


def keys_and_values(count, dtype=np.float32):
    rng = np.random.default_rng(3)
    shape = (HEADS, count, DIM)
    return [rng.standard_normal(shape).astype(dtype) for _ in "kv"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_are_where_the_backend_reads_them_and_nowhere_else(name):
    tensor = strided(*LAYOUTS[name])
    slots = np.array([5, 6, 7, 20, 21], np.int64)  # of blocks 1 and 5
    k, v = keys_and_values(len(slots))
    PagedBlocks({0: LayerCache("FLASH_ATTN", tensor)}, SIZES).write(0, k, v, slots)
    for index, slot in enumerate(slots):
        keys, values = read(tensor, int(slot))
        np.testing.assert_array_equal(keys, k[:, index])
        np.testing.assert_array_equal(values, v[:, index])
    others = [slot for slot in range(BLOCKS * TOKENS) if slot not in slots]
    assert all((part == FILL).all() for slot in others for part in read(tensor, slot))


def test_a_block_may_be_several_of_the_kernels_blocks():
    tensor = torch.full((2 * BLOCKS, HEADS, TOKENS // 2, 2 * DIM), FILL)
    k, v = keys_and_values(3)
    slots = np.array([5, 6, 7], np.int64)  # tokens 1, 2, 3 of block 1
    PagedBlocks({0: LayerCache("TRITON_ATTN", tensor)}, SIZES).write(0, k, v, slots)
    np.testing.assert_array_equal(tensor[2, :, 1, :DIM], k[:, 0])
    np.testing.assert_array_equal(tensor[3, :, 0, :DIM], k[:, 1])
    np.testing.assert_array_equal(tensor[3, :, 1, DIM:], v[:, 2])


@pytest.mark.parametrize(
    ("array_dtype", "tensor_dtype"),
    [(np.float16, torch.float16), (ml_dtypes.bfloat16, torch.bfloat16)],
)
def test_elements_of_two_bytes_keep_their_bits(array_dtype, tensor_dtype):
    tensor = torch.zeros(JOINED, dtype=tensor_dtype)
    k, v = keys_and_values(1, array_dtype)
    cache = LayerCache("FLASHINFER", tensor)
    PagedBlocks({0: cache}, SIZES).write(0, k, v, np.array([0], np.int64))
    written = tensor[0, :, 0, :DIM].float().numpy()
    np.testing.assert_array_equal(written, k[:, 0].astype(np.float32))


def test_each_layer_has_its_own_cache():
    tensors = {layer: torch.full(JOINED, FILL) for layer in (4, 5)}
    caches = {i: LayerCache("FLASH_ATTN", tensor) for i, tensor in tensors.items()}
    k, v = keys_and_values(1)
    PagedBlocks(caches, SIZES).write(5, k, v, np.array([0], np.int64))
    assert (tensors[4] == FILL).all()
    np.testing.assert_array_equal(tensors[5][0, :, 0, :DIM], k[:, 0])


@pytest.mark.parametrize(
    ("backend", "shape", "message"),
    [
        pytest.param("ROCM_ATTN", JOINED, "ROCM_ATTN", id="an unknown backend"),
        pytest.param("CPU_ATTN", PLANES_FIRST, "CPU_ATTN", id="CPU, unpacked"),
        pytest.param(
            "FLASH_ATTN", (BLOCKS, TOKENS, HEADS, 2 * DIM), "7, 4, 3, 16", id="4 dims"
        ),
        pytest.param(
            "FLASH_ATTN", (BLOCKS, HEADS, TOKENS, DIM), "no layout", id="keys only"
        ),
        pytest.param(
            "FLASH_ATTN",
            (BLOCKS + 1, HEADS, TOKENS, 2 * DIM),
            "no layout",
            id="other blocks",
        ),
        pytest.param("FLASH_ATTN", (BLOCKS, 576), "7, 576", id="latent attention"),
        pytest.param(
            "FLASH_ATTN",
            (2, BLOCKS, TOKENS * HEADS * DIM),
            "no layout",
            id="flat planes",
        ),
        pytest.param(
            "FLASH_ATTN",
            (2, BLOCKS, HEADS, DIM // 8, TOKENS, 8),
            "no layout",
            id="paged",
        ),
    ],
)
def test_an_unknown_layout_is_refused_by_backend_and_shape(backend, shape, message):
    with pytest.raises(UnknownLayoutError, match=message) as error:
        writer_of(LayerCache(backend, torch.zeros(shape)), SIZES)
    assert backend in str(error.value)


def test_a_shape_that_can_be_read_in_two_ways_is_refused():
    sizes = BlockSizes(2, TOKENS, HEADS, DIM)
    cache = LayerCache("FLASH_ATTN", torch.zeros(2, 2, TOKENS, HEADS, DIM))
    with pytest.raises(UnknownLayoutError, match="ambiguous"):
        writer_of(cache, sizes)


def test_a_quantized_cache_is_refused_with_what_to_do():
    cache = LayerCache("FLASH_ATTN", torch.zeros(JOINED, dtype=torch.uint8))
    with pytest.raises(UnknownLayoutError, match="--kv-cache-dtype auto"):
        writer_of(cache, SIZES)
