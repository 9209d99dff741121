"""tests/gpu/probe.py: what it says of attention with a planted fault."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
from real_server import REPOSITORY, program

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch", reason="a peer")
sys.path.insert(0, str(REPOSITORY / "tests/gpu"))
import probe  # noqa: E402


def in_place(rows, columns):
    return rows, columns


def said_of(keys=in_place, values=in_place, row_of=lambda row: row, head_dim=128) -> list[str]:
    """Of attention that finds element (row, column) of its keys and values elsewhere, and
    leaves its rows elsewhere."""

    def moved(x, layout):
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in x.shape), indexing="ij")
        return x[layout(rows, columns)]

    def attend(q, k, v):
        scores = q[-128:] @ moved(k, keys).T / math.sqrt(head_dim)
        seen = torch.arange(512) <= torch.arange(384, 512)[:, None]
        scores = torch.where(seen, scores, -torch.inf)
        target = row_of(torch.arange(128))
        o, lse = torch.empty(128, head_dim), torch.empty(128)
        o[target] = (scores.softmax(-1) @ moved(v, values)).bfloat16().float()
        lse[target] = scores.logsumexp(-1)
        return o, lse

    return probe.probe(attend, head_dim)


def swizzle(rows, columns):
    return rows, columns ^ (rows % 8) << 3


@pytest.mark.parametrize("head_dim", [64, 128])
def test_nothing_is_said_of_right_outputs(head_dim):
    assert said_of(head_dim=head_dim) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param(
            lambda r, c: (r, c ^ 64), "the panels of 64 columns are exchanged", id="panels exchanged"
        ),
        pytest.param(
            lambda r, c: (r, c % 64), "rows 0-127, columns 64-127 read columns 64 lower",
            id="one panel twice",
        ),
        pytest.param(swizzle, "exchanged by XOR with 0 1 2 3 4 5 6 7 by row % 8", id="no swizzle"),
        pytest.param(
            lambda r, c: (r, c ^ (((r + 1) % 8 ^ r % 8) << 3)),
            "exchanged by XOR with 1 3 1 7 1 3 1 7 by row % 8", id="a shifted swizzle",
        ),
        pytest.param(
            lambda r, c: (torch.where(r % 128 < 64, r, r - 64), c),
            "rows 64-127, columns 0-127 read keys 64 lower", id="the wrong half",
        ),
    ],
)  # fmt: skip
def test_a_fault_of_the_layout_of_values_is_named_in_every_block(values, expected):
    words = said_of(values=values)
    assert len(words) == 4
    for block, word in zip((3, 2, 1, 0), words):
        assert word.startswith(f"values of block {block}: ") and expected in word


def test_a_block_that_is_read_for_another_is_named():
    words = said_of(values=lambda r, c: (torch.where(r // 128 == 1, r + 128, r), c))
    assert words == ["values of block 1: rows 0-127, columns 0-127 read keys 128 higher"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        pytest.param(
            lambda r, c: (r, c ^ 64), "the panels of 64 columns are exchanged", id="panels exchanged"
        ),
        pytest.param(
            lambda r, c: (r, c % 64), "rows 0-127, columns 64-127 read columns 64 lower",
            id="one panel twice",
        ),
        pytest.param(swizzle, "exchanged by XOR with 0 1 2 3 4 5 6 7 by row % 8", id="no swizzle"),
    ],
)  # fmt: skip
def test_a_fault_of_the_layout_of_keys_is_named(keys, expected):
    (word,) = said_of(keys=keys)
    assert word.startswith("keys (or queries): ") and expected in word


def test_what_there_are_no_words_for_is_shown_as_it_is():
    words = said_of(row_of=lambda row: row ^ 5)
    assert "key/piece" in words[0]
    assert words[1].startswith("values of block 3: row 0: 389/0 389/1")


def test_the_emulated_kernels_of_hopper_read_everything_from_its_place(tmp_path):
    out = tmp_path / "probe.json"
    command = [sys.executable, REPOSITORY / "tests/gpu/probe.py", "chosen", "--out", out, "--seconds", "60"]
    build = program("pbs-prefilld").resolve().parent.parent
    environment = os.environ | {"PBS_REHEARSAL": "1", "PBS_BUILD_DIR": str(build)}
    subprocess.run(command, env=environment, check=True)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["head_dim"], row["says"]) for row in rows] == [
        (64, ["all is read from its place"]), (128, ["all is read from its place"]),
    ]  # fmt: skip
