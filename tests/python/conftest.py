"""Fixtures of several test files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import push_world
import pytest
from gateway_process import RunningGateway, running_gateway
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


# ---- servers that push


@pytest.fixture(scope="session")
def push_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model of six layers."""
    return push_world.make_model(tmp_path_factory.mktemp("models") / "six layers")


@pytest.fixture(scope="session")
def push_targets() -> list[str]:
    """The targets to which the server may push."""
    return push_world.free_ports(push_world.PORTS)


@pytest.fixture(scope="session")
def unused_targets(push_targets: list[str]) -> Iterator[str]:
    return iter(push_targets)


@pytest.fixture
def target(unused_targets: Iterator[str]) -> str:
    """A target that no other test uses: a channel remembers failures for a second."""
    return next(unused_targets)


@pytest.fixture(scope="session")
def pushing(push_model: Path, push_targets: list[str]) -> Iterator[RunningServer]:
    """A server that may push to push_targets."""
    with push_world.pushing_server(push_model, push_targets) as running:
        yield running


@pytest.fixture
def pusher(pushing: RunningServer) -> Iterator[Client]:
    """A client of that server."""
    with Client(pushing.target) as connected:
        yield connected


# ---- transformers, imported where a test uses it


@pytest.fixture(scope="session")
def torch():
    import torch

    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="session")
def hf(torch):
    from pbs_client import hf

    return hf


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of the tiny models, by the first word of their names."""
    import tiny_models

    root = tmp_path_factory.mktemp("models")
    return {
        name.split(",")[0]: tiny_models.make(name, root / name.split(",")[0])
        for name in tiny_models.MODELS
    }


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request, folders) -> Path:
    """Each of the tiny models."""
    return folders[request.param]


# ---- pbs-gateway; its packages are imported where a test uses it


@pytest.fixture(scope="session")
def gateway_node() -> Iterator[RunningServer]:
    """A server with the bundled model and metrics, for gateways."""
    flags = ("--model", f"recall={RECALL_MODEL}", "--metrics-listen", "127.0.0.1:0")
    with running_server(*flags) as running:
        yield running


@pytest.fixture
def node_client(gateway_node: RunningServer) -> Iterator[Client]:
    with Client(gateway_node.target) as connected:
        yield connected


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_tokenizer import make

    return make(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def gateway(
    gateway_node: RunningServer, tokenizer_folder: Path
) -> Iterator[RunningGateway]:
    """A gateway with a tokenizer, a second name of the model, and small limits."""
    flags = (
        *("--tokenizer", str(tokenizer_folder), "--node-metrics", gateway_node.metrics),
        *("--served-model-name", "team/recall", "--prompt-tokens-max", "8000"),
        *("--body-bytes-max", "100000"),
    )
    with running_gateway(gateway_node.target, *flags) as running:
        yield running


@pytest.fixture(scope="session")
def ids_only(gateway_node: RunningServer) -> Iterator[RunningGateway]:
    """A gateway without a tokenizer."""
    with running_gateway(gateway_node.target) as running:
        yield running
