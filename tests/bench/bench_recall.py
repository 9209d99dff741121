"""Retrieval accuracy of the bundled model by method, threshold and length.

    scripts/bench.sh quality --only recall        writes docs/results/quality.json

Each row asks the same questions (tests/quality/recall_task.py, 32 per prompt). `pbs,
identity order` is the method with permutation switched off; `random blocks` replaces
what pbs selected by as many random past blocks.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

import numpy as np
from bench_common import ROOT, Worker, write_results

sys.path.insert(0, str(ROOT / "tests/quality"))
import recall_task  # noqa: E402

# Length -> key-value pairs in the context, as the model was trained.
PAIRS = {1024: 64, 2048: 96, 4096: 96, 8192: 96}
QUESTIONS = 32
PROMPTS = 8  # per length
SEED = 2510
MODEL = ROOT / "tests/data/recall-llama"
THRESHOLDS = [0.5, 0.7, 0.9]


def write_prompts(folder: pathlib.Path, length: int, count: int, seed: int) -> pathlib.Path:
    """Prompts of one length as the worker reads them."""
    rng = np.random.default_rng([seed, length])
    prompts = recall_task.make_prompts(rng, count, length, PAIRS[length], QUESTIONS)
    path = folder / f"prompts_{length}.json"
    rows = zip(prompts.tokens.tolist(), prompts.answers.tolist())
    path.write_text(
        json.dumps(
            [
                {"tokens": tokens, "asked": prompts.asked.tolist(), "answers": answers}
                for tokens, answers in rows
            ]
        )
    )
    return path


def measure(worker: Worker, prompts: pathlib.Path, **words: object) -> dict:
    """Accuracy and density of one configuration."""
    worker.ask("recall", name="r", prompts=str(prompts), **words)
    reply = worker.ask("run", name="r")
    return {key: reply[key] for key in ("accuracy", "density", "questions")}


def measure_length(worker: Worker, prompts: pathlib.Path) -> dict[str, dict]:
    """All configurations at one length."""
    rows = {"dense": measure(worker, prompts, method="dense")}
    for t in THRESHOLDS:
        pbs = {"method": "pbs", "threshold": t}
        rows[f"pbs {t}"] = own = measure(worker, prompts, **pbs)
        for label, words in (
            ("query-head scope", {"scope": "query_head"}),
            ("identity order", {"order": "identity"}),
            ("random blocks", {"density": own["density"]}),
        ):
            rows[f"pbs {t}, {label}"] = measure(worker, prompts, **pbs, **words)
        rows[f"mean_pooling {t}"] = measure(
            worker, prompts, method="mean_pooling", threshold=t
        )
    return rows


def missed_bars(results: dict[int, dict[str, dict]]) -> list[str]:
    """The bars of the quality test that these results miss."""
    missed = []

    def bar(holds: bool, text: str) -> None:
        if not holds:
            missed.append(text)

    for length, rows in results.items():
        accuracy = {name: row["accuracy"] for name, row in rows.items()}
        if length <= 4096:
            bar(accuracy["dense"] >= 0.98, f"{length}: dense {accuracy['dense']:.3f} < .98")
        bar(
            accuracy["pbs 0.9"] >= accuracy["dense"] - 0.02,
            f"{length}: pbs at .9 {accuracy['pbs 0.9']:.3f}, dense {accuracy['dense']:.3f}",
        )
        gain = accuracy["pbs 0.7"] - accuracy["pbs 0.7, identity order"]
        bar(gain >= 0.1, f"{length}: pbs at .7 beats the identity order by {gain:.3f} only")
        lost = accuracy["pbs 0.7"] - accuracy["pbs 0.7, random blocks"]
        bar(lost >= 0.1, f"{length}: random blocks lose {lost:.3f} only")
    return missed


def run_recall(build: pathlib.Path, header: dict) -> int:
    """Measures, prints, writes, and judges: 1 when a bar is missed, else 0."""
    worker = Worker([str(build / "bin/bench_worker"), "--threads", "2"])
    worker.ask("model", path=str(MODEL))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for length in PAIRS:
            prompts = write_prompts(pathlib.Path(folder), length, PROMPTS, SEED)
            results[length] = measure_length(worker, prompts)
            print(f"length {length}", file=sys.stderr, flush=True)
            for name, row in results[length].items():
                print(
                    f"    {name:28} accuracy {row['accuracy']:.3f}  density {row['density']:.3f}",
                    file=sys.stderr,
                    flush=True,
                )
    worker.close()
    missed = missed_bars(results)
    figures = {"questions": PROMPTS * QUESTIONS, "seed": SEED, "results": results}
    write_results("quality", header, {**figures, "missed_bars": missed})
    print("\n".join(missed) or "every bar is met", file=sys.stderr)
    return 1 if missed else 0
