"""The failure matrix of the hand-off, with real processes (tests/faults)."""

from __future__ import annotations

import json
import subprocess
import sys

from real_server import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests" / "faults"))
import table  # noqa: E402

FAULTS = 100
SEED = 14
SECONDS_MAX = 600  # only a failure takes so long; it is about 80 on 2 cores


def test_no_fault_of_a_hundred_leaves_a_wrong_byte_or_a_held_one():
    command = [sys.executable, REPOSITORY / "tests" / "faults" / "run.py"]
    command += ["--faults", str(FAULTS), "--seed", str(SEED), "--lanes", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX)
    print(done.stdout, done.stderr)  # a failure: its seed, number, fault and log
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert (result["faults"], result["failed"]) == (FAULTS, 0)
    assert all(counts["faults"] > 0 for counts in result["outcomes"].values())


def test_the_page_has_the_table_of_the_committed_run():
    docs = REPOSITORY / "docs"
    result = json.loads((docs / "results" / "hand_off_faults.json").read_text())
    page = (docs / "DISAGGREGATION.md").read_text()
    assert "\n".join(table.rows(result)) in page
