"""Log-likelihoods of continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pbs_client.hf.caches import cache_argument


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after its prompt.

    Attributes:
        log_probabilities: natural logarithm, of each of its tokens.
        is_greedy: every token is the likeliest one.
    """

    log_probabilities: tuple[float, ...]
    is_greedy: bool

    @property
    def log_likelihood(self) -> float:
        """Of the whole continuation."""
        return sum(self.log_probabilities)


def score_after(
    model: Any, last: int, continuation: Sequence[int], cache: Any, dtype: Any
) -> Score:
    """Scores a continuation; the cache is afterwards as it was.

    Args:
        model: a transformers causal language model.
        last: the last token of the prompt.
        continuation: at least one token.
        cache: a DynamicCache of all of the prompt but its last token.
        dtype: of the softmax; None is the model's.
    """
    ids = torch.tensor([[last, *continuation[:-1]]], device=model.device)
    past = cache.get_seq_length()
    positions = torch.arange(past, past + ids.shape[1], device=model.device)
    with torch.no_grad():
        output = model(
            input_ids=ids,
            position_ids=positions[None],
            use_cache=True,
            **{cache_argument(model): cache},
        )
        logits = torch.nn.functional.log_softmax(output.logits[0], -1, dtype=dtype)
    cache.crop(-ids.shape[1])
    wanted = torch.tensor(list(continuation), device=logits.device)
    chosen = logits.gather(1, wanted[:, None])[:, 0]
    is_greedy = bool((logits.argmax(-1) == wanted).all())
    return Score(tuple(chosen.float().tolist()), is_greedy)
