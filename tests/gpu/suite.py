#!/usr/bin/env python3
"""Parity with the authors' outputs, then attention timed beside its peers in one process.

    python3 tests/gpu/suite.py --library libpbs_gpu_python.so --out FILE.json
        [--seconds N] [--commit ID]

Every length: torch SDPA (cuDNN, flash), FlexAttention and a Triton kernel over the same
block lists, ours dense, with its own selection, and with lists forced to the densities of
the paper; rounds interleave them, figures are medians. Writes what it has whenever a part
is done, and stops beginning new parts when the seconds are used up.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import inputs
import peers
import torch
from pbs_library import TUNINGS, Attention, Library, Lists
from torch.nn.attention import SDPBackend

HEADS, KV_HEADS = 32, 8  # Llama-3.1-8B
LENGTHS = [8192, 16384, 32768, 65536, 131072, 262144]
# The paper's densities at 8K .. 128K with threshold .9.
REPLAY = {8192: 0.58, 16384: 0.485, 32768: 0.405, 65536: 0.287, 131072: 0.219}
GOLDEN_MAX = {"f16": 2e-3, "bf16": 4e-2}
TUNED_TOKENS = 32768
ROUNDS_MIN = 5
FLEX_TOKENS_MAX = 32768  # its masks are made on the host side of a compiler


def query_gpu() -> dict[str, str]:
    """Name, driver and clocks as the driver tells them."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return dict(zip(fields.split(","), [value.strip() for value in said.split(",")]))


def golden(library: Library, case: dict) -> dict:
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
    )  # fmt: skip
    attention.run()
    attention.report()
    error = (attention.o.float() - tensors["o"][0].float()).abs().max().item()
    attention.close()
    return {"case": case["name"], "error": error, "right": error <= GOLDEN_MAX[case["dtype"]]}


def interleave(makers: dict[str, Callable[[], Callable]], seconds: float) -> dict[str, dict]:
    """Milliseconds of each call: rounds in which every call runs once. A peer that cannot
    be made or run is told as an error, not fatal."""
    calls: dict[str, Callable] = {}
    found: dict[str, dict] = {}
    for name, make in makers.items():
        try:
            call = make()
            for _ in range(2):
                call()
            torch.cuda.synchronize()
            calls[name] = call
        except Exception as error:  # whatever a peer's compiler may raise
            found[name] = {"error": str(error).splitlines()[0][:160]}
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds = time.monotonic(), 0
    while time.monotonic() - begin < seconds or rounds < ROUNDS_MIN:
        rounds += 1
        for name, call in calls.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            call()
            events[1].record()
            torch.cuda.synchronize()
            times[name].append(events[0].elapsed_time(events[1]))
    for name, values in times.items():
        found[name] = {"ms": statistics.median(values), "rounds": rounds}
    return found


def stages(attention: Attention) -> dict:
    """Density and stage times of one more run."""
    attention.run()
    report = attention.report()
    return {
        "density": report.density,
        "permute_ms": report.permute_seconds * 1e3,
        "select_ms": report.select_seconds * 1e3,
        "attend_ms": report.attend_seconds * 1e3,
        "workspace_bytes": report.workspace_bytes,
        "fell_back": bool(report.fell_back),
    }


def dense_flops(tokens: int, head_dim: int) -> float:
    """Of causal attention: half of the square."""
    return 2.0 * tokens * tokens * head_dim * HEADS


def time_length(library: Library, tokens: int, head_dim: int, seconds: float) -> list[dict]:
    """All inputs of one length."""
    rows = []
    for kind, make in (("structured", inputs.structured), ("white_noise", inputs.white_noise)):
        q, k, v = make(HEADS, KV_HEADS, tokens, head_dim)
        ours = {
            "pbs_dense": Attention(library, q, k, v, method="dense"),
            "pbs": Attention(library, q, k, v, dense_fallback=True),
        }
        if tokens >= 131072 and kind == "structured":
            ours["pbs_s512"] = Attention(library, q, k, v, segment_size=512)
        if tokens == TUNED_TOKENS and kind == "structured":
            ours["pbs_dense_ampere"] = Attention(
                library, q, k, v, method="dense", ampere_kernels=True
            )
            for tuning in TUNINGS[1:]:
                if tuning != "fewer_stages" or head_dim == 64:
                    ours[f"pbs_{tuning}"] = Attention(library, q, k, v, tuning=tuning)
        makers: dict[str, Callable[[], Callable]] = {
            "cudnn": functools.partial(peers.sdpa, q, k, v, SDPBackend.CUDNN_ATTENTION),
            "flash": functools.partial(peers.sdpa, q, k, v, SDPBackend.FLASH_ATTENTION),
        }
        if kind == "structured" and tokens in REPLAY:
            mask = inputs.replay_mask(HEADS, tokens, REPLAY[tokens])
            lists = Lists.from_mask(mask)
            ours["pbs_replay"] = Attention(library, q, k, v, lists=lists)
            slots = torch.arange(tokens, device="cuda", dtype=torch.int32)
            positions = slots.repeat(KV_HEADS, 1)
            makers["triton_replay"] = functools.partial(
                peers.triton_sparse, q, k, v, positions, lists
            )
            if tokens <= FLEX_TOKENS_MAX:
                makers["flex_replay"] = functools.partial(peers.flex, q, k, v, mask)
        makers |= {name: functools.partial(getattr, a, "run") for name, a in ours.items()}
        found = interleave(makers, seconds)
        for name, attention in ours.items():
            if "ms" in found[name]:
                found[name] |= stages(attention)
            attention.close()
        for name, figure in found.items():
            row = {"inputs": kind, "tokens": tokens, "head_dim": head_dim, "name": name}
            if "ms" in figure:
                figure["dense_tflops"] = dense_flops(tokens, head_dim) / figure["ms"] * 1e-9
            rows.append(row | figure)
            print(json.dumps(rows[-1]), flush=True)
        del q, k, v, ours, makers
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    """Exit status 1 when a golden case is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    begin = time.monotonic()
    library = Library(arguments.library)
    result: dict = {
        "gpu": query_gpu(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": arguments.commit,
        "command": "scripts/gpu_suite.sh",
        "golden": [],
        "timings": [],
    }

    def save() -> None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    for case in inputs.golden_cases():
        result["golden"].append(golden(library, case))
        print(json.dumps(result["golden"][-1]), flush=True)
    save()
    for head_dim in (128, 64):
        for tokens in LENGTHS:
            left = arguments.seconds - (time.monotonic() - begin)
            if left < 15 or (head_dim == 64 and tokens > 131072):
                print(f"left out: {tokens} tokens, head dim {head_dim}", flush=True)
                continue
            try:
                each = min(6.0, left / 10)
                result["timings"] += time_length(library, tokens, head_dim, each)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                result.setdefault("failed", []).append(f"{tokens}, {head_dim}: {error}")
                print(result["failed"][-1], file=sys.stderr)
            save()
    result["gpu_after"] = query_gpu()
    save()
    return 0 if all(case["right"] for case in result["golden"]) else 1


if __name__ == "__main__":
    sys.exit(main())
