"""One model behind pbs-prefilld and vLLM, for tests of the connector."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
from eventually import until
from pbs_client import Client, KvTicket, Lease, NotFoundError
from pbs_client.kv_params import KvTransferParams, prompt_digest
from real_server import RECALL_MODEL, RunningServer, running_server
from vllm_server import VllmServer, connector, vllm_server

# name: (model, policy, tensor-parallel ranks, flags of vLLM)
WORLDS: dict[str, tuple[str, str, int, tuple[str, ...]]] = {
    # So few blocks, of 4096 tokens, that requests are preempted.
    "llama, fail": (
        "llama",
        "fail",
        1,
        ("--max-model-len", "2048", "--num-gpu-blocks-override", "129"),
    ),
    # Beyond 1024 tokens, vLLM reads past the end of yarn's table of this model.
    "qwen2, recompute": ("qwen2", "recompute", 1, ("--max-model-len", "1024")),
    "recall, fail, two ranks": ("recall", "fail", 2, ("--max-model-len", "2048")),
}


@dataclass
class World:
    """A model, served by pbs-prefilld and by vLLM."""

    policy: str  # of vLLM for failed loads
    folder: Path  # of the model
    prefill: RunningServer
    client: Client
    vllm: VllmServer
    own: dict[tuple[int, ...], list[int]] = dataclasses.field(default_factory=dict)

    def prompt(self, seed: int, count: int) -> list[int]:
        return np.random.default_rng(seed).integers(16, 320, count).tolist()

    def handoff(self, prompt: list[int], method: Any = "dense", **lease: Any):
        """The ticket of a prefill, and kv_transfer_params with it."""
        done = self.client.prefill("m", prompt, method, delivery=Lease(**lease))
        assert done.ticket is not None
        ticket = dataclasses.replace(done.ticket, endpoint=self.prefill.target)
        return ticket, params_of(ticket, prompt)

    def expected(self, prompt: list[int], new_tokens: int = 12) -> list[int]:
        """What vLLM answers from its own prefill."""
        key = (*prompt, new_tokens)
        if key not in self.own:
            answer = self.vllm.complete(prompt, new_tokens=new_tokens)
            assert (answer.status, answer.cached_tokens) == (200, 0)
            self.own[key] = answer.tokens
        return self.own[key]

    def is_held(self, ticket: KvTicket) -> bool:
        try:
            self.client.describe(ticket)
        except NotFoundError:
            return False
        return True

    def is_idle(self) -> bool:
        """No lease is held, and vLLM has freed all blocks."""
        usage = self.vllm.metric("vllm:kv_cache_usage_perc")
        return self.leases() == 0 and usage == 0

    def leases(self) -> float:
        """Leases that the prefill server holds."""
        with urllib.request.urlopen(f"http://{self.prefill.metrics}/metrics") as page:
            text = page.read().decode()
        return float(re.findall(r"^pbs_kv_leases (\S+)$", text, re.M)[0])


def params_of(of: KvTicket, prompt: list[int], **changes: Any) -> dict[str, Any]:
    """The kv_transfer_params of a prompt's cache, with changed fields."""
    params = KvTransferParams(of, len(prompt), prompt_digest(prompt), 0, 0)
    return {**params.to_json_object(), **changes}


@contextlib.contextmanager
def running_world(name: str, folder: Path) -> Iterator[World]:
    """Starts a world. At its end, no lease and no block may be held."""
    model, policy, num_ranks, flags = WORLDS[name]
    path = RECALL_MODEL
    if model != "recall":
        (made,) = (known for known in tiny_models.MODELS if known.startswith(model))
        path = tiny_models.make(made, folder)
    metrics = ("--metrics-listen", "127.0.0.1:0")
    with (
        running_server("--model", f"m={path}", *metrics) as prefill,
        Client(prefill.target) as client,
        vllm_server(path, connector(policy), *flags, num_ranks=num_ranks) as vllm,
    ):
        world = World(policy, path, prefill, client, vllm)
        yield world
        until(world.is_idle)
