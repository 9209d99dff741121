#!/usr/bin/env python3
"""What a hand-off as F8_E4M3 costs in quality and saves in bytes.

    python tests/bench/bench_kv_fp8.py --smollm2 FOLDER       (10 min)

It needs numpy, torch and transformers, pbs-prefilld (build/bin or PBS_BIN), and SmolLM2
(tests/models/make_smollm2.py). The server prefills densely and holds f32. A decode tier
(tests/quality/decode_tier.py) fetches each cache in several forms, and computes in f32
what follows. Its next-token distributions over the cache that came as f32 are the
reference; other forms have the mean KL divergence from it, in nats, and the share of
positions with the same most probable token.

* recall: the bundled model (tests/quality/recall_task.py); `right` is the share of right
  answers. The questions follow the cache.
* smollm2: stretches of this repository's documentation; the last 64 tokens of each follow
  the cache.

Writes docs/results/kv_fp8.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import torch
import transformers
from bench_common import ROOT, run_header, write_results

sys.path[:0] = [str(ROOT / "tests/quality"), str(ROOT / "tests/python")]
import recall_task  # noqa: E402
from decode_tier import DecodeTier, Segment  # noqa: E402
from pbs_client import Client, KvCache, KvFormat  # noqa: E402
from real_server import RECALL_MODEL, running_server  # noqa: E402

SEED = 2510
FORMS = {
    "f32": KvFormat("f32"),
    "bf16": KvFormat("bf16"),
    "f8_e4m3, page 1": KvFormat("f32", wire_dtype="f8_e4m3", page_tokens=1),
    "f8_e4m3, page 16": KvFormat("f32", wire_dtype="f8_e4m3", page_tokens=16),
    "f8_e4m3, page 128": KvFormat("f32", wire_dtype="f8_e4m3", page_tokens=128),
}
RECALL_LENGTH, RECALL_PAIRS, RECALL_QUESTIONS = 2048, 96, 32
STRETCH, FOLLOWING = 1024, 64  # tokens


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Tokens that are prefilled, tokens that follow, and what is right behind some.

    Attributes:
        right: position in `following` -> the token expected behind it.
    """

    prefix: list[int]
    following: list[int]
    right: dict[int, int]


def recall_prompts(count: int) -> list[Prompt]:
    """Prompts of the recall task; the questions follow."""
    made = recall_task.make_prompts(
        np.random.default_rng(SEED), count, RECALL_LENGTH, RECALL_PAIRS, RECALL_QUESTIONS
    )
    tail = int(made.asked[0])
    return [
        Prompt(
            tokens[:tail].tolist(),
            tokens[tail:].tolist(),
            {int(at) - tail: int(value) for at, value in zip(made.asked, answers)},
        )
        for tokens, answers in zip(made.tokens, made.answers)
    ]


def text_prompts(folder: pathlib.Path, count: int) -> list[Prompt]:
    """Stretches of the documentation, from the beginning of each `count`-th part."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pages = sorted((ROOT / "docs").glob("*.md"))
    ids = tokenizer("\n\n".join(page.read_text() for page in pages))["input_ids"]
    step = (len(ids) - STRETCH) // count
    stretches = [ids[i * step : i * step + STRETCH] for i in range(count)]
    cut = STRETCH - FOLLOWING
    return [Prompt(s[:cut], s[cut:], {}) for s in stretches]


class Tally:
    """Sums over positions."""

    def __init__(self) -> None:
        self.positions = self.same_top = self.right = self.asked = 0
        self.divergence = self.greatest = 0.0

    def add(self, reference: torch.Tensor, other: torch.Tensor, prompt: Prompt) -> None:
        """Both are log-probabilities [following, vocabulary]."""
        divergence = (reference.exp() * (reference - other)).sum(-1)
        best = other.argmax(-1)
        self.positions += len(other)
        self.divergence += float(divergence.sum())
        self.greatest = max(self.greatest, float(divergence.max()))
        self.same_top += int((best == reference.argmax(-1)).sum())
        self.asked += len(prompt.right)
        self.right += sum(int(best[at]) == token for at, token in prompt.right.items())

    def figures(self) -> dict[str, float]:
        """As in the result file."""
        found: dict[str, float] = {
            "positions": self.positions,
            "kl_mean": self.divergence / self.positions,
            "kl_max": self.greatest,
            "same_top1": self.same_top / self.positions,
        }
        return {**found, "right": self.right / self.asked} if self.asked else found


def scale_bytes(cache: KvCache, kv_format: KvFormat) -> int:
    """What the scales of a whole cache take."""
    if kv_format.wire_dtype is None:
        return 0
    pages = -(-cache.tokens.count // kv_format.page_tokens)
    return 4 * 2 * cache.num_layers * cache.heads.count * pages


def measure(folder: pathlib.Path, prompts: Sequence[Prompt]) -> dict:
    """One model: every form over the same prompts."""
    tier = DecodeTier(folder)
    tallies = {name: Tally() for name in FORMS}
    sizes = dict.fromkeys(FORMS, 0)
    with (
        running_server("--model", f"m={folder}", "--set", "models.0.kv_dtype=f32") as server,
        Client(server.target) as client,
    ):
        for index, prompt in enumerate(prompts):
            print(f"{folder.name}: {index + 1} of {len(prompts)}", file=sys.stderr)
            ticket = client.prefill("m", prompt.prefix, "dense", delivery="lease").ticket
            segment = Segment(len(prompt.prefix), tuple(prompt.following))
            reference = None
            for name, kv_format in FORMS.items():
                seen = []
                cache = client.fetch(
                    ticket, kv_format=kv_format, progress=lambda *a, s=seen: s.append(a[2])
                )
                (logits,) = tier.logits_after(cache, [segment])
                found = logits.double().log_softmax(-1)
                reference = found if reference is None else reference
                tallies[name].add(reference, found, prompt)
                sizes[name] += seen[-1] + scale_bytes(cache, kv_format)
            client.release(ticket)
    return {
        name: {"bytes_over_bf16": sizes[name] / sizes["bf16"], **tally.figures()}
        for name, tally in tallies.items()
    }


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", type=pathlib.Path, help="folder; without it not measured")
    parser.add_argument("--recall-prompts", type=int, default=16)
    parser.add_argument("--text-prompts", type=int, default=16)
    arguments = parser.parse_args()
    header = run_header()
    recalls = recall_prompts(arguments.recall_prompts)
    figures = {"recall": measure(RECALL_MODEL, recalls)}
    if arguments.smollm2 is not None:
        prompts = text_prompts(arguments.smollm2, arguments.text_prompts)
        figures["smollm2"] = measure(arguments.smollm2, prompts)
    write_results("kv_fp8", header, figures)


if __name__ == "__main__":
    main()
