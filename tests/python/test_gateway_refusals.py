"""What pbs-gateway refuses, with which status and which words."""

from __future__ import annotations

import base64
import json

import pytest

IDS = [5, 6, 7, 300, 700, 2]
TEXT = "the fox jumps over it"
MESSAGES = [{"role": "user", "content": "what jumps?"}]
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


@pytest.mark.parametrize("api", PATHS)
@pytest.mark.parametrize("name", MALFORMED)
def test_a_body_that_is_no_object_is_refused(name, api, gateway):
    reply = gateway.call(PATHS[api][0], MALFORMED[name])
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
