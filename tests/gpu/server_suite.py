#!/usr/bin/env python3
"""Parts of scripts/gpu_server_suite.sh that need a running server; a process each.

    python3 tests/gpu/server_suite.py PART --out FILE.json ...

PART: tests, handoff, linear, ttft, concurrent.

The server and the clients are those of PBS_BIN, on the backend of PBS_TEST_BACKEND
(tests/python/real_server.py). FILE.json has what was found as soon as it is.

Exit status 0 when all is done and right, 3 when all is done, 4 when the server was lost:
ttft carries on behind what lost it when it is run again on the same file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("client/python", "tests/python", "tests/bench")]

import machine  # noqa: E402
from bench_common import Case, Worker, WorkerDiedError, run_group  # noqa: E402
from pbs_client import (  # noqa: E402
    Client,
    Dense,
    InvalidArgumentError,
    Pbs,
    ResourceExhaustedError,
)
from prefills import MODEL, Density, measure_length  # noqa: E402
from progress import Progress, first_line, plain  # noqa: E402
from real_server import BACKEND, RECALL_MODEL, program, running_server  # noqa: E402
from workload import LENGTHS, REPLAY, prompt  # noqa: E402

DONE, UNFINISHED, WRONG, LOST = 0, 1, 3, 4
REFUSALS = (InvalidArgumentError, ResourceExhaustedError)  # the server goes on
# Llama-3.1-8B's products, as in x out, and the rows that the server runs at once.
SHAPES = {"QKV": (4096, 6144), "output": (4096, 4096), "gate and up": (4096, 28672),
          "down": (14336, 4096)}  # fmt: skip
ROW_TILE, REPETITIONS, LINEAR_ROUNDS = 8192, 20, 9
PROMPTS = 8  # at once
CONCURRENT_ROUNDS = 3
# Where no length was measured yet: a part of the speed that a machine reaches, to see what
# is not worth beginning.
FLOPS_PER_SECOND = 3e14
SEARCH_RUNS = 3  # for a threshold, as a rule
# Of ordinary memory, for requests: two prompts of 128K and some. What a server takes by
# itself is a share of what the machine has when it starts, and that may grow later.
MEMORY_BYTES_MAX = 48_000_000_000


def save(path: pathlib.Path, found: dict) -> None:
    """At once or not at all."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(plain(found), indent=1) + "\n")
    os.replace(draft, path)


def served_model(folder: pathlib.Path, *flags: str):
    """A server of the model of a folder."""
    budget = f"admission.memory_bytes_max={MEMORY_BYTES_MAX}"
    return running_server("--model", f"{MODEL}={folder}", "--set", budget, *flags)


def facts_of(client: Client) -> dict:
    """What a server says it runs on, and the model that it serves."""
    (backend,) = client.info().backends
    (model,) = client.models()
    return {
        "backend": backend.name, "isa": backend.isa, "device": backend.device,
        "server_commit": client.info().commit, "layers": model.num_layers,
        "weight_bytes": model.weight_bytes, "kv_bytes_per_token": model.kv_bytes_per_token,
        "vocab_size": model.vocab_size,
    }  # fmt: skip


# ---- tests

SERVED_TESTS = ["tests/python/test_golden_parity.py", "tests/python/test_served_models.py"]


def tests(arguments: argparse.Namespace) -> int:
    """The authors' outputs and transformers' models, through a server on this backend."""
    report = arguments.out.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--junitxml", str(report), *(str(ROOT / file) for file in SERVED_TESTS)]
    # Plugins that happen to be installed have no part in it.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    status = subprocess.run([*command, *arguments.pytest.split()], env=environment).returncode
    if not report.exists():
        return status or WRONG
    found = outcomes(report)
    save(arguments.out, found)
    return DONE if status == 0 else WRONG


