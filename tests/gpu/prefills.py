"""Prefills of one length through a running server, beside torch's, in interleaved rounds."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from bench_common import Worker
from pbs_client import Client, Dense, Pbs, PbsError
from progress import first_line
from workload import prompt

MODEL = "big"
CALL_SECONDS_MAX = 60  # of the longest prefill, by far
ROUNDS_MIN, ROUNDS_MAX, ROUND_SECONDS = 3, 9, 20.0
# Logits of the last token, of two runs in bf16 that round in other places.
COSINE_MIN = 0.98
DENSITY_ERROR_MAX, CALIBRATIONS_MAX = 0.01, 6


@dataclasses.dataclass
class Density:
    """A density to be reached by the threshold.

    A served prefill takes no lists, so it cannot be told what to visit. What it visits
    grows with the threshold, so the threshold is searched at which as much is visited as
    was published: ordering and selection are in the time, the choice of blocks is its own.
    """

    wanted: float
    threshold: float = 0.0
    reached: float = 0.0

    def search(self, density_at: Callable[[float], float], end: float = math.inf) -> bool:
        """Whether a threshold was found before `end`; `density_at` must not fall."""
        below, above = (0.0, 0.0), (1.0, 1.0)
        for _ in range(CALIBRATIONS_MAX):
            if time.monotonic() > end:
                return False
            share = (self.wanted - below[1]) / max(above[1] - below[1], 1e-9)
            # Not next to an end: the other one would never move.
            share = min(max(share, 0.05), 0.95)
            self.threshold = below[0] + share * (above[0] - below[0])
            self.reached = density_at(self.threshold)
            if abs(self.reached - self.wanted) <= DENSITY_ERROR_MAX:
                return True
            if self.reached < self.wanted:
                below = (self.threshold, self.reached)
            else:
                above = (self.threshold, self.reached)
        return False


@dataclasses.dataclass
class Run:
    """One prefill: wall seconds at its caller, and what the server says of it."""

    seconds: float
    stats: object = None  # PrefillStats; None of torch


class Length:
    """Prefills of one prompt."""

    def __init__(self, client: Client, peer: Worker | None, facts: dict, tokens: int):
        self.client, self.peer, self.tokens = client, peer, tokens
        self.ids = np.array(prompt(tokens, facts["vocab_size"]), np.uint32)
        self.sdpa = ""
        self.warm_seconds = 0.0  # of the dense warm-up: about what a run takes at most

    def serve(self, method: Dense | Pbs, **options) -> Run:
        """Through the server."""
        begin = time.perf_counter()
        result = self.client.prefill(
            MODEL, self.ids, method, timeout=CALL_SECONDS_MAX, **options
        )
        self.logits = result.last_token_logits
        return Run(time.perf_counter() - begin, result.stats)

    def torch(self, **options) -> Run:
        """In the peer. RuntimeError where it cannot."""
        reply = self.peer.ask("prefill", tokens=self.tokens, seed=1, **options)
        self.sdpa = reply["sdpa"]
        return Run(reply["seconds"])

    def warm_up(self) -> tuple[dict[str, dict], dict[str, Callable[[], Run]]]:
        """Rows that have begun, and what to run in rounds; dense logits are compared."""
        rows: dict[str, dict] = {"torch": {}, "dense": {}, "pbs": {}}
        calls = {"dense": lambda: self.serve(Dense()), "pbs": lambda: self.serve(Pbs())}
        self.warm_seconds = self.serve(Dense(), last_token_logits=True).seconds
        if self.peer is None:
            rows["torch"]["error"] = "there is no torch model"
            return rows, calls
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "logits.npy"
            try:
                self.torch(logits=str(path))
            except RuntimeError as error:
                rows["torch"]["error"] = first_line(error)
                return rows, calls
            rows["dense"] |= compare(self.logits, np.load(path))
        return rows, {"torch": self.torch} | calls


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict:
    """How alike two rows of logits are."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
    return {"cosine": cosine, "from": "torch", "right": cosine >= COSINE_MIN}


