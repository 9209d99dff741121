"""tests/gpu/machine.py: what of a machine and of what was brought there is found and refused."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tarfile

import pytest
from real_server import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests/gpu"))
import machine  # noqa: E402
from progress import Progress  # noqa: E402


@pytest.fixture
def brought(tmp_path, monkeypatch):
    """Checks programs that do as told; gives the facts."""
    pack, work = tmp_path / "pack", tmp_path / "work"
    pack.mkdir(), work.mkdir()
    monkeypatch.setattr(machine, "PACK", pack)
    monkeypatch.setattr(machine, "WORK", work)
    monkeypatch.setattr(machine, "MODULES", [])
    monkeypatch.setattr(machine, "START_SECONDS_MAX", 1)
    monkeypatch.setattr(machine, "program", lambda name: work / "programs" / name)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: None)
    (pack / "sources").write_text(machine.hash_sources() + "\n")

    def go(does: str) -> dict:
        (tmp_path / "check_attention").write_text(does)
        (tmp_path / "check_attention").chmod(0o755)
        with tarfile.open(pack / "programs.tar.xz", "w:xz") as tar:
            tar.add(tmp_path / "check_attention", "check_attention")
        found = Progress(tmp_path / "machine.json")
        machine.check(found, 1)
        return found.facts

    go.pack = pack
    return go


@pytest.mark.parametrize(
    ("does", "starts", "building_may_help"),
    [
        pytest.param("#!/bin/sh\nexit 0", True, False, id="they start"),
        pytest.param("#!/bin/sh\necho no CUDA-capable device >&2; exit 2", False, False, id="no device"),
        pytest.param("#!/bin/sh\nexec sleep 60", False, False, id="slow"),
        pytest.param("#!/no/such/loader\n", False, True, id="no loader"),
        pytest.param("#!/bin/sh\necho \"version \\`GLIBC_2.39' not found\" >&2; exit 1", False, True, id="libc"),
        pytest.param(
            "#!/bin/sh\necho libx.so: cannot open shared object file >&2; exit 127", False, True, id="a library",
        ),
    ],
)  # fmt: skip
def test_building_may_help_only_where_programs_are_of_another_system(brought, does, starts, building_may_help):
    facts = brought(does)
    assert (bool(facts["programs"]), facts["building_may_help"]) == (starts, building_may_help)


def test_programs_of_other_sources_are_refused(brought):
    (brought.pack / "sources").write_text("of another day\n")
    with pytest.raises(SystemExit, match="was not made from these sources"):
        brought("#!/bin/sh\n")


@pytest.mark.parametrize(
    ("path", "counts"),
    [("kernels/a.cu", True), ("tests/gpu/a.h", True), ("server/CMakeLists.txt", True),
     ("tests/gpu/run.py", False), ("docs/a.txt", False)],
)  # fmt: skip
def test_the_hash_is_of_what_programs_are_built_from(monkeypatch, tmp_path, path, counts):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    hashes = []
    for text in ("a", "b"):
        file.write_text(text)
        hashes.append(machine.hash_sources())
    assert (len(set(hashes)) == 2) == counts


def test_the_pack_has_the_hash_that_a_machine_compares():
    line = 'import machine; print(machine.hash_sources())'
    assert line in (REPOSITORY / "scripts/pack_gpu.sh").read_text()
    command = [sys.executable, "-c", line]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "tests/gpu")}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.strip() == machine.hash_sources()


def test_a_worker_that_lost_its_mode_on_the_way_may_run(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PACK", tmp_path)
    monkeypatch.setattr(machine, "WORK", tmp_path / "work")
    worker = tmp_path / "bench_worker"
    worker.touch(0o644)
    with tarfile.open(tmp_path / "pbs-prefill-1.tar", "w") as tar:
        tar.add(worker, "pbs-prefill-1/bin/pbs-prefilld")
    machine.unpack(None, 1)
    assert os.access(tmp_path / "work/package/bin/bench_worker", os.X_OK)


@pytest.mark.peers
def test_a_product_and_a_copy_of_torch_are_measured(monkeypatch):
    pytest.importorskip("torch", reason="a peer")
    monkeypatch.setenv("PBS_REHEARSAL", "1")
    command = [sys.executable, "-c", "import machine; print(*machine.ceilings().values())"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "tests/gpu")}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert len(said.split()) == 2 and all(float(figure) > 0 for figure in said.split())


def test_cublaslt_of_torchs_packages_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert machine.find_cublaslt() == ""
    library = pathlib.Path(tmp_path, "nvidia/cu13/lib/libcublasLt.so.13")
    os.makedirs(library.parent)
    library.touch()
    assert machine.find_cublaslt() == str(library)
