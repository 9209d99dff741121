#!/usr/bin/env python3
"""Records which blocks mean pooling and PBS-Attn compute at one threshold, as JSON.

    scripts/bench.sh density

The tensors are those of the server's structured generator: they show the mechanism, and
say nothing about the quality of a model. Coverage is measured on sampled rows.
"""

from __future__ import annotations

import argparse
import sys

from bench_common import ROOT, run_header, write_results

sys.path[:0] = [str(ROOT / "client/python"), str(ROOT / "tests/python")]
from pbs_client import Attention, Client, MeanPooling, Pbs, Synthetic  # noqa: E402
from real_server import running_server  # noqa: E402

BLOCK_SIZE = 128
COVERAGE_ROWS = 64


def record(client: Client, tensors: Synthetic, method: MeanPooling | Pbs) -> dict:
    """Causal ratio and coverage of a method; for each block how many heads compute it."""
    attention = Attention(method, dense_fallback=False, coverage_rows=COVERAGE_ROWS)
    result = client.attend_synthetic(tensors, attention, want=("block_mask",))
    return {
        "causal_ratio": result.stats.executed_blocks / result.stats.causal_blocks,
        "coverage": result.stats.coverage,
        # One character per key block, one line per query block.
        "heads": ["".join(map(str, row)) for row in result.block_mask[0].sum(0, dtype=int)],
    }


def main() -> int:
    """Runs the server and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="length of the sequence")
    parser.add_argument("--threshold", type=float, default=0.9, help="of both methods")
    arguments = parser.parse_args()
    header = run_header()
    tensors = Synthetic(num_heads=8, num_kv_heads=2, seq_len=arguments.tokens, head_dim=128)
    methods = {
        "mean pooling": MeanPooling(block_size=BLOCK_SIZE, threshold=arguments.threshold),
        "PBS-Attn": Pbs(block_size=BLOCK_SIZE, threshold=arguments.threshold),
    }
    with running_server() as server, Client(server.target) as client:
        maps = {name: record(client, tensors, method) for name, method in methods.items()}
    for name, figures in maps.items():
        print(
            f"    {name:14} causal ratio {figures['causal_ratio']:.3f}, coverage {figures['coverage']:.3f}",
            file=sys.stderr,
        )
    figures = {**vars(arguments), "num_heads": tensors.num_heads, "maps": maps}
    write_results("density", header, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