def measure_length(
    client: Client, peer: Worker | None, facts: dict, tokens: int, replay: Density | None, end: float
) -> tuple[list[dict], PbsError | None]:
    """A row for each of what runs, and the error of the server that ended it: what was
    measured before stands."""
    length = Length(client, peer, facts, tokens)
    rows: dict[str, dict] = {}
    runs: dict[str, list[Run]] = {}
    failure = None
    try:
        rows, calls = length.warm_up()
        if replay is not None:
            name, rows[name], call = find_replay(length, replay, len(calls) + 1, end)
            if call is not None:
                calls[name] = call
        failed = interleave(calls, end, runs)
        for name, error in failed.items():
            rows[name]["failed" if runs[name] else "error"] = error
    except PbsError as error:
        failure = error
    for name, own in runs.items():
        if own:
            rows[name] |= figures(own, runs)
    if "torch" in rows:
        rows["torch"]["sdpa"] = length.sdpa
    found = [{"name": name} | row for name, row in rows.items() if row]
    if failure is None:
        return found, None
    rounds = min((len(own) for name, own in runs.items() if name != "torch"), default=0)
    why = f"{str(failure)[:200]} (after {rounds} rounds)"
    kept = [row if "ttft_seconds" in row else {"error": why} | row for row in found]
    return [*kept, {"name": None, "error": why}], failure


def find_replay(
    length: Length, replay: Density, calls: int, end: float
) -> tuple[str, dict, Callable[[], Run] | None]:
    """Name and row of a density replay, and what to run in rounds of `calls`, for the
    first of which the search leaves the time."""
    row: dict = {"wanted_density": replay.wanted}

    def density_at(threshold: float) -> float:
        return length.serve(Pbs(threshold=threshold)).stats.density

    # A search that begins a call at the last moment is one call over.
    search_end = end - (calls + 1) * length.warm_seconds
    is_found = replay.search(density_at, search_end)
    row["threshold"] = replay.threshold
    name = f"density replay {replay.wanted} by threshold"
    if is_found:
        return name, row, lambda: length.serve(Pbs(threshold=replay.threshold))
    why = "no time to find its threshold" if time.monotonic() > search_end else "no threshold gives it"
    row["error"] = f"{why}: {replay.threshold:.3f} gives {replay.reached:.3f}"
    return name, row, None


def interleave(
    calls: dict[str, Callable[[], Run]], end: float, runs: dict[str, list[Run]]
) -> dict[str, str]:
    """Adds to `runs` rounds in which every call runs once. A peer that fails runs in no
    further round; gives what it said, by name."""
    failed: dict[str, str] = {}
    runs |= {name: [] for name in calls}
    begin = time.monotonic()
    for count in range(ROUNDS_MAX):
        now = time.monotonic()
        if count > 0 and now + (now - begin) / count > end:
            break  # there is no time for another one
        if count >= ROUNDS_MIN and now - begin > ROUND_SECONDS:
            break
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                runs[name].append(call())
            except RuntimeError as error:
                print(f"{name}: {first_line(error)}", flush=True)
                failed[name] = first_line(error)
    return failed


def figures(own: list[Run], runs: dict[str, list[Run]]) -> dict:
    """Medians over the rounds; a ratio is the median of the rounds' own."""
    found: dict = {
        "ttft_seconds": statistics.median(run.seconds for run in own),
        "ttft_min_seconds": min(run.seconds for run in own),
        "rounds": len(own),
    }
    for other in ("dense", "torch"):
        if runs.get(other) and runs[other] is not own:
            pairs = zip(runs[other], own)  # of the rounds that both were in
            found[f"{other}_over_this"] = statistics.median(a.seconds / b.seconds for a, b in pairs)
    stats = [run.stats for run in own if run.stats is not None]
    return found | (served_figures(stats) if stats else {})


def served_figures(stats: list) -> dict:
    """What the server says of its prefills; `stages` are wall seconds."""
    stages = [dataclasses.asdict(one.stages) for one in stats]
    copied = [one for one in stats if one.kv_copy_seconds > 0]
    hidden = [1 - one.stages.copy / one.kv_copy_seconds for one in copied]
    return {
        "kv_ready_seconds": statistics.median(one.total_seconds for one in stats),
        "first_layer_seconds": statistics.median(one.time_to_first_layer_seconds for one in stats),
        "density": statistics.median(one.density for one in stats),
        "fallback_layers": max(one.fallback_layers for one in stats),
        "stages": {name: statistics.median(s[name] for s in stages) for name in stages[0]},
        "kv_copy_seconds": statistics.median(one.kv_copy_seconds for one in stats),
        # Of the copies from the device to ordinary memory; there are none on a CPU.
        "hidden_share": statistics.median(hidden) if hidden else None,
    }
