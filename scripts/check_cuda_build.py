#!/usr/bin/env python3
"""Compiles the Hopper kernels and checks what the compiler made of them.

    python3 scripts/check_cuda_build.py [--cuobjdump PROGRAM]

Per kernel: no spilled register, no warning that warpgroup products were serialised
(C7510, C7513, C7519, C7520), the exact number of products and box copies, and in each hot
loop the softmax between the two waits: lost overlap is silent otherwise (docs/KERNELS.md).
Needs nvcc 13; without it, or without cuobjdump (PyPI nvidia-cuda-cuobjdump), it says NOT
RUN and succeeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "kernels/cuda/attention/attention_sm90.cu"
SERIALISED = re.compile(r"C75(?:10|13|19|20)")
# Of a softmax of 64 scores per thread: one each, and two for the rescaling.
SOFTMAX_EXPONENTIALS = 66
OVERLAP_MIN = 0.9


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the code of one kernel must hold: three scores, three value products."""

    products: int
    copies: int


# By head dim. A block has head_dim / 16 products for scores and 8 for values; first,
# masked and plain blocks have code of their own. Copies: two halves of the queries, keys
# and values, one per 64 columns, in up to four unrolled places.
EXPECTED = {64: Expected(products=36, copies=16), 128: Expected(products=48, copies=32)}


def compile_kernels(cubin: pathlib.Path) -> tuple[list[str], str]:
    """Complaints, and what ptxas said."""
    command = [
        "nvcc", "-std=c++20", "-O3", "-gencode", "arch=compute_90a,code=sm_90a",
        "-Xptxas", "-v", "-I", str(ROOT / "kernels"), "-I", str(ROOT / "kernels/include"),
        "-cubin", "-o", str(cubin), str(SOURCE),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        return [f"nvcc failed:\n{said}"], said
    found = [f"warning {m.group(0)}" for m in SERIALISED.finditer(said)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    found += [f"{a} + {b} bytes of spills" for a, b in spills if (a, b) != ("0", "0")]
    return found, said


def instructions(sass: str) -> dict[tuple[str, int], list[str]]:
    """Instructions of each kernel, by element type and head dim."""
    kernels: dict[tuple[str, int], list[str]] = {}
    current: list[str] = []
    for line in sass.splitlines():
        if name := re.search(r"Function : \S*?(F16|Bf16)ElementELi(\d+)E", line):
            current = kernels.setdefault((name.group(1), int(name.group(2))), [])
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            current.append(code.group(1))
    return kernels


def overlaps(code: list[str]) -> list[int]:
    """Exponentials between two waits that follow each other without a product."""
    found, count, waited = [], 0, False
    for line in code:
        if "HGMMA" in line:
            waited = False
        elif "WARPGROUP.DEPBAR" in line:
            if waited:
                found.append(count)
            count, waited = 0, True
        elif "MUFU.EX2" in line:
            count += 1
    return found


def check_kernel(name: str, code: list[str], expected: Expected) -> list[str]:
    """Complaints about one kernel, after its figures."""
    products = sum("HGMMA" in line for line in code)
    copies = sum("UTMALDG" in line for line in code)
    between = overlaps(code)
    print(f"{name}: {products} products, {copies} copies, exponentials between waits {between}")
    found = []
    if products != expected.products:
        found.append(f"{name}: {products} products, expected {expected.products}")
    if copies != expected.copies:
        found.append(f"{name}: {copies} box copies, expected {expected.copies}")
    least = OVERLAP_MIN * SOFTMAX_EXPONENTIALS
    if len(between) != 2 or min(between) < least:
        found.append(f"{name}: exponentials between waits {between}, expected two of >= {least}")
    return found


def main() -> int:
    """Prints figures, then complaints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuobjdump", default="cuobjdump")
    arguments = parser.parse_args()
    for program in ("nvcc", arguments.cuobjdump):
        if shutil.which(program) is None:
            print(f"NOT RUN: there is no {program}")
            return 0
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernels.cubin"
        found, said = compile_kernels(cubin)
        if not cubin.exists():
            print("\n".join(found))
            return 1
        sass = subprocess.run(
            [arguments.cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    registers = sorted(set(re.findall(r"Used (\d+) registers", said)))
    print(f"registers at launch: {', '.join(registers)}")
    kernels = instructions(sass)
    if len(kernels) != 2 * len(EXPECTED):
        found.append(f"{len(kernels)} kernels, expected {2 * len(EXPECTED)}")
    for (element, head_dim), code in sorted(kernels.items()):
        found += check_kernel(f"{element}, head dim {head_dim}", code, EXPECTED[head_dim])
    print("\n".join(found) or "the kernels are as planned")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
