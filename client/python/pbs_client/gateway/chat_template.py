"""Chat templates: messages as the text of a prompt, as transformers and vLLM render it.

A template comes from the tokenizer's folder, so its author is trusted as the model's is;
it runs in Jinja's sandbox all the same. Messages and arguments come from the request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pbs_client.gateway.errors import bad

# What the request's chat_template_kwargs must not replace.
RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
        "return_dict",
    }
)


@dataclass(frozen=True)
class Chat:
    """What a template renders.

    Attributes:
        messages: each with a role, and the content as the list of its texts.
        tools: as the request has them; None without.
        documents: the same.
        add_generation_prompt: end with the beginning of the assistant's turn.
        continue_final_message: leave the last message open.
        arguments: further variables of the template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    documents: Sequence[Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """A compiled template, or one for requests with tools and one for others."""

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str]
    ) -> None:
        """Compiles the templates.

        Args:
            sources: "default", and "tool_use" if the model has it.
            special_tokens: bos_token and the like, which templates use.

        Raises:
            ValueError: a template is no Jinja, or there is none named default.
        """
        if "default" not in sources:
            names = ", ".join(sorted(sources))
            raise ValueError(f"no chat template is named default; these are: {names}")
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, jinja2.Template] = {}
        self._takes_parts: dict[str, bool] = {}
        environment = _environment()
        for name, source in sources.items():
            try:
                tree = environment.parse(source)
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise ValueError(f"chat template {name}: {error}") from None
            self._takes_parts[name] = _loops_over_content(tree)

    def render(self, chat: Chat) -> str:
        """The prompt's text. RefusedError: the template refuses the messages."""
        wants_tools = bool(chat.tools) and "tool_use" in self._templates
        name = "tool_use" if wants_tools else "default"
        messages = [_in_form(m, self._takes_parts[name]) for m in chat.messages]
        variables = {
            **self._special_tokens,
            **chat.arguments,
            "messages": messages,
            "tools": chat.tools,
            "documents": chat.documents,
            "add_generation_prompt": chat.add_generation_prompt,
        }
        try:
            text = self._templates[name].render(variables)
        except (jinja2.TemplateError, ArithmeticError, LookupError) as error:
            raise self._refusal(name, error) from None
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise self._refusal(name, error) from None
        if chat.continue_final_message:
            text = _up_to_final_message(text, chat.messages[-1])
        return text

    def _refusal(self, name: str, error: Exception) -> Exception:
        """Says why only in the template's own words, which quote no message."""
        why = str(error) if isinstance(error, _Raised) else ""
        said = f": {why}" if why and why in self._sources[name] else ""
        return bad("messages", f"the chat template refuses the messages{said}")


class _Raised(jinja2.TemplateError):
    """What a template says with raise_exception()."""


class _GenerationBlock(Extension):
    """The block {% generation %} marks the assistant's words; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  as the base class has it

    def parse(self, parser: Any) -> list[nodes.Node]:
        """The statements inside the block."""
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(
            ("name:endgeneration",), drop_needle=True
        )
        return body


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        # Inside a prompt nothing is HTML.
        autoescape=False,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: Any) -> None:
    raise _Raised(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether a template reads the parts of a content one by one.

    Such a template gets content as a list of parts, any other as one text, as in vLLM.
    """
    aliases = {
        assign.target.name
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node)
    }
    return any(
        _is_content(loop.iter)
        or (isinstance(loop.iter, nodes.Name) and loop.iter.name in aliases)
        for loop in tree.find_all(nodes.For)
    )


def _is_content(node: nodes.Node) -> bool:
    """message.content or message['content'], also behind filters."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return (
        isinstance(node, nodes.Getitem)
        and isinstance(node.arg, nodes.Const)
        and node.arg.value == "content"
    )


def _in_form(message: Mapping[str, Any], as_parts: bool) -> dict[str, Any]:
    texts = message["content"]
    if as_parts:
        return {**message, "content": [{"type": "text", "text": t} for t in texts]}
    return {**message, "content": "\n".join(texts)}


def _up_to_final_message(text: str, message: Mapping[str, Any]) -> str:
    """The rendered text without what the template adds after the last message."""
    words = "\n".join(message["content"])
    begin = text.rfind(words.strip())
    if not words.strip() or begin < 0:
        raise bad(
            "continue_final_message",
            "continue_final_message: the chat template does not show the last message's "
            "content; send add_generation_prompt instead",
        )
    for kept in (words.lstrip(), words.strip()):
        if text.startswith(kept, begin):
            return text[: begin + len(kept)]
    raise AssertionError("the stripped content stands at `begin`")
