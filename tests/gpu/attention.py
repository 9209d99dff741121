#!/usr/bin/env python3
"""Attention beside its peers, in one process a step.

    python3 tests/gpu/attention.py STEP --out FILE.json --seconds N

gate: the authors' outputs, then a problem of many tiles beside its peers; it is wrong
unless each of REQUIRED is right. Other steps time what PARTS says in rounds that interleave
all of a part; figures are medians. hung: correctness.py diagnose.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import json
import math
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
# pbs_all reads every block, by way of order, gather and lists.
DENSE_PEERS, REPLAY_PEERS = ("cudnn", "flash"), ("triton_replay", "masked_replay")
SAME = {"flash": ("cudnn",), "triton_replay": ("masked_replay",), "pbs_dense": DENSE_PEERS,
        "pbs_all": DENSE_PEERS, "pbs_replay_in_order": REPLAY_PEERS}  # fmt: skip
REQUIRED = ("pbs_dense", "pbs_all", "pbs_replay_in_order")
DIFFERENCE_MAX, DENSITY_ERROR_MAX = 2e-2, 0.01
FIRST_RUNS, ROUNDS_MIN = (1, 1) if REHEARSAL else (2, 5)
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


OTHER_METHODS = (
    "mean_pooling", "xattention", "minference", "flexprefill", "prism", "flashprefill",
)  # fmt: skip
DENSE = (*DENSE_PEERS, "pbs_dense", "pbs_all", "pbs")
SPARSE = ("triton_replay", "pbs_replay", "pbs_replay_in_order")
METHODS = ("cudnn", "pbs_dense", "pbs", *(f"pbs_{name}" for name in OTHER_METHODS))
ALL_DENSE, ALL_REPLAY = ("pbs_dense:*",), ("pbs_replay:*",)
PARTS = {
    "gate": [Part(128, 8192, (*DENSE_PEERS, *REPLAY_PEERS, *REQUIRED))],
    "d128_32k": [Part(128, 32768, (*DENSE, "pbs_s512", *SPARSE))],
    "d128_128k": [Part(128, 131072, ("cudnn", "pbs_dense", "pbs_all", "pbs", "pbs_s512", "pbs_replay"))],
    "variants": [
        Part(128, 16384, ALL_DENSE), Part(128, 32768, ALL_REPLAY), Part(128, 131072, ALL_REPLAY),
    ],
    "lengths": [Part(128, tokens, (*DENSE, *SPARSE)) for tokens in (8192, 16384, 65536)],
    "noise": [Part(128, 32768, DENSE, "white_noise")],
    "methods": [Part(128, 32768, METHODS)],
    "kernels": [Part(128, 32768, ("pbs",))],  # for a profiler
    "d64_32k": [
        Part(64, 32768, (*DENSE, *SPARSE)), Part(64, 32768, ALL_DENSE), Part(64, 32768, ALL_REPLAY),
    ],
}  # fmt: skip


def is_peer(name: str) -> bool:
    """Whether a call is somebody else's."""
    return not name.startswith("pbs")


def golden(library: Library, case: dict) -> tuple[Attention, torch.Tensor]:
    """One case of tests/golden: the authors' order and mask in, their output expected."""
    folder, is_pbs = ROOT / "tests/golden", case["method"] == "pbs"
    tensors = load_file(folder / case["file"], DEVICE)
    source = tensors
    if "inputs_from" in case:
        source = load_file(folder / f"{case['inputs_from']}.safetensors", DEVICE)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[case["dtype"]]
    q, k, v = (source[name][0].to(dtype, copy=True) for name in "qkv")
    options: dict = {"segment_size": case["segment"], "query_head_scope": True} if is_pbs else {}
    if "order" in tensors:
        options["order"] = tensors["order"][0].to(torch.int32).contiguous()
    if "block_mask" in tensors:
        mask = tensors["block_mask"][0].bool()
        options["lists"] = Lists.from_mask(mask if is_pbs else torch.tril(mask))
    method = "pbs" if is_pbs else "mean_pooling"
    return Attention(library, q, k, v, method=method, **options), tensors["o"][0].float()


