#!/usr/bin/env python3
"""Parity with the authors' outputs, then attention timed beside its peers in one process.

    python3 tests/gpu/suite.py --library libpbs_gpu_python.so --out FILE.json
        [--seconds N] [--commit ID] [--check TEXT ...] [--ampere HEAD_DIM ...]

Every length: torch SDPA (cuDNN, flash), FlexAttention and a Triton kernel over the same
block lists, ours dense, with its own selection, and with lists forced to the densities of
the paper; rounds interleave them, figures are medians. Writes what it has whenever a part
is done, and stops beginning new parts when the seconds are used up.

--check: what was found about the kernels before, to stand in the results. --ampere: head
dims that run the kernels of compute capability 8.0.

Exit status 0 when all is done and right, 3 when all is done. Anything else: it ended in a
call; run again on the same file, it carries on without that call.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import inputs
import machine
import peers
import torch
from pbs_library import VARIANTS, Attention, Library, Lists
from progress import PART, Progress, first_line
from torch.nn.attention import SDPBackend
from workload import HEADS, KV_HEADS, LENGTHS, REPLAY

LONGEST = 262144  # head dim 128
INPUTS = {"structured": inputs.structured, "white_noise": inputs.white_noise}
GOLDEN_MAX = {"f16": 2e-3, "bf16": 4e-2}
# What computes the same, and what two roundings to bf16 may differ by, of a row's norm.
SAME = {
    "flash": ["cudnn"],
    "pbs_dense": ["cudnn", "flash"],
    "flex_replay": ["triton_replay"],
    "pbs_replay_in_order": ["triton_replay", "flex_replay"],
}
DIFFERENCE_MAX = 2e-2
TUNED_TOKENS = 32768
ROUNDS_MIN, STAGE_RUNS = 5, 5
FLEX_TOKENS_MAX = 32768  # its masks are made on the host side of a compiler
PART_SECONDS_MAX = 5.0
# No call of ours takes longer, unless it hangs; a peer may have to be compiled.
CALL_SECONDS_MAX, PEER_SECONDS_MAX = 25, 75
# Longer than it takes to enqueue a call, so that no call waits for the host: a millisecond.
AHEAD_CYCLES = 2_000_000


def query_gpu() -> dict[str, str]:
    """Name, driver and clocks, or what torch knows of them."""
    unknown = {"name": torch.cuda.get_device_name(), "driver_version": "unknown"}
    return machine.query_gpu() or unknown


def golden(library: Library, case: dict, ampere: list[int]) -> dict:
    """One case of tests/golden: the authors' order and mask in, their output expected."""
    folder = inputs.ROOT / "tests/golden"
    tensors = inputs.read_safetensors(folder / case["file"])
    source = tensors
    if "q" not in tensors:
        files = {c["name"]: c["file"] for c in inputs.golden_cases()}
        source = inputs.read_safetensors(folder / files[case["inputs_from"]])
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[case["dtype"]]
    q, k, v = (source[name][0].to(dtype).contiguous() for name in "qkv")
    is_pbs = case["method"] == "pbs"
    order = tensors["order"][0].to(torch.int32).contiguous() if "order" in tensors else None
    mask = tensors["block_mask"][0].bool() if "block_mask" in tensors else None
    attention = Attention(
        library, q, k, v,
        method="pbs" if is_pbs else "mean_pooling",
        segment_size=case.get("segment") or 256,
        query_head_scope=is_pbs,
        order=order if is_pbs else None,
        lists=Lists.from_mask(mask if is_pbs else torch.tril(mask)) if mask is not None else None,
        variant="ampere" if q.shape[-1] in ampere else "chosen",
    )  # fmt: skip
    attention.run()
    attention.report()
    error = (attention.o.float() - tensors["o"][0].float()).abs().max().item()
    attention.close()
    return {"case": case["name"], "error": error, "right": error <= GOLDEN_MAX[case["dtype"]]}


