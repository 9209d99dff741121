#!/usr/bin/env python3
"""Runs tasks of lm-evaluation-harness on the real model, prefilled by a server.

    scripts/bench.sh lm-eval                     dense, the default and pbs (about an hour)
    scripts/bench.sh lm-eval --limit 4           with fewer samples of each task
    scripts/bench.sh lm-eval --settings 'pbs'    other settings of tests/quality/settings.py

Nobody here wrote these tasks. They are the ones of the package that need no download:
RULER's, which make their prompts themselves. A server prefills each prompt, transformers
decodes over the handed-over cache, and the harness scores the text. Every setting meets
the same samples. The result is docs/results/quality_lm_eval.json.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import random
import re
import sys
import time
from importlib.metadata import version
from typing import Any

import lm_eval
import numpy as np
from bench_common import ROOT, run_header, write_results
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

sys.path[:0] = [str(ROOT / f"tests/{name}") for name in ("quality", "python")]
sys.path.insert(0, str(ROOT / "client/python"))
from pbs_client import Attention, Client, hf  # noqa: E402
from real_server import running_server  # noqa: E402
from rule import Mean  # noqa: E402
from settings import DENSE, all_settings  # noqa: E402
from summary import to_json  # noqa: E402

MODEL = "smollm2"
TASKS = ("niah_single_1", "ruler_vt", "ruler_cwe", "ruler_fwe")
SETTINGS = (
    DENSE,
    "xattention 0.9, block 64, window 8, tail 3, corrected",
    "pbs 0.9, tail 2",
    "pbs 0.9",
)
LENGTH, LIMIT, SEED = 4096, 10, 2510


class PrefilledModel(LM):
    """A model of the harness: a server prefills, transformers decodes greedily.

    Attributes:
        densities: of each prompt, in the order of the calls.
        prompts: SHA-256 over all contexts.
    """

    def __init__(self, client: Client, model: Any, tokenizer: Any, attention: Attention):
        super().__init__()
        self._client, self._model, self._tokenizer = client, model, tokenizer
        self._attention = attention
        self.densities: list[float] = []
        self.prompts = hashlib.sha256()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts behind the contexts, up to a stop string, an end token or the limit."""
        return [self._generate(*request.args) for request in requests]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """No task here asks for it."""
        raise NotImplementedError("tasks of log-likelihoods")

    loglikelihood_rolling = loglikelihood

    def _generate(self, context: str, arguments: dict[str, Any]) -> str:
        self.prompts.update(context.encode())
        tokens = self._tokenizer(context)["input_ids"]
        result = self._client.prefill(MODEL, tokens, self._attention, delivery="lease")
        cache = self._client.fetch(result.ticket)
        self._client.release(result.ticket)
        self.densities.append(result.stats.density)
        new_tokens = hf.generate(
            self._model, tokens, cache, max_new_tokens=arguments["max_gen_toks"],
            first_token=result.first_token,
        )  # fmt: skip
        text = self._tokenizer.decode(new_tokens, skip_special_tokens=True)
        for stop in arguments.get("until", []):
            text = text.split(stop)[0]
        return text


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--models", type=pathlib.Path, help="folder of models (build/models)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--settings", help="regular expression of names; dense always runs")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of the prompts")
    parser.add_argument("--limit", type=int, default=LIMIT, help="samples of each task")
    arguments = parser.parse_args()
    arguments.models = arguments.models or arguments.build / "models"
    return arguments


def make_tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    """The tasks with their samples, made once, the same in every run."""
    random.seed(SEED)
    np.random.seed(SEED)
    metadata = {
        "tokenizer": str(arguments.models / MODEL),
        "max_seq_lengths": [arguments.length],
    }
    return TaskManager(metadata=metadata).load(arguments.tasks)


def scores_of(
    model: PrefilledModel, tasks: dict[str, Any], limit: int, length: int
) -> dict[str, list[float]]:
    """Scores of each task's samples, 0 .. 1, in their order."""
    done = lm_eval.evaluate(model, tasks, limit=limit, bootstrap_iters=0)
    return {
        task: [s[str(length)] for s in sorted(samples, key=lambda s: s["doc_id"])]
        for task, samples in done["samples"].items()
    }


def figures_of(
    model: PrefilledModel, scores: dict[str, list[float]], dense: dict[str, list[float]]
) -> dict[str, Any]:
    """A setting's means, and those of the samples' differences from dense."""
    return {
        "density": Mean.of(model.densities),
        "tasks": {
            task: {
                "score": Mean.of(own),
                "against_dense": Mean.of([a - b for a, b in zip(own, dense[task])]),
            }
            for task, own in scores.items()
        },
    }


def main() -> int:
    """Dense first, then the other settings on the same samples."""
    arguments = parse_arguments()
    header = run_header()
    folder = arguments.models / MODEL
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tasks = make_tasks(arguments)
    wanted = re.compile(arguments.settings) if arguments.settings else None
    settings = [
        s for s in all_settings()
        if s.name == DENSE or (wanted.search(s.name) if wanted else s.name in SETTINGS)
    ]  # fmt: skip
    model = hf.load_model(folder, dtype="f32")
    measured: dict[str, dict[str, Any]] = {}
    dense: dict[str, list[float]] = {}
    prompts = ""
    with (
        running_server("--model", f"{MODEL}={folder}") as server,
        Client(server.target) as client,
    ):
        for setting in settings:
            begun = time.monotonic()
            prefilled = PrefilledModel(client, model, tokenizer, setting.attention())
            scores = scores_of(prefilled, tasks, arguments.limit, arguments.length)
            prompts = prompts or prefilled.prompts.hexdigest()
            if prefilled.prompts.hexdigest() != prompts:
                raise RuntimeError(f"{setting.name} met other prompts than dense")
            dense = dense or scores
            measured[setting.name] = figures_of(prefilled, scores, dense)
            shown = {task: round(float(np.mean(own)), 3) for task, own in scores.items()}
            print(f"{setting.name}: {shown}, {time.monotonic() - begun:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
            figures = {
                "lm_eval": version("lm_eval"),
                "length": arguments.length,
                "limit": arguments.limit,
                "prompts_sha256": prompts,
                "settings": to_json(measured),
            }
            write_results("quality_lm_eval", header, figures)  # an ended run keeps it
    return 0


if __name__ == "__main__":
    sys.exit(main())
