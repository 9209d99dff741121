"""What pbs-gateway answers to each route, and what it refuses."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import numpy as np
import pytest
from gateway_process import RunningGateway, running_gateway
from pbs_client import Client
from pbs_client.kv_params import KvTransferParams, prompt_digest
from real_server import RECALL_MODEL, RunningServer, running_server
from tiny_tokenizer import make as make_tokenizer
from tokenizers import Tokenizer

# As routers write it into the request of a prefill worker.
REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
IDS = [5, 6, 7, 300, 700, 2]
TEXT = "the fox jumps over it"
MESSAGES = [{"role": "user", "content": "what jumps?"}]


@pytest.fixture(scope="module")
def node() -> Iterator[RunningServer]:
    with running_server(
        "--model", f"recall={RECALL_MODEL}", "--metrics-listen", "127.0.0.1:0"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def gateway(node, folder) -> Iterator[RunningGateway]:
    flags = (
        *("--tokenizer", str(folder), "--node-metrics", node.metrics),
        *("--served-model-name", "team/recall", "--prompt-tokens-max", "8000"),
        *("--body-bytes-max", "100000"),
    )
    with running_gateway(node.target, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def ids_only(node) -> Iterator[RunningGateway]:
    with running_gateway(node.target) as running:
        yield running


@pytest.fixture(scope="module")
def client(node) -> Iterator[Client]:
    with Client(node.target) as connected:
        yield connected


def chat_text(messages) -> str:
    turns = "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages
    )
    return f"<s>{turns}<|im_start|>assistant\n"


# name: path, body without what a router adds, the prompt as text (special tokens as the
# tokenizer adds them), as text that is complete, or as ids
PROMPTS = {
    "completion of a text": ("/v1/completions", {"prompt": TEXT}, TEXT),
    "completion of ids": ("/v1/completions", {"prompt": IDS}, IDS),
    "completion of a list of one text": ("/v1/completions", {"prompt": [TEXT]}, TEXT),
    "completion of a list of ids": ("/v1/completions", {"prompt": [IDS]}, IDS),
    "completion without special tokens": (
        "/v1/completions",
        {"prompt": TEXT, "add_special_tokens": False},
        (TEXT,),
    ),
    "chat": (
        "/v1/chat/completions",
        {"messages": MESSAGES},
        (chat_text(MESSAGES),),
    ),
    "chat in parts": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        (chat_text([{"role": "user", "content": "hi"}]),),
    ),
    "generate from token_ids": ("/inference/v1/generate", {"token_ids": IDS}, IDS),
    "generate from input_ids": ("/inference/v1/generate", {"input_ids": IDS}, IDS),
    "generate from a text": ("/inference/v1/generate", {"text": TEXT}, TEXT),
    "generate from a prompt": ("/inference/v1/generate", {"prompt": TEXT}, TEXT),
    "generate from a prompt of ids": ("/inference/v1/generate", {"prompt": IDS}, IDS),
}


def expected_ids(tokenizer, prompt) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    if isinstance(prompt, tuple):
        return tokenizer.encode(prompt[0], add_special_tokens=False).ids
    return tokenizer.encode(prompt).ids


def routed(path, body):
    """The body as a router sends it to a prefill worker."""
    limits = {"max_tokens": 1, "min_tokens": 1}
    if path == "/inference/v1/generate":
        limits = {"sampling_params": limits}
    return {**body, **limits, "stream": False, "kv_transfer_params": REMOTE_DECODE}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_gets_one_token_and_a_cache_that_can_be_fetched(
    name, gateway, client, node, tokenizer
):
    path, body, prompt = PROMPTS[name]
    ids = expected_ids(tokenizer, prompt)
    reply = gateway.call(path, routed(path, body))
    assert reply.status == 200, reply.body
    expected = client.prefill("recall", ids)
    (choice,) = reply.body["choices"]
    assert choice["token_ids"] == [expected.first_token]
    assert choice["finish_reason"] == "length"
    assert reply.body["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 1,
        "total_tokens": len(ids) + 1,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    params = KvTransferParams.from_json_object(reply.body["kv_transfer_params"])
    assert params.tokens == len(ids)
    assert params.prompt_digest == prompt_digest(ids)
    assert params.first_token_id == expected.first_token
    assert params.ticket.endpoint == node.target
    assert params.ticket.model_digest == expected.model_digest
    assert params.ticket.sparsity_digest == expected.sparsity_digest
    cache = client.fetch(params.ticket)
    own = client.prefill("recall", ids, delivery="inline").kv
    assert all(np.array_equal(a, b) for a, b in zip(cache.k + cache.v, own.k + own.v))
    client.release(params.ticket)


SHAPES = {
    "/v1/completions": ("text_completion", "cmpl-", {"prompt": IDS}),
    "/v1/chat/completions": ("chat.completion", "chatcmpl-", {"messages": MESSAGES}),
    "/inference/v1/generate": ("generate", "gen-", {"token_ids": IDS}),
}


@pytest.mark.parametrize("path", SHAPES)
def test_a_reply_has_the_shape_of_its_api(path, gateway):
    kind, prefix, body = SHAPES[path]
    reply = gateway.call(path, routed(path, body), {"x-request-id": "abc"})
    assert reply.headers["x-request-id"] == "abc"
    assert reply.body["object"] == kind
    assert reply.body["id"] == prefix + "abc"
    assert reply.body["model"] == "team/recall"
    (choice,) = reply.body["choices"]
    text = choice["message"]["content"] if "chat" in path else choice["text"]
    assert isinstance(text, str)
    assert choice["logprobs"] is None


@pytest.mark.parametrize("path", SHAPES)
def test_the_text_is_that_of_the_token(path, gateway, tokenizer):
    # The recall model repeats its last token here, and 20 is a byte of the alphabet.
    _, _, body = SHAPES[path]
    if "chat" not in path:
        body = {next(iter(body)): [20] * 40}
    reply = gateway.call(path, routed(path, body))
    (choice,) = reply.body["choices"]
    text = choice["message"]["content"] if "chat" in path else choice["text"]
    assert text == tokenizer.decode(choice["token_ids"])


def test_log_probabilities_are_those_of_the_node(gateway, client):
    from pbs_client import Logits

    top = client.prefill("recall", IDS, logits=Logits(top=3)).top_logits
    body = {"prompt": IDS, "max_tokens": 1, "logprobs": 3}
    found = gateway.call("/v1/completions", body).body["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [top[0].log_probability]
    assert list(found["top_logprobs"][0].values()) == [t.log_probability for t in top]
    body = {"token_ids": IDS, "sampling_params": {"max_tokens": 1, "logprobs": 2}}
    found = gateway.call("/inference/v1/generate", body).body["choices"][0]["logprobs"]
    (entry,) = found["content"]
    assert (entry["token_id"], entry["logprob"]) == (
        top[0].token_id,
        top[0].log_probability,
    )
    assert [t["token_id"] for t in entry["top_logprobs"]] == [t.token_id for t in top[:2]]
    body = {"messages": MESSAGES, "max_tokens": 1, "logprobs": True, "top_logprobs": 2}
    found = gateway.call("/v1/chat/completions", body).body["choices"][0]["logprobs"]
    (entry,) = found["content"]
    assert len(entry["top_logprobs"]) == 2
    assert bytes(entry["bytes"]).decode() == entry["token"]


def test_without_candidates_only_the_token_has_a_log_probability(gateway):
    body = {"prompt": IDS, "max_tokens": 1, "logprobs": 0}
    found = gateway.call("/v1/completions", body).body["choices"][0]["logprobs"]
    assert len(found["token_logprobs"]) == 1
    assert found["top_logprobs"] == [{}]


def test_sampling_of_the_decode_tier_changes_nothing(gateway):
    plain = {"prompt": IDS, "max_tokens": 1, "kv_transfer_params": REMOTE_DECODE}
    sampled = {
        **plain, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 3, "stop": ["x"],
        "presence_penalty": 0.1, "logit_bias": {"5": 1}, "echo": False, "best_of": 1,
        "n": 1, "response_format": {"type": "json_object"}, "stream_options": None,
        "user": "someone", "unknown_field": [1],
    }  # fmt: skip
    first, second = (gateway.call("/v1/completions", b).body for b in (plain, sampled))
    assert first["choices"] == second["choices"]


def test_a_declined_remote_decode_leaves_no_lease(gateway):
    before = gateway.metrics()["pbs_kv_leases"]
    body = {
        "prompt": IDS,
        "max_tokens": 1,
        "kv_transfer_params": {"do_remote_decode": False},
    }
    reply = gateway.call("/v1/completions", body)
    assert reply.status == 200
    assert reply.body["kv_transfer_params"] is None
    assert gateway.metrics()["pbs_kv_leases"] == before


def sparsity_digest(gateway, **fields) -> str:
    ids = [n % 500 + 10 for n in range(3000)]
    reply = gateway.call("/v1/completions", {"prompt": ids, "max_tokens": 1, **fields})
    assert reply.status == 200, reply.body
    digest: str = reply.body["kv_transfer_params"]["sparsity_digest"]
    return digest


ATTENTION = {
    "a method's name": {"pbs_attention": "dense"},
    "a method and its options": {
        "pbs_attention": {"method": "pbs", "threshold": 0.5, "sink_blocks": 1}
    },
    "the message's JSON": {"pbs_attention": {"pbs": {"threshold": 0.5}, "sinkBlocks": 1}},
    "changes of the default profile": {"pbs_attention": {"window_blocks": 3}},
    "a permuted method": {
        "pbs_attention": {"method": "xattention", "permute": {"segment_size": 256}}
    },
    "a profile": {"pbs_profile": "paper"},
    "a profile and a change": {
        "pbs_profile": "paper",
        "pbs_attention": {"coverage_rows": 4},
    },
}


def test_attention_options_of_a_body_reach_the_node(gateway):
    found = {name: sparsity_digest(gateway, **b) for name, b in ATTENTION.items()}
    assert found["a method's name"] == "exact"
    assert found["a method and its options"] == found["the message's JSON"]
    assert found["a method and its options"].startswith("pbs-")
    assert found["a permuted method"].startswith("xattention-")
    assert found["a profile"] == found["a profile and a change"]
    assert found["a profile"] not in (found["the message's JSON"], "exact")
    assert found["changes of the default profile"] != sparsity_digest(gateway)


def test_a_cache_salt_is_the_salt_of_the_tenant(gateway):
    salted = sparsity_digest(gateway, pbs_attention="dense", cache_salt="tenant 7")
    other = sparsity_digest(gateway, pbs_attention="dense", cache_salt="tenant 8")
    assert salted.startswith("exact-")
    assert salted != other


def test_a_priority_is_accepted_within_the_nodes_range(gateway):
    body = {"prompt": IDS, "max_tokens": 1, "priority": -100}
    assert gateway.call("/v1/completions", body).status == 200


def test_tools_reach_the_chat_template(gateway, tokenizer):
    tools = [{"type": "function", "function": {"name": "é", "parameters": {}}}]
    body = {"messages": MESSAGES, "tools": tools, "max_tokens": 1}
    reply = gateway.call("/v1/chat/completions", body)
    system = f"<|im_start|>system\n{json.dumps(tools, ensure_ascii=False)}<|im_end|>\n"
    text = chat_text(MESSAGES).replace("<s>", f"<s>{system}")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    params = reply.body["kv_transfer_params"]
    assert (params["tokens"], params["prompt_digest"]) == (len(ids), prompt_digest(ids))


def test_the_models_route_lists_every_name(gateway):
    models = gateway.call("/v1/models").body
    assert models["object"] == "list"
    assert [m["id"] for m in models["data"]] == ["team/recall", "recall"]
    assert {m["root"] for m in models["data"]} == {"recall"}
    assert {m["max_model_len"] for m in models["data"]} == {8192}


@pytest.mark.parametrize("model", ["recall", "team/recall", "", None])
def test_each_name_of_the_model_and_none_are_served(model, gateway):
    body = {"model": model, "prompt": IDS, "max_tokens": 1}
    reply = gateway.call("/v1/completions", body)
    assert reply.status == 200
    assert reply.body["model"] == (model or "team/recall")


def test_metrics_are_the_nodes_and_the_gateways_own(gateway):
    page = gateway.call("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {line.split("{")[0].split(" ")[0] for line in page.body.splitlines()}
    assert "pbs_prefill_backlog_seconds" in names
    assert "pbs_gateway_requests_total" in names
    headers = [line for line in page.body.splitlines() if line.startswith("# TYPE")]
    assert len(headers) == len(set(headers))
    assert gateway.metrics()["pbs_gateway_node_metrics_up"] == 1


def test_metrics_without_the_nodes_say_so(ids_only):
    found = ids_only.metrics()
    assert found["pbs_gateway_node_metrics_up"] == 0
    assert not any(name.startswith("pbs_kv") for name in found)


def test_health_is_that_of_the_node(gateway):
    reply = gateway.call("/health")
    assert (reply.status, reply.body) == (200, {"status": "SERVING"})


COMPLETION = {"prompt": IDS, "max_tokens": 1}
CHAT = {"messages": MESSAGES, "max_tokens": 1}
GENERATE = {"token_ids": IDS, "sampling_params": {"max_tokens": 1}}
PATHS = {
    "completions": ("/v1/completions", COMPLETION),
    "chat": ("/v1/chat/completions", CHAT),
    "generate": ("/inference/v1/generate", GENERATE),
}
TOKENS = "this is a prefill worker"
SURROGATE = "half \ud800 a pair"

# name: API, changed fields, status, what the message says
REFUSED = {
    "more tokens": ("completions", {"max_tokens": 2}, 400, "max_tokens 2 is not 1"),
    "no tokens": ("completions", {"max_tokens": 0}, 400, "max_tokens 0 is not 1"),
    "more completion tokens": (
        "chat",
        {"max_completion_tokens": 7},
        400,
        "max_completion_tokens 7",
    ),
    "more tokens of generate": (
        "generate",
        {"sampling_params": {"max_tokens": 9}},
        400,
        "sampling_params.max_tokens 9",
    ),
    "tokens in words": ("completions", {"max_tokens": "1"}, 400, "max_tokens is not an"),
    "true tokens": ("completions", {"max_tokens": True}, 400, "max_tokens is not an"),
    "no limit and no decode tier": ("completions", {"max_tokens": None}, 400, TOKENS),
    "at least two": ("completions", {"min_tokens": 2}, 400, "min_tokens 2"),
    "a stream": ("completions", {"stream": True}, 400, "stream is not false"),
    "two answers": ("completions", {"n": 2}, 400, "n 2 is not 1"),
    "the best of two": ("completions", {"best_of": 2}, 400, "best_of 2 is not 1"),
    "beams": ("completions", {"use_beam_search": True}, 400, TOKENS),
    "to decode from a cache": (
        "completions",
        {"kv_transfer_params": {"do_remote_prefill": True}},
        400,
        "do_remote_prefill",
    ),
    "transfer of a list": (
        "completions",
        {"kv_transfer_params": [1]},
        400,
        "kv_transfer_params is not an object",
    ),
    "transfer flag in words": (
        "completions",
        {"kv_transfer_params": {"do_remote_decode": "yes"}},
        400,
        "do_remote_decode is not true or false",
    ),
    "an echo": ("completions", {"echo": True}, 400, "echo"),
    "prompt log-probabilities": ("completions", {"prompt_logprobs": 1}, 400, TOKENS),
    "a suffix": ("completions", {"suffix": "end"}, 400, "suffix"),
    "truncation": ("completions", {"truncate_prompt_tokens": 4}, 400, "truncate"),
    "no prompt": ("completions", {"prompt": None}, 400, "prompt is missing"),
    "a number as prompt": ("completions", {"prompt": 5}, 400, "neither a text nor"),
    "two prompts": ("completions", {"prompt": ["a", "b"]}, 400, "has 2 prompts"),
    "two lists of ids": ("completions", {"prompt": [[1], [2]]}, 400, "has 2 prompts"),
    "no ids": ("completions", {"prompt": []}, 400, "0 tokens"),
    "an id in words": ("completions", {"prompt": [1, 2, 3.5]}, 400, "prompt[2] is no"),
    "a negative id": ("completions", {"prompt": [1, -2]}, 400, "prompt[1] is no token"),
    "a true id": ("completions", {"prompt": [True]}, 400, "prompt[0] is no token id"),
    "an id beyond the vocabulary": (
        "completions",
        {"prompt": [1, 5000]},
        400,
        "token_ids[1] is not below vocab_size 1024",
    ),
    "more tokens than the gateway takes": (
        "completions",
        {"prompt": [5] * 8001},
        400,
        "8001 tokens, more than prompt_tokens_max of the gateway, 8000",
    ),
    "half a character": ("completions", {"prompt": SURROGATE}, 400, "surrogate"),
    "half a character in a chat": (
        "chat",
        {"messages": [{"role": "user", "content": SURROGATE}]},
        400,
        "surrogate",
    ),
    "half a character as model": ("completions", {"model": SURROGATE}, 400, "surrogate"),
    "half a character as salt": (
        "completions",
        {"cache_salt": SURROGATE},
        400,
        "surrogate",
    ),
    "another model": ("completions", {"model": "other"}, 404, "'other' is not served"),
    "a long model": ("completions", {"model": "m" * 1000}, 400, "1000 bytes"),
    "log-probabilities in words": ("completions", {"logprobs": "a"}, 400, "logprobs"),
    "fewer than no candidates": ("completions", {"logprobs": -1}, 400, "logprobs -1"),
    "too many candidates": ("completions", {"logprobs": 101}, 400, "[0, 100]"),
    "candidates alone": ("chat", {"top_logprobs": 2}, 400, "needs logprobs"),
    "an unknown method": ("completions", {"pbs_attention": "fast"}, 400, "'fast'"),
    "an unknown method in an object": (
        "completions",
        {"pbs_attention": {"method": "fast"}},
        400,
        "'fast'",
    ),
    "an option of another method": (
        "completions",
        {"pbs_attention": {"method": "pbs", "stride": 8}},
        400,
        "'stride' is no option of method pbs",
    ),
    "an option out of range": (
        "completions",
        {"pbs_attention": {"method": "pbs", "threshold": 1.5}},
        400,
        "threshold",
    ),
    "an option in words": (
        "completions",
        {"pbs_attention": {"method": "pbs", "threshold": "high"}},
        400,
        "Pbs.threshold 'high' is not a number",
    ),
    "an unknown field of the message": (
        "completions",
        {"pbs_attention": {"pbs": {"colour": 1}}},
        400,
        "colour",
    ),
    "given lists": (
        "completions",
        {"pbs_attention": {"pbs": {"useGivenLists": True}}},
        400,
        "options of Attend",
    ),
    "a list as attention": ("completions", {"pbs_attention": [1]}, 400, "pbs_attention"),
    "an unknown profile": ("completions", {"pbs_profile": "mine"}, 400, '"mine"'),
    "a profile and a method": (
        "completions",
        {"pbs_profile": "paper", "pbs_attention": "dense"},
        400,
        "exclude each other",
    ),
    "a priority out of range": ("completions", {"priority": 101}, 400, "[-100, 100]"),
    "a long salt": ("completions", {"cache_salt": "s" * 200}, 400, "128"),
    "no messages": ("chat", {"messages": []}, 400, "messages is not a list of at least"),
    "messages as text": ("chat", {"messages": "hi"}, 400, "messages is not a list"),
    "a message as text": ("chat", {"messages": ["hi"]}, 400, "messages[0] is not an"),
    "no role": ("chat", {"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    "an image": (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content[0] is not a text",
    ),
    "arguments that are no JSON": (
        "chat",
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"arguments": "{"}}],
                }
            ]
        },
        400,
        "messages[0].tool_calls[0].function.arguments is not JSON",
    ),
    "a chat template": ("chat", {"chat_template": "{{ 1 }}"}, 400, "chat_template"),
    "messages as arguments": (
        "chat",
        {"chat_template_kwargs": {"messages": []}},
        400,
        "chat_template_kwargs.messages",
    ),
    "an open message and a new one": (
        "chat",
        {"continue_final_message": True},
        400,
        "exclude each other",
    ),
    "a prompt twice": ("generate", {"text": "a"}, 400, "token_ids and text"),
    "generate without a prompt": ("generate", {"token_ids": None}, 400, "no prompt"),
    "ids as text": ("generate", {"token_ids": "a"}, 400, "not a list of token ids"),
    "images of generate": ("generate", {"features": {"mm_hashes": {}}}, 400, "features"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_field_and_says_what_to_do(name, gateway):
    api, changes, status, said = REFUSED[name]
    path, body = PATHS[api]
    reply = gateway.call(path, {**body, **changes})
    assert reply.status == status, reply.body
    assert said in reply.message
    assert reply.body["error"]["code"] == status
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    assert reply.body["error"]["type"] == kind
    assert "retry-after" not in reply.headers


MALFORMED = {
    "nothing": b"",
    "no JSON": b"prompt",
    "half of JSON": b'{"prompt": [1, 2',
    "a list": b"[]",
    "a number": b"7",
    "NaN": b'{"prompt": [1], "max_tokens": NaN}',
    "Infinity": b'{"max_tokens": -Infinity}',
    "no UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": [1], "max_tokens": 1}'.encode("utf-16"),
    "a deep nest": b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "a long number": b'{"max_tokens": ' + b"9" * 5_000 + b"}",
}


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("name", MALFORMED)
def test_a_body_that_is_no_object_is_refused(name, path, gateway):
    reply = gateway.call(path, MALFORMED[name])
    assert reply.status == 400
    assert "the body is not" in reply.message


def test_a_long_body_is_refused_before_it_is_read(gateway):
    reply = gateway.call("/v1/completions", b" " * 100_001)
    assert reply.status == 413
    assert "body_bytes_max 100000" in reply.message


def test_a_long_body_of_unknown_length_is_refused(gateway):
    connection = gateway.connect()
    chunks = (b" " * 50_000 for _ in range(3))
    connection.request("POST", "/v1/completions", chunks, encode_chunked=True,
                       headers={"transfer-encoding": "chunked"})  # fmt: skip
    response = connection.getresponse()
    assert response.status == 413
    connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("POST", "/v1/completions/render", 404),
        ("GET", "/", 404),
    ],
)
def test_an_unknown_route_or_method_gets_an_error_of_the_same_shape(
    method, path, status, gateway
):
    reply = gateway.call(path, method=method)
    assert reply.status == status
    assert reply.body["error"]["code"] == status


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": TEXT, "max_tokens": 1}),
        ("/v1/chat/completions", CHAT),
        ("/inference/v1/generate", {"text": TEXT, "max_tokens": 1}),
    ],
)
def test_without_a_tokenizer_text_is_refused(path, body, ids_only):
    reply = ids_only.call(path, body)
    assert reply.status == 400
    assert "--tokenizer FOLDER" in reply.message


def test_without_a_tokenizer_ids_are_served(ids_only):
    body = {"prompt": IDS, "max_tokens": 1, "logprobs": 1}
    (choice,) = ids_only.call("/v1/completions", body).body["choices"]
    (token,) = choice["token_ids"]
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}"]


def test_no_prompt_and_no_ids_are_in_the_log(gateway):
    secret = "zebra-" + base64.b32encode(b"never in a log").decode()
    odd = [937, 938, 939, 940]
    for path, body in PATHS.values():
        for prompt in (secret, odd):
            sent = {k: v for k, v in body.items() if k not in ("prompt", "token_ids")}
            if "chat" in path:
                sent["messages"] = [{"role": "user", "content": str(prompt)}]
            else:
                sent["prompt"] = prompt
            assert gateway.call(path, sent).status == 200
            for wrong in ({"stream": True}, {"n": secret}, {"stop_": secret, "n": 2}):
                gateway.call(path, {**sent, **wrong})
            gateway.call(path, json.dumps(sent).encode()[:-2])
            gateway.call(path, {**sent, "prompt": [secret, *odd]})
    log = "".join(gateway.log)
    assert secret not in log
    assert "938" not in "".join(e.get("message", "") for e in gateway.events("request"))
    assert gateway.events("request")
    assert not gateway.events("fault")
