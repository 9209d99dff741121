"""A system that refuses threads or memory: one sentence and exit status 1."""

from __future__ import annotations

import os

import pytest
from real_server import refused_start

# prlimit does not count the threads of root.
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
USER = AS_NOBODY if os.geteuid() == 0 else ()


@pytest.mark.parametrize(
    "limit",
    [
        *(f"--nproc={threads}" for threads in (1, 3, 6, 9, 12, 20)),
        *(f"--as={megabytes << 20}" for megabytes in (100, 140, 180, 220)),
    ],
)
def test_a_limit_that_is_too_low_is_told_with_what_to_do(limit):
    log = refused_start(prefix=(*USER, "prlimit", limit))
    assert "the system refused" in log
    assert "raise the limit (pids limit of the container, ulimit -u, ulimit -v)" in log