def outcomes(report: pathlib.Path) -> dict:
    """Of the tests of a JUnit file: how many were right and skipped, which were not."""
    cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [
        case.get("name")
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    right = len(cases) - len(skipped) - len(failed)
    return {"right": right, "skipped": len(skipped), "failed": failed}


# ---- handoff


def decode(target: str, method: list[str]) -> dict:
    """The bundled model's answer, decoded by pbs-decode from the cache handed to it."""
    data = RECALL_MODEL
    command = [
        str(program("pbs-decode")), "--server", target, "--model-path", str(data),
        "--tokens", str(data / "prompt_8k.json"),
        "--then-tokens", str(data / "prompt_8k.question.json"),
        "--max-new-tokens", "1", "--json", *method,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return {"right": False, "error": said[:200]}
    line = json.loads(done.stdout)
    wanted = json.loads((data / "prompt_8k.answer.json").read_text())
    wanted_fields = ("prompt_tokens", "density", "kv_bytes", "backend", "seconds", "stages")
    return {"right": line["tokens"] == wanted} | {name: line[name] for name in wanted_fields}


def handoff(arguments: argparse.Namespace) -> int:
    """Caches of the bundled model handed to pbs-decode, which is another process."""
    found: dict = {"rows": []}
    with running_server("--model", f"recall={RECALL_MODEL}") as server:
        for name, words in (("dense", ["--method", "dense"]),
                            ("pbs", ["--method", "pbs", "--threshold", "0.9"])):
            row = {"name": name} | decode(server.target, words)
            found["rows"].append(row)
            save(arguments.out, found)
            print(json.dumps(row), flush=True)
    return DONE if all(row["right"] for row in found["rows"]) else WRONG


# ---- linear


def library_path(folder: pathlib.Path) -> str:
    """A folder, then those of LD_LIBRARY_PATH: the GPU's driver may be found through it."""
    return ":".join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))


