"""Tasks of lm-evaluation-harness that a test makes: files of questions, no download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUESTIONS, CONTEXT_WORDS = 12, 60
CHOICES = ("yes", "no", "answer", "w7 w8")


def contexts(count: int = QUESTIONS) -> list[str]:
    """Contexts of words, of different lengths."""
    random = np.random.default_rng(7)
    lengths = random.integers(2, CONTEXT_WORDS, count)
    return [
        " ".join(f"w{word}" for word in random.integers(0, 300, length))
        for length in lengths
    ]


def write(folder: Path, answers: Sequence[str], golds: Sequence[int]) -> None:
    """Writes tiny_generate, tiny_choice, tiny_likelihood, tiny_rolling.

    Args:
        folder: for `--include_path`.
        answers: the right text of each question.
        golds: the right choice of each question.
    """
    data = folder / "questions.jsonl"
    rows = zip(contexts(), answers, golds)
    data.write_text(
        "".join(
            json.dumps({"text": text, "answer": answer, "gold": int(gold)}) + "\n"
            for text, answer, gold in rows
        )
    )
    _task(
        folder,
        "tiny_generate",
        data,
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["stop"], "max_gen_toks": 8, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    _task(
        folder,
        "tiny_choice",
        data,
        output_type="multiple_choice",
        doc_to_target="gold",
        doc_to_choice=list(CHOICES),
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    _task(
        folder,
        "tiny_likelihood",
        data,
        output_type="loglikelihood",
        doc_to_target="{{answer}}",
        target_delimiter=" ",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )
    _task(
        folder,
        "tiny_rolling",
        data,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )


def _task(folder: Path, name: str, data: Path, **config: Any) -> None:
    """A task's file; JSON is YAML."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        **config,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=1))
