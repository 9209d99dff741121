"""vllm-router, which nobody here wrote, in front of pbs-gateway and a decode worker.

The decode worker is one of this file: it records what arrives and answers a constant.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from gateway_process import read_reply, running_gateway
from pbs_client import Client
from pbs_client.kv_params import KvTransferParams, prompt_digest
from real_server import RECALL_MODEL, mortal_server, running_server
from router_process import routing
from tokenizers import Tokenizer

pytestmark = pytest.mark.peers
pytest.importorskip("vllm_router", reason="vllm-router is not installed")

FLAGS = ("--request-timeout-secs", "60", "--disable-retries")
ANSWER = {"choices": [{"index": 0, "text": "decoded", "finish_reason": "stop"}]}
IDS = [5, 6, 7, 300, 700, 2]
TEXT = "the fox jumps over it"
MESSAGES = [{"role": "user", "content": "what jumps?"}]


@dataclass
class DecodeWorker:
    """A worker that answers every POST alike.

    Attributes:
        received: (path, headers, body) of each request for an answer.
    """

    address: str = ""
    received: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


@contextlib.contextmanager
def decode_worker() -> Iterator[DecodeWorker]:
    worker = DecodeWorker()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:  # noqa: N802
            self._send({})

        def do_POST(self) -> None:  # noqa: N802
            raw = self.rfile.read(int(self.headers["content-length"]))
            # The router first asks for a text's ids, at /render and /tokenize.
            if self.path not in {path for path, _, _ in ROUTED.values()}:
                self.send_error(404)
                return
            headers = {name.lower(): text for name, text in self.headers.items()}
            worker.received.append((self.path, headers, json.loads(raw)))
            self._send(ANSWER)

        def _send(self, body: Any) -> None:
            sent = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    worker.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield worker
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def decode() -> Iterator[DecodeWorker]:
    with decode_worker() as worker:
        yield worker


@pytest.fixture(scope="module")
def router(gateway, decode, tmp_path_factory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("router") / "log"
    with routing([gateway.address], decode.address, log, *FLAGS) as address:
        yield address


def call(router: str, path: str, body: Any):
    connection = http.client.HTTPConnection(router, timeout=60)
    try:
        connection.request(
            "POST", path, json.dumps(body), {"content-type": "application/json"}
        )
        return read_reply(connection)
    finally:
        connection.close()


# name: path, the user's body, the prompt as a text with special tokens or as ids
ROUTED = {
    "a completion of a text": ("/v1/completions", {"prompt": TEXT}, f"<s>{TEXT}"),
    "a completion of ids": ("/v1/completions", {"prompt": IDS}, IDS),
    "a sampled completion": (
        "/v1/completions",
        {"prompt": IDS, "temperature": 0.5, "logprobs": 2, "stop": ["x"]},
        IDS,
    ),
    "a streamed completion": (
        "/v1/completions",
        {"prompt": IDS, "stream": True, "stream_options": {"include_usage": True}},
        IDS,
    ),
    "an unlimited completion": (
        "/v1/completions",
        {"prompt": IDS, "max_tokens": None},
        IDS,
    ),
    "a chat": (
        "/v1/chat/completions",
        {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1},
        "<s><|im_start|>user\nwhat jumps?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "a generation": (
        "/inference/v1/generate",
        {"token_ids": IDS, "sampling_params": {"max_tokens": 9}, "max_tokens": None},
        IDS,
    ),
}


@pytest.mark.parametrize("name", ROUTED)
def test_the_decode_worker_gets_what_it_fetches_the_cache_by(
    name, router, gateway, decode, gateway_node, tokenizer_folder
):
    path, body, prompt = ROUTED[name]
    sent = {"model": "recall", "max_tokens": 9, **body}
    sent = {key: value for key, value in sent.items() if value is not None}
    decode.received.clear()
    reply = call(router, path, sent)
    assert reply.status == 200, reply.body
    ((where, headers, received),) = decode.received
    assert where == path
    assert received.get("max_tokens") == sent.get("max_tokens")
    ids = prompt
    if isinstance(prompt, str):
        tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    value = received["kv_transfer_params"]
    params = KvTransferParams.from_json_object(value)
    assert params.to_json_object() == value  # nothing lost, added or rounded
    assert params.prompt_digest == prompt_digest(ids)
    with Client("127.0.0.1:1") as client:  # the ticket names its own server
        cache = client.fetch(params.ticket)
        client.release(params.ticket)
    with Client(gateway_node.target) as client:
        own = client.prefill("recall", ids, delivery="inline").kv
    assert all(np.array_equal(a, b) for a, b in zip(cache.k + cache.v, own.k + own.v))
    assert gateway.events("request")[-1]["request_id"] == headers["x-request-id"]


def test_the_router_names_both_workers_in_the_request_id(router, gateway, decode):
    call(router, "/v1/completions", {"model": "recall", "prompt": IDS, "max_tokens": 2})
    name = gateway.events("request")[-1]["request_id"]
    both = f"___prefill_addr_{gateway.address}___decode_addr_{decode.address}_"
    assert re.fullmatch(re.escape(both) + "[0-9a-f]{32}", name)


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"model": "other"}, 404, "not served"),
        ({"n": 2}, 400, "n 2 is not 1"),
        ({"prompt": [5000]}, 400, "vocab_size"),
    ],
)
def test_a_refusal_of_the_gateway_reaches_the_user(changes, status, said, router, decode):
    decode.received.clear()
    body = {"model": "recall", "prompt": IDS, "max_tokens": 2, **changes}
    reply = call(router, "/v1/completions", body)
    assert reply.status == status, reply.body
    assert said in json.dumps(reply.body)
    assert not decode.received


def test_no_request_is_lost_when_a_node_is_killed(decode, tmp_path):
    model = ("--model", f"recall={RECALL_MODEL}")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(mortal_server(*model))
        second = stack.enter_context(running_server(*model))
        gateways = [
            stack.enter_context(
                running_gateway(own.target, "--fallback-node", other.target)
            )
            for own, other in ((first, second), (second, first))
        ]
        addresses = [gateway.address for gateway in gateways]
        log = tmp_path / "log"
        router = stack.enter_context(routing(addresses, decode.address, log, *FLAGS))
        decode.received.clear()
        ids = [n % 500 + 10 for n in range(2000)]
        body = {"model": "recall", "prompt": ids, "max_tokens": 9}
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(call, router, "/v1/completions", body) for _ in range(32)]
            calls[4].result()
            first.process.kill()
            statuses = [one.result().status for one in calls]
        assert statuses == [200] * len(calls)
        given = (b["kv_transfer_params"] for _, _, b in decode.received)
        tickets = [KvTransferParams.from_json_object(value).ticket for value in given]
        assert len(tickets) == len(calls)
        assert {ticket.endpoint for ticket in tickets[-4:]} == {second.target}
        with Client("127.0.0.1:1") as client:
            for ticket in tickets:
                if ticket.endpoint == second.target:
                    client.release(ticket)
        assert all(gateway.events("request") for gateway in gateways)
