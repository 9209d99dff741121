#!/usr/bin/env python3
"""Mixed load on one server for minutes, then: nothing held, nothing lost, no growth.

    python tests/soak/soak.py --hanging-client build/tests/hanging_client --minutes 5

The server is that of PBS_BIN or of build/ (tests/python/real_server.py).
Runs the bundled model. Attend with every method and dtype, prefill with every delivery,
fetches of parts, cancels and deadlines, bad input, clients killed half way. Every answer
is compared with the first one to the same question. At a tenth of the time and at the
end the load pauses and the server must be empty: no byte charged, no lease, no queue.
Its memory may not have grown by more than RSS_GROWTH_MAX in between.

Prints one JSON line; exit status 1 when something was not as it should be.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import pathlib
import random
import re
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
from pbs_client import (
    Client,
    Dense,
    Inline,
    KvFormat,
    KvPart,
    Lease,
    MeanPooling,
    Pbs,
    Synthetic,
    Timing,
    errors,
)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "python"))
from real_server import RECALL_MODEL, RunningServer, running_server  # noqa: E402

VOCABULARY = 1024
# Allocator slack: arenas of threads that come and go. A leak of 1 KiB a request shows.
RSS_GROWTH_MAX = 32 << 20
QUIET_SECONDS_MAX = 120
LEASE_SECONDS = 5
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
METHODS = {
    "dense": Dense(),
    "pbs": Pbs(threshold=0.7),
    "pbs_query_head": Pbs(threshold=0.7, scope="query_head"),
    "mean_pooling": MeanPooling(threshold=0.7),
}
# Gauges that must be 0 when nobody asks for anything.
EMPTY = (
    "pbs_memory_charged_bytes",
    "pbs_kv_leases",
    "pbs_requests_running",
    "pbs_requests_waiting",
    "pbs_prefill_backlog_tokens",
    "pbs_kv_export_outstanding_bytes",
)


class StopHere(Exception):
    """Raised by a callback to leave a call half way."""


class Server:
    """A server that serves: where, and what it says of itself."""

    def __init__(self, running: RunningServer) -> None:
        self.target, self.metrics_target = running.target, running.metrics
        self._pid = running.process.pid

    def gauges(self) -> dict[str, float]:
        """The sum over labels of every gauge in EMPTY."""
        with urllib.request.urlopen(f"http://{self.metrics_target}/metrics") as reply:
            text = reply.read().decode()
        gauges = {}
        for name in EMPTY:
            values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M)
            if not values:
                raise LookupError(f"the server has no metric {name}")
            gauges[name] = sum(map(float, values))
        return gauges

    def resident_bytes(self) -> int:
        """Resident memory without pages that the system may take back at any time."""
        rollup = pathlib.Path(f"/proc/{self._pid}/smaps_rollup").read_text()
        kib = dict(re.findall(r"^(\w+):\s+(\d+) kB", rollup, re.M))
        return (int(kib["Rss"]) - int(kib["LazyFree"])) << 10


class Soak:
    """Workers on a server, each repeating one kind of work until told to stop."""

    def __init__(self, server: Server, hanging_client: str) -> None:
        self.server = server
        self.hanging_client = hanging_client
        self.done: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self._answers: dict[str, str] = {}
        self._lock = threading.Lock()
        self._go = threading.Event()
        self._stop = False
        self._active = 0
        self._threads: list[threading.Thread] = []

    # ---- the kinds of work

    def attend(self, client: Client, rng: random.Random) -> None:
        name, method = rng.choice(list(METHODS.items()))
        dtype, length = rng.choice(DTYPES), rng.choice((1, 100, 700, 1500))
        seed = rng.randrange(3)
        numbers = np.random.default_rng(seed)
        q, k, v = (
            numbers.standard_normal((1, heads, length, 64)).astype(dtype)
            for heads in (4, 2, 2)
        )
        result = client.attend(q, k, v, method, want=("o", "lse"))
        question = f"attend {name} {np.dtype(dtype).name} {length} {seed}"
        self.expect_same(question, result.o, result.lse)

    def attend_synthetic(self, client: Client, rng: random.Random) -> None:
        name, method = rng.choice(list(METHODS.items()))
        dtype = rng.choice(("f32", "f16", "bf16"))
        tensors = Synthetic(
            num_heads=4, num_kv_heads=2, seq_len=2048, head_dim=128, dtype=dtype
        )
        result = client.attend_synthetic(tensors, method, timing=Timing(repetitions=2))
        self.expect_same(f"synthetic {name} {dtype}", result.o)

    def prefill(self, client: Client, rng: random.Random) -> None:
        name, method = rng.choice(list(METHODS.items()))
        question, tokens = self.prompt(rng)
        inline = rng.random() < 0.5
        result = client.prefill(
            "recall", tokens, method, delivery="inline" if inline else None
        )
        self.expect_same(f"token {name} {question}", result.first_token)
        if inline:
            self.expect_same_cache(f"{name} {question}", result.kv)

    def lease(self, client: Client, rng: random.Random) -> None:
        name, method = rng.choice(list(METHODS.items()))
        question, tokens = self.prompt(rng)
        result = client.prefill(
            "recall", tokens, method, delivery=Lease(LEASE_SECONDS)
        )
        part = rng.randrange(3)
        try:
            if part == 0:
                self.expect_same_cache(f"{name} {question}", client.fetch(result.ticket))
            elif part == 1:
                cache = client.fetch(result.ticket, kv_format=KvFormat("f32", "NHD"))
                self.expect_same(f"f32 NHD {name} {question}", *arrays_of(cache))
            else:
                second = KvPart(layers=(1, 1), heads=(1, 1))
                cache = client.fetch(result.ticket, part=second)
                self.expect_same(f"part {name} {question}", *arrays_of(cache))
            if rng.random() < 0.7:  # the rest expire
                client.release(result.ticket)
        except errors.NotFoundError:
            self.count(self.refused, "lease expired first")

    def cancel(self, client: Client, rng: random.Random) -> None:
        _, tokens = self.prompt(rng)

        def leave(_layer: object) -> None:
            raise StopHere

        with contextlib.suppress(StopHere, errors.DeadlineExceededError):
            if rng.random() < 0.5:
                client.prefill(
                    "recall",
                    tokens,
                    delivery=rng.choice((None, Inline(), Lease(ttl_seconds=1))),
                    timeout=rng.uniform(0.001, 0.1),
                )
            else:
                client.prefill("recall", tokens, delivery="inline", on_layer=leave)

    def bad_input(self, client: Client, rng: random.Random) -> None:
        expected, call = rng.choice(
            (
                (
                    errors.InvalidArgumentError,
                    lambda: client.prefill("recall", [VOCABULARY]),
                ),
                (
                    errors.InvalidArgumentError,
                    lambda: client.prefill("recall", [1], Pbs(threshold=2.0)),
                ),
                (errors.NotFoundError, lambda: client.prefill("nobody", [1, 2])),
                (
                    errors.InvalidArgumentError,
                    lambda: client.attend(*[np.full((1, 1, 8, 64), np.nan, "f4")] * 3),
                ),
            )
        )
        try:
            call()
        except expected:
            return
        raise AssertionError(f"bad input was taken; wanted {expected.__name__}")

    def killed_client(self, client: Client, rng: random.Random) -> None:
        what = rng.choice(("upload", "prefill", "inline", "fetch"))
        command = [self.hanging_client, self.server.target, what]
        if what == "fetch":
            _, tokens = self.prompt(rng)
            lease = Lease(LEASE_SECONDS)
            ticket = client.prefill("recall", tokens, delivery=lease).ticket
            command += [ticket.handle, str(ticket.epoch)]
        process = subprocess.Popen(command)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.02, 0.5))
            raise AssertionError(f"hanging_client {what} ended with {process.returncode}")
        process.kill()
        process.wait()

    # ---- checks

    @staticmethod
    def prompt(rng: random.Random) -> tuple[str, np.ndarray]:
        length, seed = rng.choice((1, 129, 1000, 4000)), rng.randrange(3)
        tokens = np.random.default_rng(seed).integers(0, VOCABULARY, length)
        return f"{length} tokens seed {seed}", tokens

    def expect_same(self, question: str, *answers: object) -> None:
        digest = hashlib.sha256()
        for answer in answers:
            digest.update(np.ascontiguousarray(answer).tobytes())
        with self._lock:
            first = self._answers.setdefault(question, digest.hexdigest())
        if first != digest.hexdigest():
            raise AssertionError(f"another answer than the first to: {question}")

    def expect_same_cache(self, question: str, cache: object) -> None:
        self.expect_same(f"cache {question}", *arrays_of(cache))

    # ---- workers

    def count(self, counter: collections.Counter[str], kind: str) -> None:
        with self._lock:
            counter[kind] += 1

    def _work(self, work: Callable[[Client, random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        kind = work.__name__
        with Client(self.server.target) as client:
            while True:
                self._go.wait()
                with self._lock:
                    if self._stop:
                        return
                    if not self._go.is_set():
                        continue
                    self._active += 1
                try:
                    work(client, rng)
                    self.count(self.done, kind)
                except errors.ResourceExhaustedError:
                    self.count(self.refused, kind)
                except Exception:
                    with self._lock:
                        self.failures.append(
                            f"{kind} seed {seed}: {traceback.format_exc()}"
                        )
                finally:
                    with self._lock:
                        self._active -= 1

    def start(self) -> None:
        kinds = [self.attend, self.attend_synthetic, self.prefill, self.prefill]
        kinds += [self.lease, self.lease, self.cancel, self.bad_input, self.killed_client]
        for seed, work in enumerate(kinds):
            thread = threading.Thread(target=self._work, args=(work, seed), daemon=True)
            thread.start()
            self._threads.append(thread)
        self._go.set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[dict[str, float]]:
        """Stops the load and waits until the server is empty; yields what is left."""
        self._go.clear()
        give_up = time.monotonic() + QUIET_SECONDS_MAX
        left: dict[str, float] = {"calls": 1}
        while any(left.values()) and time.monotonic() < give_up:
            time.sleep(0.1)
            left = {"calls": self._active, **self.server.gauges()}
        yield {name: value for name, value in left.items() if value}
        self._go.set()

    def stop(self) -> None:
        with self._lock:
            self._stop = True
        self._go.set()
        for thread in self._threads:
            thread.join()


def arrays_of(cache: object) -> list[np.ndarray]:
    """The arrays of a cache, by name."""
    return [array for _, array in sorted(cache.tensors().items())]


def run(server: Server, hanging_client: str, minutes: float) -> int:
    """Loads the server and prints what was found; 1 when something was wrong."""
    soak = Soak(server, hanging_client)
    begin = time.monotonic()
    soak.start()
    time.sleep(minutes * 6)
    with soak.paused() as left_early:
        early = server.resident_bytes()
    time.sleep(max(0, begin + minutes * 60 - time.monotonic()))
    with soak.paused() as left:
        end = server.resident_bytes()
        soak.stop()

    print("\n".join(soak.failures), file=sys.stderr)
    wrong = len(soak.failures) + len(left_early) + len(left)
    wrong += end - early > RSS_GROWTH_MAX
    summary = {
        "seconds": round(time.monotonic() - begin, 1),
        "done": dict(soak.done),
        "refused": dict(soak.refused),
        "failures": len(soak.failures),
        "left_at_a_tenth": left_early,
        "left_at_the_end": left,
        "resident_mib_at_a_tenth": round(early / 2**20, 1),
        "resident_mib_at_the_end": round(end / 2**20, 1),
        "growth_mib_max": RSS_GROWTH_MAX >> 20,
    }
    print(json.dumps(summary))
    return 1 if wrong else 0


def main() -> int:
    """Runs the soak; a server that does not end well is an error too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hanging-client", required=True, help="tests/hanging_client")
    parser.add_argument("--minutes", type=float, default=30)
    arguments = parser.parse_args()

    flags = ("--model", f"recall={RECALL_MODEL}", "--metrics-listen", "127.0.0.1:0")
    with running_server(*flags) as running:
        return run(Server(running), arguments.hanging_client, arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
