"""The three APIs: the prompt in a body, and the reply.

| path | prompt |
|---|---|
| /v1/completions | prompt: a text, ids, or a list of one of these |
| /v1/chat/completions | messages, and tools and documents for the chat template |
| /inference/v1/generate | token_ids, input_ids (ids), text, or prompt (either) |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pbs_client.gateway.chat_template import RESERVED, Chat
from pbs_client.gateway.errors import bad
from pbs_client.gateway.fields import Fields, checked_text
from pbs_client.gateway.job import Options, check_worker_rules, options_of
from pbs_client.results import TokenLogit

_ID_MAX = (1 << 32) - 1
# Of a message, what templates read besides role and content.
_MESSAGE_FIELDS = (
    "name",
    "tool_call_id",
    "tool_calls",
    "reasoning_content",
    "reasoning",
)
_TEXT_PARTS = ("text", "input_text")


@dataclass(frozen=True)
class Text:
    """A prompt as text; with the tokenizer's own special tokens or without."""

    text: str
    add_special_tokens: bool = True


Prompt = Any  # list[int], Text or Chat


@dataclass(frozen=True)
class Request:
    """A body of any API.

    Attributes:
        model: as the body names it; "" when it names none.
        prompt: ids (list of int), Text or Chat.
        options: of the prefill.
        candidates: best next tokens that the reply lists; None when it has no
            log-probabilities.
        skip_special_tokens: the token's text is "" for a special token.
        ignore_eos: an end token does not end the answer.
    """

    model: str
    prompt: Prompt
    options: Options
    candidates: int | None
    skip_special_tokens: bool
    ignore_eos: bool


@dataclass(frozen=True)
class Answer:
    """What a reply is made of.

    Attributes:
        request_id: of the request's header, or a new one.
        created: seconds since 1970.
        model: as the request names it.
        prompt_tokens: of the prompt.
        token_id: the greedy next token.
        text: of the token; "" without a tokenizer.
        is_end: the token ends the answer.
        own: the token with its log-probability; None when none was asked for.
        top: the candidates that were asked for, best first.
        texts: the text of each of these, by id; empty without a tokenizer.
        kv_transfer_params: None when no cache is held.
    """

    request_id: str
    created: int
    model: str
    prompt_tokens: int
    token_id: int
    text: str
    is_end: bool
    own: TokenLogit | None
    top: Sequence[TokenLogit]
    texts: Mapping[int, str]
    kv_transfer_params: Mapping[str, Any] | None


@dataclass(frozen=True)
class Api:
    """One API.

    Attributes:
        path: of the route.
        decode: the request of a body. Raises RefusedError.
        reply: the body of the reply.
    """

    path: str
    decode: Callable[[Fields], Request]
    reply: Callable[[Answer], dict[str, Any]]


# ---- prompts


def _ids(path: str, value: list[Any]) -> list[int]:
    for position, token in enumerate(value):
        if type(token) is not int or not 0 <= token <= _ID_MAX:
            raise bad(path, f"{path}[{position}] is no token id")
    return value


def _prompt(path: str, value: Any, add_special_tokens: bool) -> Prompt:
    """A text or ids, or a list of one of these."""
    if (
        isinstance(value, list)
        and len(value) == 1
        and isinstance(value[0], (str, list))
    ):
        value = value[0]
    if isinstance(value, str):
        return Text(checked_text(path, value), add_special_tokens)
    if not isinstance(value, list):
        raise bad(path, f"{path} is neither a text nor a list of token ids")
    if any(isinstance(entry, (str, list)) for entry in value):
        raise bad(path, f"{path} has {len(value)} prompts; send a request for each")
    return _ids(path, value)


def _decode_completion(body: Fields) -> Request:
    lease = check_worker_rules(body, body)
    value = body.get("prompt")
    if value is None:
        raise bad("prompt", "prompt is missing; it is a text or a list of token ids")
    special = body.flag("add_special_tokens")
    prompt = _prompt("prompt", value, special is not False)
    return _request(body, body, prompt, lease, body.integer("logprobs"))


def _decode_generate(body: Fields) -> Request:
    sampling = body.inner("sampling_params")
    limits = sampling if body.get("sampling_params") is not None else body
    lease = check_worker_rules(body, limits)
    given = [
        n
        for n in ("token_ids", "input_ids", "text", "prompt")
        if body.get(n) is not None
    ]
    if len(given) != 1:
        said = " and ".join(given) or "no prompt"
        raise bad(
            "token_ids",
            f"the body has {said}; give one of token_ids, input_ids, text, prompt",
        )
    name, value = given[0], body.get(given[0])
    if name == "text" and not isinstance(value, str):
        raise bad(name, f"{name} is not a text")
    if name in ("token_ids", "input_ids") and not isinstance(value, list):
        raise bad(name, f"{name} is not a list of token ids")
    special = body.flag("add_special_tokens")
    prompt = _prompt(name, value, special is not False)
    return _request(body, limits, prompt, lease, limits.integer("logprobs"))


def _decode_chat(body: Fields) -> Request:
    lease = check_worker_rules(body, body)
    generation = body.flag("add_generation_prompt")
    goes_on = bool(body.flag("continue_final_message"))
    if goes_on and generation is not False:
        raise bad(
            "continue_final_message",
            "continue_final_message and add_generation_prompt exclude each other; set "
            "add_generation_prompt to false",
        )
    if body.flag("add_special_tokens"):
        raise bad(
            "add_special_tokens",
            "add_special_tokens is not supported: the chat template adds them; omit it",
        )
    chat = Chat(
        messages=_messages_of(body),
        tools=_list_of_objects(body, "tools"),
        documents=_list_of_objects(body, "documents"),
        add_generation_prompt=generation is not False,
        continue_final_message=goes_on,
        arguments=_arguments(body),
    )
    candidates = body.integer("top_logprobs") or 0
    wanted = body.flag("logprobs")
    if candidates and not wanted:
        raise bad("top_logprobs", "top_logprobs needs logprobs to be true")
    return _request(body, body, chat, lease, candidates if wanted else None)


