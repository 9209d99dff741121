"""Prompts of the faults, and what is compared of a cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from pbs_client import Attention, Pbs

MODEL = "small"
VOCABULARY = 512


@dataclass(frozen=True)
class Prompt:
    """Seeded token ids and the method of their prefill.

    Lengths are on, before and after multiples of the segment of 256 and of no page.
    """

    length: int
    seed: int
    method: str

    def tokens(self) -> np.ndarray:
        """The ids."""
        return np.random.default_rng(self.seed).integers(0, VOCABULARY, self.length)

    def attention(self) -> Attention:
        """The attention options; a method runs as named, however short the prompt."""
        if self.method == "pbs":
            return Attention(Pbs(threshold=0.7), dense_fallback=False)
        return Attention(method=self.method)


PROMPTS = (
    Prompt(1024, 1, "dense"),
    Prompt(1791, 2, "dense"),
    Prompt(2049, 3, "pbs"),
    Prompt(3001, 4, "dense"),
)


def digest_of_layer(k: np.ndarray, v: np.ndarray) -> str:
    """A digest of shape, dtype and bytes of a layer."""
    digest = hashlib.sha256()
    for array in (k, v):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()


def digests_of(cache: object) -> list[str]:
    """The digest of each layer."""
    return [digest_of_layer(k, v) for k, v in zip(cache.k, cache.v)]
