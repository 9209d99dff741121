"""docs/PROTOCOL.md is enough to write a client: tests/conformance/client.py is one."""

from __future__ import annotations

import subprocess
import sys

from real_server import REPOSITORY, RunningServer

CLIENT = REPOSITORY / "tests" / "conformance" / "client.py"


def test_every_promise_holds_for_a_client_written_from_the_page(server: RunningServer):
    done = subprocess.run(
        [sys.executable, CLIENT, "--server", server.target, "--model", "recall"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