def context_is_lost() -> bool:
    """Whether a kernel faulted: nothing runs in this process any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_golden(progress: Progress, library: Library, ampere: list[int]) -> None:
    """All cases of tests/golden that a process before did not run."""
    for case in inputs.golden_cases():
        if progress.has_case(case["name"]):
            continue
        progress.begin({"case": case["name"]})
        faulthandler.dump_traceback_later(CALL_SECONDS_MAX, exit=True)
        try:
            found = golden(library, case, ampere)
        except Exception as error:
            if context_is_lost():
                progress.stop(error)
            found = {"case": case["name"], "right": False, "failed": first_line(error)}
        progress.result["golden"].append(found)
        progress.end()
        print(json.dumps(found), flush=True)


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two rows of outputs [heads, tokens, head_dim], over the norm of b's: a block of
    keys too few shows in the longest rows, too. NaN if either has one."""
    heads = zip(a.unbind(), b.unbind())
    shares = [(x.float() - y).norm(dim=-1) / y.float().norm(dim=-1) for x, y in heads]
    return torch.stack([share.max() for share in shares]).max().item()


def compare(outputs: dict[str, torch.Tensor], found: dict[str, dict]) -> None:
    """Of what computes the same, how far it is from the first peer that ran."""
    for name, others in SAME.items():
        peer = next((other for other in others if other in outputs), None)
        if name in outputs and peer is not None:
            difference = largest_difference(outputs[name], outputs[peer])
            found[name] |= {
                "difference": difference, "from": peer, "right": difference <= DIFFERENCE_MAX,
            }  # fmt: skip


def prepare(progress: Progress, part: dict, makers: dict[str, Callable]) -> tuple[dict, dict]:
    """What the makers make, each run twice, and a row for each. One that cannot be made or
    run is told as an error, not fatal, unless nothing runs after it."""
    made: dict[str, Callable] = {}
    found: dict[str, dict] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, make in makers.items():
        if progress.is_barred(part["head_dim"], name):
            continue
        progress.begin(part | {"name": name})
        limit = CALL_SECONDS_MAX if name.startswith("pbs") else PEER_SECONDS_MAX
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            call = make()
            for _ in range(2):
                output = call()
                torch.cuda.synchronize()
            if isinstance(call, Attention):
                call.report()
            made[name], found[name] = call, {}
            if name in SAME or any(name in others for others in SAME.values()):
                outputs[name] = output
        except Exception as error:  # whatever a peer's compiler may raise
            if context_is_lost():
                progress.stop(error)
            found[name] = {"error": first_line(error)}
    progress.begin(part | {"name": None})
    faulthandler.dump_traceback_later(PEER_SECONDS_MAX, exit=True)
    compare(outputs, found)
    return made, found


