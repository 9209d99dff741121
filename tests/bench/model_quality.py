"""Runs the quality matrix of the real model through a server; bench_quality.py calls it.

Prompts are the outer loop and settings the inner one, dense first, so that all settings
meet a prompt in the same hour. A measurement that the log has is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers
from bench_common import ROOT, write_results

sys.path[:0] = [str(ROOT / f"tests/{name}") for name in ("quality", "python")]
import rule  # noqa: E402
import summary  # noqa: E402
from decode_tier import DecodeTier, TextOutcome  # noqa: E402
from haystacks import HAYSTACKS, TEXTS, Text, read_texts  # noqa: E402
from measure import EXPOSED, MODEL, Measurer, ProcessClock, TextPrompt  # noqa: E402
from pbs_client import Client, InvalidArgumentError, UnimplementedError  # noqa: E402
from real_server import running_server  # noqa: E402
from retrieval_tasks import TASKS, make_prompt  # noqa: E402
from run_log import Key, OtherRunError, RunLog  # noqa: E402
from settings import DENSE, Setting, UnknownSettingError, all_settings  # noqa: E402

CONTINUATION_TOKENS = 256
PROBE_TOKENS = 300  # of the prompt that shows whether the server has a setting
KINDS = (summary.TEXT, summary.RETRIEVAL)
REFUSALS = (UnknownSettingError, UnimplementedError, InvalidArgumentError)
# What makes prompts and measures; a change of these makes other records.
SOURCES = ("haystacks", "retrieval_tasks", "decode_tier", "measure")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        settings: dense first.
        lengths: prompt tokens, ascending.
        prompts: of each kind and length.
        seed: of all prompts.
        deadline: time.monotonic() at which no measurement begins any more.
        screen: go no further with settings whose loss is far out at a length, after
            rule.PROMPTS_MIN prompts of it.
    """

    settings: tuple[Setting, ...]
    lengths: tuple[int, ...]
    prompts: int
    seed: int
    deadline: float
    screen: bool


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Prompts:
    """Makes the prompts of a run, each from its own seed."""

    def __init__(self, folder: pathlib.Path, seed: int):
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._seed, self._encode = seed, lambda text: tokenizer.encode(text).ids
        sentences = read_texts()
        whole = "\n".join("\n".join(sentences[name]) for name in TEXTS)
        self.digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
        self._texts = {name: Text(sentences[name], self._encode) for name in TEXTS}

    def text(self, length: int, index: int) -> TextPrompt:
        """Consecutive sentences of the texts in turn, and what follows them."""
        rng = np.random.default_rng([self._seed, 0, length, index])
        name = TEXTS[index % len(TEXTS)]
        tokens = self._texts[name].stretch(rng, length + CONTINUATION_TOKENS)
        return TextPrompt(name, tuple(tokens[:length]), tuple(tokens[length:]))

    def retrieval(self, length: int, index: int) -> Any:
        """Haystacks in turn, and in turn the task that the prompt itself asks."""
        rng = np.random.default_rng([self._seed, 1, length, index])
        haystack = HAYSTACKS[index % len(HAYSTACKS)]
        others = TASKS[: TASKS.index("words")]
        first = "words" if haystack == "words" else others[index % len(others)]
        return make_prompt(rng, haystack, first, length, self._texts["kjv"], self._encode)


