#!/usr/bin/env python3
"""Checks what the compiler made of the CUDA kernels.

    python3 tests/structure/check_cuda_build.py --module libpbs_cuda.so --log FILE
        [--variants FILE] [--cuobjdump PROGRAM]

--log: what a build from nothing said (scripts/build_cuda.sh); --variants: what one of the
programs for a GPU said (scripts/pack_gpu.sh --programs). Of every kernel, variants too: no
spilled register, no stack, no warning about warpgroup products (C75xx: that they were
serialised, that registers did not change hands). Of the module, per counted kernel: the
registers at launch, at most those that docs/KERNELS.md says; the number of products, copies
and 16-byte stores; the loads that are under way together; and in each hot loop of the
Hopper kernels the softmax between the two waits: lost overlap is silent otherwise. Every
kernel of compute capability 9.0 waits for the one before it ahead of its first access to
memory. Needs cuobjdump (PyPI nvidia-cuda-cuobjdump).
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import subprocess
import sys

WARPGROUP_WARNING = re.compile(r"C75\d\d")
# Of a softmax of 64 scores per thread: one each, and two for the rescaling.
SOFTMAX_EXPONENTIALS = 66
OVERLAP_MIN = 0.9


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the code of one kernel must hold, by the name of its instruction; registers of a
    thread at launch, at most (docs/KERNELS.md)."""

    instructions: dict[str, int]
    registers: int
    overlaps: int = 0  # hot loops whose softmax stands between two waits
    # Loads of 16 bytes that a thread has under way before it uses the first, loop by loop.
    under_way: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Unit:
    """Kernels that are counted, by name and head dim, in the code for one architecture."""

    architecture: str
    kernels: dict[str, dict[int, Expected]]


def attention_sm80(registers: tuple[int, int, int, int]) -> dict[int, Expected]:
    """64 keys: two fragments of rows (one at 256) x head_dim / 16 x 8 products for scores, as
    many for values. Copies of 16 bytes: queries, and keys and values in three places. A row
    of the output is stored by four lanes."""
    return {
        64: Expected({"HMMA": 128, "LDGSTS": 20, "STG.E.128": 8}, registers[0]),
        96: Expected({"HMMA": 192, "LDGSTS": 30, "STG.E.128": 12}, registers[1]),
        128: Expected({"HMMA": 256, "LDGSTS": 40, "STG.E.128": 16}, registers[2]),
        256: Expected({"HMMA": 256, "LDGSTS": 64, "STG.E.128": 16}, registers[3]),
    }


def corrected(registers: tuple[int, int, int, int]) -> dict[int, Expected]:
    """32 means: two fragments of rows (one at 256) x head_dim / 16 x 4 products for scores, as
    many for values. Copies: queries, and means in three places."""
    return {
        64: Expected({"HMMA": 64, "LDGSTS": 14, "STG.E.128": 8}, registers[0]),
        96: Expected({"HMMA": 96, "LDGSTS": 21, "STG.E.128": 12}, registers[1]),
        128: Expected({"HMMA": 128, "LDGSTS": 28, "STG.E.128": 16}, registers[2]),
        256: Expected({"HMMA": 128, "LDGSTS": 40, "STG.E.128": 16}, registers[3]),
    }


