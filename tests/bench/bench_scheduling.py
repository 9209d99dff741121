#!/usr/bin/env python3
"""Measures the queue's two rules (docs/adr/0005 and 0015) and writes JSON.

    scripts/bench.sh scheduling                     both parts
    scripts/bench.sh scheduling --only simulation   the queue alone, with a GPU's rates

simulation: scheduling_simulation under two mixes of prompts.
cpu: servers that differ in one setting, all there during the whole measurement. A round
asks each of them in turn, in an order that rotates; figures are medians over the rounds,
ratios the medians of the rounds' own ratios. Per round and server:
  long alone   one long prompt
  long, shorts the same, and short ones that arrive at even distances while it runs
  burst        eight short prompts at once
Times are the client's, from the call to its end: the first token comes with the end.

Exit status 1 when the simulation finds a long prompt delayed by more than its bound.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from bench_common import ROOT, run_header, write_results

sys.path[:0] = [str(ROOT / "client/python"), str(ROOT / "tests/python")]
from pbs_client import Client, Dense  # noqa: E402
from real_server import program, running_server  # noqa: E402

# Name -> options of scheduling_simulation.
MIXES = {
    "100 to 2,000 tokens, 10 a second": [],
    "16 to 128 tokens, 100 a second": [
        "--short-tokens-min", "16", "--short-tokens-max", "128", "--short-rate", "100",
        "--seconds", "150",
    ],
}  # fmt: skip
# Servers that differ in one setting from the second one.
SERVERS = {
    "in order": {"yield_share": 0, "batch_tokens_max": 1},
    "yielding": {"yield_share": 0.25, "batch_tokens_max": 1},
    "sharing runs": {"yield_share": 0.25, "batch_tokens_max": 8192},
}
YIELDING, BURSTING = ("in order", "yielding"), ("yielding", "sharing runs")
SHORTS = 8  # while a long one runs, and of a burst
# Short ones arrive in this share of the time that a long one takes alone.
ARRIVALS_SHARE = 0.6


def simulate(seconds: float | None) -> tuple[dict, bool]:
    """What the simulation finds for every mix, and whether its bound holds."""
    found, holds = {}, True
    for name, options in MIXES.items():
        options = options + ([] if seconds is None else ["--seconds", str(seconds)])
        command = [str(program("scheduling_simulation")), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{' '.join(options)}: exit status {done.returncode}")
        found[name] = {"options": options, **json.loads(done.stdout)}
        holds = holds and done.returncode == 0
    return {"mixes": found, "bound_holds": holds}, holds


class Server:
    """A server under test, as the measurement sees it."""

    def __init__(self, target: str, arguments: argparse.Namespace):
        self.client = Client(target)
        vocab_size = self.client.models()[0].vocab_size
        self.long = [i % vocab_size for i in range(arguments.long_tokens)]
        self.short = [i * 7 % vocab_size for i in range(arguments.short_tokens)]
        self.alone_seconds = float("inf")  # of a long one: the least that was seen

    def ask(self, tokens: list[int], on_layer=None) -> float:
        """Seconds from the call to its end."""
        begin = time.monotonic()
        self.client.prefill("", tokens, Dense(), on_layer=on_layer)
        return time.monotonic() - begin

    def warm_up(self) -> None:
        """So that both kinds have been measured by the server's cost model."""
        self.ask(self.short)
        self.long_alone()

    def long_alone(self) -> dict:
        """One long prompt, and then a short one on the idle server."""
        long = self.ask(self.long)
        self.alone_seconds = min(self.alone_seconds, long)
        return {"long": long, "short": self.ask(self.short)}

    def long_with_shorts(self) -> dict:
        """A long prompt, and short ones at even distances from its first layer on."""
        running = threading.Event()
        distance = ARRIVALS_SHARE * self.alone_seconds / SHORTS
        with concurrent.futures.ThreadPoolExecutor(1 + SHORTS) as pool:
            long = pool.submit(self.ask, self.long, lambda layer: running.set())
            begun = running.wait(600)
            shorts, late = [], 0
            begin = time.monotonic()
            for i in range(SHORTS if begun else 0):
                time.sleep(max(0.0, begin + i * distance - time.monotonic()))
                late += long.done()
                shorts.append(pool.submit(self.ask, self.short))
            times = [short.result() for short in shorts]
            return {"long": long.result(), "short": statistics.median(times),
                    "short_max": max(times), "arrived_late": late}

    def burst(self) -> dict:
        """Eight at once: until the last is there, and until one of the middle is."""
        with concurrent.futures.ThreadPoolExecutor(SHORTS) as pool:
            begin = time.monotonic()
            asked = [pool.submit(self.ask, self.short) for _ in range(SHORTS)]
            times = [short.result() for short in asked]
            return {"all": time.monotonic() - begin, "short": statistics.median(times)}


