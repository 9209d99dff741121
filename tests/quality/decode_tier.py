"""What a decode tier computes from a handed-over cache: dense, in float32, with torch.

Nothing here prefills: tokens that follow a prompt are computed over its cache, and the
logits of the prompt itself come from the hidden states that an exposing model
(tests/models/make_smollm2.py --expose-hidden) leaves in its cache.

Threading: none. Memory: a copy of the cache, and LOGIT_ROWS rows of logits at a time.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from pbs_client import KvCache, hf
from pbs_client.hf.caches import cache_argument
from retrieval_tasks import Question, RetrievalPrompt

LOGIT_ROWS = 512  # of the vocabulary's width, 100 MB
KL_ROWS = 64  # last positions of a prompt whose whole distributions are compared


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens that follow the first `prefix` tokens of a cache."""

    prefix: int
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AnswerScore:
    """How an answer was met.

    Attributes:
        parts_right: share of the answer's parts that are right, 0 .. 1.
        whole: all of them are.
        nll: natural-log loss per scored token.
        first_right: the first token of the answer is right.
    """

    parts_right: float
    whole: bool
    nll: float
    first_right: bool


@dataclasses.dataclass(frozen=True, eq=False)
class TextOutcome:
    """What a model says about the tokens of a text.

    Attributes:
        nll: float32 [tokens - 1], the natural-log loss of each token but the first.
        top: int64 [tokens], the most probable next token behind each.
        tail: float32 [KL_ROWS, vocabulary], log-probabilities behind the last tokens.
    """

    nll: np.ndarray
    top: np.ndarray
    tail: np.ndarray


def hidden_rows(cache: KvCache, hidden_size: int) -> np.ndarray:
    """Rows of the final norm, from the values of the exposing layers.

    cache: these layers alone. Returns float32 [tokens, hidden_size], contiguous.
    """
    heads = [head for layer in cache.v for head in layer]
    columns = np.concatenate(heads, axis=-1)[:, :hidden_size]
    return np.ascontiguousarray(columns, dtype=np.float32)


def visible(segments: Sequence[Segment], cached: int) -> torch.Tensor:
    """Which keys each token of packed segments attends to: bool [tokens, keys].

    Keys are the cache, then the tokens. A token sees its segment's prefix of the cache,
    and the segment up to itself.
    """
    total = sum(len(segment.tokens) for segment in segments)
    mask = torch.zeros(total, cached + total, dtype=torch.bool)
    begin = 0
    for segment in segments:
        end = begin + len(segment.tokens)
        mask[begin:end, : segment.prefix] = True
        own = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        mask[begin:end, cached + begin : cached + end] = own
        begin = end
    return mask


class DecodeTier:
    """The model of a folder, as a decode tier holds it."""

    def __init__(self, folder: pathlib.Path):
        self.model = hf.load_model(folder, dtype="f32")
        self.hidden_size = int(self.model.config.hidden_size)
        self.num_layers = int(self.model.config.num_hidden_layers)

    def logits_after(
        self, cache: KvCache, segments: Sequence[Segment]
    ) -> list[torch.Tensor]:
        """Logits behind each token of each segment: [tokens, vocabulary] per segment.

        The segments do not see each other. They are computed in one pass.
        """
        tokens = [token for segment in segments for token in segment.tokens]
        if not tokens:
            return [torch.empty(0, 0) for _ in segments]
        positions = [s.prefix + i for s in segments for i in range(len(s.tokens))]
        cached = cache.tokens.count
        arguments = {cache_argument(self.model): hf.dynamic_cache(cache, cached)}
        with torch.inference_mode():
            logits = self.model(
                input_ids=torch.tensor([tokens]),
                position_ids=torch.tensor([positions]),
                attention_mask=visible(segments, cached)[None, None],
                use_cache=True,
                **arguments,
            ).logits[0]
        return list(logits.split([len(segment.tokens) for segment in segments]))

    def answer(
        self, prompt: RetrievalPrompt, cache: KvCache, last_logits: np.ndarray
    ) -> list[AnswerScore]:
        """Scores of a prompt's questions over its cache.

        The first answer follows the prompt: `last_logits` [vocabulary], the prefill's,
        give its first token. The other questions follow the context.
        """
        first, *later = prompt.questions
        segments = [Segment(len(prompt.tokens), first.answer[:-1])]
        segments += [Segment(len(prompt.context), q.asked + q.answer[:-1]) for q in later]
        rows = self.logits_after(cache, segments)
        start = torch.from_numpy(np.array(last_logits))[None]
        behind_first = torch.cat([start, rows[0]]) if len(first.answer) > 1 else start
        scores = [score(first, behind_first)]
        for question, logits in zip(later, rows[1:]):
            scores.append(score(question, logits[len(question.asked) - 1 :]))
        return scores

    def continuation_nll(
        self, cache: KvCache, tokens: Sequence[int], start: np.ndarray
    ) -> float:
        """Loss per token of what follows a prompt, dense over its cache.

        start: the hidden row [hidden_size] of the prompt's last token, as prefilled; it
        gives the first of `tokens`.
        """
        segment = Segment(cache.tokens.count, tuple(tokens[:-1]))
        (logits,) = self.logits_after(cache, [segment])
        first = self._head(torch.from_numpy(start[None]))
        log_probabilities = torch.cat([first, logits]).log_softmax(-1)
        wanted = torch.tensor(list(tokens))[:, None]
        return float(-log_probabilities.gather(1, wanted).mean())

    def read_text(self, hidden: np.ndarray, tokens: Sequence[int]) -> TextOutcome:
        """What the output head makes of hidden rows [tokens, hidden_size]."""
        following = torch.tensor([*tokens[1:], 0])
        losses, tops = [], []
        for begin in range(0, len(tokens), LOGIT_ROWS):
            rows = torch.from_numpy(hidden[begin : begin + LOGIT_ROWS])
            logits = self._head(rows)
            wanted = following[begin : begin + LOGIT_ROWS, None]
            losses.append(logits.logsumexp(-1) - logits.gather(1, wanted)[:, 0])
            tops.append(logits.argmax(-1))
        tail = self._head(torch.from_numpy(hidden[-KL_ROWS:])).log_softmax(-1)
        return TextOutcome(
            torch.cat(losses)[:-1].numpy(), torch.cat(tops).numpy(), tail.numpy()
        )

    def _head(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of rows of the final norm."""
        with torch.inference_mode():
            return self.model.lm_head(rows)


def score(question: Question, logits: torch.Tensor) -> AnswerScore:
    """logits [answer tokens, vocabulary]: row i predicts answer token i."""
    log_probabilities = logits.log_softmax(-1)
    best = logits.argmax(-1).tolist()
    right = [token in ids for token, ids in zip(best, question.accepted)]
    parts = [all(right[begin:end]) for begin, end in question.parts]
    losses = [
        # Of several right tokens the loss counts their sum.
        -float(log_probabilities[i, sorted(question.accepted[i])].logsumexp(-1))
        for begin, end in question.parts
        for i in range(begin, end)
    ]
    return AnswerScore(
        sum(parts) / len(parts), all(parts), sum(losses) / len(losses), right[0]
    )


def mean_divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence, in nats, of rows of log-probabilities from reference rows."""
    return float((np.exp(reference) * (reference - other)).sum(-1).mean())
