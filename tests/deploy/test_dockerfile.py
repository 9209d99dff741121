"""The Dockerfile builds in both image formats: OCI, which has no SHELL, and Docker's."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

DOCKERFILE = pathlib.Path(__file__).resolve().parents[2] / "deploy" / "Dockerfile"


def commands() -> list[str]:
    """RUN instructions of the shell form."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    joined = text.replace("\\\n", " ")
    found = re.findall(r"^RUN (?!\[)(.*)$", joined, re.MULTILINE)
    assert len(found) >= 5
    return found


def test_there_is_no_shell_instruction():
    assert not re.search(r"^SHELL", DOCKERFILE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_of_sh(command):
    shell = shutil.which("dash") or "sh"
    subprocess.run([shell, "-n", "-c", command], check=True)
    outside = re.sub(r"bash [^']*'[^']*'", "", command)
    for bashism in ("[[", "source ", "<<<", "${!", "[@]", "pipefail"):
        assert bashism not in outside, bashism
