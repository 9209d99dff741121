#!/usr/bin/env python3
"""The peer's half of a side-by-side benchmark: torch, one run at a time on request.

stdin, one JSON object a line; "do" and what else there is:
  attention name, dtype (f32 | bf16), len, heads, kv_heads, head_dim
  linear    name, rows, in, out, dtype (f32 | bf16)
  run       name -> wall and CPU seconds
  drop      name
stdout: one JSON line per command. See bench_worker.cc, which speaks the same.

usage: torch_worker.py [--threads N]
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def attention(words: dict):
    """Causal scaled_dot_product_attention; KV heads are repeated beforehand."""
    heads, length, dim = (words[k] for k in ("heads", "len", "head_dim"))
    dtype = DTYPES[words["dtype"]]
    q, k, v = (torch.randn(1, heads, length, dim).to(dtype) for _ in range(3))
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True
    )


def linear(words: dict):
    """torch.nn.functional.linear without bias."""
    rows, wide, out = (words[k] for k in ("rows", "in", "out"))
    dtype = DTYPES[words["dtype"]]
    x, weight = torch.randn(rows, wide).to(dtype), torch.randn(out, wide).to(dtype)
    return lambda: torch.nn.functional.linear(x, weight)


def main() -> None:
    """Serves commands until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(1)
    cases = {}
    makers = {"attention": attention, "linear": linear}
    for line in sys.stdin:
        words = json.loads(line)
        command = words["do"]
        reply: dict[str, object] = {"ok": True}
        with torch.inference_mode():
            if command in makers:
                cases[words["name"]] = makers[command](words)
                cases[words["name"]]()  # warms up
            elif command == "run":
                cpu, wall = time.process_time(), time.perf_counter()
                cases[words["name"]]()
                reply["wall"] = time.perf_counter() - wall
                reply["cpu"] = time.process_time() - cpu
            elif command == "drop":
                cases.pop(words["name"], None)
            else:
                reply = {"error": f"unknown command {command}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