def golden_cases() -> list[dict]:
    """All that the CUDA backend takes: f16 and bf16, blocks of 128, one sequence; mean
    pooling has another case's q, k and v."""
    manifest = json.loads((ROOT / "tests/golden/manifest.json").read_text())
    cases = [case for case in manifest["cases"] if case["block"] == 128 and case["B"] == 1]
    cases += [case for case in manifest["baselines"] if case["method"] == "meanpooling"]
    return [case for case in cases if case["dtype"] != "f32"]


def run_golden(progress: Progress, library: Library) -> None:
    """All cases that a process before did not run."""
    for case in golden_cases()[: REHEARSED_GOLDEN if REHEARSAL else None]:
        call = {"kind": "golden", "case": case["name"]}
        if progress.has(**call):
            continue
        progress.begin(**call)
        watch(CALL_SECONDS_MAX)
        try:
            attention, expected = golden(library, case)
            attention()
            attention.report()
            error = (attention.o.float() - expected).abs().max().item()
            found = {"error_max": error, "right": error <= GOLDEN_MAX[case["dtype"]]}
        except Exception as error:
            if is_lost():
                progress.stop(error)
            found = {"right": False, "error": first_line(error)}
        progress.end(call | found)
    rows = [row for row in progress.rows if row["kind"] == "golden"]
    progress.say(f"authors' outputs: {sum(r.get('right', False) for r in rows)} of {len(rows)} right")


