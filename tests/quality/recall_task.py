"""Associative recall over a long context: the task of the bundled model.

A prompt of `length` tokens is

    BOS | context: key-value pairs at random even slots amid filler | SEP | k v k v ...

The tail asks for `questions` distinct keys of the context, in random order, each
followed by its value, so the answer to question i is the token behind it: the model is
right when its argmax at an asked key is that key's value.

Threading: none. Determinism: a numpy Generator decides everything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

import numpy as np

VOCAB_SIZE = 1024
BOS, EOS, SEP = 0, 1, 2
FILLER = range(16, 256)
KEYS = range(256, 384)
VALUES = range(640, 768)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts with their answers.

    Attributes:
      tokens: int64 [batch, length].
      asked: int64 [questions], the positions of the asked keys (equal in every row).
      answers: int64 [batch, questions], the value expected behind each asked key.
    """

    tokens: np.ndarray
    asked: np.ndarray
    answers: np.ndarray


def make_prompts(
    rng: np.random.Generator, batch: int, length: int, pairs: int, questions: int
) -> Prompts:
    """Draws prompts.

    Args:
      rng: source of all randomness.
      batch: number of prompts, at least 1.
      length: tokens of a prompt.
      pairs: key-value pairs in the context; at most len(KEYS) and the context's slots.
      questions: keys asked for, 1 .. pairs.

    Raises:
      ValueError: an argument is out of its range; names it with its limit.
    """
    slots = (length - 2 * questions - 2) // 2
    if not 1 <= questions <= pairs:
        raise ValueError(f"questions {questions} is outside [1, pairs = {pairs}]")
    if pairs > min(slots, len(KEYS)):
        raise ValueError(
            f"pairs {pairs} exceeds the {slots} slots of length {length} or the "
            f"{len(KEYS)} keys"
        )
    tokens = rng.integers(FILLER.start, FILLER.stop, (batch, length))
    tail = length - 2 * questions
    tokens[:, 0] = BOS
    tokens[:, tail - 1] = SEP
    keys = _distinct(rng, batch, len(KEYS), pairs) + KEYS.start
    values = rng.integers(VALUES.start, VALUES.stop, (batch, pairs))
    place = 1 + 2 * _distinct(rng, batch, slots, pairs)
    np.put_along_axis(tokens, place, keys, 1)
    np.put_along_axis(tokens, place + 1, values, 1)
    chosen = _distinct(rng, batch, pairs, questions)
    answers = np.take_along_axis(values, chosen, 1)
    tokens[:, tail::2] = np.take_along_axis(keys, chosen, 1)
    tokens[:, tail + 1 :: 2] = answers
    return Prompts(tokens, np.arange(tail, length, 2), answers)


def _distinct(rng: np.random.Generator, batch: int, count: int, take: int) -> np.ndarray:
    """[batch, take] distinct numbers below `count` per row, in random order."""
    return rng.random((batch, count)).argsort(1)[:, :take]


def main() -> None:
    """Writes one prompt as the quickstart uses it: context, question, answer."""
    parser = argparse.ArgumentParser(description="Writes one prompt as token-id lists.")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--length", type=int, default=8192)
    arguments = parser.parse_args()
    prompts = make_prompts(
        np.random.default_rng(arguments.seed), 1, arguments.length, 96, 32
    )
    tokens = prompts.tokens[0].tolist()
    name = f"prompt_{arguments.length // 1024}k"
    parts = {"": tokens[:-2], ".question": tokens[-2:-1], ".answer": tokens[-1:]}
    for suffix, part in parts.items():
        (arguments.out / f"{name}{suffix}.json").write_text(json.dumps(part) + "\n")


if __name__ == "__main__":
    main()
