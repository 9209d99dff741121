#!/usr/bin/env python3
"""Faults of the hand-off, with real processes: seeded, one after another on each lane.

    python tests/faults/run.py --faults 1000 --seed 1 --json FILE
    python tests/faults/run.py --seed 1 --only 17     the fault of that number alone

The server is that of PBS_BIN or of build/ (tests/python/real_server.py). After every
fault: whatever was handed over as a cache is bit-equal to the cache without a fault, or
the call ended with a code that is right for the fault (matrix.py); the next request is
bit-equal; and within the lease and 2 s the node holds no byte and no lease.

Prints one JSON line; exit status 1 when something was not as it should be.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "bench")]
from bench_common import run_header  # noqa: E402
from caches import VOCABULARY  # noqa: E402
from fault_processes import LEASE_SECONDS  # noqa: E402
from lane import FREE_SECONDS_MAX, Lane  # noqa: E402
from matrix import FAULTS, LAYERS, Fault  # noqa: E402

PROGRESS_FAULTS = 100
MODEL_FLAGS = (
    *("--preset", "tiny", "--layers", str(LAYERS), "--vocab-size", str(VOCABULARY)),
)


def fault_of(seed: int, index: int) -> tuple[Fault, random.Random]:
    """The fault of a number, and what chooses its details."""
    bag = [fault for fault in FAULTS for _ in range(fault.weight)]
    random.Random(f"{seed} bag {index // len(bag)}").shuffle(bag)
    return bag[index % len(bag)], random.Random(f"{seed} fault {index}")


def happen(lane: Lane, fault: Fault) -> list[str]:
    """Brings a fault about; what was wrong after it."""
    fault.bring_about(lane)
    lane.settle()
    wrong = fault.wrong(lane.outcomes)
    if not lane.next_request():
        wrong.append("next request: another cache")
    if not lane.nothing_held():
        wrong.append(f"held after the lease and {FREE_SECONDS_MAX} s: {lane.node.held()}")
    return wrong


class Run:
    """Lanes that take fault after fault."""

    def __init__(
        self, model: pathlib.Path, seed: int, indices: list[int], minutes: float
    ) -> None:
        self._model, self._seed = model, seed
        self._left = collections.deque(indices)
        self._end = time.monotonic() + 60 * minutes
        self._lock = threading.Lock()
        self.counts: dict[str, collections.Counter[str]] = {
            fault.name: collections.Counter() for fault in FAULTS
        }
        self.failures: list[dict[str, Any]] = []
        self.server_commit = ""
        self.done = 0
        self.seconds_held = 0.0

    def work(self) -> None:
        """One lane, until no fault is left. A fault that fails gets the next a new one."""
        lane: Lane | None = None
        while self._left and time.monotonic() < self._end:
            try:
                index = self._left.popleft()
            except IndexError:
                break
            try:
                lane = lane or Lane(self._model)
            except Exception:
                self._fail(index, [traceback.format_exc()], [], [])
                continue
            if not self._one(lane, index):
                lane.close()
                lane = None
        if lane is not None:
            lane.close()

    def _one(self, lane: Lane, index: int) -> bool:
        fault, rng = fault_of(self._seed, index)
        lane.begin(rng)
        self.server_commit = lane.server_commit
        try:
            wrong = happen(lane, fault)
        except Exception:
            wrong = [traceback.format_exc()]
        with self._lock:
            self.done += 1
            self.counts[fault.name]["faults"] += 1
            self.counts[fault.name]["cuts, flips and holds of the relay"] += lane.hits
            for who, outcome in lane.outcomes:
                self.counts[fault.name][f"{who}: {outcome}"] += 1
            self.seconds_held = max(self.seconds_held, lane.seconds_held)
            if self.done % PROGRESS_FAULTS == 0:
                failed = len(self.failures)
                print(f"{self.done} faults, {failed} did harm", file=sys.stderr, flush=True)
        if wrong:
            self._fail(index, wrong, lane.notes, list(lane.node.log)[-20:])
        return not wrong

    def _fail(self, index: int, wrong: list[str], notes: list[str], log: list[str]) -> None:
        failure = {"seed": self._seed, "index": index}
        failure["fault"] = fault_of(self._seed, index)[0].name
        with self._lock:
            self.failures.append({**failure, "wrong": wrong, "notes": notes, "log": log})


def run(seed: int, indices: list[int], lanes: int, minutes: float) -> dict[str, Any]:
    """Brings the faults about and says what came of them."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "model"
        script = HERE.parent / "models" / "make_random_model.py"
        command = [sys.executable, str(script), *MODEL_FLAGS, "--out", str(model)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        running = Run(model, seed, indices, minutes)
        threads = [threading.Thread(target=running.work) for _ in range(lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {
        "seed": seed,
        "server_commit": running.server_commit,
        "faults": running.done,
        "lanes": lanes,
        "lease_seconds": LEASE_SECONDS,
        "free_seconds_max": FREE_SECONDS_MAX,
        "seconds": round(time.monotonic() - begin, 1),
        "longest_seconds_until_nothing_held": round(running.seconds_held, 2),
        "failed": len(running.failures),
        "not_run": len(indices) - running.done,
        "outcomes": {
            name: dict(sorted(counts.items())) for name, counts in running.counts.items()
        },
        "failures": running.failures,
    }


def main() -> int:
    """Runs the faults; 1 when one of them did harm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=4, help="faults at once, a node each")
    parser.add_argument("--minutes", type=float, default=1e6, help="end the run then")
    parser.add_argument("--only", type=int, help="number of the one fault to bring about")
    parser.add_argument("--json", type=pathlib.Path, help="file to write as well")
    given = parser.parse_args()
    only = given.only is not None
    indices = [given.only] if only else list(range(given.faults))
    result = run(given.seed, indices, 1 if only else given.lanes, given.minutes)
    for failure in result["failures"]:
        print(json.dumps(failure, indent=1), file=sys.stderr)
    print(json.dumps({k: v for k, v in result.items() if k != "failures"}))
    if given.json:
        given.json.write_text(json.dumps({**run_header(), **result}, indent=1) + "\n")
    return 1 if result["failed"] or result["not_run"] else 0


if __name__ == "__main__":
    sys.exit(main())
