#!/usr/bin/env python3
"""Attention beside its peers, in one process a step.

    python3 tests/gpu/attention.py STEP --out FILE.json --seconds N

gate: the authors' outputs, then a problem of many tiles beside cuDNN and Triton. Other
steps time what PARTS says in rounds that interleave all of a part; figures are medians.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import inputs
import peers
import torch
from device import DEVICE, is_lost, milliseconds, synchronize, watch
from machine import REHEARSAL, ROOT, program
from pbs_library import Attention, Library, Lists
from progress import Progress, first_line, run_part_of
from safetensors.torch import load_file

HEADS, KV_HEADS = (4, 2) if REHEARSAL else (32, 8)  # Llama-3.1-8B
# The paper's densities at 8K .. 128K with threshold .9.
REPLAY = {8192: 0.58, 16384: 0.485, 32768: 0.405, 65536: 0.287, 131072: 0.219}
GOLDEN_MAX = {"f16": 2e-3, "bf16": 4e-2}
# What computes the same, and what two roundings to bf16 may differ by, of a row's norm.
SAME = {"flash": ["cudnn"], "pbs_dense": ["cudnn", "flash"], "pbs_replay_in_order": ["triton_replay"]}
DIFFERENCE_MAX = 2e-2
FIRST_RUNS, ROUNDS_MIN, STAGE_RUNS = (1, 1, 1) if REHEARSAL else (2, 5, 5)
PART_SECONDS_MAX = 5.0
# No call of ours takes longer, unless it hangs; a peer may have to be compiled.
CALL_SECONDS_MAX, PEER_SECONDS_MAX = 10, 40
REHEARSED_SHRINK, REHEARSED_TOKENS_MIN, REHEARSED_GOLDEN = 512, 256, 2


@dataclasses.dataclass(frozen=True)
class Part:
    """What runs on the same tensors. A name with :* is all variants of the kernels."""

    head_dim: int
    tokens: int
    names: tuple[str, ...]
    inputs: str = "structured"


DENSE = ("cudnn", "flash", "pbs_dense", "pbs")
SPARSE = ("triton_replay", "pbs_replay", "pbs_replay_in_order")
ALL_DENSE, ALL_REPLAY = ("pbs_dense:*",), ("pbs_replay:*",)
PARTS = {
    "gate": [Part(128, 8192, ("cudnn", "pbs_dense", "triton_replay", "pbs_replay_in_order"))],
    "d128_32k": [Part(128, 32768, (*DENSE, "pbs_s512", *SPARSE))],
    "d128_128k": [Part(128, 131072, ("cudnn", "pbs_dense", "pbs", "pbs_s512", "pbs_replay"))],
    "variants": [
        Part(128, 16384, ALL_DENSE), Part(128, 32768, ALL_REPLAY), Part(128, 131072, ALL_REPLAY),
    ],
    "lengths": [Part(128, tokens, (*DENSE, *SPARSE)) for tokens in (8192, 16384, 65536)],
    "noise": [Part(128, 32768, DENSE, "white_noise")],
    "kernels": [Part(128, 32768, ("pbs",))],  # for a profiler
    "d64_32k": [
        Part(64, 32768, (*DENSE, *SPARSE)), Part(64, 32768, ALL_DENSE), Part(64, 32768, ALL_REPLAY),
    ],
}  # fmt: skip


def is_peer(name: str) -> bool:
    """Whether a call is somebody else's."""
    return not name.startswith("pbs")


def golden(library: Library, case: dict) -> dict:
    """One case of tests/golden: the authors' order and mask in, their output expected."""
    folder, is_pbs = ROOT / "tests/golden", case["method"] == "pbs"
    tensors = load_file(folder / case["file"], DEVICE)
    source = tensors
    if "inputs_from" in case:
        source = load_file(folder / f"{case['inputs_from']}.safetensors", DEVICE)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[case["dtype"]]
    q, k, v = (source[name][0].to(dtype, copy=True) for name in "qkv")
    options: dict = {"method": "mean_pooling"}
    if is_pbs:
        options = {"segment_size": case["segment"], "query_head_scope": True}
        if "order" in tensors:
            options["order"] = tensors["order"][0].to(torch.int32).contiguous()
    if "block_mask" in tensors:
        mask = tensors["block_mask"][0].bool()
        options["lists"] = Lists.from_mask(mask if is_pbs else torch.tril(mask))
    attention = Attention(library, q, k, v, **options)
    attention()
    attention.report()
    error = (attention.o.float() - tensors["o"][0].float()).abs().max().item()
    return {"error_max": error, "right": error <= GOLDEN_MAX[case["dtype"]]}


