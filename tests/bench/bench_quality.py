#!/usr/bin/env python3
"""What selecting blocks costs in quality, on a real model and on the recall model.

    scripts/bench.sh quality                      everything (some hours on 2 cores)
    scripts/bench.sh quality --quick              a few minutes: four settings at 2K
    scripts/bench.sh quality --only recall        the bundled recall model alone (10 min)
    scripts/bench.sh quality --settings 'pbs .*' --lengths 4096

The part `model` prefills SmolLM2-135M-Instruct through a server with every setting of
tests/quality/settings.py, hands the caches over, and decodes dense with transformers.
Its state is a log in the build folder: a run that ends early goes on where it was, unless
--fresh. Results are docs/results/quality_model.json, or --output NAME.

The part `recall` is bench_recall.py. Exit status 1 when it misses a bar.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
import time

import bench_recall
from bench_common import ROOT, run_header

LENGTHS = [2048, 4096, 7900]  # the context is 8192; answers and continuations follow
PROMPTS = 4
QUICK_PROMPTS = 2
SEED = 2602


def parse_arguments() -> argparse.Namespace:
    """The command line; --quick fills in what is not given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["model", "recall"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--models", type=pathlib.Path, help="folder of both (build/models)")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"default: {LENGTHS}")
    parser.add_argument("--prompts", type=int, help=f"of each kind and length ({PROMPTS})")
    parser.add_argument("--settings", help="a regular expression for whole names")
    parser.add_argument("--more", action="store_true", help="also the grid's further options")
    parser.add_argument("--time-limit", type=float, default=240, help="minutes, for model")
    parser.add_argument("--quick", action="store_true", help="four settings, 2K")
    parser.add_argument("--no-screen", action="store_true",
                        help="also go on with settings whose loss is far out")  # fmt: skip
    parser.add_argument("--resume", action="store_true", default=True, help="the default")
    parser.add_argument("--fresh", action="store_true", help="drop the log of earlier runs")
    parser.add_argument("--output", default="quality_model", help="name of the results")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--list", action="store_true", help="print the settings and end")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.models = arguments.models or arguments.build / "models"
    arguments.lengths = arguments.lengths or (LENGTHS[:1] if quick else LENGTHS)
    arguments.prompts = arguments.prompts or (QUICK_PROMPTS if quick else PROMPTS)
    return arguments


def chosen_settings(arguments: argparse.Namespace) -> tuple:
    """Dense, and of the others what the arguments name."""
    import settings

    pattern = arguments.settings
    if pattern is not None:
        wanted = [s for s in settings.all_settings() if re.fullmatch(pattern, s.name)]
    else:
        wanted = settings.all_settings(more=arguments.more)
    if arguments.quick and pattern is None:
        wanted = [s for s in wanted if s.name in settings.QUICK]
    return (settings.all_settings()[0], *(s for s in wanted if s.name != settings.DENSE))


def measure_model(arguments: argparse.Namespace, header: dict) -> None:
    """The part `model`. Its imports need torch and transformers."""
    import model_quality

    settings = chosen_settings(arguments)
    if arguments.list:
        print("\n".join(setting.name for setting in settings))
        return
    plan = model_quality.Plan(
        settings=settings,
        lengths=tuple(sorted(arguments.lengths)),
        prompts=arguments.prompts,
        seed=arguments.seed,
        deadline=time.monotonic() + 60 * arguments.time_limit,
        screen=not arguments.no_screen,
    )
    model_quality.run_model(arguments, plan, header)


def main() -> int:
    """Runs the chosen parts."""
    sys.path[:0] = [str(ROOT / "client/python"), str(ROOT / "tests/quality")]
    arguments = parse_arguments()
    header = run_header()
    if "model" in arguments.only:
        measure_model(arguments, header)
    if "recall" in arguments.only and not arguments.quick and not arguments.list:
        return bench_recall.run_recall(arguments.build, header)
    return 0


if __name__ == "__main__":
    sys.exit(main())