# Rows of keys, then of values: eight pieces of 16 bytes (six at head dim 96) are loaded before
# the first is stored.
GATHERED = {
    64: Expected({"STG.E.128": 16}, registers=72, under_way=(8, 8)),
    96: Expected({"STG.E.128": 12}, registers=77, under_way=(6, 6)),
    128: Expected({"STG.E.128": 16}, registers=78, under_way=(8, 8)),
    256: Expected({"STG.E.128": 16}, registers=95, under_way=(8, 8)),
}
POOLED = {
    64: Expected({}, registers=86, under_way=(8,)),
    96: Expected({}, registers=80, under_way=(6,)),
    128: Expected({}, registers=90, under_way=(8,)),
    256: Expected({}, registers=96, under_way=(8,)),
}
# Three thread blocks to a multiprocessor; two at head dim 256, by their shared memory.
# Products: two fragments of rows x head_dim / 16 x 8.
SCORED = {
    64: Expected({"HMMA": 64}, registers=168),
    96: Expected({"HMMA": 96}, registers=168),
    128: Expected({"HMMA": 128}, registers=168),
    256: Expected({"HMMA": 256}, registers=176),
}
# The same products; two thread blocks to a multiprocessor.
STRIDED = {head_dim: dataclasses.replace(scored, registers=234) for head_dim, scored in SCORED.items()}
MEANS = {
    64: Expected({}, registers=90, under_way=(8,)),
    96: Expected({}, registers=86, under_way=(6,)),
    128: Expected({}, registers=94, under_way=(8,)),
    256: Expected({}, registers=108, under_way=(8,)),
}
# The same products; two thread blocks to a multiprocessor at head dim 256.
SHARED_LINES = {**SCORED, 256: dataclasses.replace(SCORED[256], registers=180)}
# Registers of the kernels that are not counted, at most, on either architecture.
OTHERS = {
    "StoreSequences": 36,
    "WeighProxies": 56,
    "WeighLines": 56,
    "ChooseLines": 64,
    "ScoreGrid": 96,
    "CutGrid": 64,
    "WriteLines": 64,
    "SortSegments": 40,
    "MeasureBands": 64,
    "ChooseKeyLines": 52,
    "GatherColumns": 72,
    "ListSpans": 80,
    "SplitMeans": 32,
    "SelectBlocks": 96,
    "GuardHeads": 56,
    "OrderTiles": 64,
    "MeasureCoverage": 128,
    "MoveRows": 30,
    "NormalizeRows": 94,
    "MakeRotations": 20,
    "SplitHeads": 30,
    "PoolHeads": 60,
    "GateRows": 32,
    "DotRows": 79,
}
# Accesses to global memory, as the first word of an instruction.
GLOBAL_MEMORY = re.compile(r"\b(LD|LDG|ST|STG|ATOM|ATOMG|RED|REDG|LDGSTS|UTMALDG|UTMASTG|UBLKCP)\b")
AROUND_ATTENTION = {
    "GatherKeys": GATHERED,
    "PoolMeans": MEANS,
    "PoolQueries": POOLED,
    "SelectAntidiagonals": STRIDED,
    "SelectRows": SCORED,
    "ShareImportance": SCORED,
    "ShareLines": SHARED_LINES,
    "SumChunks": SCORED,
    "SumLines": SCORED,
}
UNITS = [
    # A block has head_dim / 16 products for scores and 8 for values; first, masked and
    # plain blocks have code of their own. Copies, one per 64 columns: queries, keys, and
    # values in three places; UBLKCP: the first record of a tile, the next ones, positions.
    # Loads from global memory: the producer's, of a list, and three of a masked block that is
    # read in part: its list entry, its part, its columns. Outputs leave as boxes
    # through shared memory, four matrices of eight by eight at a time, or, from tiles that
    # are not whole, as rows, each stored by four lanes.
    Unit(
        "90a",
        {
            "AttendSm90Kernel": {
                64: Expected(
                    {"HGMMA": 36, "UTMALDG": 5, "UBLKCP": 3, "LDG": 7, "UTMASTG": 1,
                     "STSM": 4, "STG.E.128": 4}, 168, overlaps=2
                ),
                128: Expected(
                    {"HGMMA": 48, "UTMALDG": 10, "UBLKCP": 3, "LDG": 7, "UTMASTG": 2,
                     "STSM": 8, "STG.E.128": 8}, 168, overlaps=2
                ),
            }
        },
    ),
    # Attention of 8.0 runs on Hopper where that has no kernel of its own, and as PTX on what
    # comes after it.
    Unit(
        "80",
        {
            "AttendSm80Kernel": attention_sm80((213, 238, 255, 239)),
            "CorrectByMeans": corrected((168, 214, 247, 226)),
            **AROUND_ATTENTION,
        },
    ),
    Unit(
        "90",
        {
            "AttendSm80Kernel": attention_sm80((218, 255, 255, 253)),
            "CorrectByMeans": corrected((172, 210, 247, 238)),
            **AROUND_ATTENTION,
        },
    ),
]