def run_golden(progress: Progress, library: Library) -> None:
    """All cases that the CUDA backend takes and a process before did not run: f16 and bf16,
    blocks of 128, one sequence; mean pooling has another case's q, k and v."""
    manifest = json.loads((ROOT / "tests/golden/manifest.json").read_text())
    cases = [case for case in manifest["cases"] if case["block"] == 128 and case["B"] == 1]
    cases += [case for case in manifest["baselines"] if case["method"] == "meanpooling"]
    cases = [case for case in cases if case["dtype"] != "f32"]
    for case in cases[:REHEARSED_GOLDEN] if REHEARSAL else cases:
        call = {"kind": "golden", "case": case["name"]}
        if progress.has(**call):
            continue
        progress.begin(**call)
        watch(CALL_SECONDS_MAX)
        try:
            found = golden(library, case)
        except Exception as error:
            if is_lost():
                progress.stop(error)
            found = {"right": False, "error": first_line(error)}
        progress.end(call | found)
    rows = [row for row in progress.rows if row["kind"] == "golden"]
    progress.say(f"authors' outputs: {sum(r.get('right', False) for r in rows)} of {len(rows)} right")


def maker(library: Library, tensors: tuple, lists: Callable[[], Lists], name: str) -> Callable:
    """What makes a call by its name; `lists` makes those of a replay."""
    name, _, variant = name.partition(":")
    if name in peers.BACKENDS:
        return functools.partial(peers.sdpa, *tensors, name)
    if name == "triton_replay":
        return lambda: peers.block_sparse(*tensors, lists())
    ours = functools.partial(Attention, library, *tensors, variant=variant or "chosen")
    if name == "pbs_replay":
        return lambda: ours(lists=lists())
    if name == "pbs_replay_in_order":
        slots = torch.arange(tensors[1].shape[1], device=DEVICE, dtype=torch.int32)
        return lambda: ours(lists=lists(), order=slots.repeat(KV_HEADS, 1))
    options = {"pbs_dense": {"method": "dense"}, "pbs": {"dense_fallback": True},
               "pbs_s512": {"segment_size": 512}}  # fmt: skip
    return functools.partial(ours, **options[name])


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two rows of outputs [heads, tokens, head_dim], over the norm of b's: a block of
    keys too few shows in the longest rows, too. NaN if either has one."""
    heads = zip(a.unbind(), b.unbind())
    shares = [(x.float() - y).norm(dim=-1) / y.float().norm(dim=-1) for x, y in heads]
    return torch.stack([share.max() for share in shares]).max().item()


def compare(outputs: dict[str, torch.Tensor], found: dict[str, dict]) -> None:
    """How far each is from the first that ran of those that compute the same: a variant
    from the chosen kernels."""
    for name, output in outputs.items():
        plain, _, variant = name.partition(":")
        others = [f"{plain}:chosen"] if variant else SAME.get(name, [])
        peer = next((other for other in others if other in outputs and other != name), None)
        if peer is not None:
            off = largest_difference(output, outputs[peer])
            found[name] |= {"difference": off, "from": peer, "right": off <= DIFFERENCE_MAX}


def prepare(progress: Progress, part: dict, makers: dict[str, Callable]) -> tuple[dict, dict]:
    """What the makers make, each run once or twice, and a row for each. One that cannot be
    made or run is told as an error, not fatal, unless nothing runs after it."""
    made: dict[str, Callable] = {}
    found: dict[str, dict] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, make in makers.items():
        call = part | {"name": name, "peer": is_peer(name)}
        if progress.has(ended=True, head_dim=part["head_dim"], name=name):
            continue
        progress.begin(**call)
        watch(PEER_SECONDS_MAX if is_peer(name) else CALL_SECONDS_MAX)
        try:
            made[name], found[name] = make(), call
            for _ in range(FIRST_RUNS):
                outputs[name] = made[name]()
                synchronize()
            if isinstance(made[name], Attention):
                made[name].report()
        except Exception as error:  # whatever a peer's compiler may raise
            if is_lost():
                progress.stop(error)
            # A variant may not be for these kernels.
            found[name] = call | {"error": first_line(error), "right": is_peer(name) or ":" in name}
            made.pop(name, None), outputs.pop(name, None)
    progress.begin(**part)
    watch(PEER_SECONDS_MAX)
    compare(outputs, found)
    return made, found


def interleave(calls: dict[str, Callable], seconds: float) -> dict[str, dict]:
    """Milliseconds of each call: rounds in which every call runs once."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds = time.monotonic(), 0
    while calls and (time.monotonic() - begin < seconds or rounds < ROUNDS_MIN):
        watch(PEER_SECONDS_MAX)
        rounds += 1
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    return {name: {"ms": statistics.median(values), "ms_min": min(values), "rounds": rounds}
            for name, values in times.items()}  # fmt: skip


