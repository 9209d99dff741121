#!/usr/bin/env python3
"""Checks the include ranks of docs/ARCHITECTURE.md: includes only go down.

    python3 tests/structure/check_includes.py

Exit status 1 lists every include that goes up, sideways between backends, or names a
library that its module may not see.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)')


@dataclasses.dataclass(frozen=True)
class Module:
    """A folder, its rank, and the libraries its files may include."""

    folder: str
    rank: int
    libraries: tuple[str, ...] = ()
    # Modules of equal or higher rank that it may see all the same.
    also: tuple[str, ...] = ()


# The first module whose folder is a prefix of a path is its module.
MODULES = [
    Module("kernels/include/pbs", 0),
    Module("kernels/common", 1),
    Module("kernels/methods", 1),
    Module("kernels/synthetic", 1),
    Module("kernels/reference", 1),
    # Its primitives are the emulator's when the host compiles it.
    Module("kernels/cuda", 1, ("cuda",), ("kernels/common", "kernels/emulator")),
    Module("kernels/emulator", 1, (), ("kernels/cuda",)),
    Module("kernels/cpu", 1, ("tbb", "dnnl"), ("kernels/common", "kernels/methods")),
    Module("kernels/loader", 1),
    Module("server/model", 2, ("nlohmann", "xxhash")),
    Module("proto/wire", 2, ("grpc", "protobuf"), ("proto",)),
    Module("server/base/grpc_status", 2, ("absl", "grpc", "protobuf"), ("server/base", "proto")),
    Module("server/base", 2, ("absl", "spdlog", "protobuf"), ("server/base", "proto")),
    Module("server/telemetry", 3, ("absl", "microhttpd", "prometheus"), ("proto",)),
    Module("server/engine", 4, ("absl",)),
    Module("server/codec", 5, ("absl", "grpc", "protobuf"), ("proto",)),
    Module("server/transfer", 6, ("absl", "grpc", "protobuf"), ("proto",)),
    Module("server/service", 7, ("absl", "grpc", "protobuf"), ("proto",)),
    Module("server/config", 8, ("absl", "protobuf"), ("proto",)),
    Module("server/backend", 9, ("absl",)),
    Module("server/node", 10, ("absl", "grpc", "protobuf", "prometheus"), ("proto",)),
    Module("server/main.cc", 11, ("absl", "CLI11", "protobuf"), ("proto",)),
    Module("client/cpp/decode", 12, ("absl", "CLI11", "grpc", "protobuf", "nlohmann"),
         ("proto",)),
    Module("client/cpp", 12, ("absl", "CLI11", "grpc", "protobuf", "nlohmann"),
         ("proto",)),
]
# The client sees the protocol only; its reference decode tier also sees the data plane.
CLIENT_SEES = ("client/cpp", "proto")
DECODE_SEES = CLIENT_SEES + (
    "kernels/include/pbs", "server/model", "server/base/process.h", "server/base/status.h")

LIBRARIES = {
    "absl/": "absl",
    "grpc/": "grpc",
    "grpcpp/": "grpc",
    "google/protobuf/": "protobuf",
    "prometheus/": "prometheus",
    "microhttpd.h": "microhttpd",
    "spdlog/": "spdlog",
    "nlohmann/": "nlohmann",
    "xxhash.h": "xxhash",
    "tbb/": "tbb",
    "dnnl": "dnnl",
    "CLI/": "CLI11",
    "hwy/": "hwy",
    "cuda": "cuda",
}
# How project includes are spelled -> the folder they name.
SPELLINGS = [
    (re.compile(r"^pbs/v1/|^google/rpc/"), "proto"),
    (re.compile(r"^pbs/"), "kernels/include/pbs"),
    (re.compile(r"^(common|methods|reference|cpu|cuda|emulator|loader|synthetic)/"), "kernels/{0}"),
]


def module_of(path: str) -> Module | None:
    """The module of a path relative to the repository, or None."""
    return next((module for module in MODULES if path.startswith(module.folder)), None)


def target_of(include: str) -> str | None:
    """The project path an include names, or None for a library header."""
    if (ROOT / include).exists():
        return include
    for pattern, folder in SPELLINGS:
        if match := pattern.match(include):
            return folder.format(*match.groups()) + "/" + include.split("/", 1)[1]
    return None


def may_see(path: str, module: Module, target: str) -> bool:
    """Whether a file in `module` may include the project path `target`."""
    if path.startswith("client/cpp/decode"):
        return target.startswith(DECODE_SEES)
    if path.startswith("client/"):
        return target.startswith(CLIENT_SEES)
    if target.startswith(tuple(f + "/" for f in (module.folder, *module.also))):
        return True
    other = module_of(target)
    return other is not None and other.rank < module.rank


def violations(path: pathlib.Path) -> list[str]:
    """One line for every include of `path` that its rank forbids."""
    relative = path.relative_to(ROOT).as_posix()
    module = module_of(relative)
    if module is None:
        return []
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        include = match.group(1) or match.group(2)
        where = f"{relative}:{number}: {module.folder} (rank {module.rank})"
        library = next((n for p, n in LIBRARIES.items() if include.startswith(p)), None)
        if target := target_of(include):
            if not may_see(relative, module, target):
                found.append(f"{where} may not include {target}")
        elif library and library not in module.libraries:
            found.append(f"{where} may not use {library} ({include})")
    return found


def main() -> int:
    """Checks every C++ file of the ranked modules."""
    files = [
        path
        for top in ("kernels", "proto", "server", "client")
        for path in sorted((ROOT / top).rglob("*"))
        if path.suffix in {".h", ".cc", ".inc", ".cu", ".cuh"}
    ]
    found = [line for path in files for line in violations(path)]
    print("\n".join(found) or f"includes of {len(files)} files respect the ranks")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
