"""pbs-gateway under malformed bodies and clients that leave at any moment."""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gateway_process import eventually, read_reply, running_gateway
from pbs_client.kv_params import KvTransferParams
from real_server import RECALL_MODEL, running_server
from tiny_tokenizer import make as make_tokenizer

BODIES = 3000
SEEDS = (1, 2)
STATUSES = {200, 400, 404, 413}

TEXTS = ("", "a", "the fox", "\ud800", "\x00", "é\u202e😀", "<|im_end|>", "x" * 3000)
NUMBERS = (0, 1, -1, 2, 100, 101, 1 << 31, 1 << 64, -(1 << 70), 0.5, 1.0, 1e300, 1e-300)
KEYS = (
    "model", "prompt", "messages", "token_ids", "input_ids", "text", "max_tokens", "n",
    "max_completion_tokens", "min_tokens", "stream", "sampling_params", "best_of", "echo",
    "kv_transfer_params", "logprobs", "top_logprobs", "pbs_attention", "pbs_profile",
    "cache_salt", "priority", "tools", "documents", "chat_template_kwargs", "suffix",
    "add_special_tokens", "add_generation_prompt", "continue_final_message", "ignore_eos",
    "skip_special_tokens", "reasoning_effort", "prompt_logprobs", "features",
)  # fmt: skip
INNER = (
    "role", "content", "tool_calls", "function", "arguments", "type", "text", "name",
    "do_remote_decode", "do_remote_prefill", "method", "pbs", "xattention", "dense",
    "threshold", "block_size", "blockSize", "permute", "permutation", "segment_size",
    "scope", "head_thresholds", "coverage_rows", "profile", "max_tokens", "logprobs",
    "messages", "bos_token", "as_published", "window_blocks",
)  # fmt: skip
WORDS = (
    "user", "assistant", "system", "text", "image_url", "recall", "other", "dense", "pbs",
    "xattention", "paper", "fast", "kv_head", "{}", "{", "null",
)  # fmt: skip
GOOD = {
    "/v1/completions": {"prompt": [5, 6, 7], "max_tokens": 1},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 1,
    },
    "/inference/v1/generate": {
        "token_ids": [5, 6, 7],
        "sampling_params": {"max_tokens": 1},
    },
}


def value(random_: random.Random, depth: int) -> Any:
    kind = random_.randrange(9 if depth else 6)
    if kind == 0:
        return None
    if kind == 1:
        return random_.random() < 0.5
    if kind == 2:
        return random_.choice(NUMBERS)
    if kind in (3, 4):
        return random_.choice(TEXTS + WORDS)
    if kind == 5:
        return [random_.randrange(0, 1100) for _ in range(random_.randrange(6))]
    if kind == 6:
        return [value(random_, depth - 1) for _ in range(random_.randrange(4))]
    names = random_.sample(INNER, random_.randrange(1, 5))
    return {name: value(random_, depth - 1) for name in names}


def body(random_: random.Random, path: str) -> bytes:
    fields = dict(GOOD[path])
    for name in random_.sample(KEYS, random_.randrange(1, 4)):
        fields[name] = value(random_, 4)
    if random_.random() < 0.1:
        del fields[random_.choice(list(fields))]
    raw = bytearray(json.dumps(fields).encode())
    fate = random_.random()
    if fate < 0.15:
        del raw[random_.randrange(len(raw)) :]
    elif fate < 0.3:
        raw[random_.randrange(len(raw))] = random_.randrange(256)
    return bytes(raw)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_body_breaks_the_gateway_or_leaves_anything_held(seed, tmp_path):
    random_ = random.Random(seed)
    folder = make_tokenizer(tmp_path)
    with running_server(
        "--model", f"recall={RECALL_MODEL}", "--metrics-listen", "127.0.0.1:0"
    ) as node, running_gateway(
        node.target, "--tokenizer", str(folder), "--node-metrics", node.metrics,
        "--lease-seconds", "1",
    ) as gateway:  # fmt: skip
        connection = gateway.connect()
        counts: dict[int, int] = {}
        for number in range(BODIES // len(SEEDS)):
            path = random_.choice(list(GOOD))
            sent = body(random_, path)
            connection.request("POST", path, sent)
            reply = read_reply(connection)
            assert reply.status in STATUSES, (seed, number, sent, reply.body)
            counts[reply.status] = counts.get(reply.status, 0) + 1
        connection.close()
        # Both fates are common, so that neither is untested.
        assert counts[200] > 100, counts
        assert counts[400] > 100, counts

        def is_empty() -> bool:
            found = gateway.metrics()
            held = found['pbs_kv_held_bytes{tier="host"}'] + found["pbs_kv_leases"]
            return held == 0 and found["pbs_gateway_requests_running"] == 0

        eventually(is_empty, "nothing is held")
        assert gateway.call("/health").status == 200
        assert not gateway.events("fault")


LEAVERS = 300
PATIENCE_SECONDS = 0.05  # about the time of a request under load


def impatient_reply(address: str, sent: bytes, patience: float) -> dict[str, Any] | None:
    """The reply to a client that closes its side when its patience ends; None without."""
    host, _, port = address.partition(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(sent)}\r\n\r\n"
    )
    received = b""
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + sent)
        select.select([connection], [], [], patience)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65_536):
                received += chunk
    _, _, content = received.partition(b"\r\n\r\n")
    try:
        return json.loads(content)
    except ValueError:  # nothing, or a part
        return None


def test_a_client_that_leaves_at_any_moment_leaves_nothing_held(gateway_node, node_client):
    random_ = random.Random(3)
    with running_gateway(
        gateway_node.target, "--node-metrics", gateway_node.metrics
    ) as own:
        held = own.metrics()["pbs_kv_leases"]

        def leave(number: int) -> bool:
            ids = [20 + number % 500] * random_.choice((1, 50, 1000, 4000))
            sent = json.dumps({"prompt": ids, "max_tokens": 1}).encode()
            patience = random_.expovariate(1 / PATIENCE_SECONDS)
            reply = impatient_reply(own.address, sent, patience)
            if reply is None:
                return True
            params = KvTransferParams.from_json_object(reply["kv_transfer_params"])
            node_client.release(params.ticket)
            return False

        with ThreadPoolExecutor(4) as pool:
            left = sum(pool.map(leave, range(LEAVERS)))
        assert 20 < left < LEAVERS - 20, left  # both fates are common

        def is_as_before() -> bool:
            found = own.metrics()
            running = found["pbs_gateway_requests_running"] + found["pbs_requests_running"]
            return found["pbs_kv_leases"] <= held and running == 0

        eventually(is_as_before, "nothing is held")
        assert not own.events("fault")
        assert not own.events("release_failed")
        assert not own.events("library_line")
