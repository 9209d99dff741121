#!/usr/bin/env python3
"""Measures how much of a cache's transfer hides behind the prefill, and writes JSON.

    scripts/bench.sh overlap

A round: a prefill with delivery `lease`; a fetch that starts with `admitted` and follows
it; then, with the server idle, a fetch of the same cache. The transfer that the consumer
waits for is what is left of the first fetch after `done`. Its share of the idle fetch is
the exposed share; the rest is hidden. The consumer is a thread of this process, over
loopback, with checksums.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import threading
import time

from bench_common import ROOT, run_header, write_results

sys.path[:0] = [str(ROOT / "client/python"), str(ROOT / "tests/python")]
from pbs_client import Client, Lease  # noqa: E402
from real_server import running_server  # noqa: E402

GOAL = 0.9


class Follower:
    """A fetch that starts when the prefill is admitted, on a connection of its own."""

    def __init__(self, target: str):
        self._target = target
        self._thread: threading.Thread | None = None
        self.ticket = None
        self.end = 0.0

    def start(self, _admitted, ticket) -> None:
        self.ticket = ticket
        self._thread = threading.Thread(target=self._fetch)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _fetch(self) -> None:
        with Client(self._target) as client:
            client.fetch(self.ticket)
            self.end = time.monotonic()


def measure(client: Client, target: str, tokens: list[int], method: str | None) -> dict:
    """One round."""
    follower = Follower(target)
    begin = time.monotonic()
    result = client.prefill(
        "", tokens, method, delivery=Lease(ttl_seconds=600), on_admitted=follower.start
    )
    done = time.monotonic()
    follower.join()
    idle = time.monotonic()
    cache = client.fetch(follower.ticket)
    alone = time.monotonic() - idle
    client.release(follower.ticket)
    exposed = max(0.0, follower.end - done)
    return {
        "prefill_seconds": done - begin,
        "density": result.stats.density,
        "cache_bytes": sum(array.nbytes for array in (*cache.k, *cache.v)),
        "fetch_alone_seconds": alone,
        "exposed_seconds": exposed,
        "hidden": 1 - exposed / alone,
    }


def main() -> int:
    """Runs the rounds and writes the results. Exit status 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="its folder")
    parser.add_argument("--tokens", type=int, default=32768, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", help="of the attention; the server's default")
    arguments = parser.parse_args()
    header = run_header()
    rounds = []
    flags = ("--backend", "cpu", "--model", f"timed={arguments.model}")
    with running_server(*flags) as server, Client(server.target) as client:
        vocabulary = client.models()[0].vocab_size
        tokens = [(7919 * i) % vocabulary for i in range(arguments.tokens)]
        for _ in range(arguments.rounds):
            rounds.append(measure(client, server.target, tokens, arguments.method))
            print(
                "    prefill {prefill_seconds:.1f} s, fetch alone {fetch_alone_seconds:.3f} s, "
                "after `done` {exposed_seconds:.3f} s: {hidden:.3f} hidden".format(**rounds[-1]),
                file=sys.stderr,
            )
    hidden = statistics.median(row["hidden"] for row in rounds)
    figures = {
        "tokens": arguments.tokens,
        "method": arguments.method or "the server's default",
        "model": arguments.model.name,
        "rounds": rounds,
        "hidden": hidden,
        "goal": GOAL,
    }
    write_results("kv_overlap", header, figures)
    return 0 if hidden >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
