"""Text that a question's answer is hidden in, and real text whose loss is measured.

Haystacks, by the names in HAYSTACKS:

* "kjv": the King James Bible, in the public domain, as Debian packages it (bible-kjv,
  bible-kjv-text). A prompt begins at a random verse.
* "noise": five sentences, again and again.
* "words": a list of nouns, in which three are ten times as frequent as any other. It is
  also what the question for common words is about.

Texts, by the names in TEXTS: "kjv", which repeats itself much and which models know by
heart, and "handbook", modern prose: the Debian Administrator's Handbook (package
debian-handbook).

Units are sentences as token ids. Threading: none. Determinism: a numpy Generator decides.
"""

from __future__ import annotations

import html
import pathlib
import re
import subprocess
from collections.abc import Callable, Iterator

import numpy as np

WHOLE_BIBLE = "gen1:1-rev22:21"
NOISE = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
# Each is one token behind a space, in this tokenizer as in most.
NOUNS = (
    "apple river stone chair bread window garden letter bottle candle forest island mirror "
    "ladder pocket basket button coffee desert engine flower guitar hammer jacket kitchen "
    "lemon market needle orange pencil rabbit saddle tunnel valley whistle village bridge "
    "castle dragon feather glass honey iron jewel king lamp moon night ocean paper queen road "
    "silver table uncle violin water yard zone arrow"
).split()
COMMON_WORDS = 3
COMMON_SHARE = 0.2  # of the list, each; each other noun has .007
HAYSTACKS = ("kjv", "noise", "words")
TEXTS = ("kjv", "handbook")
HANDBOOK = pathlib.Path("/usr/share/doc/debian-handbook/html/en-US")
PARAGRAPH_MIN = 40  # characters; shorter ones are labels

Encode = Callable[[str], list[int]]  # text -> token ids


def kjv_verses() -> list[str]:
    """The verses of the Bible, in order, without their references.

    Raises:
        FileNotFoundError: the program `bible` is not installed.
    """
    printed = subprocess.run(
        ["bible", "-f", WHOLE_BIBLE], check=True, capture_output=True, text=True
    ).stdout
    # "Ge1:1 In the beginning ..."; each line is a verse.
    return [" " + line.split(" ", 1)[1] for line in printed.splitlines() if " " in line]


def handbook_paragraphs(folder: pathlib.Path = HANDBOOK) -> list[str]:
    """The handbook's paragraphs in the order of its files, each behind a space.

    Raises:
        FileNotFoundError: the handbook is not installed.
    """
    files = sorted(folder.glob("*.html"))
    if not files:
        raise FileNotFoundError(f"{folder} has no pages; install debian-handbook")
    found = []
    for file in files:
        for body in re.findall(
            r'<div class="para">(.*?)</div>', file.read_text(), re.DOTALL
        ):
            words = html.unescape(re.sub("<[^>]+>", "", body)).split()
            found.append(" " + " ".join(words))
    return [paragraph for paragraph in found if len(paragraph) > PARAGRAPH_MIN]


def read_texts() -> dict[str, list[str]]:
    """The sentences of each of TEXTS.

    Raises:
        FileNotFoundError: one is not installed.
    """
    return {"kjv": kjv_verses(), "handbook": handbook_paragraphs()}


class Text:
    """Real text as token ids, of which every prompt takes a stretch of its own."""

    def __init__(self, sentences: list[str], encode: Encode):
        self._sentences, self._encode = sentences, encode

    def stretch(self, rng: np.random.Generator, num_tokens: int) -> list[int]:
        """`num_tokens` ids of consecutive sentences from a random one on."""
        tokens: list[int] = []
        for sentence in self.sentences(rng):
            tokens += sentence
            if len(tokens) >= num_tokens:
                break
        return tokens[:num_tokens]

    def sentences(self, rng: np.random.Generator) -> Iterator[list[int]]:
        """Sentence by sentence, without an end: after the last comes the first."""
        at = int(rng.integers(len(self._sentences)))
        while True:
            yield self._encode(self._sentences[at])
            at = (at + 1) % len(self._sentences)


def noise_sentences(encode: Encode) -> Iterator[list[int]]:
    """The sentences of NOISE, without an end."""
    encoded = [encode(sentence) for sentence in NOISE]
    while True:
        yield from encoded


def common_words(rng: np.random.Generator) -> list[str]:
    """The frequent nouns of one word list."""
    return [NOUNS[i] for i in rng.permutation(len(NOUNS))[:COMMON_WORDS]]


def word_list(
    rng: np.random.Generator, frequent: list[str], encode: Encode
) -> Iterator[list[int]]:
    """Lines of nouns, without an end; those of `frequent` have COMMON_SHARE each."""
    rare = [noun for noun in NOUNS if noun not in frequent]
    share = (1 - COMMON_SHARE * len(frequent)) / len(rare)
    odds = [COMMON_SHARE] * len(frequent) + [share] * len(rare)
    while True:
        drawn = rng.choice(frequent + rare, size=12, p=odds)
        yield encode(" " + ", ".join(drawn) + ",")


def fill(sentences: Iterator[list[int]], num_tokens: int) -> list[list[int]]:
    """Sentences of `num_tokens` in all; the last is cut where the count is reached."""
    filled: list[list[int]] = []
    left = num_tokens
    while left > 0:
        sentence = next(sentences)[:left]
        filled.append(sentence)
        left -= len(sentence)
    return filled
