"""docs/PROTOCOL.md is enough to write a client: tests/conformance/client.py is one."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
from real_server import REPOSITORY, RunningServer

CLIENT = REPOSITORY / "tests" / "conformance" / "client.py"


def test_every_promise_holds_for_a_client_written_from_the_page(server: RunningServer):
    done = subprocess.run(
        [sys.executable, CLIENT, "--server", server.target, "--model", "recall"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def documented_bytes() -> tuple[bytes, str]:
    """The worked example of the page: its bytes, and its text."""
    page = (REPOSITORY / "docs/PROTOCOL.md").read_text()
    example = page.split("<!-- example: kv-chunk -->")[1].split("<!-- end -->")[0]
    rows = re.findall(r"^\| `([0-9a-f ]+)` \|", example, re.MULTILINE)
    return bytes.fromhex("".join(rows)), example


def test_the_worked_example_is_the_chunk_that_the_page_says():
    sys.path.insert(0, str(CLIENT.parent))
    import client

    encoded, text = documented_bytes()
    protocol = client.Protocol(REPOSITORY / "proto/pbs_v1.binpb", channel=None)
    chunk = protocol.message("KvChunk").FromString(encoded)
    assert chunk.SerializeToString() == encoded
    assert (chunk.ticket_epoch, chunk.kind, chunk.token_begin) == (1, 1, 5)
    assert (chunk.token_count, chunk.head_count) == (2, 1)
    assert np.frombuffer(chunk.payload, "<f4").tolist() == [1, 2, -0.5, 0]
    assert chunk.crc32c == client.crc32c(chunk.payload)
    assert f"{chunk.crc32c:#x}" in text
    both = chunk.crc32c.to_bytes(4, "little") + (0x6974318E).to_bytes(4, "little")
    assert both.hex(" ") in text
    assert f"{client.crc32c(both):#x}" in text
