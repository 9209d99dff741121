"""The CPU image's file system: what deploy/runtime_root.sh lays out for a program."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

import pytest

DEPLOY = pathlib.Path(__file__).resolve().parents[2] / "deploy"
LAID_OUT = DEPLOY / "runtime_root.sh"


def loaded_by(program: str) -> list[str]:
    """Paths of the shared libraries, the loader among them."""
    listed = subprocess.run(
        ["ldd", program], check=True, capture_output=True, text=True
    ).stdout
    return re.findall(r"(?:=> |^\s*)(/\S+) \(", listed, re.MULTILINE)


def packages_of(program: str) -> list[str]:
    """What deploy/runtime_packages.sh names."""
    listed = subprocess.run(
        [DEPLOY / "runtime_packages.sh", program],
        check=True,
        capture_output=True,
        text=True,
    )
    return listed.stdout.split()


@pytest.fixture(scope="module")
def program() -> str:
    """A built server; where there is none, a program that every Debian has."""
    if not shutil.which("dpkg-query"):
        pytest.skip("NOT RUN: packages are named by dpkg, which is not here")
    if not shutil.which("strip"):
        pytest.skip("NOT RUN: there is no strip")
    server = os.environ.get("PBS_PREFILLD", "")
    return server if os.access(server, os.X_OK) else "/usr/bin/apt-get"


@pytest.fixture(scope="module")
def root(program, tmp_path_factory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("image") / "root"
    subprocess.run([LAID_OUT, program, made], check=True)
    return made


def files_of(root: pathlib.Path) -> set[str]:
    found = (f for f in root.rglob("*") if f.is_file() and not f.is_symlink())
    return {f"/{f.relative_to(root)}" for f in found}


def test_every_library_is_found_under_the_name_it_is_loaded_by(program, root):
    assert loaded_by(program)
    for name in loaded_by(program):
        inside = root / name[1:]
        assert inside.is_file(), name
        assert inside.resolve().is_relative_to(root), "no link leads out of the image"
        assert inside.read_bytes() == pathlib.Path(name).read_bytes()


def test_there_is_one_program_and_no_file_beside_what_is_promised(program, root):
    name = f"/usr/local/bin/{pathlib.Path(program).name}"
    libraries = {str(pathlib.Path(file).resolve()) for file in loaded_by(program)}
    names = "passwd group nsswitch.conf debian_version hosts hostname resolv.conf"
    etc = {f"/etc/{name}" for name in names.split()}
    promised = {name, "/usr/lib/os-release"} | libraries | etc
    beside = {
        file
        for file in files_of(root) - promised
        if not file.startswith(("/var/lib/dpkg/status.d/", "/usr/share/common-licenses/"))
        and not re.fullmatch(r"/usr/share/doc/[^/]+/copyright", file)
        and not file.startswith("/usr/local/share/doc/pbs-prefill/")
    }
    assert promised <= files_of(root)
    assert beside == set()


def test_the_user_is_the_images_and_is_not_root(root):
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (users,) = {tuple(u.split(":")) for u in re.findall(r"^USER (\S+)$", dockerfile, re.M)}
    fields = (root / "etc/passwd").read_text().strip().split(":")
    assert tuple(fields[2:4]) == users
    assert (root / "etc/group").read_text().strip().split(":")[2] == users[1]


def test_scanners_find_name_version_and_licence_of_every_package(program, root):
    described = {}
    for file in (root / "var/lib/dpkg/status.d").iterdir():
        fields = dict(re.findall(r"^(Package|Version): (.*)$", file.read_text(), re.M))
        described[fields["Package"]] = fields["Version"]
        assert (root / "usr/share/doc" / file.name / "copyright").stat().st_size > 0
    owners = packages_of(program)
    assert set(owners) | {"base-files"} == set(described)
    for name, version in described.items():
        asked = ["dpkg-query", "-W", "-f=${Version}", name]
        installed = subprocess.run(asked, check=True, capture_output=True, text=True)
        assert version == installed.stdout
    release = (root / "etc/os-release").read_text()
    assert release == pathlib.Path("/etc/os-release").read_text()


def test_the_packages_own_every_library_and_none_is_for_development(program):
    packages = packages_of(program)
    assert not [p for p in packages if p.endswith("-dev")]
    files = subprocess.run(
        ["dpkg-query", "-L", *packages], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    owned = {str(pathlib.Path(file).resolve()) for file in files}
    libraries = [str(pathlib.Path(lib).resolve()) for lib in loaded_by(program)]
    assert [lib for lib in libraries if lib not in owned] == []


def test_a_library_that_no_package_owns_is_an_error(tmp_path):
    if not shutil.which("dpkg-query"):
        pytest.skip("NOT RUN: packages are named by dpkg, which is not here")
    sleep, own = shutil.which("sleep"), tmp_path / "libc.so.6"
    shutil.copy(next(f for f in loaded_by(sleep) if f.endswith("/libc.so.6")), own)
    refused = subprocess.run(
        [LAID_OUT, sleep, tmp_path / "root"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert refused.returncode != 0
    assert f"no package owns {own}" in refused.stderr


def test_who_diverts_a_path_is_not_taken_for_its_owner(tmp_path):
    if not shutil.which("dpkg-query"):
        pytest.skip("NOT RUN: packages are named by dpkg, which is not here")
    asked, real = tmp_path / "dpkg-query", shutil.which("dpkg-query")
    asked.write_text(f"""#!/bin/sh
shift
for path; do
  case $path in
    /lib64/*)
      echo "diversion by other from: $path"
      echo "diversion by other to: $path.kept"
      ;;
    /usr/lib64/*) echo "loader:amd64: $path" ;;
    *) {real} -S "$path" 2>/dev/null ;;
  esac
done
exit 1
""")
    asked.chmod(0o755)
    owners = subprocess.run(
        [DEPLOY / "runtime_packages.sh", shutil.which("sleep")],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert owners == ["libc6", "loader"]