def linear(arguments: argparse.Namespace) -> int:
    """Linear layers at the model's shapes beside torch's own, interleaved."""
    worker = program("bench_worker")
    ours = Worker([str(worker)], {"LD_LIBRARY_PATH": library_path(worker.parent.parent / "lib")})
    torch = torch_worker()
    own = {"backend": BACKEND, "module": arguments.module, "cublaslt": arguments.cublaslt}
    rows = arguments.rows
    found: dict = {"backend": BACKEND, "rows": rows, "repetitions": arguments.repetitions,
                   "groups": []}
    for label, shape in SHAPES.items():
        wide, out = (size // arguments.shrink for size in shape)
        words = {"rows": rows, "in": wide, "out": out, "dtype": "bf16",
                 "repetitions": arguments.repetitions}
        cases = [Case("torch", torch, "linear", **words),
                 Case("ours", ours, "linear", **words, **own)]
        group = run_group(f"linear {label} {rows}x{wide}x{out}", cases, LINEAR_ROUNDS)
        found["groups"].append({"name": label, "shape": [rows, wide, out], **group})
        save(arguments.out, found)
    ours.close(), torch.close()
    return DONE


# ---- time to first token


def torch_worker() -> Worker:
    """A process of the peer."""
    script = pathlib.Path(__file__).with_name("torch_model.py")
    return Worker([sys.executable, str(script)])


def start_torch(folder: pathlib.Path) -> Worker | None:
    """The peer with the model; None, and a word, where it cannot be."""
    peer = torch_worker()
    try:
        peer.ask("model", path=str(folder))
    except RuntimeError as error:
        print(f"no torch model: {first_line(error)}", flush=True)
        peer.close()  # it may hold memory of the GPU
        return None
    return peer


def is_alive(peer: Worker) -> bool:
    """Whether a peer answers: an error, too, is an answer."""
    try:
        peer.ask("drop", name="nothing")
    except RuntimeError as error:
        return not isinstance(error, WorkerDiedError)
    return True


def flops(tokens: int, facts: dict, density: float = 1.0) -> float:
    """About what a prefill of a length is."""
    weights = facts["weight_bytes"] / 2  # bf16
    attention = 2.0 * tokens * tokens * 4096 * facts["layers"]
    return 2 * weights * tokens + density * attention


def rate_of(timings: list[dict], facts: dict) -> float:
    """FLOP/s at the longest length that was measured."""
    measured = [row for row in timings if "ttft_seconds" in row]
    longest = max((row["tokens"] for row in measured), default=0)
    rows = [row for row in measured if row["tokens"] == longest]
    if not rows:
        return FLOPS_PER_SECOND
    work = sum(flops(longest, facts, row.get("density", 1.0)) for row in rows)
    return work / sum(row["ttft_seconds"] for row in rows)


def flops_min(tokens: int, facts: dict, density: float | None, has_peer: bool) -> float:
    """Of warm-ups, the search for a threshold and one round."""
    dense_runs = 5 if has_peer else 3  # torch and dense twice, pbs once
    replays = 0.0 if density is None else flops(tokens, facts, density) * (SEARCH_RUNS + 1)
    return dense_runs * flops(tokens, facts) + replays


def ttft(arguments: argparse.Namespace) -> int:
    """Every length: torch, ours dense, with real selection, and at the paper's density."""
    end = time.monotonic() + arguments.seconds
    with served_model(arguments.model) as server, Client(server.target) as client:
        facts = facts_of(client)
        progress = Progress(arguments.out, {"model": facts}, ("tokens",))
        peer = start_torch(arguments.model)
        for tokens, density in arguments.lengths.items():
            part = {"tokens": tokens}
            if part in progress.result["parts"]:
                continue
            left = end - time.monotonic()
            work = flops_min(tokens, facts, density, peer is not None)
            needed = work / rate_of(progress.result["timings"], facts)
            if left < needed:
                print(f"left out: {tokens} tokens, {left:.0f} of {needed:.0f} s are left", flush=True)
                continue
            progress.begin(part | {"name": None})
            replay = None if density is None else Density(density)
            rows, failure = measure_length(client, peer, facts, tokens, replay, end)
            if failure is not None and not isinstance(failure, REFUSALS):
                progress.finish(part, rows)
                os._exit(LOST)  # a server that hangs would be waited for
            gpu = machine.query_gpu()
            rows = [row | {"gpu": gpu} for row in rows]
            progress.finish(part, rows)
            for row in rows:
                print(json.dumps(plain(part | row)), flush=True)
            if peer is not None and not is_alive(peer):
                peer.close()
                peer = None
        if peer is not None:
            peer.close()
    progress.result["done"] = True
    progress.save()
    return DONE if all(row.get("right", True) for row in progress.result["timings"]) else WRONG


# ---- concurrent


def concurrent_prompts(arguments: argparse.Namespace) -> int:
    """Eight prompts one after another and at once: what waiting in line costs. Every round
    is written; none begins that would not end in time."""
    end = time.monotonic() + arguments.seconds
    rounds: list[dict] = []
    with served_model(arguments.model) as server, Client(server.target) as client:
        facts = facts_of(client)
        prompts = [prompt(arguments.tokens, facts["vocab_size"], seed) for seed in range(PROMPTS)]

        def run(tokens: list[int], method: Dense | Pbs | None = None) -> tuple[float, int]:
            begin = time.perf_counter()
            left = max(1.0, end - time.monotonic())
            result = client.prefill(MODEL, tokens, method or Pbs(), timeout=left)
            return time.perf_counter() - begin, result.first_token

        run(prompts[0], Dense())
        needed = 2 * PROMPTS * run(prompts[0])[0]
        first_tokens: list[int] = []
        for _ in range(CONCURRENT_ROUNDS):
            if time.monotonic() + needed > end:
                break
            alone, ran_alone = timed(lambda: [run(tokens) for tokens in prompts])
            with concurrent.futures.ThreadPoolExecutor(PROMPTS) as pool:
                together, ran = timed(lambda: list(pool.map(run, prompts)))
            needed = alone + together
            first_tokens = first_tokens or [token for _, token in ran_alone]
            rounds.append({"alone": alone, "together": together,
                           "ttft": sorted(seconds for seconds, _ in ran),
                           "right": [token for _, token in ran] == first_tokens})
            found = {"model": facts, "prompts": PROMPTS, "tokens": arguments.tokens}
            save(arguments.out, found | summary(rounds))
    if not rounds:
        print(f"no round: it takes {needed:.0f} s", flush=True)
        return UNFINISHED
    print(json.dumps(plain(summary(rounds))), flush=True)
    return DONE if summary(rounds)["right"] else WRONG


def summary(rounds: list[dict]) -> dict:
    """Of the rounds so far."""
    ratio = statistics.median(r["alone"] / r["together"] for r in rounds)
    right = all(r["right"] for r in rounds)
    return {"rounds": rounds, "alone_over_together": ratio, "right": right}


def timed(call: Callable) -> tuple[float, list]:
    """Seconds, and what the call gave."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


# ---- all of them


def lengths_of(text: str) -> dict[int, float | None]:
    """Such as "8192 300:0.7": lengths, each with a density of its own or the paper's."""
    lengths: dict[int, float | None] = {}
    for word in text.split():
        tokens, _, density = word.partition(":")
        lengths[int(tokens)] = float(density) if density else REPLAY.get(int(tokens))
    return lengths


PARTS = {
    "tests": tests, "handoff": handoff, "linear": linear, "ttft": ttft,
    "concurrent": concurrent_prompts,
}  # fmt: skip


def main() -> int:
    """Status as the top says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--model", type=pathlib.Path, help="folder, for ttft and concurrent")
    parser.add_argument("--lengths", type=lengths_of, help="in the order to run, for ttft",
                        default=dict.fromkeys(LENGTHS, None) | REPLAY)
    parser.add_argument("--tokens", type=int, default=16384, help="of a concurrent prompt")
    parser.add_argument("--rows", type=int, default=ROW_TILE, help="of a linear layer")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--shrink", type=int, default=1, help="divides the linear layers' sizes")
    parser.add_argument("--pytest", default="", help="more of its arguments")
    parser.add_argument("--module", default="")
    parser.add_argument("--cublaslt", default="")
    arguments = parser.parse_args()
    return PARTS[arguments.part](arguments)


if __name__ == "__main__":
    sys.exit(main())
