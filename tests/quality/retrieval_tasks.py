"""Retrieval prompts in the manner of RULER (arXiv 2404.06654), and their questions.

One prompt hides all needles of five tasks in one haystack (haystacks.py), and asks
several questions about it:

* single: one fact of its kind
* keys: one of four numbers, each of another city
* values: three words that belong to one animal
* queries: the numbers of two cities in one answer
* tracking: the names of a chain of variables that have one value
* words: the three most frequent nouns; in word lists only

The first question ends the prompt. The others are for a decode tier, which has the cache
of the context: `context` is the prompt without its first question.

An answer is scored by its parts (a number, a word, a name). A part is right when every
one of its tokens is the most probable one, with the right tokens before it. All parts are
right exactly when greedy decoding gives the answer.

Threading: none. Determinism: a numpy Generator decides everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from haystacks import (
    HAYSTACKS,
    NOUNS,
    Encode,
    Text,
    common_words,
    fill,
    noise_sentences,
    word_list,
)

CITIES = (
    "Paris London Tokyo Cairo Madrid Berlin Vienna Dublin Athens Boston Sydney Moscow Delhi "
    "Rome Oslo Lima"
).split()
ANIMALS = "lion tiger horse eagle snake whale camel goat wolf bear".split()
PLACES = "lighthouse library museum harbor station temple theater hospital".split()
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
TASKS = ("single", "keys", "values", "queries", "tracking", "words")

NUM_KEYS = 4
KEYS_ASKED = 2  # questions of one key each, early and late
NUM_VALUES = 3
CHAIN_LENGTH = 3
DIGITS = 5

# Without the chat template: the model finds more with these words than with it.
HEAD = "Facts are hidden in this text.\n"
ASK = "\n\nQuestion: "
TURN = "\nAnswer: "


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its answer, as token ids.

    Attributes:
        task: one of TASKS.
        asked: the question, the change of turn and the words that lead to the answer.
        answer: what should follow.
        parts: spans (begin, end) of `answer` that are scored; the rest is given.
        accepted: for each token of `answer` the ids that count as right.
        depth: share of the haystack before the needle that is asked for, 0 .. 1; the mean
            of several; None for words.
    """

    task: str
    asked: tuple[int, ...]
    answer: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    accepted: tuple[frozenset[int], ...]
    depth: float | None


