#!/usr/bin/env python3
"""How fast a served model is beside torch.

    python3 tests/gpu/served.py linear|ttft|concurrent --out FILE.json --seconds N

The server and the clients are those of PBS_BIN, on the backend of PBS_TEST_BACKEND
(tests/python/real_server.py). The model, in the work folder, has the shape of
Llama-3.1-8B and some of its layers: the ratios of a layer are those of the whole.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import statistics
import sys
import time

import torch
import torch_model
from bench_common import Worker
from device import DEVICE, synchronize
from machine import REHEARSAL, WORK, find_cublaslt
from pbs_client import Client, Dense, InvalidArgumentError, Pbs, ResourceExhaustedError
from prefills import MODEL, measure_length, prompt
from progress import Progress, first_line, run_part_of
from real_server import BACKEND, program, running_server

# In the order of the goals, with the paper's density and by which share of the time it ends.
LENGTHS = {32768: (0.405, 0.3), 131072: (0.219, 0.8), 8192: (0.58, 1.0)}
SHRINK = 16 if REHEARSAL else 1  # of lengths and sizes
# Llama-3.1-8B's products, as in x out, and the rows that the server runs at once.
SHAPES = {"QKV": (4096, 6144), "output": (4096, 4096), "gate and up": (4096, 28672),
          "down": (14336, 4096)}  # fmt: skip
ROW_TILE, REPETITIONS, LINEAR_ROUNDS = 8192 // SHRINK**2, 20 if SHRINK == 1 else 1, 9
PROMPTS, PROMPT_TOKENS, CONCURRENT_ROUNDS = 8, 16384 // SHRINK, 3
# Of ordinary memory, for requests: two prompts of 128K and some. What a server takes by
# itself is a share of what the machine has when it starts, and that may grow later.
MEMORY_BYTES_MAX = 48_000_000_000
REFUSALS = (InvalidArgumentError, ResourceExhaustedError)  # the server goes on


@contextlib.contextmanager
def served_model(progress: Progress):
    """A client of a server of the big model, and what it says of both."""
    budget = f"admission.memory_bytes_max={MEMORY_BYTES_MAX}"
    flags = ("--model", f"{MODEL}={WORK / 'model'}", "--set", budget)
    with running_server(*flags) as server, Client(server.target) as client:
        (backend,), (model,) = client.info().backends, client.models()
        facts = {"backend": backend.name, "device": backend.device, "layers": model.num_layers,
                 "weight_bytes": model.weight_bytes, "vocab_size": model.vocab_size}  # fmt: skip
        progress.facts["model"] = facts
        yield client, facts


def linear(progress: Progress, _: float) -> None:
    """Linear layers at the model's shapes beside torch's own, in turn; medians."""
    worker = program("bench_worker")
    # The GPU's driver may be found through it.
    folders = [str(worker.parent.parent / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    ours = Worker([str(worker)], {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders))})
    cublaslt = find_cublaslt()

    def torch_seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
        begin = time.perf_counter()
        for _ in range(REPETITIONS):
            torch.nn.functional.linear(x, weight)
        synchronize()
        return time.perf_counter() - begin

    for name, (wide, out) in SHAPES.items():
        shape = {"rows": ROW_TILE, "in": wide // SHRINK, "out": out // SHRINK}
        ours.ask("linear", name=name, dtype="bf16", repetitions=REPETITIONS, backend=BACKEND,
                 cublaslt=cublaslt, **shape)  # fmt: skip
        x, weight = (torch.randn(shape[n], shape["in"], device=DEVICE).bfloat16() for n in ("rows", "out"))
        torch_seconds(x, weight)  # warms up, as the other did
        pairs = [(torch_seconds(x, weight), ours.ask("run", name=name)["wall"])
                 for _ in range(LINEAR_ROUNDS)]  # fmt: skip
        work = 2e-12 * shape["rows"] * shape["in"] * shape["out"] * REPETITIONS
        theirs, own = (work / statistics.median(seconds) for seconds in zip(*pairs))
        ratio = statistics.median(a / b for a, b in pairs)
        figures = {"torch_tflops": theirs, "tflops": own, "ratio": ratio}
        progress.end({"kind": "linear", "name": name, "backend": BACKEND} | shape | figures)
        progress.say(f"{name}: {own:.3g} TFLOP/s, {ratio:.2f}x torch")
    ours.close()


def torch_peer(progress: Progress):
    """Gives logits of a prompt from torch; None, and a word, where it cannot be."""
    try:
        llama = torch_model.Llama(WORK / "model", DEVICE)
    except Exception as error:  # it is a peer
        progress.say(f"no torch model: {first_line(error)}")
        return None
    return lambda ids: llama.prefill(ids).cpu().numpy()


def ttft(progress: Progress, seconds: float) -> None:
    """Every length: torch, ours dense, with real selection, and at the paper's density."""
    begin = time.monotonic()
    with served_model(progress) as (client, facts):
        peer = torch_peer(progress)
        for tokens, (density, share) in LENGTHS.items():
            row = {"kind": "prefill", "tokens": tokens, "layers": facts["layers"]}
            if progress.has(**row):
                continue
            progress.begin(**row)
            ids = prompt(tokens // SHRINK, facts["vocab_size"])
            rows, failure = measure_length(client, peer, ids, density, begin + share * seconds)
            progress.end(*(row | found for found in rows))
            for found in rows:
                said = found.get("error") or (f"{found['ttft_seconds']:.3f} s, "
                                              f"{found.get('dense_over_this', 1):.2f}x dense")
                progress.say(f"{tokens // 1024}K, {found['name']}: {said}")
            if failure is not None and not isinstance(failure, REFUSALS):
                progress.stop(failure)  # a server that hangs would be waited for


def concurrent_prompts(progress: Progress, seconds: float) -> None:
    """Eight prompts one after another and at once: what waiting in line costs. Every round
    is written; none begins that would not end in time."""
    end = time.monotonic() + seconds
    rounds: list[dict] = []
    with served_model(progress) as (client, facts):
        prompts = [prompt(PROMPT_TOKENS, facts["vocab_size"], seed) for seed in range(PROMPTS)]

        def run(ids, method: Dense | Pbs | None = None) -> tuple[float, int]:
            begin = time.perf_counter()
            timeout = max(1.0, end - time.monotonic())
            result = client.prefill(MODEL, ids, method or Pbs(), timeout=timeout)
            return time.perf_counter() - begin, result.first_token

        run(prompts[0], Dense())
        needed = 2 * PROMPTS * run(prompts[0])[0]
        while len(rounds) < CONCURRENT_ROUNDS and time.monotonic() + needed < end:
            begin = time.perf_counter()
            first = [token for _, token in map(run, prompts)]
            alone = time.perf_counter() - begin
            with concurrent.futures.ThreadPoolExecutor(PROMPTS) as pool:
                ran = list(pool.map(run, prompts))
            together = time.perf_counter() - begin - alone
            needed = alone + together
            rounds.append({"alone": alone, "together": together, "ttft": sorted(s for s, _ in ran),
                           "right": [token for _, token in ran] == first})  # fmt: skip
            progress.rows[:] = [{
                "kind": "concurrent", "prompts": PROMPTS, "tokens": PROMPT_TOKENS, "rounds": rounds,
                "alone_over_together": statistics.median(r["alone"] / r["together"] for r in rounds),
                "right": all(r["right"] for r in rounds),
            }]  # fmt: skip
            progress.save()
    if not rounds:
        raise SystemExit(f"no round: it takes {needed:.0f} s")
    progress.say(f"at once {progress.rows[0]['alone_over_together']:.2f}x one after another")


if __name__ == "__main__":
    parts = {"linear": linear, "ttft": ttft, "concurrent": concurrent_prompts}
    sys.exit(run_part_of(__doc__, parts))
