"""Inputs made on the GPU, and the authors' outputs from tests/golden."""

from __future__ import annotations

import json
import math
import pathlib
import struct

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def white_noise(heads: int, kv_heads: int, tokens: int, head_dim: int, seed: int = 1):
    """q, k, v: the worst case for selection."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(count: int) -> torch.Tensor:
        shape = (count, tokens, head_dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    return normal(heads), normal(kv_heads), normal(kv_heads)


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding, half split; x [heads, tokens, head_dim] in f32."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=torch.float64), frequency)
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def ar1(tokens: int, correlation: float, generator: torch.Generator) -> torch.Tensor:
    """A stationary first-order process of unit variance, in chunks of one decay each."""
    decay = math.exp(-1 / correlation)
    fresh = torch.randn(tokens, device="cuda", generator=generator) * math.sqrt(1 - decay**2)
    chunk = 256
    padded = torch.nn.functional.pad(fresh, (0, -tokens % chunk)).reshape(-1, chunk)
    steps = torch.arange(chunk, device="cuda")
    lag = steps[:, None] - steps[None, :]
    kernel = torch.where(lag >= 0, decay ** lag.clamp(min=0).float(), 0.0)
    inside = padded @ kernel.T
    state, out = torch.randn((), device="cuda", generator=generator), []
    carry = decay ** (steps + 1).float()
    for row in inside:
        out.append(row + carry * state)
        state = out[-1][-1]
    return torch.cat(out)[:tokens]


def structured(
    heads: int, kv_heads: int, tokens: int, head_dim: int, seed: int = 1, rope_base: float = 5e5
):
    """The structured generator of kernels/synthetic (its suggested setting), bf16."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    topics, half = 6, head_dim // 2
    frequency = rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    slow = (frequency * tokens < 0.6).nonzero()[:, 0]
    needed = (topics + 2) // 2 + 1
    if len(slow) < needed:
        slow = torch.arange(half - needed, half)
    fast = (frequency > 2 * math.pi / 512).nonzero()[:, 0].cuda()
    columns = torch.cat([slow, slow + half]).cuda()
    qs, ks, vs = [], [], []
    for _ in range(kv_heads):
        basis = torch.zeros(topics + 2, head_dim, device="cuda")
        basis[:, columns] = torch.linalg.qr(normal(len(columns), topics + 2))[0].T
        u, w, z = basis[0], basis[1:-1], basis[-1]
        local = torch.zeros(head_dim, device="cuda")
        local[fast] = torch.sign(normal(len(fast)))
        local *= 2 * head_dim**0.25 / local.norm()
        importance = 3 * normal(tokens) + 0.4 * ar1(tokens, 512, generator)
        importance[:4] += 6
        changes = torch.rand(tokens, device="cuda", generator=generator) < 1 / 700
        label = torch.randint(topics, (tokens + 1,), device="cuda", generator=generator)
        label = label[torch.cumsum(changes, 0)]

        def bare(count: int) -> torch.Tensor:
            rows = normal(count, head_dim)
            return rows - rows @ basis.T @ basis  # noqa: B023

        root = math.sqrt(head_dim)
        k = bare(tokens) + root * torch.outer(importance, u) + 0.5 * w[label] + local
        ks.append(k)
        vs.append(normal(tokens, head_dim))
        for _ in range(heads // kv_heads):
            gain = 0.8 + 0.4 * torch.rand((), device="cuda", generator=generator)
            sign = torch.sign(normal(topics))
            q = bare(tokens) + torch.outer(gain * (1 + 0.25 * normal(tokens)), u)
            qs.append(q + torch.outer(sign[label], z) + 0.5 * w[label] + local)
    q, k = (rotate(torch.stack(rows), rope_base).bfloat16() for rows in (qs, ks))
    return q, k, torch.stack(vs).bfloat16()


def replay_mask(heads: int, tokens: int, density: float, seed: int = 1) -> torch.Tensor:
    """Random lists of a density (visited over causal blocks), segments of two blocks:
    bool [heads, blocks, blocks]; own segment and block 0 always."""
    blocks = tokens // 128
    generator = torch.Generator("cuda").manual_seed(seed)
    i = torch.arange(blocks, device="cuda")
    own = (i[:, None] // 2) == (i[None, :] // 2)
    past = (i[:, None] // 2) > (i[None, :] // 2)
    forced = own | (past & (i[None, :] == 0))
    free = (past & ~forced).sum().item()
    share = (density * blocks * (blocks + 1) / 2 - forced.sum().item()) / max(free, 1)
    chosen = torch.rand(heads, blocks, blocks, device="cuda", generator=generator) < share
    return forced | (past & chosen)


def flex_blocks(mask: torch.Tensor):
    """FlexAttention's form of a mask of blocks of 128: only blocks on the diagonal are
    masked inside."""
    from torch.nn.attention.flex_attention import BlockMask

    def causal(_batch, _head, query, key):
        return query >= key

    def listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None], indices.to(torch.int32)[None]

    past = torch.tril(mask, -1)
    diagonal = torch.tril(mask) & ~past
    return BlockMask.from_kv_blocks(
        *listed(diagonal), *listed(past), BLOCK_SIZE=128, mask_mod=causal
    )


def read_safetensors(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Tensors of a file, on the GPU."""
    data = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + header_bytes + at for at in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(data[begin:end]), dtype=TYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"]).cuda()
    return tensors


def golden_cases() -> list[dict]:
    """Manifest entries that the CUDA backend can take: f16 and bf16, blocks of 128, one
    sequence; mean pooling has another case's q, k and v."""
    manifest = json.loads((ROOT / "tests/golden/manifest.json").read_text())
    pbs = [case for case in manifest["cases"] if case["block"] == 128 and case["B"] == 1]
    both = pbs + [c for c in manifest["baselines"] if c["method"] == "meanpooling"]
    return [case for case in both if case["dtype"] in ("f16", "bf16")]
