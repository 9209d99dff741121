"""A cache of the bundled model handed to pbs-decode, which is another process."""

from __future__ import annotations

import json
import subprocess

import pytest
from real_server import BACKEND, RECALL_MODEL, program


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(["--method", "dense"], id="dense"),
        pytest.param(["--method", "pbs", "--threshold", "0.9"], id="pbs"),
    ],
)
def test_the_answer_decoded_from_a_handed_over_cache_is_right(server, method):
    data = RECALL_MODEL
    command = [
        program("pbs-decode"), "--server", server.target, "--model-path", data,
        "--tokens", data / "prompt_8k.json", "--then-tokens", data / "prompt_8k.question.json",
        "--max-new-tokens", "1", "--json", *method,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["tokens"] == json.loads((data / "prompt_8k.answer.json").read_text())
    assert line["backend"] == BACKEND