def tensors_of(part: Part) -> tuple[tuple, Callable[[], Lists]]:
    """q, k and v of a part, and what gives the lists of a replay."""
    tokens = max(REHEARSED_TOKENS_MIN, part.tokens // REHEARSED_SHRINK) if REHEARSAL else part.tokens
    make_lists = functools.cache(
        lambda: Lists.from_mask(inputs.replay_mask(HEADS, tokens, REPLAY[part.tokens]))
    )
    return getattr(inputs, part.inputs)(HEADS, KV_HEADS, tokens, part.head_dim), make_lists


def maker(library: Library, tensors: tuple, lists: Callable[[], Lists], name: str) -> Callable:
    """What makes a call by its name; `lists` makes those of a replay."""
    name, _, variant = name.partition(":")
    if name in peers.BACKENDS:
        return functools.partial(peers.sdpa, *tensors, name)
    if name in REPLAY_PEERS:
        make = peers.masked if REHEARSAL or name == "masked_replay" else peers.block_sparse
        return lambda: make(*tensors, lists())
    ours = functools.partial(Attention, library, *tensors, variant=variant or "chosen")
    if name == "pbs_replay":
        return lambda: ours(lists=lists())
    if name == "pbs_replay_in_order":
        slots = torch.arange(tensors[1].shape[1], device=DEVICE, dtype=torch.int32)
        return lambda: ours(lists=lists(), order=slots.repeat(KV_HEADS, 1))
    options = {"pbs_dense": {"method": "dense"}, "pbs": {"dense_fallback": True},
               "pbs_all": {"threshold": 1.0}, "pbs_s512": {"segment_size": 512},
               **{f"pbs_{name}": {"method": name} for name in OTHER_METHODS}}  # fmt: skip
    options["pbs_prism"]["threshold"] = 0.95
    return functools.partial(ours, **options[name])


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two rows of outputs [heads, tokens, head_dim], over the norm of b's: a block of
    keys too few shows in the longest rows, too. Infinite where either has a NaN."""
    heads = zip(a.unbind(), b.unbind())
    shares = [(x.float() - y).norm(dim=-1) / y.float().norm(dim=-1) for x, y in heads]
    return torch.stack([share.max() for share in shares]).max().nan_to_num(math.inf).item()


def compare(outputs: dict[str, torch.Tensor], found: dict[str, dict]) -> None:
    """How far each is from the nearest of those that compute the same: a variant from the
    chosen kernels. All of ours are finite."""
    for name, output in outputs.items():
        plain, _, variant = name.partition(":")
        others = [f"{plain}:chosen"] if variant else SAME.get(name, [])
        offs = {other: largest_difference(output, outputs[other])
                for other in others if other in outputs and other != name}  # fmt: skip
        if offs:
            peer = min(offs, key=offs.__getitem__)
            off = offs[peer]
            found[name] |= {"difference": off, "from": peer, "right": off <= DIFFERENCE_MAX}
        if not is_peer(name) and not output.isfinite().all():
            found[name] |= {"right": False, "why": "outputs are not finite"}


def prepare(progress: Progress, part: dict, makers: dict[str, Callable]) -> tuple[dict, dict]:
    """What the makers make, each run once or twice, and a row for each. One that cannot be
    made or run is told as an error, not fatal, unless nothing runs after it."""
    made, found, outputs = {}, {}, {}
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
            is_wrong = {} if is_peer(name) or ":" in name else {"right": False}
            found[name] = call | {"error": first_line(error)} | is_wrong
            made.pop(name, None), outputs.pop(name, None)
    progress.begin(**part)
    watch(PEER_SECONDS_MAX)
    compare(outputs, found)
    return made, found


def interleave(calls: dict[str, Callable], seconds: float) -> dict[str, dict]:
    """Medians of rounds in which every call runs once; of ours also density and stages."""
    runs: dict[str, list[dict]] = {name: [] for name in calls}
    begin, rounds = time.monotonic(), 0
    while calls and (time.monotonic() - begin < seconds or rounds < ROUNDS_MIN):
        watch(PEER_SECONDS_MAX)
        rounds += 1
        # There and back: no call is always behind the same one.
        for name, call in [*calls.items()][:: 1 if rounds % 2 else -1]:
            ms = {"ms": milliseconds(call)}
            runs[name].append(ms | (call.report() if isinstance(call, Attention) else {}))
    return {name: own[0] | {"ms_min": min(run["ms"] for run in own), "rounds": rounds}
            | {key: statistics.median(run[key] for run in own) for key in own[0] if key.endswith("ms")}
            for name, own in runs.items()}  # fmt: skip


def judge_density(name: str, found: dict, blocks: int, lists: Callable[[], Lists]) -> None:
    """What was listed, or no more than causal blocks and the own segments."""
    least, most, reads = 0.0, 1 + (4 if "s512" in name else 2) / blocks, found["density"]
    if "replay" in name:
        least, most = (lists().density() + off for off in (-DENSITY_ERROR_MAX, DENSITY_ERROR_MAX))
    if not least < reads <= most:
        found |= {"right": False, "why": f"density {reads:.3f} is not in {least:.3f} .. {most:.3f}"}


def line_of(name: str, found: dict[str, dict]) -> str:
    """Time, speed of the dense work, density, and how far ahead of the fastest peer, or the
    chosen kernels."""
    row, (plain, _, variant) = found[name], name.partition(":")
    wrong = f", WRONG: {row.get('why') or row.get('difference')}" * (row.get("right") is False)
    if "ms" not in row:
        return f"{name}: {row['error']}"
    words = [f"{name} {row['ms']:.3f} ms, {row['dense_tflops']:.0f} TFLOP/s"]
    words += [f"density {row['density']:.3f}"] if "density" in row else []
    others = (f"{plain}:chosen",) if variant else DENSE_PEERS
    times = {found[o]["ms"]: o for o in others if "ms" in found.get(o, {}) and found[o].get("right", True)}
    if times and not is_peer(name):
        words.append(f"{min(times) / row['ms']:.2f}x {times[min(times)]}")
    return ", ".join(words) + wrong


def run_part(progress: Progress, library: Library, part: Part, row: dict, seconds: float) -> None:
    """A row for everything of a part, with what is in `row`."""
    progress.begin(**row)
    watch(PEER_SECONDS_MAX)
    names = [name.removesuffix("*") + variant for name in part.names
             for variant in (library.variants if name.endswith("*") else [""])]  # fmt: skip
    tensors, lists = tensors_of(part)
    makers = {name: maker(library, tensors, lists, name) for name in names}
    made, found = prepare(progress, row, makers)
    flops = 2.0 * part.tokens**2 * part.head_dim * HEADS  # causal: half of the square
    for name, figures in interleave(made, seconds).items():
        found[name] |= figures | {"dense_tflops": flops / figures["ms"] * 1e-9}
        if not is_peer(name):
            found[name]["workspace_bytes"] = made[name].workspace_bytes
            judge_density(name, found[name], tensors[0].shape[1] // 128, lists)
    progress.end(*found.values())
    progress.say(f"{part.inputs}, {part.tokens // 1024}K, head dim {part.head_dim}:")
    for name in found:
        progress.say(f"  {line_of(name, found)}")


def run_parts(progress: Progress, library: Library, step: str, end: float) -> None:
    """All parts of a step that a process before did not do and that there is time for."""
    for index, part in enumerate(PARTS[step]):
        row = {"kind": "attention", "head_dim": part.head_dim, "inputs": part.inputs,
               "tokens": part.tokens, "part": index}  # fmt: skip
        done = row | {"kind": "part"}
        if progress.has(**done) or progress.has(**row, name=None):
            continue
        left = end - time.monotonic()
        seconds = min(PART_SECONDS_MAX, left / 3 / (len(PARTS[step]) - index))
        try:
            if left < 3:
                done["error"] = "left out, no time"
            else:
                run_part(progress, library, part, row, seconds)
        except Exception as error:
            if is_lost():
                progress.stop(error)
            done |= {"error": first_line(error), "right": False}
        if "error" in done:
            progress.say(f"{part}: {done['error']}")
        progress.end(done)
        if not REHEARSAL:
            torch.cuda.empty_cache()


def run_hung(progress: Progress, _: float) -> None:
    """A call that hung (of the facts), once more through the library whose waits end."""
    library, call = Library(program("libpbs_gpu_python_bounded.so")), progress.facts["call"]
    name = call.get("name") or call.get("case") or "no call of ours"
    try:
        if call["kind"] == "golden":
            attention, _ = golden(library, next(c for c in golden_cases() if c["name"] == name))
        else:
            part = Part(call["head_dim"], call["tokens"], (), call["inputs"])
            attention = maker(library, *tensors_of(part), name)()
        attention()
        end = time.monotonic() + CALL_SECONDS_MAX
        while not (told := attention.hang()) and time.monotonic() < end:
            if REHEARSAL or torch.cuda.current_stream().query():
                break
            time.sleep(0.05)
        told = told or "no wait of Hopper's kernels is late"
    except Exception as error:
        told = f"not run: {first_line(error)}"
    progress.say(f"{name} with bounded waits: {told}")


def run_step(name: str, progress: Progress, seconds: float) -> None:
    """Runs a step."""
    end, library = time.monotonic() + seconds, Library(program("libpbs_gpu_python.so"))
    if name == "gate":
        run_golden(progress, library)
    run_parts(progress, library, name, end)
    for call in REQUIRED if name == "gate" else ():
        if not progress.has(kind="attention", name=call, right=True):
            why = f"{call}: nothing says that it is right"
            progress.end({"kind": "gate", "name": call, "right": False, "error": why})
            progress.say(why)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    steps = {name: functools.partial(run_step, name) for name in PARTS} | {"hung": run_hung}
    exit_status = run_part_of(__doc__, steps)
    sys.stdout.flush()
    os._exit(exit_status)  # a compiler's workers are not waited for
