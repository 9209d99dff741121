#!/usr/bin/env python3
"""Runs the recipes of the Python client on the heads of a real model.

    scripts/bench.sh experiments                       all of them (about an hour on 2 cores)
    scripts/bench.sh experiments --only identity ttft  some of them
    scripts/bench.sh experiments --length 2048         on shorter prompts

Starts a server with SmolLM2-135M-Instruct, captures heads of a text, makes retrieval
tasks, and runs `pbs-client recipe` for each. Results are docs/results/experiment_*.json
and .svg; experiments_report.py fills docs/EXPERIMENTS.md from them.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

import numpy as np
import tokenizers
from bench_common import RESULTS, ROOT

sys.path[:0] = [str(ROOT / f"tests/{name}") for name in ("quality", "python")]
sys.path.insert(0, str(ROOT / "client/python"))
from haystacks import HAYSTACKS, Text, kjv_verses  # noqa: E402
from pbs_client import Client  # noqa: E402
from pbs_client.capture import read as read_capture  # noqa: E402
from pbs_client.recipes import RECIPES, run_recipe, table_lines, tasks  # noqa: E402
from pbs_client.recipes.base import Inputs  # noqa: E402
from real_server import running_server  # noqa: E402
from retrieval_tasks import TASKS, make_prompt  # noqa: E402

MODEL = "smollm2"
LAYERS = (0, 5, 10, 15, 20, 25, 29)  # of 30
LENGTH = 4096
TASK_LENGTH = 2048
TASK_COUNT = 30
SEED = 2510


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--models", type=pathlib.Path, help="folder of models (build/models)")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of the heads")
    parser.add_argument("--task-length", type=int, default=TASK_LENGTH)
    parser.add_argument("--task-count", type=int, default=TASK_COUNT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.models = arguments.models or arguments.build / "models"
    return arguments


def make_tasks(text: Text, encode, length: int, count: int) -> tuple[tasks.Task, ...]:
    """Retrieval prompts; haystacks in turn, and in turn what the prompt itself asks."""
    made = []
    others = TASKS[: TASKS.index("words")]
    for index in range(count):
        haystack = HAYSTACKS[index % len(HAYSTACKS)]
        first = "words" if haystack == "words" else others[index % len(others)]
        rng = np.random.default_rng([SEED, 1, index])
        prompt = make_prompt(rng, haystack, first, length, text, encode)
        right = tuple(sorted(prompt.questions[0].accepted[0]))
        made.append(tasks.Task(prompt.tokens, right, f"{first} in {haystack}"))
    return tuple(made)


def main() -> int:
    """Makes what the recipes need, then runs them."""
    arguments = parse_arguments()
    folder = arguments.models / MODEL
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    text = Text(kjv_verses(), encode)
    prompt = text.stretch(np.random.default_rng([SEED, 0]), arguments.length)
    asked = make_tasks(text, encode, arguments.task_length, arguments.task_count)
    state = arguments.build / "experiments"
    state.mkdir(parents=True, exist_ok=True)
    with running_server("--model", f"{MODEL}={folder}") as server:
        with Client(server.target) as client:
            path = state / f"heads_{arguments.length}.safetensors"
            client.capture(MODEL, prompt, LAYERS).write(path)
            inputs = Inputs(
                client, read_capture(path), MODEL, prompt, asked, arguments.rounds,
                say=lambda line: print(f"{time.strftime('%H:%M:%S')} {line}",
                                       file=sys.stderr, flush=True),
            )  # fmt: skip
            for name in arguments.only:
                inputs.say(name)
                result = run_recipe(RECIPES[name], inputs, arguments.output)
                print("\n".join([*table_lines(result), *result["found"], ""]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
