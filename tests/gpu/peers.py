"""What others run on the same tensors: torch SDPA, and a block-sparse kernel of our own in
Triton that stands in for the published one. In a rehearsal both are plain torch."""

from __future__ import annotations

import contextlib
import math

import torch
from machine import REHEARSAL
from torch.nn.attention import SDPBackend, sdpa_kernel

with contextlib.suppress(ImportError):  # the calls of it fail, others run
    import triton
    import triton.language as tl

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str):
    """A call of dense causal attention on one backend of torch; q [H, L, D]. Where the
    backend takes no grouped heads it has keys and values of every head."""
    keys, values = k, v

    def run() -> torch.Tensor:
        with contextlib.nullcontext() if REHEARSAL else sdpa_kernel(BACKENDS[backend]):
            return torch.nn.functional.scaled_dot_product_attention(
                q[None], keys[None], values[None], is_causal=True, enable_gqa=True
            )[0]

    try:
        run()
    except RuntimeError:
        keys, values = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    return run


def block_sparse_kernel(
    q, k, v, positions, begin, count, indices, o,
    tokens, scale_log2,
    group: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr,
    segment_blocks: tl.constexpr,
):  # fmt: skip
    """One block of queries: its listed key blocks, own segment masked by position."""
    query_block = tl.program_id(0)
    head = tl.program_id(1)
    rows = query_block * block + tl.arange(0, block)
    columns = tl.arange(0, head_dim)
    kv = (head // group).to(tl.int64) * tokens
    q_at = q + (head.to(tl.int64) * tokens + rows[:, None]) * head_dim + columns[None, :]
    queries = tl.load(q_at)
    largest = tl.full([block], -float("inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    out = tl.zeros([block, head_dim], tl.float32)
    row = head * tl.num_programs(0) + query_block
    first = tl.load(begin + row)
    own = query_block // segment_blocks * segment_blocks
    for i in range(tl.load(count + row)):
        key_block = tl.load(indices + first + i).to(tl.int32)
        slots = key_block * block + tl.arange(0, block)
        keys = tl.load(k + (kv + slots[None, :]) * head_dim + columns[:, None])
        scores = tl.dot(queries, keys) * scale_log2
        if key_block >= own:
            at = tl.load(positions + kv + slots)
            scores = tl.where(at[None, :] <= rows[:, None], scores, -1.0e6)
        top = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - top[:, None])
        shrink = tl.exp2(largest - top)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v + (kv + slots[:, None]) * head_dim + columns[None, :])
        out = out * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        largest = top
    o_at = o + (head.to(tl.int64) * tokens + rows[:, None]) * head_dim + columns[None, :]
    tl.store(o_at, (out / total[:, None]).to(o.dtype.element_ty))


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists):
    """A call over unpermuted keys that visits the blocks of lists, causal inside, and needs
    no compiler; its mask has a byte a score."""
    allowed = lists.mask.repeat_interleave(128, 1).repeat_interleave(128, 2).tril()
    keys, values = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q[None], keys[None], values[None], attn_mask=allowed[None]
    )[0]


def block_sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists):
    """The same in Triton."""
    heads, tokens, head_dim = q.shape
    group = heads // k.shape[0]
    positions = torch.arange(tokens, device=k.device, dtype=torch.int32).repeat(k.shape[0], 1)
    o, count = torch.full_like(q, torch.nan), lists.count.to(torch.int32)
    kernel = triton.jit(block_sparse_kernel)

    def run() -> torch.Tensor:
        kernel[(tokens // 128, heads)](
            q, k, v, positions, lists.begin, count, lists.indices, o, tokens,
            math.log2(math.e) / math.sqrt(head_dim), group, head_dim, 128, 2,
            num_warps=8, num_stages=2,
        )  # fmt: skip
        return o

    return run
