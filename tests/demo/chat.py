"""A user of the router: chat requests in text, streamed or not."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_ANSWER_SECONDS_MAX = 600
_MESSAGE_CHARACTERS_MAX = 300


@dataclass
class Answer:
    """What came back; the times are of time.time().

    Attributes:
        error: empty when the request was answered.
    """

    sent: float
    first: float = 0.0
    last: float = 0.0
    text: str = ""
    error: str = ""
    prompt_tokens: int = 0
    tokens: int = 0

    def take_usage(self, usage: dict[str, Any]) -> None:
        """From the reply's usage."""
        self.prompt_tokens = usage["prompt_tokens"]
        self.tokens = usage["completion_tokens"]


def ask(
    router: str,
    model: str,
    question: str,
    max_tokens: int,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Sends one chat request, greedy; streams it if there is an `on_text`."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    if on_text:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = Answer(time.time())
    connection = http.client.HTTPConnection(router, timeout=_ANSWER_SECONDS_MAX)
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            text = reply.read().decode(errors="replace")[:_MESSAGE_CHARACTERS_MAX]
            answer.error = f"status {reply.status}: {text}"
        elif on_text:
            _read_stream(reply, answer, on_text)
        else:
            whole = json.loads(reply.read())
            answer.text = whole["choices"][0]["message"]["content"]
            answer.take_usage(whole["usage"])
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    answer.last = answer.last or time.time()
    return answer


def _read_stream(
    reply: http.client.HTTPResponse, answer: Answer, on_text: Callable[[str], None]
) -> None:
    """Reads server-sent events up to [DONE]."""
    for line in reply:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            return
        if not data:
            continue
        event = json.loads(data)
        if "error" in event:
            answer.error = json.dumps(event["error"])[:_MESSAGE_CHARACTERS_MAX]
            return
        if event.get("usage"):
            answer.take_usage(event["usage"])
        for choice in event["choices"]:
            text = choice["delta"].get("content") or ""
            if text:
                answer.first = answer.first or time.time()
                answer.last = time.time()
                answer.text += text
                on_text(text)
    answer.error = "the stream ended before [DONE]"
