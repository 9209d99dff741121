#!/usr/bin/env python3
"""The machine: its GPU, what is installed, and what scripts/pack_gpu.sh brought.

    python3 tests/gpu/machine.py check|unpack --out FILE.json --seconds N

What tests/gpu/run.py sets: PBS_GPU_PACK, the folder of pack_gpu.sh; PBS_GPU_WORK, a
folder of this run; PBS_REHEARSAL=1, without a GPU: programs over an emulated device, of
the build in PBS_BUILD_DIR.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile

from progress import Progress, first_line, run_part_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("PBS_BUILD_DIR", ROOT / "build"))
PACK = pathlib.Path(os.environ.get("PBS_GPU_PACK", BUILD / "gpu"))
WORK = pathlib.Path(os.environ.get("PBS_GPU_WORK", BUILD / "gpu-work"))
REHEARSAL = os.environ.get("PBS_REHEARSAL") == "1"
MODULES = ["torch", "triton", "numpy", "safetensors", "pytest", "grpc", "google.protobuf",
           "google_crc32c", "ml_dtypes"]  # fmt: skip


def finish(process: subprocess.Popen, seconds: float) -> int | None:
    """Its status; None when it was not done in time. Then nobody waits for it: what hangs in
    a driver may take long to go."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(max(seconds, 1))
    process.kill()
    return None


def query_gpu() -> dict[str, str] | None:
    """Name, driver and clocks; None where there is no driver."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if finish(process, 20) == 0 and (said := process.stdout.readline()):
            return dict(zip(fields.split(","), map(str.strip, said.split(","))))
    return None


def program(name: str) -> pathlib.Path:
    """check_attention or libpbs_gpu_python.so, or with waits that end, NAME_bounded."""
    if not REHEARSAL:
        return WORK / "programs" / name
    library = "tests/gpu/libpbs_gpu_python_emulated.so"
    return BUILD / (library if name.endswith(".so") else "bin/check_attention_emulated")


def find_cublaslt() -> str:
    """Of torch's packages, or "": the machine may have one of its own."""
    folders = (pathlib.Path(folder).glob("nvidia/**/libcublasLt.so.13") for folder in sys.path)
    return str(next(itertools.chain.from_iterable(folders), ""))


def start_programs() -> str:
    """Why the programs do not start, or ""."""
    command = [program("check_attention"), "--device", "1"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        ctypes.CDLL(str(program("libpbs_gpu_python.so")))
    except (OSError, subprocess.SubprocessError) as error:
        return first_line(error)
    return "" if done.returncode == 0 else done.stderr.strip()[:200] or f"status {done.returncode}"


def extract(archive: pathlib.Path, folder: pathlib.Path) -> None:
    """There may be no tar and no xz."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def check(progress: Progress, _: float) -> None:
    """Driver, programs, libraries."""
    extract(PACK / "programs.tar.xz", WORK / "programs")
    gpu, why = query_gpu(), start_programs()
    progress.facts |= {"programs": "" if why else str(program("check_attention").parent),
                       "system": platform.platform(), "cublaslt": find_cublaslt()}  # fmt: skip
    progress.say(f"{gpu['name'] if gpu else 'no GPU'}; programs: {why or 'they start'}")
    modules = progress.facts["modules"] = {}
    for name in MODULES:
        try:
            module = importlib.import_module(name)
            modules[name] = str(getattr(module, "__version__", "there"))
        except Exception as error:  # whatever a broken package may raise
            modules[name] = None
            progress.say(f"{name} is missing: {first_line(error)}")
    if not REHEARSAL:
        import torch

        torch.zeros(1, device="cuda")  # fails here and not in what is measured
        progress.facts["cudnn"] = torch.backends.cudnn.version()


def unpack(_: Progress, __: float) -> None:
    """The package and the wheels, into the run's folder."""
    tags = ("-none-any", "-abi3-", f"-cp{''.join(map(str, sys.version_info[:2]))}-")
    for wheel in PACK.glob("wheels/*.whl"):
        if any(tag in wheel.name for tag in tags):
            zipfile.ZipFile(wheel).extractall(WORK / "python")
    (package,) = PACK.glob("pbs-prefill-*")
    extract(package, WORK)
    next(WORK.glob("pbs-prefill-*")).rename(WORK / "package")
    shutil.copy2(PACK / "bench_worker", WORK / "package/bin")


if __name__ == "__main__":
    sys.exit(run_part_of(__doc__, {"check": check, "unpack": unpack}))