def check_log(said: str) -> list[str]:
    """Complaints about any kernel."""
    found = [f"warning {m.group(0)}" for m in WARPGROUP_WARNING.finditer(said)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    found += [f"{a} + {b} bytes of spills" for a, b in spills if (a, b) != ("0", "0")]
    stacks = re.findall(r"(\d+) bytes stack frame", said)
    found += [f"{bytes_} bytes of stack: registers that are indexed" for bytes_ in stacks
              if bytes_ != "0"]
    print(f"{len(spills)} kernels, spills and stack of {len(found)}")
    return found if spills else ["the log is not one of a build from nothing"]


def without_bounded(said: str) -> str:
    """What ninja's log says of kernels whose waits have no bounds: only these are timed."""
    jobs = re.split(r"^\[\d+/\d+\] ", said, flags=re.MULTILINE)
    return "".join(job for job in jobs if "_bounded" not in job.partition("\n")[0])


def check_others(said: str) -> list[str]:
    """Complaints about the registers of kernels that are not counted."""
    found = []
    for kernel, planned in OTHERS.items():
        entry = rf"Compiling entry function '\S*\d{kernel}\S*' for 'sm_\d+'.*?Used (\d+) registers"
        used = [int(count) for count in re.findall(entry, said, re.DOTALL)]
        print(f"{kernel}: {max(used, default=0)} registers")
        if not used or max(used) > planned:
            found.append(f"{kernel}: {used} registers, at most {planned} are planned")
    return found


def check_ptx(module: pathlib.Path, cuobjdump: str) -> list[str]:
    """Complaints when what comes after Hopper would find nothing to compile."""
    command = [cuobjdump, "-ptx", str(module)]
    ptx = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    missing = {"AttendSm80Kernel", "CorrectByMeans", *AROUND_ATTENTION, *OTHERS}
    missing -= {kernel for kernel in missing if re.search(rf"\.entry \S*\d{kernel}", ptx)}
    print(f"PTX for compute_90: {'has' if not missing else 'lacks some of'} every kernel")
    return [f"no PTX of {kernel}" for kernel in sorted(missing)]


def counted(kernel: str) -> str:
    """Matches the mangled name of a kernel up to its element type and head dim."""
    return rf"\S*\d{kernel}I\S*?(F16|Bf16)ElementELi(\d+)E"


def registers_of(said: str, kernel: str, architecture: str) -> dict[tuple[str, int], int]:
    """Registers of each such kernel at launch, by element type and head dim."""
    entry = (
        rf"Compiling entry function '{counted(kernel)}\S*' for 'sm_{architecture}'"
        r".*?Used (\d+) registers"
    )
    return {
        (element, int(head_dim)): int(count)
        for element, head_dim, count in re.findall(entry, said, re.DOTALL)
    }


def instructions(sass: str, kernel: str) -> dict[tuple[str, int], list[str]]:
    """Instructions of each such kernel, by element type and head dim."""
    kernels: dict[tuple[str, int], list[str]] = {}
    current: list[str] = []
    for line in sass.splitlines():
        if "Function : " in line:
            current = []
            if name := re.search(counted(kernel), line):
                kernels[name.group(1), int(name.group(2))] = current
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


def under_way(code: list[str]) -> tuple[int, ...]:
    """Runs of 16-byte loads, each up to the first sum or store behind it."""
    found, count = [], 0
    for line in code:
        if re.search(r"\bLDG\.E\.128\b", line):
            count += 1
        elif count and re.search(r"\b(FADD|STG)\b", line):
            found.append(count)
            count = 0
    return tuple(found)


def check_kernel(name: str, code: list[str], registers: int, expected: Expected) -> list[str]:
    """Complaints about one kernel, after its figures."""
    found, figures = [], [f"{registers} registers"]
    if registers > expected.registers:
        found.append(f"{name}: {registers} registers, at most {expected.registers} are planned")
    for instruction, count in expected.instructions.items():
        made = sum(re.search(rf"\b{re.escape(instruction)}\b", line) is not None for line in code)
        figures.append(f"{made} {instruction}")
        if made != count:
            found.append(f"{name}: {made} {instruction}, expected {count}")
    between = overlaps(code)
    if expected.overlaps:
        figures.append(f"exponentials between waits {between}")
    least = OVERLAP_MIN * SOFTMAX_EXPONENTIALS
    if len(between) != expected.overlaps or any(count < least for count in between):
        found.append(
            f"{name}: exponentials between waits {between}, "
            f"expected {expected.overlaps} of >= {least}"
        )
    if expected.under_way:
        together = under_way(code)
        figures.append(f"loads under way {together}")
        if together != expected.under_way:
            found.append(f"{name}: loads under way {together}, not {expected.under_way}")
    print(f"{name}: {', '.join(figures)}")
    return found


def check_waits(sass: str) -> list[str]:
    """Complaints about kernels that could see memory before the kernel before them has ended.

    Each waits for that one, once, touches no global memory ahead of the wait, and reads
    nothing through the read-only cache, whose loads the compiler may move ahead of it.
    """
    kernels = re.split(r"Function : ", sass)[1:]
    wrong = []
    for kernel in kernels:
        ahead = kernel.partition("ACQBULK")[0]
        if (
            kernel.count("ACQBULK") != 1
            or GLOBAL_MEMORY.search(ahead)
            or re.search(r"\bLDG\.\S*CONSTANT", kernel)
        ):
            wrong.append(kernel.split()[0])
    print(f"{len(kernels) - len(wrong)} of {len(kernels)} kernels wait for the one before, ahead "
          "of their first access")
    return [f"{len(wrong)} kernels do not wait for the one before: {wrong[0]} ..."] if wrong else []


def check_unit(unit: Unit, module: pathlib.Path, said: str, cuobjdump: str) -> list[str]:
    """Complaints about the counted kernels of one architecture."""
    found = []
    command = [cuobjdump, "-arch", f"sm_{unit.architecture}", "-sass", str(module)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if unit.architecture.startswith("9"):
        found += check_waits(sass)
    for kernel, planned in unit.kernels.items():
        codes = instructions(sass, kernel)
        used = registers_of(said, kernel, unit.architecture)
        if len(codes) != 2 * len(planned) or codes.keys() != used.keys():
            found.append(f"sm_{unit.architecture}: {len(codes)} {kernel} in the code and "
                         f"{len(used)} in the log, expected {2 * len(planned)}")
            continue
        for (element, head_dim), code in sorted(codes.items()):
            name = f"{kernel}, sm_{unit.architecture}, {element}, head dim {head_dim}"
            found += check_kernel(name, code, used[element, head_dim], planned[head_dim])
    return found


def main() -> int:
    """Prints figures, then complaints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", type=pathlib.Path, required=True)
    parser.add_argument("--log", type=pathlib.Path, required=True)
    parser.add_argument("--variants", type=pathlib.Path)
    parser.add_argument("--cuobjdump", default="cuobjdump")
    arguments = parser.parse_args()
    said = arguments.log.read_text()
    found = check_log(said) + check_others(said)
    if arguments.variants:
        found += check_log(without_bounded(arguments.variants.read_text()))
    found += check_ptx(arguments.module, arguments.cuobjdump)
    for unit in UNITS:
        found += check_unit(unit, arguments.module, said, arguments.cuobjdump)
    print("\n".join(found) or "the kernels are as planned")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