def medians(runs: list[dict]) -> dict:
    """Of every figure; all of them are kept beside it."""
    return {
        key: {"median": statistics.median(run[key] for run in runs),
              "runs": [run[key] for run in runs]}
        for key in runs[0]
    }  # fmt: skip


def ratio(over: list[dict], under: list[dict], key: str) -> dict:
    """The rounds' own ratios: their median, the least and the greatest."""
    ratios = [a[key] / b[key] for a, b in zip(over, under)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def measure_round(servers: dict[str, Server], round_idx: int, runs: dict) -> None:
    """Adds one run of every case to `runs`, the first server another one each time."""
    names = list(servers)
    begin = round_idx % len(names)
    for name in names[begin:] + names[:begin]:
        server = servers[name]
        if name in YIELDING:
            runs["long alone"][name].append(server.long_alone())
            runs["long, shorts"][name].append(server.long_with_shorts())
        if name in BURSTING:
            runs["burst"][name].append(server.burst())


def ratios(runs: dict) -> dict:
    """What a rule is worth: with it over without it, and over nothing else to do."""
    mixed, alone, burst = runs["long, shorts"], runs["long alone"], runs["burst"]
    order, yielding = YIELDING
    return {
        "short, yielding / in order": ratio(mixed[yielding], mixed[order], "short"),
        "long, yielding / in order": ratio(mixed[yielding], mixed[order], "long"),
        "long, in order / alone": ratio(mixed[order], alone[order], "long"),
        "long, yielding / alone": ratio(mixed[yielding], alone[yielding], "long"),
        "burst, sharing runs / one by one": ratio(
            burst[BURSTING[1]], burst[BURSTING[0]], "all"
        ),
    }


def measure(arguments: argparse.Namespace) -> dict:
    """Starts the servers and measures them in rounds."""
    runs: dict[str, dict[str, list]] = {
        "long alone": {name: [] for name in YIELDING},
        "long, shorts": {name: [] for name in YIELDING},
        "burst": {name: [] for name in BURSTING},
    }
    with contextlib.ExitStack() as stack:
        servers = {}
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, scheduling in SERVERS.items():
            config = folder / f"{name}.json"
            config.write_text(json.dumps({"scheduling": scheduling}))
            flags = ["--config", str(config), "--model", f"m={arguments.model}"]
            flags += ["--threads", str(arguments.threads)]
            running = stack.enter_context(running_server(*flags))
            servers[name] = Server(running.target, arguments)
            stack.callback(servers[name].client.close)
            servers[name].warm_up()
        commit = servers[YIELDING[0]].client.info().commit
        for i in range(arguments.rounds):
            measure_round(servers, i, runs)
            print(f"{time.strftime('%H:%M:%S')} round {i + 1}", file=sys.stderr, flush=True)
    cases = {
        case: {name: medians(found) for name, found in of_case.items()}
        for case, of_case in runs.items()
    }
    return {
        "server_commit": commit, "threads": arguments.threads, "rounds": arguments.rounds,
        "long_tokens": arguments.long_tokens, "short_tokens": arguments.short_tokens,
        "shorts": SHORTS, "servers": SERVERS, "cases": cases, "ratios": ratios(runs),
    }  # fmt: skip


def main() -> int:
    """Runs the chosen parts and writes their results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["simulation", "cpu"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--model", type=pathlib.Path, help="for cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="of a server")
    parser.add_argument("--long-tokens", type=int, default=3072)
    parser.add_argument("--short-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, help="simulated, instead of the mixes' own")
    arguments = parser.parse_args()
    if arguments.model is None and "cpu" in arguments.only:
        parser.error("--model is needed for the part cpu")
    header = run_header()
    holds = True
    if "simulation" in arguments.only:
        figures, holds = simulate(arguments.seconds)
        write_results("scheduling_simulation", header, figures)
    if "cpu" in arguments.only:
        figures = measure(arguments)
        write_results("scheduling_cpu", header, figures)
        for name, value in figures["ratios"].items():
            print(f"    {name:34} {value['median']:6.2f}x", file=sys.stderr)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