def stages(attention: Attention) -> dict:
    """Density and stage times of more runs, medians."""
    reports = []
    for _ in range(STAGE_RUNS):
        milliseconds(attention)
        reports.append(attention.report())
    names = ("permute_ms", "select_ms", "attend_ms")
    times = {name: statistics.median(report[name] for report in reports) for name in names}
    return reports[0] | times | {"workspace_bytes": attention.workspace_bytes}


def run_part(progress: Progress, library: Library, part: Part, row: dict, seconds: float) -> None:
    """A row for everything of a part, with what is in `row`."""
    progress.begin(**row)
    watch(PEER_SECONDS_MAX)
    names = [name.removesuffix("*") + variant for name in part.names
             for variant in (library.variants if name.endswith("*") else [""])]  # fmt: skip
    shrunk = max(REHEARSED_TOKENS_MIN, part.tokens // REHEARSED_SHRINK)
    tokens = shrunk if REHEARSAL else part.tokens
    tensors = getattr(inputs, part.inputs)(HEADS, KV_HEADS, tokens, part.head_dim)

    @functools.cache
    def lists() -> Lists:
        return Lists.from_mask(inputs.replay_mask(HEADS, tokens, REPLAY[part.tokens]))

    makers = {name: maker(library, tensors, lists, name) for name in names}
    made, found = prepare(progress, row, makers)
    flops = 2.0 * part.tokens**2 * part.head_dim * HEADS  # causal: half of the square
    for name, figures in interleave(made, seconds).items():
        found[name] |= figures | {"dense_tflops": flops / figures["ms"] * 1e-9}
    for name, call in made.items():
        if isinstance(call, Attention):
            watch(CALL_SECONDS_MAX)
            found[name] |= stages(call)
    progress.end(*found.values())
    said = [f"{name} {figures.get('error') or round(figures['ms'], 3)}" + (
        "" if figures.get("right", True) else f" WRONG {figures.get('difference', '')}"
    ) for name, figures in found.items()]  # fmt: skip
    where = f"{part.inputs}, {part.tokens // 1024}K, head dim {part.head_dim}"
    progress.say(f"{where}, ms: {', '.join(said)}")


def run_parts(progress: Progress, library: Library, step: str, end: float) -> None:
    """All parts of a step that a process before did not do and that there is time for."""
    for index, part in enumerate(PARTS[step]):
        row = {"kind": "attention", "head_dim": part.head_dim, "inputs": part.inputs,
               "tokens": part.tokens, "part": index}  # fmt: skip
        done = {"kind": "part", "part": index}
        if progress.has(**done) or progress.has(**row, name=None):
            continue
        left = end - time.monotonic()
        if left < 3:
            progress.say(f"left out, no time: {part}")
            continue
        seconds = min(PART_SECONDS_MAX, left / 3 / (len(PARTS[step]) - index))
        try:
            run_part(progress, library, part, row, seconds)
        except Exception as error:
            if is_lost():
                progress.stop(error)
            done["error"] = first_line(error)
            progress.say(f"{part}: {first_line(error)}")
        progress.end(done)
        if not REHEARSAL:
            torch.cuda.empty_cache()


def run_step(name: str, progress: Progress, seconds: float) -> None:
    """Runs a step."""
    end, library = time.monotonic() + seconds, Library(program("libpbs_gpu_python.so"))
    if name == "gate":
        run_golden(progress, library)
    run_parts(progress, library, name, end)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    steps = {name: functools.partial(run_step, name) for name in PARTS}
    exit_status = run_part_of(__doc__, steps)
    sys.stdout.flush()
    os._exit(exit_status)  # a compiler's workers are not waited for
