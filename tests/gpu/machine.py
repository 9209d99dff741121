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
import hashlib
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
BUILT_FROM = ("kernels", "server", "client", "proto", "cmake", "tests/gpu", "tests/bench", "tests/support")
SOURCES = {".cc", ".h", ".cu", ".inc", ".proto", ".cmake", ".txt"}
START_SECONDS_MAX = 60  # of a program and its device, from a cold disk
# Said of programs of another system, which building them here may help.
UNLINKED = ("GLIBC", "shared object", "shared librar", "Exec format", "No such file")


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


def hash_sources() -> str:
    """Of what scripts/pack_gpu.sh builds from."""
    digest = hashlib.sha256()
    for folder in BUILT_FROM:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCES:
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def start_programs() -> str:
    """Why the programs do not start, or ""."""
    command = [program("check_attention"), "--device", "1"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS_MAX)
        ctypes.CDLL(str(program("libpbs_gpu_python.so")))
    except (OSError, subprocess.SubprocessError) as error:
        return first_line(error)
    return "" if done.returncode == 0 else done.stderr.strip()[:200] or f"status {done.returncode}"


def ceilings() -> dict[str, float]:
    """What one product of torch and one copy reach."""
    import torch
    from device import DEVICE, milliseconds

    size, count = (256, 1 << 20) if REHEARSAL else (8192, 1 << 30)
    a, x = torch.randn(size, size, device=DEVICE).bfloat16(), torch.zeros(count // 4, device=DEVICE)
    product, copy = (min(milliseconds(call) for _ in range(5)) for call in (lambda: a @ a, x.clone))
    return {"matmul_tflops": 2e-9 * size**3 / product, "copy_gb_per_s": 2e-6 * count / copy}


def extract(archive: pathlib.Path, folder: pathlib.Path) -> None:
    """There may be no tar and no xz."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def check(progress: Progress, _: float) -> None:
    """Driver, programs, libraries."""
    if (PACK / "sources").read_text().strip() != hash_sources():
        raise SystemExit(f"{PACK} was not made from these sources: run scripts/pack_gpu.sh")
    # From a cold disk they take long: meanwhile.
    subprocess.Popen([sys.executable, "-c", "import torch, triton"], stderr=subprocess.DEVNULL)
    extract(PACK / "programs.tar.xz", WORK / "programs")
    gpu, why = query_gpu(), start_programs()
    progress.facts |= {"programs": "" if why else str(program("check_attention").parent),
                       "building_may_help": any(word in why for word in UNLINKED), "system": platform.platform(),
                       "cublaslt": find_cublaslt()}  # fmt: skip
    progress.say(f"{gpu['name'] if gpu else 'no GPU'}; programs: {why or 'they start'}")
    modules = progress.facts["modules"] = {}
    for name in MODULES:
        try:
            module = importlib.import_module(name)
            modules[name] = str(getattr(module, "__version__", "there"))
        except Exception as error:  # whatever a broken package may raise
            modules[name] = None
            progress.say(f"{name} is missing: {first_line(error)}")
    if modules.get("torch"):  # else it is said above
        import torch

        progress.facts |= ceilings()  # without a device fails here, not in what is measured
        progress.facts["cudnn"] = torch.backends.cudnn.version()
        progress.say("{matmul_tflops:.3g} TFLOP/s, {copy_gb_per_s:.3g} GB/s".format(**progress.facts))


def unpack(_: Progress, __: float) -> None:
    """The package and the wheels, into the run's folder."""
    tags = ("-none-any", "-abi3-", f"-cp{''.join(map(str, sys.version_info[:2]))}-")
    for wheel in PACK.glob("wheels/*.whl"):
        if any(tag in wheel.name for tag in tags):
            zipfile.ZipFile(wheel).extractall(WORK / "python")
    (package,) = PACK.glob("pbs-prefill-*")
    extract(package, WORK)
    next(WORK.glob("pbs-prefill-*")).rename(WORK / "package")
    worker = shutil.copy2(PACK / "bench_worker", WORK / "package/bin/bench_worker")
    os.chmod(worker, 0o755)  # the bit may be lost on the way


if __name__ == "__main__":
    sys.exit(run_part_of(__doc__, {"check": check, "unpack": unpack}))
