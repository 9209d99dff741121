"""`pbs-client recipe`: experiments by name."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pbs_client.capture import read as read_capture
from pbs_client.cli.connection import connect
from pbs_client.cli.files import read_tokens
from pbs_client.recipes import (
    INPUT_FLAGS,
    RECIPES,
    check_inputs,
    find_recipe,
    run_recipe,
    table_lines,
    tasks,
)
from pbs_client.recipes.base import Inputs

ROUNDS_MAX = 1000

DESCRIPTION = """\
Runs an experiment against a server and says what it found. `--list` prints the names.

writes:  experiment_NAME.json (figures, machine, commits, command) and experiment_NAME.svg
prints:  the table and what it found, as text; with --list one JSON line for each recipe"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    group = parser.add_argument_group("recipe")
    group.add_argument("name", nargs="?", metavar="NAME", help="the experiment")
    group.add_argument("--list", action="store_true", help="print what there is")
    group.add_argument(
        "--heads", metavar="FILE", help="captured heads (`pbs-client capture`)"
    )
    group.add_argument("--model", metavar="NAME", help="a model of the server")
    group.add_argument(
        "--tokens", metavar="FILE", help="a prompt: JSON list of token ids"
    )
    group.add_argument(
        "--tasks",
        metavar="FILE",
        help="JSON list of {tokens, answer, kind}: prompts with known answers",
    )
    group.add_argument(
        "--rounds",
        type=_rounds,
        default=3,
        metavar="N",
        help="repetitions of what is timed [%(default)s]",
    )
    group.add_argument(
        "--output", default=".", metavar="DIR", help="folder of the results [here]"
    )
    group.add_argument("--no-plot", action="store_true", help="write no SVG")


def _rounds(text: str) -> int:
    rounds = int(text) if text.isascii() and text.isdecimal() else 0
    if not 1 <= rounds <= ROUNDS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not in 1..{ROUNDS_MAX}")
    return rounds


def recipe(arguments: argparse.Namespace) -> None:
    """`pbs-client recipe`."""
    if arguments.list:
        for found in RECIPES.values():
            line = {
                "name": found.name,
                "question": found.question,
                "needs": found.needs,
            }
            print(json.dumps(line), flush=True)
        return
    if arguments.name is None:
        raise ValueError(f"name one of {', '.join(RECIPES)}, or give --list")
    chosen = find_recipe(arguments.name)
    for name in INPUT_FLAGS:
        if getattr(arguments, name) and name not in chosen.needs:
            takes = " and ".join(f"--{need}" for need in chosen.needs)
            raise ValueError(
                f"recipe {chosen.name} does not take --{name}; it takes {takes}"
            )
    with connect(arguments) as client:
        inputs = Inputs(
            client,
            heads=read_capture(arguments.heads) if arguments.heads else None,
            model=arguments.model,
            tokens=read_tokens(arguments.tokens) if arguments.tokens else (),
            tasks=tasks.read(arguments.tasks) if arguments.tasks else (),
            rounds=arguments.rounds,
            say=lambda line: print(f"{chosen.name}: {line}", file=sys.stderr),
        )
        check_inputs(chosen, inputs)
        result = run_recipe(
            chosen, inputs, Path(arguments.output), plot=not arguments.no_plot
        )
    print("\n".join([*table_lines(result), "", *result["found"]]), flush=True)
