#!/usr/bin/env python3
"""Parts of scripts/gpu_server_suite.sh that need a running server; a process each.

    python3 tests/gpu/server_suite.py PART --out FILE.json ...

PART: tests, handoff, linear, concurrent, ttft.

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
from bench_common import Case, Worker, run_group  # noqa: E402
from pbs_client import (  # noqa: E402
    Client,
    Dense,
    InvalidArgumentError,
    Pbs,
    PbsError,
    ResourceExhaustedError,
)
from prefills import MODEL, Density, measure_length  # noqa: E402
from progress import Progress, first_line, plain  # noqa: E402
from real_server import BACKEND, RECALL_MODEL, program, running_server  # noqa: E402
from workload import LENGTHS, REPLAY, prompt  # noqa: E402

DONE, WRONG, LOST = 0, 3, 4
REFUSALS = (InvalidArgumentError, ResourceExhaustedError)  # the server goes on
# Llama-3.1-8B's products, as in x out, and the rows that the server runs at once.
SHAPES = {"QKV": (4096, 6144), "output": (4096, 4096), "gate and up": (4096, 28672),
          "down": (14336, 4096)}  # fmt: skip
ROW_TILE, REPETITIONS, LINEAR_ROUNDS = 8192, 20, 9
PROMPTS = 8  # at once
CONCURRENT_ROUNDS = 3
# Of a part of speed that a machine reaches: to see what is not worth beginning.
FLOPS_PER_SECOND = 3e14
RUNS_MIN = 9  # warm-ups, the search for a threshold, one round


def save(path: pathlib.Path, found: dict) -> None:
    """At once or not at all."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(plain(found), indent=1) + "\n")
    os.replace(draft, path)


def served_model(folder: pathlib.Path, *flags: str):
    """A server of the model of a folder."""
    return running_server("--model", f"{MODEL}={folder}", *flags)


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
    status = subprocess.run([*command, *arguments.pytest.split()]).returncode
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


def linear(arguments: argparse.Namespace) -> int:
    """Linear layers at the model's shapes beside torch's own, interleaved."""
    environment = {"LD_LIBRARY_PATH": str(program("bench_worker").parent.parent / "lib")}
    ours = Worker([str(program("bench_worker"))], environment)
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
        return None
    return peer


def seconds_of(tokens: int, facts: dict, runs: float) -> float:
    """About what some prefills of a length take."""
    weights = facts["weight_bytes"] / 2  # bf16
    attention = 2.0 * tokens * tokens * 4096 * facts["layers"]
    return runs * (2 * weights * tokens + attention) / FLOPS_PER_SECOND


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
            if left < seconds_of(tokens, facts, RUNS_MIN):
                print(f"left out: {tokens} tokens, {left:.0f} s are left", flush=True)
                continue
            progress.begin(part | {"name": None})
            try:
                replay = None if density is None else Density(density)
                rows = measure_length(client, peer, facts, tokens, replay, end)
            except PbsError as error:
                rows = [{"name": None, "error": str(error)[:200]}]
                if not isinstance(error, REFUSALS):
                    progress.finish(part, rows)
                    os._exit(LOST)  # a server that hangs would be waited for
            gpu = machine.query_gpu()
            rows = [row | {"gpu": gpu} for row in rows]
            progress.finish(part, rows)
            for row in rows:
                print(json.dumps(plain(part | row)), flush=True)
        if peer is not None:
            peer.close()
    progress.result["done"] = True
    progress.save()
    return DONE if all(row.get("right", True) for row in progress.result["timings"]) else WRONG


# ---- concurrent


def concurrent_prompts(arguments: argparse.Namespace) -> int:
    """Eight prompts one after another and at once: what waiting in line costs."""
    with served_model(arguments.model) as server, Client(server.target) as client:
        facts = facts_of(client)
        prompts = [prompt(arguments.tokens, facts["vocab_size"], seed) for seed in range(PROMPTS)]

        def run(tokens: list[int]) -> tuple[float, int]:
            begin = time.perf_counter()
            result = client.prefill(MODEL, tokens, Pbs(), timeout=arguments.seconds)
            return time.perf_counter() - begin, result.first_token

        client.prefill(MODEL, prompts[0], Dense())
        rounds, first_tokens = [], [run(tokens)[1] for tokens in prompts]
        for _ in range(CONCURRENT_ROUNDS):
            alone, _ = timed(lambda: [run(tokens) for tokens in prompts])
            with concurrent.futures.ThreadPoolExecutor(PROMPTS) as pool:
                together, ran = timed(lambda: list(pool.map(run, prompts)))
            rounds.append({"alone": alone, "together": together,
                           "ttft": sorted(seconds for seconds, _ in ran),
                           "right": [token for _, token in ran] == first_tokens})
    found = {
        "model": facts, "prompts": PROMPTS, "tokens": arguments.tokens, "rounds": rounds,
        "alone_over_together": statistics.median(r["alone"] / r["together"] for r in rounds),
        "right": all(r["right"] for r in rounds),
    }  # fmt: skip
    save(arguments.out, found)
    print(json.dumps(plain(found)), flush=True)
    return DONE if found["right"] else WRONG


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
    "tests": tests, "handoff": handoff, "linear": linear, "concurrent": concurrent_prompts,
    "ttft": ttft,
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
