"""Prefills of one length through a running server, beside torch's, in interleaved rounds."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
from machine import REHEARSAL
from pbs_client import Client, Dense, Logits, Pbs, PbsError
from progress import first_line

MODEL = "big"
CALL_SECONDS_MAX = 30  # of the longest prefill, by far
ROUNDS_MAX = 2 if REHEARSAL else 9
# Logits of the last token, of two runs in bf16 that round in other places.
COSINE_MIN = 0.98
DENSITY_ERROR_MAX, CALIBRATIONS_MAX = 0.01, 6
REPLAY = "density replay"


def prompt(tokens: int, vocab_size: int, seed: int = 1) -> np.ndarray:
    """Random ids, the same for all who run it."""
    return np.random.default_rng(seed).integers(2, vocab_size, tokens).astype(np.uint32)


def find_threshold(
    wanted: float, density_at: Callable[[float], float], end: float = math.inf
) -> tuple[float, float, bool]:
    """A threshold, its density, and whether that is the wanted one, found before `end`. A
    served prefill takes no lists, but what it visits grows with the threshold."""
    below, above = (0.0, 0.0), (1.0, 1.0)
    threshold = reached = 0.0
    for _ in range(CALIBRATIONS_MAX):
        if time.monotonic() > end:
            break
        share = (wanted - below[1]) / max(above[1] - below[1], 1e-9)
        # Not next to an end: the other one would never move.
        threshold = below[0] + min(max(share, 0.05), 0.95) * (above[0] - below[0])
        reached = density_at(threshold)
        if abs(reached - wanted) <= DENSITY_ERROR_MAX:
            return threshold, reached, True
        if reached < wanted:
            below = (threshold, reached)
        else:
            above = (threshold, reached)
    return threshold, reached, False


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict:
    """How alike two rows of logits are."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
    return {"cosine": cosine, "from": "torch", "right": cosine >= COSINE_MIN}


def measure_length(
    client: Client, peer: Callable | None, ids: np.ndarray, density: float | None, end: float
) -> tuple[list[dict], PbsError | None]:
    """A row for each of what runs, and the error of the server that ended it: what was
    measured before stands. `peer` gives torch's logits."""

    def serve(method: Dense | Pbs, **options):
        return client.prefill(MODEL, ids, method, timeout=CALL_SECONDS_MAX, **options)

    rows: dict[str, dict] = {"dense": {}, "pbs": {}}
    runs: dict[str, list[tuple[float, object]]] = {}  # seconds and result
    failure = None
    try:
        calls = {"dense": lambda: serve(Dense()), "pbs": lambda: serve(Pbs())}
        begin = time.monotonic()
        warm = serve(Dense(), logits=Logits(all_of_last_token=True))
        dense_seconds = time.monotonic() - begin
        if peer is not None:
            rows["torch"] = {"peer": True}
            try:
                rows["dense"] |= compare(warm.last_token_logits, peer(ids.tolist()))
                calls = {"torch": lambda: peer(ids.tolist())} | calls
            except RuntimeError as error:
                rows["torch"]["error"] = first_line(error)
        if density is not None:
            # The search leaves the time for a round, and for a call that began last.
            search_end = end - (len(calls) + 2) * dense_seconds
            threshold, reached, found = find_threshold(
                density, lambda t: serve(Pbs(threshold=t)).stats.density, search_end
            )
            rows[REPLAY] = {"wanted_density": density, "threshold": threshold}
            if found:
                calls[REPLAY] = lambda: serve(Pbs(threshold=threshold))
            else:
                why = "no time to find its threshold" if time.monotonic() > search_end else "no threshold"
                rows[REPLAY]["error"] = f"{why}: {threshold:.3f} gives {reached:.3f}"
        interleave(calls, end, runs, rows)
    except PbsError as error:
        failure = error
    for name, own in runs.items():
        rows[name] |= figures(own, runs) if own else {}
    if failure is not None:
        done = max(map(len, runs.values()), default=0)
        for row in rows.values():
            row |= {} if "ttft_seconds" in row else {"error": f"{str(failure)[:200]} ({done} rounds)"}
    return [{"name": name} | row for name, row in rows.items()], failure


def interleave(calls: dict[str, Callable], end: float, runs: dict[str, list], rows: dict) -> None:
    """Adds to `runs` rounds in which every call runs once. A peer that fails runs in no
    further round, which its row tells."""
    runs |= {name: [] for name in calls}
    begin = time.monotonic()
    for count in range(ROUNDS_MAX):
        spent = time.monotonic() - begin
        if count > 0 and begin + spent + spent / count > end:
            break  # there is no time for another one
        for name, call in calls.items():
            if "error" in rows[name]:
                continue
            try:
                started = time.perf_counter()
                result = call()
                runs[name].append((time.perf_counter() - started, result))
            except RuntimeError as error:
                rows[name]["error"] = first_line(error)


def figures(own: list[tuple], runs: dict[str, list[tuple]]) -> dict:
    """The median run, and what the server says of it; a ratio is the median of the rounds'
    own."""
    seconds, result = sorted(own, key=lambda run: run[0])[len(own) // 2]
    found: dict = {"ttft_seconds": seconds, "ttft_min_seconds": min(run[0] for run in own),
                   "rounds": len(own)}  # fmt: skip
    for other in ("dense", "torch"):
        if runs.get(other) and runs[other] is not own:
            pairs = zip(runs[other], own)  # of the rounds that both were in
            found[f"{other}_over_this"] = statistics.median(a[0] / b[0] for a, b in pairs)
    stats = getattr(result, "stats", None)
    return found if stats is None else found | {"stats": dataclasses.asdict(stats)}
