"""Inputs made on the device."""

from __future__ import annotations

import math

import torch
from device import DEVICE


def white_noise(heads: int, kv_heads: int, tokens: int, head_dim: int, seed: int = 1):
    """q, k, v: the worst case for selection."""
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    options["generator"] = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(n, tokens, head_dim, **options) for n in (heads, kv_heads, kv_heads)]


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding, half split; x [heads, tokens, head_dim] in f32."""
    half, options = x.shape[-1] // 2, {"device": x.device, "dtype": torch.float64}
    frequency = base ** (-torch.arange(half, **options) / half)
    angle = torch.outer(torch.arange(x.shape[1], **options), frequency)
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def ar1(tokens: int, correlation: float, generator: torch.Generator) -> torch.Tensor:
    """About a stationary first-order process of unit variance."""
    decay = math.exp(-1 / correlation)
    reach = int(8 * correlation)  # e^-8 of it is left
    fresh = torch.randn(tokens + reach, device=DEVICE, generator=generator)
    kernel = decay ** torch.arange(reach, -1, -1, device=DEVICE).float()
    return torch.conv1d(fresh[None, None], kernel[None, None])[0, 0] * math.sqrt(1 - decay**2)


def structured(
    heads: int, kv_heads: int, tokens: int, head_dim: int, seed: int = 1, rope_base: float = 5e5
):
    """The structured generator of kernels/synthetic (its suggested setting), bf16."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, generator=generator)

    topics, half = 6, head_dim // 2
    frequency = rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    slow, needed = (frequency * tokens < 0.6).nonzero()[:, 0], (topics + 2) // 2 + 1
    slow = slow if len(slow) >= needed else torch.arange(half - needed, half)
    fast = (frequency > 2 * math.pi / 512).nonzero()[:, 0].to(DEVICE)
    columns = torch.cat([slow, slow + half]).to(DEVICE)
    qs, ks, vs = [], [], []
    for _ in range(kv_heads):
        basis = torch.zeros(topics + 2, head_dim, device=DEVICE)
        basis[:, columns] = torch.linalg.qr(normal(len(columns), topics + 2))[0].T
        u, w, z = basis[0], basis[1:-1], basis[-1]
        local = torch.zeros(head_dim, device=DEVICE)
        local[fast] = torch.sign(normal(len(fast)))
        local *= 2 * head_dim**0.25 / local.norm()
        importance = 3 * normal(tokens) + 0.4 * ar1(tokens, 512, generator)
        importance[:4] += 6
        changes = torch.rand(tokens, device=DEVICE, generator=generator) < 1 / 700
        label = torch.randint(topics, (tokens + 1,), device=DEVICE, generator=generator)
        label = label[torch.cumsum(changes, 0)]

        def bare(count: int) -> torch.Tensor:
            rows = normal(count, head_dim)
            return rows - rows @ basis.T @ basis  # noqa: B023

        wanted = math.sqrt(head_dim) * torch.outer(importance, u)
        ks.append(bare(tokens) + wanted + 0.5 * w[label] + local)
        vs.append(normal(tokens, head_dim))
        for _ in range(heads // kv_heads):
            gain = 0.8 + 0.4 * torch.rand((), device=DEVICE, generator=generator)
            sign = torch.sign(normal(topics))
            q = bare(tokens) + torch.outer(gain * (1 + 0.25 * normal(tokens)), u)
            qs.append(q + torch.outer(sign[label], z) + 0.5 * w[label] + local)
    q, k = (rotate(torch.stack(rows), rope_base).bfloat16() for rows in (qs, ks))
    return q, k, torch.stack(vs).bfloat16()


def replay_mask(heads: int, tokens: int, density: float, seed: int = 1) -> torch.Tensor:
    """Random lists of a density (visited over causal blocks), segments of two blocks:
    bool [heads, blocks, blocks]; own segment and block 0 always."""
    blocks = tokens // 128
    generator = torch.Generator(DEVICE).manual_seed(seed)
    i = torch.arange(blocks, device=DEVICE)
    own = (i[:, None] // 2) == (i[None, :] // 2)
    past = (i[:, None] // 2) > (i[None, :] // 2)
    forced = own | (past & (i[None, :] == 0))
    free = (past & ~forced).sum().item()
    share = (density * blocks * (blocks + 1) / 2 - forced.sum().item()) / max(free, 1)
    chosen = torch.rand(heads, blocks, blocks, device=DEVICE, generator=generator) < share
    return forced | (past & chosen)
