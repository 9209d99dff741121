"""Runs vLLM's API server for CPUs with the connector, for tests."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eventually import until

_START_SECONDS_MAX = 300
_STOP_SECONDS_MAX = 60
_ANSWER_SECONDS_MAX = 120
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
RUNNING = "vllm:num_requests_running"
SLOTS = 8  # requests that run at a time
BLOCK_SIZE = 32  # the smallest of vLLM on a CPU


@dataclass(frozen=True)
class Answer:
    """A reply: its tokens when status is 200, else its text."""

    status: int
    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    text: str = ""


class VllmServer:
    """A running server. Requests are greedy and of token ids."""

    def __init__(self, port: int, log: Path) -> None:
        self._port, self._log = port, log
        self.address = f"127.0.0.1:{port}"
        self._salts = itertools.count()

    def complete(
        self,
        prompt: Sequence[int],
        params: dict[str, Any] | None = None,
        new_tokens: int = 12,
        **fields: Any,
    ) -> Answer:
        """One request. Without a cache_salt it shares no cache with any other."""
        with self.request(prompt, params, new_tokens, **fields) as connection:
            return self.answer(connection)

    def answer(self, connection: http.client.HTTPConnection) -> Answer:
        """The reply to request(), which was not streamed."""
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            return Answer(response.status, text=text)
        reply = json.loads(text)
        details = reply["usage"]["prompt_tokens_details"] or {}
        return Answer(
            200, reply["choices"][0]["token_ids"], details.get("cached_tokens") or 0
        )

    def stream(self, prompt: Sequence[int], params: dict[str, Any]) -> list[list[int]]:
        """The tokens of each event of a streamed answer."""
        with self.request(prompt, params, 12, stream=True) as connection:
            lines = connection.getresponse().read().decode().splitlines()
        data = [line.removeprefix("data: ") for line in lines if line]
        assert data[-1] == "[DONE]", data[-1]
        events = [json.loads(line) for line in data[:-1]]
        return [event["choices"][0]["token_ids"] for event in events]

    @contextlib.contextmanager
    def request(
        self,
        prompt: Sequence[int],
        params: dict[str, Any] | None,
        new_tokens: int = 12,
        **fields: Any,
    ) -> Iterator[http.client.HTTPConnection]:
        """A request that was sent; the end of the block closes its connection."""
        body = {
            "model": "m",
            "prompt": list(map(int, prompt)),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "cache_salt": f"own {next(self._salts)}",
            **fields,
        }
        if params is not None:
            body["kv_transfer_params"] = params
        connection = http.client.HTTPConnection(
            "127.0.0.1", self._port, timeout=_ANSWER_SECONDS_MAX
        )
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        try:
            yield connection
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The sum of a metric's values over its labels."""
        status, text = self.get("/metrics")
        assert status == 200
        pattern = rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$"
        return sum(map(float, re.findall(pattern, text, re.M)))

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text()


@contextlib.contextmanager
def vllm_server(
    model: Path,
    transfer: dict[str, Any],
    *flags: str,
    num_ranks: int = 1,
    takes_text: bool = False,
) -> Iterator[VllmServer]:
    """Starts a server in f32 and waits until it serves; stops it after.

    `takes_text` needs a tokenizer in the folder; without, prompts are token ids.
    """
    if not takes_text:
        flags = (*flags, "--skip-tokenizer-init")
    environment = {**os.environ, **_ENVIRONMENT}
    if num_ranks > 1:
        cpus = sorted(os.sched_getaffinity(0))
        ranks = [str(cpus[rank % len(cpus)]) for rank in range(num_ranks)]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(ranks)
        flags = (*flags, "--tensor-parallel-size", str(num_ranks))
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*_command(model, port, transfer), *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        server = VllmServer(port, log)
        try:
            until(lambda: _serves(server, process), _START_SECONDS_MAX)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS_MAX)
            finally:
                process.kill()
                process.wait()


def refused_start(model: Path, transfer: dict[str, Any], *flags: str) -> str:
    """What a server prints that does not start."""
    ended = subprocess.run(
        [*_command(model, free_port(), transfer), "--skip-tokenizer-init", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_START_SECONDS_MAX,
        env={**os.environ, **_ENVIRONMENT},
    )
    assert ended.returncode != 0
    return ended.stdout


def connector(policy: str, **extra_config: Any) -> dict[str, Any]:
    """The value of --kv-transfer-config."""
    return {
        "kv_connector": "PbsPrefillConnector",
        "kv_connector_module_path": "pbs_client.vllm",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"endpoints": ["127.0.0.1:*"], **extra_config},
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _command(model: Path, port: int, transfer: dict[str, Any]) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", "m"),
        "--enable-prompt-tokens-details",
        *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", str(SLOTS)),
        *("--block-size", str(BLOCK_SIZE)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]


def _serves(server: VllmServer, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, f"vLLM stopped:\n{server.log()[-8000:]}"
    try:
        return server.get("/health")[0] == 200
    except OSError:
        return False


def in_threads(calls: Sequence[Any]) -> list[Any]:
    """The results of calls that run at the same time."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
