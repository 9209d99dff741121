"""What pbs-gateway answers to each route."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pbs_client import Logits
from pbs_client.kv_params import KvTransferParams, prompt_digest
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
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


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
    name, gateway, gateway_node, node_client, tokenizer
):
    path, body, prompt = PROMPTS[name]
    ids = expected_ids(tokenizer, prompt)
    reply = gateway.call(path, routed(path, body))
    assert reply.status == 200, reply.body
    expected = node_client.prefill("recall", ids)
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
    assert params.ticket.endpoint == gateway_node.target
    assert params.ticket.model_digest == expected.model_digest
    assert params.ticket.sparsity_digest == expected.sparsity_digest
    cache = node_client.fetch(params.ticket)
    own = node_client.prefill("recall", ids, delivery="inline").kv
    assert all(np.array_equal(a, b) for a, b in zip(cache.k + cache.v, own.k + own.v))
    node_client.release(params.ticket)


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


def test_log_probabilities_are_those_of_the_node(gateway, node_client):
    top = node_client.prefill("recall", IDS, logits=Logits(top=3)).top_logits
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


def test_without_a_tokenizer_ids_are_served(ids_only):
    body = {"prompt": IDS, "max_tokens": 1, "logprobs": 1}
    (choice,) = ids_only.call("/v1/completions", body).body["choices"]
    (token,) = choice["token_ids"]
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}"]
