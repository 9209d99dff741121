#!/usr/bin/env python3
"""Says where the CPU time of a download goes, with perf, and writes JSON.

    scripts/bench.sh dataplane-profile

Samples of both processes while one stream fetches a cache with checksums, by what the
code does. CPU seconds are samples times their distance. What belongs to the preparation
is left out: the prefill, and the overwriting of the target before each transfer.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from bench_common import ROOT, run_header, write_results

sys.path[:0] = [str(ROOT / "client/python"), str(ROOT / "tests/python")]
from real_server import program, running_server  # noqa: E402

HERTZ = 1999
# The first pattern that matches "dso symbol" names what a sample did.
WORK = {
    "left out": r"memset|pbs::(?!wire|client|server)|clear_page|pbs::server::.*(?:Engine|Model)",
    "copies of the kernel": r"_copy_(?:from|to)_iter|copy_user|rep_movs",
    # At the client one pass.
    "checksums and copies into place": r"Update\w+|Crc32c|Stream\w+|memmove|memcpy",
    "network stack and scheduler of the kernel": r"kernel",
    "gRPC, protobuf and the rest": r"",
}


def samples_of(data: pathlib.Path) -> dict[str, float]:
    """CPU seconds by what the code did."""
    report = subprocess.run(
        ["perf", "report", "-i", data, "-n", "-g", "none", "--no-children", "--stdio",
         "--sort", "dso,symbol", "-F", "sample,dso,symbol", "-w", "12,40,200"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds: dict[str, float] = collections.defaultdict(float)
    for line in report.stdout.splitlines():
        found = re.match(r"\s*(\d+)\s+(\S+)\s+\[(.)\]\s+(.*)", line)
        if found is None:
            continue
        count, dso, _, symbol = found.groups()
        name = next(n for n, pattern in WORK.items() if re.search(pattern, f"{dso} {symbol}"))
        seconds[name] += int(count) / HERTZ
    return seconds


def main() -> int:
    """Runs the transfers under perf and writes the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="its folder")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    header = run_header()
    with tempfile.TemporaryDirectory() as folder, running_server(
        "--backend", "cpu", "--model", f"kv={arguments.model}"
    ) as server:
        files = {side: pathlib.Path(folder) / side for side in ("server", "client")}
        bench = [program("pbs-bench"), "transfer", "--server", server.target, "--peers",
                 "none", "--direction", "download", "--checksums", "on", "--streams", "1",
                 "--rounds", str(arguments.rounds)]  # fmt: skip
        record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(HERTZ), "-o"]
        attached = subprocess.Popen([*record, files["server"], "-p", str(server.process.pid)])
        done = subprocess.run(
            [*record, files["client"], *bench], capture_output=True, text=True, check=True
        )
        attached.send_signal(2)
        attached.wait()
        cell = json.loads(done.stdout)["cells"][0]
        # Beside the rounds: one that warms up, and the reference.
        gigabytes = cell["bytes"] * (arguments.rounds + 2) / 1e9
        sides = {side: samples_of(data) for side, data in files.items()}
    names = [name for name in WORK if name != "left out"]
    figures = {
        "rounds": arguments.rounds,
        "gb_per_second": cell["gb_per_second"],
        "cpu_seconds_per_gb": {
            side: {name: seconds[name] / gigabytes for name in names}
            for side, seconds in sides.items()
        },
    }
    for side, seconds in figures["cpu_seconds_per_gb"].items():
        for name, value in seconds.items():
            print(f"    {side:8} {value:6.3f} CPU-s/GB  {name}", file=sys.stderr)
    write_results("data_plane_profile", header, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