class Run:
    """The measurements of a plan."""

    def __init__(self, plan: Plan, prompts: Prompts, measurer: Measurer, log: RunLog,
                 dense_folder: pathlib.Path):  # fmt: skip
        self._plan, self._prompts, self._measurer = plan, prompts, measurer
        self._log, self._dense_folder = log, dense_folder
        self.skipped: dict[str, str] = {}
        self.screened: set[str] = set()

    def probe(self, client: Client) -> None:
        """Finds out which settings client and server have, with a short prompt each."""
        tokens = self._prompts.text(PROBE_TOKENS, 0).tokens
        for setting in self._plan.settings:
            try:
                client.prefill(MODEL, tokens, setting.attention())
            except REFUSALS as error:
                self._skip(setting, error)

    def measure(self) -> bool:
        """Measures what is missing. False when the time ended before."""
        begun, done = time.monotonic(), 0
        for setting in self._plan.settings:
            self._screen(setting.name)
        missing = [k for k in self._keys() if not self._log.has(k) and not self._is_out(k)]
        say(f"{len(self._log.records)} measurements are there, {len(missing)} to make")
        for key in self._keys():
            setting_name, length, kind, index = key
            if self._log.has(key) or self._is_out(key):
                continue
            if time.monotonic() > self._plan.deadline:
                return False
            self._measure_one(key)
            self._screen(setting_name)
            done += 1
            per_item = (time.monotonic() - begun) / done
            left = sum(not self._log.has(k) and not self._is_out(k) for k in missing)
            say(f"{kind} {index}, {length}: {setting_name}: {self._headline(key)}  "
                f"({left} to go, {left * per_item / 60:.0f} min at {per_item:.1f} s)")  # fmt: skip
        return True

    def _keys(self) -> Iterator[Key]:
        """The prompts that screening needs first: short ones tell what long ones need not."""
        first = min(rule.PROMPTS_MIN, self._plan.prompts)
        rounds = [range(first), *([i] for i in range(first, self._plan.prompts))]
        for indices, length in itertools.product(rounds, self._plan.lengths):
            for index, kind, setting in itertools.product(
                indices, KINDS, self._plan.settings
            ):
                yield setting.name, length, kind, index

    def _is_out(self, key: Key) -> bool:
        """Whether this is not to be measured: skipped or screened."""
        return key[0] in self.skipped or key[0] in self.screened

    def _screen(self, name: str) -> None:
        """Remembers a setting whose loss is far out."""
        if not self._plan.screen or name in self.screened or name == DENSE:
            return
        if rule.is_hopeless(self.cells_of(name)):
            self.screened.add(name)
            say(f"{name}: its loss is far out, and it is measured no further")

    def _measure_one(self, key: Key) -> None:
        name, length, kind, index = key
        setting = next(s for s in self._plan.settings if s.name == name)
        try:
            if kind == summary.TEXT:
                figures = self._measure_text(setting, length, index)
            else:
                prompt = self._prompts.retrieval(length, index)
                figures = self._measurer.retrieval(prompt, setting.attention())
        except REFUSALS as error:
            self._skip(setting, error)
            return
        self._log.add(key, figures)

    def _measure_text(self, setting: Setting, length: int, index: int) -> dict[str, Any]:
        prompt = self._prompts.text(length, index)
        dense = (
            None if setting.name == DENSE else self._dense_outcome(prompt, length, index)
        )
        figures, outcome = self._measurer.text(prompt, setting.attention(), dense)
        if dense is None:
            self._dense_folder.mkdir(parents=True, exist_ok=True)
            np.savez(self._dense_file(length, index), **dataclasses.asdict(outcome))
        return figures

    def _dense_outcome(self, prompt: TextPrompt, length: int, index: int) -> TextOutcome:
        """What dense made of a text: kept on disk, or made again."""
        file = self._dense_file(length, index)
        if not file.exists():
            dense = next(s for s in self._plan.settings if s.name == DENSE)
            self._measure_text(dense, length, index)
        with np.load(file) as kept:
            return TextOutcome(**kept)

    def _dense_file(self, length: int, index: int) -> pathlib.Path:
        return self._dense_folder / f"text-{length}-{index}.npz"

    def _skip(self, setting: Setting, error: Exception) -> None:
        self.skipped[setting.name] = f"{type(error).__name__}: {error}"
        say(f"skipped: {setting.name}: {error}")

    def _headline(self, key: Key) -> str:
        record = self._log.records.get(key, {})
        shown = ("nll", "continuation_nll", "top1_agreement", "score", "coverage",
                 "cpu_seconds", "attention_seconds")  # fmt: skip
        return " ".join(f"{name} {record[name]:.3f}" for name in shown if name in record)

    # ---- results

    def figures_of(self, name: str) -> dict[int, dict[str, Any]]:
        """Figures by length, of those that are measured."""
        records = [r for r in self._log.records.values() if r["setting"] in (name, DENSE)]
        lengths = sorted({record["length"] for record in records})
        found = {n: summary.figures(records, name, n) for n in lengths}
        return {length: figures for length, figures in found.items() if figures}

    def cells_of(self, name: str) -> dict[int, rule.Cell]:
        """What the rule reads, by length."""
        return {n: summary.cell(figures) for n, figures in self.figures_of(name).items()}

    def results(self) -> dict[str, Any]:
        """All figures of the log, the choice of the rule, and what was left out.

        The log may have more settings and lengths than the plan, of an earlier call.
        """
        known = {s.name: s for s in (*all_settings(), *self._plan.settings)}
        settings = {
            s.name: {"method": s.method, "options": s.options, "tail_blocks": s.tail_blocks,
                     "corrected": s.corrected, "lengths": figures}
            for s in known.values()
            if (figures := self.figures_of(s.name))
        }  # fmt: skip
        lengths = sorted(settings.get(DENSE, {}).get("lengths", {}))
        choice = None
        if lengths:
            choice = rule.choose_default({n: self.cells_of(n) for n in settings}, lengths)
        return summary.to_json(
            {"seed": self._plan.seed, "lengths": lengths, "settings": settings,
             "choice": choice, "skipped": self.skipped, "screened": sorted(self.screened)}
        )  # fmt: skip


def identity(client: Client, prompts: Prompts, seed: int) -> dict[str, Any]:
    """What the records of a log have in common."""
    sources = b"".join((ROOT / f"tests/quality/{n}.py").read_bytes() for n in SOURCES)
    return {
        "server": client.info().commit,
        "models": {model.name: model.model_digest for model in client.models()},
        "text": prompts.digest,
        "seed": seed,
        "sources": hashlib.sha256(sources).hexdigest()[:16],
    }


def run_model(
    arguments: argparse.Namespace, plan: Plan, header: dict[str, Any]
) -> pathlib.Path | None:
    """Measures and writes docs/results/quality_model.json; None if nothing is whole."""
    folders = {name: arguments.models / name for name in (MODEL, EXPOSED)}
    state = arguments.build / "quality"
    prompts, tier = Prompts(folders[MODEL], plan.seed), DecodeTier(folders[MODEL])
    flags = [word for n, folder in folders.items() for word in ("--model", f"{n}={folder}")]
    with running_server(*flags) as server, Client(server.target) as client:
        who = identity(client, prompts, plan.seed)
        try:
            log = RunLog(state / f"{arguments.output}.jsonl", who, fresh=arguments.fresh)
        except OtherRunError as error:
            sys.exit(f"{error} from this run; --fresh begins anew, --output keeps both")
        measurer = Measurer(client, ProcessClock(server.process.pid), tier)
        dense_folder = state / "dense" / hashlib.sha256(repr(who).encode()).hexdigest()[:16]
        run = Run(plan, prompts, measurer, log, dense_folder)
        run.probe(client)
        complete = run.measure()
        say(
            "everything is measured"
            if complete
            else "the time is over; call again to go on"
        )
    results = run.results()
    if not results["lengths"]:
        say("no length has both kinds of prompts yet; nothing is written")
        return None
    figures = {"model": MODEL, "complete": complete, "identity": who, **results}
    return write_results(arguments.output, header, figures)