def _request(
    body: Fields, limits: Fields, prompt: Prompt, lease: bool, candidates: int | None
) -> Request:
    if candidates is not None and candidates < 0:
        raise bad("logprobs", f"logprobs {candidates} is less than 0")
    return Request(
        model=body.text("model") or "",
        prompt=prompt,
        options=options_of(body, lease),
        candidates=candidates,
        skip_special_tokens=limits.flag("skip_special_tokens") is not False,
        ignore_eos=bool(limits.flag("ignore_eos")),
    )


def _arguments(body: Fields) -> dict[str, Any]:
    arguments = dict(body.inner("chat_template_kwargs").values)
    for name in RESERVED & set(arguments):
        path = f"chat_template_kwargs.{name}"
        raise bad(path, f"{path} is a field of the request itself; set it there")
    effort = body.text("reasoning_effort")
    if effort is not None:
        arguments.setdefault("reasoning_effort", effort)
    return arguments


def _list_of_objects(body: Fields, name: str) -> list[Any] | None:
    value = body.get(name)
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise bad(name, f"{name} is not a list of objects")
    return value


def _messages_of(body: Fields) -> list[dict[str, Any]]:
    value = body.get("messages")
    if not isinstance(value, list) or not value:
        raise bad("messages", "messages is not a list of at least one message")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(value)]


def _message(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad(path, f"{path} is not an object")
    if not isinstance(value.get("role"), str):
        raise bad(f"{path}.role", f"{path}.role is not a string")
    message = {"role": value["role"], "content": _content(path, value.get("content"))}
    for name in _MESSAGE_FIELDS:
        if value.get(name) is not None:
            message[name] = value[name]
    calls = message.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = _tool_calls(f"{path}.tool_calls", calls)
    return message


def _content(path: str, value: Any) -> list[str]:
    """The texts of a message: one, or that of each part."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise bad(f"{path}.content", f"{path}.content is neither a text nor a list")
    texts = []
    for i, part in enumerate(value):
        where = f"{path}.content[{i}]"
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type") if isinstance(part, dict) else "text"
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise bad(where, f"{where} is not a text; this model takes text only")
        texts.append(text)
    return texts


def _tool_calls(path: str, value: Any) -> list[Any]:
    """Calls with arguments as an object, as templates expect them."""
    if not isinstance(value, list):
        raise bad(path, f"{path} is not a list")
    calls = []
    for i, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise bad(f"{path}[{i}]", f"{path}[{i}].function is not an object")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                where = f"{path}[{i}].function.arguments"
                raise bad(where, f"{where} is not JSON") from None
        function = {**function, "arguments": {} if arguments is None else arguments}
        calls.append({**call, "function": function})
    return calls


# ---- replies


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": 1,
        "total_tokens": answer.prompt_tokens + 1,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _body(answer: Answer, kind: str, prefix: str, choice: Any) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{answer.request_id}",
        "object": kind,
        "created": answer.created,
        "model": answer.model,
        "choices": [
            {
                "index": 0,
                **choice,
                "finish_reason": "stop" if answer.is_end else "length",
                "token_ids": [answer.token_id],
            }
        ],
        "usage": _usage(answer),
        "kv_transfer_params": answer.kv_transfer_params,
    }


def _name(answer: Answer, token_id: int) -> str:
    """A candidate's text; without a tokenizer its id, as vLLM writes it."""
    return answer.texts.get(token_id) or f"token_id:{token_id}"


def _reply_completion(answer: Answer) -> dict[str, Any]:
    logprobs = None
    if answer.own is not None:
        top = {_name(answer, t.token_id): t.log_probability for t in answer.top}
        logprobs = {
            "tokens": [_name(answer, answer.own.token_id)],
            "token_logprobs": [answer.own.log_probability],
            "top_logprobs": [top],
            "text_offset": [0],
        }
    choice = {"text": answer.text, "logprobs": logprobs}
    return _body(answer, "text_completion", "cmpl", choice)


def _reply_chat(answer: Answer) -> dict[str, Any]:
    logprobs = None
    if answer.own is not None:
        entry = _chat_entry(answer, answer.own)
        entry["top_logprobs"] = [_chat_entry(answer, t) for t in answer.top]
        logprobs = {"content": [entry]}
    message = {"role": "assistant", "content": answer.text}
    choice = {"message": message, "logprobs": logprobs}
    return _body(answer, "chat.completion", "chatcmpl", choice)


def _chat_entry(answer: Answer, token: TokenLogit) -> dict[str, Any]:
    name = _name(answer, token.token_id)
    return {
        "token": name,
        "logprob": token.log_probability,
        "bytes": list(name.encode()),
    }


def _generate_entry(token: TokenLogit) -> dict[str, Any]:
    return {"token_id": token.token_id, "logprob": token.log_probability}


def _reply_generate(answer: Answer) -> dict[str, Any]:
    logprobs = None
    if answer.own is not None:
        entry: dict[str, Any] = dict(_generate_entry(answer.own))
        entry["top_logprobs"] = [_generate_entry(t) for t in answer.top]
        logprobs = {"content": [entry]}
    body = _body(answer, "generate", "gen", {"text": answer.text, "logprobs": logprobs})
    return {"request_id": answer.request_id, **body}


APIS = (
    Api("/v1/completions", _decode_completion, _reply_completion),
    Api("/v1/chat/completions", _decode_chat, _reply_chat),
    Api("/inference/v1/generate", _decode_generate, _reply_generate),
)
