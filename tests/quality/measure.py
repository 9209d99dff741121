"""Measures one setting on one prompt: a prefill by the server, a decode tier behind it.

Two models are served: MODEL, for retrieval, and EXPOSED, the same with layers that expose
its hidden states, for the loss of text. Both give the same hidden states.

A record is a flat dict of JSON values. Times are seconds: `cpu_seconds` are those of the
server's process during the call, `attention_seconds` wall time of ordering, selecting and
attending. `executed_flops` are those of attention in the real layers.

Threading: one call at a time, so that the process's CPU time is that of the call.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from decode_tier import (
    KL_ROWS,
    DecodeTier,
    TextOutcome,
    hidden_rows,
    mean_divergence,
)
from pbs_client import Attention, Client, KvPart, Logits, PrefillResult
from retrieval_tasks import RetrievalPrompt

MODEL, EXPOSED = "smollm2", "smollm2-exposed"
COVERAGE_ROWS = 8  # sampled query rows of each head and layer; not part of the times
POSITION_BINS = 8  # equal parts of a text whose losses are reported apart


@dataclasses.dataclass(frozen=True)
class TextPrompt:
    """Real text, by its name: what is prefilled, and what follows it."""

    name: str
    tokens: tuple[int, ...]
    continuation: tuple[int, ...]


class ProcessClock:
    """CPU seconds of a process, all threads, in ticks of the kernel."""

    def __init__(self, process: int):
        self._file = pathlib.Path(f"/proc/{process}/stat")
        self._ticks_per_second = os.sysconf("SC_CLK_TCK")

    def seconds(self) -> float:
        """User and system time so far."""
        behind_name = self._file.read_text().rpartition(")")[2].split()
        return (int(behind_name[11]) + int(behind_name[12])) / self._ticks_per_second


class Measurer:
    """The server's client and the decode tier."""

    def __init__(self, client: Client, clock: ProcessClock, tier: DecodeTier):
        self._client, self._clock, self._tier = client, clock, tier

    def text(
        self, prompt: TextPrompt, attention: Attention, dense: TextOutcome | None
    ) -> tuple[dict[str, Any], TextOutcome]:
        """Loss of a text and of its continuation; agreement with the dense outcome.

        dense: None when this setting is the dense one.
        """
        result, cpu = self._prefill(EXPOSED, prompt.tokens, attention, Logits())
        real = self._tier.num_layers
        extra = len(result.stats.layer_density) - real
        cache = self._client.fetch(result.ticket, part=KvPart(layers=(0, real)))
        exposed = self._client.fetch(result.ticket, part=KvPart(layers=(real, extra)))
        self._client.release(result.ticket)
        hidden = hidden_rows(exposed, self._tier.hidden_size)
        outcome = self._tier.read_text(hidden, prompt.tokens)
        follow = self._tier.continuation_nll(cache, prompt.continuation, hidden[-1])
        reference = dense or outcome
        bins = np.array_split(outcome.nll, POSITION_BINS)
        return {
            **prefill_figures(result, cpu, real),
            "text": prompt.name,
            "nll": float(outcome.nll.mean()),
            "nll_by_position": [round(float(part.mean()), 5) for part in bins],
            "continuation_nll": follow,
            "top1_agreement": float((outcome.top == reference.top).mean()),
            f"kl_last_{KL_ROWS}": mean_divergence(reference.tail, outcome.tail),
        }, outcome

    def retrieval(self, prompt: RetrievalPrompt, attention: Attention) -> dict[str, Any]:
        """Scores of a prompt's questions."""
        wanted = Logits(all_of_last_token=True)
        result, cpu = self._prefill(MODEL, prompt.tokens, attention, wanted)
        cache = self._client.fetch(result.ticket)
        self._client.release(result.ticket)
        scores = self._tier.answer(prompt, cache, result.last_token_logits)
        answers = [
            {
                "task": question.task,
                "depth": question.depth and round(question.depth, 3),
                "in_prompt": index == 0,
                **dataclasses.asdict(scored),
            }
            for index, (question, scored) in enumerate(zip(prompt.questions, scores))
        ]
        return {
            **prefill_figures(result, cpu, self._tier.num_layers),
            "haystack": prompt.haystack,
            "score": float(np.mean([scored.parts_right for scored in scores])),
            "answer_nll": float(np.mean([scored.nll for scored in scores])),
            "answers": answers,
        }

    def _prefill(
        self, model: str, tokens: Sequence[int], attention: Attention, logits: Logits
    ) -> tuple[PrefillResult, float]:
        """The result and the server's CPU seconds."""
        attention = dataclasses.replace(attention, coverage_rows=COVERAGE_ROWS)
        before = self._clock.seconds()
        result = self._client.prefill(
            model, tokens, attention, delivery="lease", logits=logits
        )
        return result, self._clock.seconds() - before


def prefill_figures(result: PrefillResult, cpu: float, real_layers: int) -> dict[str, Any]:
    """Times, work and coverage of a prefill.

    The work of layers that only expose is taken off. They have as many blocks as others,
    so a share of the dense work is theirs.
    """
    stats, stages = result.stats, result.stats.stages
    layers = len(stats.layer_density)
    of_layer = stats.dense_flops / layers
    extra = sum(stats.layer_density[real_layers:]) * of_layer
    return {
        "cpu_seconds": round(cpu, 3),
        "attention_seconds": round(stages.permute + stages.select + stages.attend, 4),
        "order_select_seconds": round(stages.permute + stages.select, 4),
        "total_seconds": round(stats.total_seconds, 4),
        "executed_flops": stats.executed_flops - extra,
        "coverage": stats.coverage,
        "fallback_layers": stats.fallback_layers,
    }