@dataclasses.dataclass(frozen=True)
class RetrievalPrompt:
    """A context and questions about it; `tokens` is what is prefilled."""

    haystack: str
    context: tuple[int, ...]
    questions: tuple[Question, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The context and the first question."""
        return self.context + self.questions[0].asked


@dataclasses.dataclass(frozen=True)
class Draft:
    """A question before its needles have places: pieces of the answer, and their needles.

    `pieces` alternate: given text, scored part, given text, scored part ...
    """

    task: str
    question: str
    pieces: tuple[str, ...]
    needles: tuple[int, ...]
    any_order: bool = False


class NeedleBook:
    """The needles of a prompt and the drafts that ask for them."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.sentences: list[str] = []
        self.drafts: list[Draft] = []
        self._add_single()
        self._add_keys()
        self._add_values()
        self._add_tracking()

    def _draw(self, names: list[str] | str, count: int) -> list[str]:
        return [names[i] for i in self.rng.permutation(len(names))[:count]]

    def _number(self) -> str:
        return str(self.rng.integers(10 ** (DIGITS - 1), 10**DIGITS))

    def _hide(self, sentence: str) -> int:
        self.sentences.append(" " + sentence)
        return len(self.sentences) - 1

    def _add_single(self) -> None:
        place, code = self._draw(PLACES, 1)[0], self._number()
        needle = self._hide(f"The secret code of the {place} is {code}.")
        self.drafts.append(
            Draft("single", f"What is the secret code of the {place}?",
                  (f"The secret code of the {place} is ", code), (needle,))
        )  # fmt: skip

    def _add_keys(self) -> None:
        cities = self._draw(CITIES, NUM_KEYS)
        numbers = [self._number() for _ in cities]
        needles = [
            self._hide(f"The magic number of {city} is {number}.")
            for city, number in zip(cities, numbers)
        ]
        for i in range(0, NUM_KEYS, NUM_KEYS // KEYS_ASKED):
            self.drafts.append(
                Draft("keys", f"What is the magic number of {cities[i]}?",
                      (f"The magic number of {cities[i]} is ", numbers[i]), (needles[i],))
            )  # fmt: skip
        a, b = 1, NUM_KEYS - 1
        self.drafts.append(
            Draft("queries", f"What are the magic numbers of {cities[a]} and of {cities[b]}?",
                  (f"The magic number of {cities[a]} is ", numbers[a],
                   f", and the magic number of {cities[b]} is ", numbers[b]),
                  (needles[a], needles[b]))
        )  # fmt: skip

    def _add_values(self) -> None:
        animal, words = self._draw(ANIMALS, 1)[0], self._draw(NOUNS, NUM_VALUES)
        needles = [self._hide(f"The {animal} likes the {word}.") for word in words]
        pieces = [f"The {animal} likes the", f" {words[0]}"]
        for word in words[1:]:
            pieces += [f". The {animal} likes the", f" {word}"]
        self.drafts.append(
            Draft("values", f"Which {NUM_VALUES} things does the {animal} like?",
                  tuple(pieces), tuple(needles), any_order=True)
        )  # fmt: skip

    def _add_tracking(self) -> None:
        names = self._draw(LETTERS, CHAIN_LENGTH)
        value = self._number()
        needles = [self._hide(f"VAR {names[0]} = {value}.")]
        for before, name in zip(names, names[1:]):
            needles.append(self._hide(f"VAR {name} = VAR {before}."))
        pieces = [f"The variables with the value {value} are: VAR", f" {names[0]}"]
        for name in names[1:]:
            pieces += [", VAR", f" {name}"]
        self.drafts.append(
            Draft("tracking", f"Which {CHAIN_LENGTH} variables have the value {value}?",
                  tuple(pieces), tuple(needles), any_order=True)
        )  # fmt: skip


def words_draft(frequent: list[str]) -> Draft:
    """The question for the frequent nouns of a word list."""
    pieces = ["The list repeats most often the words", f" {frequent[0]}"]
    for word in frequent[1:]:
        pieces += [",", f" {word}"]
    question = f"What are the {len(frequent)} most common words of the list?"
    return Draft("words", question, tuple(pieces), (), any_order=True)


def needle_depths(rng: np.random.Generator, book: NeedleBook) -> list[float]:
    """Depths of the needles, 0 .. 1: one random place in each of equal strata.

    Variables of a chain, and cities that are asked for, keep their order, so that chains
    can be followed and the questions sweep the depth.
    """
    count = len(book.sentences)
    places = (np.arange(count) + rng.uniform(0.1, 0.9, count)) / count
    shuffled = rng.permutation(places)
    depths = [0.0] * count
    for task_needles in _needle_groups(count):
        own = sorted(shuffled[list(task_needles)])
        for needle, depth in zip(task_needles, own):
            depths[needle] = float(depth)
    return depths


def _needle_groups(count: int) -> list[range]:
    """Needles of single, keys, values and tracking, in the order of NeedleBook."""
    bounds = np.cumsum([0, 1, NUM_KEYS, NUM_VALUES, CHAIN_LENGTH])
    assert bounds[-1] == count
    return [range(int(a), int(b)) for a, b in zip(bounds, bounds[1:])]


def encode_question(draft: Draft, depths: list[float], encode: Encode) -> Question:
    """A draft as token ids. The first piece leads to the answer and is asked with it."""
    asked = encode(ASK + draft.question + TURN + draft.pieces[0])
    answer: list[int] = []
    parts: list[tuple[int, int]] = []
    for i, piece in enumerate(draft.pieces[1:]):
        begin = len(answer)
        answer += encode(piece)
        if i % 2 == 0:
            parts.append((begin, len(answer)))
    accepted = [frozenset([token]) for token in answer]
    if draft.any_order:  # at the start of a part, every later part will do as well
        starts = [answer[begin] for begin, _ in parts]
        for i, (begin, _) in enumerate(parts):
            accepted[begin] = frozenset(starts[i:])
    own = [depths[needle] for needle in draft.needles]
    depth = float(np.mean(own)) if own else None
    return Question(
        draft.task, tuple(asked), tuple(answer), tuple(parts), tuple(accepted), depth
    )


def hide(
    sentences: list[list[int]], needles: list[list[int]], depths: list[float]
) -> list[int]:
    """Puts each needle before the sentence at its depth of the haystack's tokens."""
    total = sum(map(len, sentences))
    order = sorted(range(len(needles)), key=lambda i: depths[i])
    hidden: list[int] = []
    waiting = iter(order)
    following = next(waiting, None)
    seen = 0
    for sentence in sentences:
        while following is not None and depths[following] * total <= seen:
            hidden += needles[following]
            following = next(waiting, None)
        hidden += sentence
        seen += len(sentence)
    while following is not None:
        hidden += needles[following]
        following = next(waiting, None)
    return hidden


def make_prompt(
    rng: np.random.Generator,
    haystack: str,
    first_task: str,
    num_tokens: int,
    text: Text,
    encode: Encode,
) -> RetrievalPrompt:
    """Draws a prompt whose `tokens` are exactly `num_tokens`.

    Args:
        rng: source of all randomness.
        haystack: one of HAYSTACKS.
        first_task: what the prompt's own question is; "words" needs haystack "words".
        num_tokens: of the prompt, the first question included.
        text: where the haystack "kjv" comes from.
        encode: text -> token ids; it must know the chat template's special tokens.

    Raises:
        ValueError: the haystack is unknown, or num_tokens cannot hold the needles.
    """
    if haystack not in HAYSTACKS:
        raise ValueError(f"haystack {haystack!r} is not one of {', '.join(HAYSTACKS)}")
    book = NeedleBook(rng)
    drafts, frequent = list(book.drafts), common_words(rng)
    if haystack == "words":
        drafts.append(words_draft(frequent))
    depths = needle_depths(rng, book)
    drafts.sort(key=lambda draft: draft.task != first_task)  # stable: the first leads
    questions = tuple(encode_question(draft, depths, encode) for draft in drafts)
    head, needles = encode(HEAD), [encode(sentence) for sentence in book.sentences]
    left = num_tokens - len(head) - sum(map(len, needles)) - len(questions[0].asked)
    if left < 2 * sum(map(len, needles)):
        raise ValueError(f"num_tokens {num_tokens} is too few for {len(needles)} needles")
    sources: dict[str, Iterator[list[int]]] = {
        "kjv": text.sentences(rng),
        "noise": noise_sentences(encode),
        "words": word_list(rng, frequent, encode),
    }
    context = head + hide(fill(sources[haystack], left), needles, depths)
    return RetrievalPrompt(haystack, tuple(context), questions)
