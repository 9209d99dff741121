"""What the GPU suites run: sizes, densities, prompts. No torch."""

from __future__ import annotations

import numpy as np

HEADS, KV_HEADS = 32, 8  # Llama-3.1-8B
LENGTHS = [8192, 16384, 32768, 65536, 131072]
# The paper's densities at 8K .. 128K with threshold .9.
REPLAY = {8192: 0.58, 16384: 0.485, 32768: 0.405, 65536: 0.287, 131072: 0.219}


def prompt(tokens: int, vocab_size: int, seed: int = 1) -> list[int]:
    """Random ids, the same for all who run it."""
    return np.random.default_rng(seed).integers(2, vocab_size, tokens).tolist()
