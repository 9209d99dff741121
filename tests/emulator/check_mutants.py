#!/usr/bin/env python3
"""Shows that the emulator catches each planted defect of mutants.py.

    python3 tests/emulator/check_mutants.py --build FOLDER [--compiler g++] [--jobs N]
        [--only TEXT ...]

Builds the programs of mutants.py from the sources as they are, which must pass, and once
per mutant from a copy with that defect, which must not. The build FOLDER has the
libraries. A mutant whose text is not in the sources exactly once is an error. What no
defect is planted in is compiled once for all.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import tempfile

from mutants import PROGRAMS

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RUN_SECONDS_MAX = 120
LIBRARIES = [  # of a build, in the order of linking
    "kernels/emulator/libpbs_emulator.a",
    "kernels/libpbs_reference.a",
    "kernels/libpbs_cuda_plan.a",
    "kernels/libpbs_kernels.a",
]
PRELUDE = [  # none of kernels/cuda that a defect is planted in
    "<algorithm>",
    "<cmath>",
    "<random>",
    "<vector>",
    '"pbs/backend.h"',
    '"emulator/device_array.h"',
    '"emulator/primitives.h"',
]
FLAGS = ["-std=c++20", "-O1", "-DPBS_EMULATOR"]
INCLUDES = [str(folder) for folder in (ROOT, ROOT / "kernels", ROOT / "kernels/include")]


def compile_prelude(arguments: argparse.Namespace, folder: pathlib.Path) -> pathlib.Path:
    """The header that every program includes first, compiled beside itself."""
    header = folder / "prelude.h"
    header.write_text("".join(f"#include {name}\n" for name in PRELUDE))
    command = [arguments.compiler, *FLAGS, *(f"-I{include}" for include in INCLUDES)]
    command += ["-x", "c++-header", str(header), "-o", f"{header}.gch"]
    subprocess.run(command, check=True)
    return header


def run_build(
    arguments: argparse.Namespace, source: str, folder: pathlib.Path
) -> tuple[bool, str]:
    """Builds with `folder` before the sources; whether it ran clean, and what it said."""
    program = folder / "program"
    flags = [*FLAGS, "-include", str(arguments.prelude)]
    flags += [f"-I{include}" for include in (folder, *INCLUDES)]
    libraries = [str(arguments.build / library) for library in LIBRARIES]
    subprocess.run(
        [arguments.compiler, *flags, str(ROOT / "tests/emulator" / source), *libraries]
        + ["-o", str(program)],
        check=True,
    )
    try:
        done = subprocess.run(
            [str(program)], capture_output=True, text=True, timeout=RUN_SECONDS_MAX
        )
    except subprocess.TimeoutExpired:
        return False, f"still running after {RUN_SECONDS_MAX} s"
    return done.returncode == 0, done.stdout.strip() or f"exit status {done.returncode}"


def run_mutant(
    arguments: argparse.Namespace, programs: tuple[str, ...], mutant: tuple
) -> tuple[str, bool, str]:
    """Name, whether it was caught, by what."""
    name, file, text, replacement = mutant
    kernel = (ROOT / "kernels" / file).read_text()
    if kernel.count(text) != 1:
        return name, False, f"its text is {kernel.count(text)} times in {file}"
    with tempfile.TemporaryDirectory() as work:
        folder = pathlib.Path(work)
        target = folder / file
        target.parent.mkdir(parents=True)
        target.write_text(kernel.replace(text, replacement))
        for program in programs:
            clean, said = run_build(arguments, program, folder)
            if not clean:
                return name, True, said
    return name, False, said


def main() -> int:
    """Prints one line per mutant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help="only defects with one of these in their name or file",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        arguments.prelude = compile_prelude(arguments, pathlib.Path(work))
        return run_all(arguments)


def run_all(arguments: argparse.Namespace) -> int:
    """The same, once the prelude is there."""
    mutants = [
        (programs, mutant)
        for programs, planted in PROGRAMS.items()
        for mutant in planted
        if any(text in part for text in arguments.only for part in mutant[:2])
    ]
    names = [mutant[0] for planted in PROGRAMS.values() for mutant in planted]
    if twice := {name for name in names if names.count(name) > 1}:
        print(f"two defects have one name: {', '.join(sorted(twice))}")
        return 1
    if not mutants:
        print(f"no defect has {' or '.join(arguments.only)} in its name or file")
        return 1
    for program in {program: None for programs, _ in mutants for program in programs}:
        with tempfile.TemporaryDirectory() as work:
            clean, said = run_build(arguments, program, pathlib.Path(work))
        if not clean:
            print(f"{program} fails with the sources as they are: {said}")
            return 1
    missed = 0
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for name, caught, said in pool.map(lambda m: run_mutant(arguments, *m), mutants):
            print(f"{'caught' if caught else 'MISSED':7} {name:36} {said}", flush=True)
            missed += not caught
    print(f"{len(mutants) - missed} of {len(mutants)} planted defects were caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
