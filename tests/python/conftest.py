"""Fixtures of several test files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pbs_client import Client
from real_server import RECALL_MODEL, RunningServer, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """A server with the bundled model, named recall."""
    with running_server("--model", f"recall={RECALL_MODEL}") as running:
        yield running


@pytest.fixture(
    scope="session",
    params=["llama, fail", "qwen2, recompute", "recall, fail, two ranks"],
)
def world(request, tmp_path_factory):
    """A model behind a server and behind vLLM: vllm_world.World."""
    import vllm_world

    folder = tmp_path_factory.mktemp("world")
    with vllm_world.running_world(request.param, folder) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as connected:
        yield connected
