#!/usr/bin/env python3
"""The attention kernels of this tree beside those of an earlier commit, in one run.

    scripts/bench.sh revision REV                          (15 min)

Cases of both are interleaved. The result, docs/results/cpu_revision.json, has for each
method and length the median of the rounds' ratios: above 1 this tree is faster.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics

from bench_common import ROOT, Case, Worker, run_group, run_header, write_results

LENGTHS = {8192: 11, 32768: 3}  # tokens: rounds
METHODS = ("dense", "pbs", "mean_pooling")
SHAPE = {"dtype": "f32", "heads": 2, "kv_heads": 1, "head_dim": 128}


def compare(length: int, rounds: int, before: Worker, after: Worker) -> dict:
    """One length: every method of both revisions."""
    words = {**SHAPE, "len": length}
    cases = [
        Case(f"{method}, {name}", worker, "attention", **words, method=method)
        for method in METHODS
        for name, worker in (("before", before), ("after", after))
    ]
    group = run_group(f"{length} tokens", cases, rounds)
    speed = {
        method: {
            clock: statistics.median(
                x[clock] / y[clock] for x, y in zip(cases[2 * i].runs, cases[2 * i + 1].runs)
            )
            for clock in ("wall", "cpu")
        }
        for i, method in enumerate(METHODS)
    }
    return {**group, "length": length, "speed_over_before": speed}


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, help="bench_worker of the earlier commit")
    parser.add_argument("--before-commit", required=True)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    arguments = parser.parse_args()
    header = run_header()
    before = Worker([arguments.before, "--threads", "2"])
    after = Worker([str(arguments.build / "bin/bench_worker"), "--threads", "2"])
    groups = [compare(length, n, before, after) for length, n in LENGTHS.items()]
    for worker in (before, after):
        worker.close()
    figures = {"before": arguments.before_commit, "groups": groups}
    write_results("cpu_revision", header, figures)


if __name__ == "__main__":
    main()