def interleave(calls: dict[str, Callable], seconds: float) -> dict[str, dict]:
    """Milliseconds of each call: rounds in which every call runs once."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds = time.monotonic(), 0
    while calls and (time.monotonic() - begin < seconds or rounds < ROUNDS_MIN):
        faulthandler.dump_traceback_later(CALL_SECONDS_MAX, exit=True)
        rounds += 1
        for name, call in calls.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda._sleep(AHEAD_CYCLES)
            events[0].record()
            call()
            events[1].record()
            torch.cuda.synchronize()
            times[name].append(events[0].elapsed_time(events[1]))
    return {
        name: {"ms": statistics.median(values), "ms_min": min(values), "rounds": rounds}
        for name, values in times.items()
    }


def stages(attention: Attention) -> dict:
    """Density and stage times of more runs, medians."""
    reports = []
    for _ in range(STAGE_RUNS):
        torch.cuda._sleep(AHEAD_CYCLES)
        attention.run()
        reports.append(attention.report())
    times = {
        f"{stage}_ms": statistics.median(getattr(r, f"{stage}_seconds") for r in reports) * 1e3
        for stage in ("permute", "select", "attend")
    }
    return times | {
        "density": reports[0].density,
        "workspace_bytes": reports[0].workspace_bytes,
        "fell_back": bool(reports[0].fell_back),
    }


def dense_flops(tokens: int, head_dim: int) -> float:
    """Of causal attention: half of the square."""
    return 2.0 * tokens * tokens * head_dim * HEADS


def makers_of(library: Library, part: dict, tensors: tuple, is_ampere: bool) -> dict[str, Callable]:
    """What runs in a part, by name; each makes a call."""
    kind, tokens, head_dim = (part[key] for key in PART)

    def ours(**options) -> Callable[[], Attention]:
        return functools.partial(
            Attention, library, *tensors, **({"variant": "ampere" if is_ampere else "chosen"} | options)
        )

    makers: dict[str, Callable] = {
        "cudnn": functools.partial(peers.sdpa, *tensors, SDPBackend.CUDNN_ATTENTION),
        "flash": functools.partial(peers.sdpa, *tensors, SDPBackend.FLASH_ATTENTION),
        "pbs_dense": ours(method="dense"),
        "pbs": ours(dense_fallback=True),
    }
    if kind != "structured":
        return makers
    if tokens >= 131072:
        makers["pbs_s512"] = ours(segment_size=512)
    if tokens in REPLAY:
        mask = inputs.replay_mask(HEADS, tokens, REPLAY[tokens])
        lists = Lists.from_mask(mask)
        slots = torch.arange(tokens, device="cuda", dtype=torch.int32).repeat(KV_HEADS, 1)
        makers["triton_replay"] = functools.partial(peers.triton_sparse, *tensors, slots, lists)
        if tokens <= FLEX_TOKENS_MAX:
            makers["flex_replay"] = functools.partial(peers.flex, *tensors, mask)
        makers["pbs_replay"] = ours(lists=lists)
        makers["pbs_replay_in_order"] = ours(lists=lists, order=slots)
    if tokens == TUNED_TOKENS and not is_ampere:
        makers["pbs_dense_ampere"] = ours(method="dense", variant="ampere")
        for variant in VARIANTS[2:]:
            if variant != "fewer_stages" or head_dim == 64:
                makers[f"pbs_{variant}"] = ours(variant=variant)
    return makers


def time_part(
    progress: Progress, library: Library, part: dict, is_ampere: bool, seconds: float
) -> list[dict]:
    """Inputs of one kind and length: a row for everything that runs on them."""
    kind, tokens, head_dim = (part[key] for key in PART)
    progress.begin(part | {"name": None})
    faulthandler.dump_traceback_later(PEER_SECONDS_MAX, exit=True)
    tensors = INPUTS[kind](HEADS, KV_HEADS, tokens, head_dim)
    made, found = prepare(progress, part, makers_of(library, part, tensors, is_ampere))
    for name, figures in interleave(made, seconds).items():
        found[name] |= figures
        found[name]["dense_tflops"] = dense_flops(tokens, head_dim) / figures["ms"] * 1e-9
    for name, call in made.items():
        if isinstance(call, Attention):
            faulthandler.dump_traceback_later(CALL_SECONDS_MAX, exit=True)
            found[name] |= stages(call)
            call.close()
            if is_ampere:
                found[name]["kernels"] = "sm_80"
    return [{"name": name} | figures for name, figures in found.items()]


def parts_in_order() -> list[dict]:
    """The longest last: it is beside the paper's."""
    sizes = [(tokens, head_dim) for head_dim in (128, 64) for tokens in LENGTHS]
    return [
        dict(zip(PART, (kind, *size))) for size in [*sizes, (LONGEST, 128)] for kind in INPUTS
    ]


def seconds_of(part: dict) -> float:
    """About what a part takes at least, at a speed that is reached."""
    rounds = ROUNDS_MIN + STAGE_RUNS + 2
    return 8 + 5 * rounds * dense_flops(part["tokens"], part["head_dim"]) / 5e14


def run_parts(progress: Progress, library: Library, ampere: list[int], end: float) -> None:
    """All parts that a process before did not do and that there is time for."""
    for part in parts_in_order():
        if part in progress.result["parts"]:
            continue
        left = end - time.monotonic()
        if left < seconds_of(part):
            print(f"left out: {part}", flush=True)
            continue
        try:
            is_ampere = part["head_dim"] in ampere
            rows = time_part(progress, library, part, is_ampere, min(PART_SECONDS_MAX, left / 12))
        except Exception as error:
            if context_is_lost():
                progress.stop(error)
            rows = [{"name": None, "error": first_line(error)}]
        progress.finish(part, rows)
        for row in rows:
            print(json.dumps(part | row), flush=True)
        torch.cuda.empty_cache()


def main() -> int:
    """Status as the top says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--commit", default="")
    parser.add_argument("--check", action="append", default=[])
    parser.add_argument("--ampere", action="append", type=int, default=[])
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    library = Library(arguments.library)
    torch.zeros(1, device="cuda")  # a slow start is no hang
    facts = {
        "gpu": query_gpu(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": arguments.commit,
        "command": "scripts/gpu_suite.sh",
        "checks": arguments.check,
    }
    progress = Progress(arguments.out, facts)
    run_golden(progress, library, arguments.ampere)
    run_parts(progress, library, arguments.ampere, end)
    faulthandler.cancel_dump_traceback_later()
    progress.result["gpu_after"] = query_gpu()
    progress.result["done"] = True
    progress.save()
    return 0 if progress.is_right() else 3


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a compiler's workers are not waited for
