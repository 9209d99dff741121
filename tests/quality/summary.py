"""Sums up a run's records: figures by setting and length, and the cells of the rule.

Means are over prompts. A standard error is that of the prompts' mean, never of tokens or
questions. What is compared with dense is compared prompt by prompt: a setting's prompts
are matched with the same prompts of dense.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from rule import DENSE, Cell, Mean

TEXT, RETRIEVAL = "text", "retrieval"
PAPER = "pbs 0.9"  # the setting of the PBS-Attn paper
DEPTHS = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.01))
Record = Mapping[str, Any]
Pairs = list[tuple[Record, Record]]  # the setting's and dense's, of the same prompt


def paired(records: Iterable[Record], setting: str, length: int) -> dict[str, Pairs]:
    """A setting's records beside those of dense, by kind of prompt."""
    own: dict[tuple[str, int], Record] = {}
    dense: dict[tuple[str, int], Record] = {}
    for record in records:
        if record["length"] == length:
            place = (record["kind"], record["index"])
            if record["setting"] == setting:
                own[place] = record
            if record["setting"] == DENSE:
                dense[place] = record
    pairs: dict[str, Pairs] = {TEXT: [], RETRIEVAL: []}
    for place in sorted(own.keys() & dense.keys()):
        pairs[place[0]].append((own[place], dense[place]))
    return pairs


def excess(pairs: Pairs, name: str) -> Mean:
    """How far the mean of a loss is above that of dense, as a share of dense's."""
    of_dense = statistics.fmean(dense[name] for _, dense in pairs)
    return Mean.of([(own[name] - dense[name]) / of_dense for own, dense in pairs])


def median_ratio(pairs: Pairs, name: str) -> float:
    """The median of the prompts' ratios to dense."""
    return statistics.median(own[name] / dense[name] for own, dense in pairs)


def mean(pairs: Pairs, name: str) -> Mean:
    """Over the setting's prompts."""
    return Mean.of([own[name] for own, _ in pairs])


def density(pairs: Pairs) -> Mean:
    """Computed blocks over causal blocks, which are those that dense computes."""
    name = "executed_flops"
    return Mean.of([own[name] / dense[name] for own, dense in pairs])


def text_figures(pairs: Pairs) -> dict[str, Any]:
    """Loss by position, continuation and agreement."""
    bins = zip(*(own["nll_by_position"] for own, _ in pairs))
    kl = next(name for name in pairs[0][0] if name.startswith("kl_last_"))
    return {
        "nll": mean(pairs, "nll"),
        "nll_excess": excess(pairs, "nll"),
        "nll_excess_by_text": {
            name: excess([p for p in pairs if p[0]["text"] == name], "nll")
            for name in sorted({own["text"] for own, _ in pairs})
        },
        "nll_by_position": [round(statistics.fmean(values), 5) for values in bins],
        "continuation_nll": mean(pairs, "continuation_nll"),
        "continuation_excess": excess(pairs, "continuation_nll"),
        "top1_agreement": mean(pairs, "top1_agreement"),
        kl: mean(pairs, kl),
        "density": density(pairs),
        "coverage": mean(pairs, "coverage"),
    }


def retrieval_figures(pairs: Pairs) -> dict[str, Any]:
    """Scores by task, haystack, depth and place of the question."""
    groups: dict[str, dict[str, list[float]]] = {
        name: defaultdict(list) for name in ("task", "haystack", "depth", "asked")
    }
    whole, first_right = [], []
    for own, _ in pairs:
        for answer in own["answers"]:
            score = answer["parts_right"]
            groups["task"][answer["task"]].append(score)
            groups["haystack"][own["haystack"]].append(score)
            asked = "in the prompt" if answer["in_prompt"] else "over the cache"
            groups["asked"][asked].append(score)
            for low, high in DEPTHS:
                if answer["depth"] is not None and low <= answer["depth"] < high:
                    groups["depth"][f"{low:.2f}..{min(high, 1):.2f}"].append(score)
            whole.append(answer["whole"])
            if answer["in_prompt"]:
                first_right.append(answer["first_right"])
    differences = [own["score"] - dense["score"] for own, dense in pairs]
    return {
        "score": mean(pairs, "score"),
        "score_difference": Mean.of(differences),
        "questions": len(whole),
        "whole": statistics.fmean(whole),
        "first_token_of_the_prefill_right": statistics.fmean(first_right),
        "answer_nll": mean(pairs, "answer_nll"),
        **{
            f"by_{name}": {
                label: {
                    "score": round(statistics.fmean(scores), 4),
                    "questions": len(scores),
                }
                for label, scores in sorted(group.items())
            }
            for name, group in groups.items()
        },
        "density": density(pairs),
        "coverage": mean(pairs, "coverage"),
    }


def time_figures(pairs: Pairs) -> dict[str, Any]:
    """Medians over all prompts, as ratios to dense on the same prompt."""
    return {
        "cpu_ratio": median_ratio(pairs, "cpu_seconds"),
        "attention_ratio": median_ratio(pairs, "attention_seconds"),
        "cpu_seconds": statistics.median(own["cpu_seconds"] for own, _ in pairs),
        "attention_seconds": statistics.median(
            own["attention_seconds"] for own, _ in pairs
        ),
        "prompts": len(pairs),
    }


def figures(records: Iterable[Record], setting: str, length: int) -> dict[str, Any] | None:
    """All figures of a setting at a length; None while a kind of prompt is missing."""
    pairs = paired(records, setting, length)
    if not pairs[TEXT] or not pairs[RETRIEVAL]:
        return None
    return {
        "text": text_figures(pairs[TEXT]),
        "retrieval": retrieval_figures(pairs[RETRIEVAL]),
        "time": time_figures(pairs[TEXT] + pairs[RETRIEVAL]),
    }


def cell(of: Mapping[str, Any]) -> Cell:
    """What the rule reads, from figures()."""
    return Cell(
        text_excess=of["text"]["nll_excess"],
        continuation_excess=of["text"]["continuation_excess"],
        score_difference=of["retrieval"]["score_difference"],
        time_ratio=of["time"]["cpu_ratio"],
        density=of["text"]["density"].mean,
    )


def best_of_methods(results: dict[str, Any]) -> list[str]:
    """The settings of the README, of results(): dense, the default, the paper's, one per other method.

    Of a method the fastest setting that holds at the longest length, or else the one that
    loses least there.
    """
    settings, failed = results["settings"], results["choice"]["failed"]
    longest = str(results["lengths"][-1])

    def rank(name: str) -> tuple[bool, float]:
        figures = settings[name]["lengths"][longest]
        if name in failed:
            return True, figures["text"]["nll_excess"]["mean"]
        return False, figures["time"]["cpu_ratio"]

    shown = list(dict.fromkeys(["dense", results["choice"]["setting"], PAPER]))
    seen = {settings[name]["method"] for name in shown[:2]}
    for method in dict.fromkeys(s["method"] for s in settings.values()):
        own = [n for n, s in settings.items() if s["method"] == method]
        whole = [n for n in own if longest in settings[n]["lengths"]]
        if method not in seen and whole:
            shown.append(min(whole, key=rank))
    return [name for name in dict.fromkeys(shown) if name in settings]


def to_json(value: Any) -> Any:
    """Plain dicts for json.dumps; floats with six significant digits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
