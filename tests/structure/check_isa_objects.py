#!/usr/bin/env python3
"""Checks that no code of one instruction set can reach a CPU that lacks it.

    python3 tests/structure/check_isa_objects.py LIBRARY [NM]

An inline function that a file built with -mavx512f exports may be the copy that the
linker keeps for the whole program, which then dies on older CPUs. So every object of
LIBRARY (libpbs_cpu.a) that is named after an instruction set exports one symbol: its
table, which is read only where the CPU was asked first.
"""

from __future__ import annotations

import re
import subprocess
import sys

MEMBER = re.compile(r"^\w+_(avx2|avx512|avx512_bf16)\.cc\.o$")
TABLE = re.compile(r"^_ZN3pbs3cpu\d+k(Avx2|Avx512|Avx512Bf16)(Kernels|Pointwise)E$")


def exported(library: str, nm: str) -> dict[str, list[str]]:
    """The defined symbols that the linker sees, weak ones too, by object file."""
    listing = subprocess.run(
        [nm, "--defined-only", "--extern-only", "--format=posix", library],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    symbols: dict[str, list[str]] = {}
    for line in listing.splitlines():
        head = re.match(r"^.*\[(.+)\]:$", line)
        if head:
            member = symbols.setdefault(head.group(1), [])
        elif line:
            member.append(line.split()[0])
    return symbols


def main() -> int:
    """Checks every object that has an instruction set in its name."""
    library = sys.argv[1]
    nm = sys.argv[2] if len(sys.argv) > 2 else "nm"
    objects = {k: v for k, v in exported(library, nm).items() if MEMBER.match(k)}
    found = [
        f"{name} exports {', '.join(symbols) or 'nothing'}; wanted its table alone"
        for name, symbols in objects.items()
        if len(symbols) != 1 or not TABLE.match(symbols[0])
    ]
    if not objects:
        found = [f"{library} has no object named after an instruction set"]
    print("\n".join(found) or f"{len(objects)} objects export their table alone")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
