"""What a body of every API says: rules of a prefill worker, and options of the prefill.

A prefill worker computes a prompt's cache and one token. What asks for more is refused.
Fields that shape only the answer of the decode tier (temperature, stop, ...) are not
read: the decode tier gets the same body and computes the prompt's last token itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from pbs_client import _messages
from pbs_client.gateway.errors import bad
from pbs_client.gateway.fields import Fields
from pbs_client.options import METHODS, Attention, Permute

PRIORITY_MAX = 100  # the node's
_SHOWN_CHARACTERS_MAX = 64
_ELSEWHERE = (
    "this is a prefill worker: send the request to the router or to a decode worker"
)
# They ask for the prompt's own tokens or text back.
_ECHOES = ("echo", "prompt_logprobs")
# They change the prompt in ways that the gateway does not follow.
_PROMPT_CHANGES = (
    "suffix",
    "truncate_prompt_tokens",
    "prompt_embeds",
    "features",
    "content_parts",
    "mm_processor_kwargs",
    "chat_template",
)


@dataclass(frozen=True)
class Options:
    """Options of a prefill, from a body.

    Attributes:
        attention: method and options; all None is the node's default profile.
        lease: hold the cache for a decode tier.
        tenant_salt: mixed into sparsity_digest.
        priority: the node's: higher runs first.
    """

    attention: Attention
    lease: bool
    tenant_salt: str
    priority: int


def check_worker_rules(body: Fields, limits: Fields) -> bool:
    """Refuses what a prefill worker cannot answer.

    Args:
        body: the request.
        limits: the object with max_tokens and n: body itself or sampling_params.

    Returns:
        Whether the cache is to be held, which do_remote_decode: false declines.
    """
    transfer = body.inner("kv_transfer_params")
    if transfer.flag("do_remote_prefill"):
        path = transfer.path("do_remote_prefill")
        raise bad(path, f"{path} asks to decode from a held cache; {_ELSEWHERE}")
    decodes_elsewhere = transfer.flag("do_remote_decode")
    _check_tokens(limits, bool(decodes_elsewhere))
    for name in ("n", "best_of"):
        count = limits.integer(name)
        if count not in (None, 1):
            path = limits.path(name)
            raise bad(path, f"{path} {_shown(count)} is not 1; send a request for each")
    for name in ("stream", "use_beam_search"):
        if body.flag(name) or limits.flag(name):
            raise bad(name, f"{name} is not false; {_ELSEWHERE}")
    if not decodes_elsewhere:
        for fields, name in ((f, name) for f in (body, limits) for name in _ECHOES):
            if fields.get(name) not in (None, False):
                path = fields.path(name)
                raise bad(path, f"{path} is not supported; {_ELSEWHERE}")
    for name in _PROMPT_CHANGES:
        if body.get(name) not in (None, "", [], {}):
            raise bad(
                name,
                f"{name} is not supported; apply it first, and send the prompt's ids",
            )
    return decodes_elsewhere is not False


def _check_tokens(limits: Fields, decodes_elsewhere: bool) -> None:
    stated = False
    for name in ("max_tokens", "max_completion_tokens"):
        count = limits.integer(name)
        stated = stated or count is not None
        if count not in (None, 1):
            path = limits.path(name)
            raise bad(path, f"{path} {_shown(count)} is not 1; {_ELSEWHERE}")
    least = limits.integer("min_tokens")
    if least is not None and least > 1:
        path = limits.path("min_tokens")
        raise bad(path, f"{path} {_shown(least)} is more than 1; {_ELSEWHERE}")
    if not stated and not decodes_elsewhere:
        path = limits.path("max_tokens")
        raise bad(
            path,
            f"{path} is missing, and so is kv_transfer_params.do_remote_decode; "
            f"{_ELSEWHERE}, or set {path} to 1",
        )


def options_of(body: Fields, lease: bool) -> Options:
    """The options of the prefill itself."""
    priority = body.integer("priority") or 0
    if abs(priority) > PRIORITY_MAX:
        raise bad(
            "priority",
            f"priority {_shown(priority)} is outside [-{PRIORITY_MAX}, {PRIORITY_MAX}]",
        )
    return Options(
        attention=attention_of(body),
        lease=lease,
        tenant_salt=body.text("cache_salt") or "",
        # In a body, as vLLM reads it, lower runs first.
        priority=-priority,
    )


def attention_of(body: Fields) -> Attention:
    """pbs_attention and pbs_profile.

    pbs_attention is the name of a method; or an object with `method` and options, named
    as in pbs_client.options; or the JSON of the message AttentionOptions.
    """
    value = body.get("pbs_attention")
    profile = body.text("pbs_profile")
    try:
        if value is None:
            attention = Attention()
        elif isinstance(value, str):
            attention = Attention(value)
        elif isinstance(value, dict):
            attention = _attention(value)
        else:
            raise ValueError("it is neither a method's name nor an object")
    except (TypeError, ValueError) as error:
        raise bad("pbs_attention", f"pbs_attention: {error}") from None
    try:
        return dataclasses.replace(attention, profile=profile or attention.profile)
    except ValueError as error:
        raise bad("pbs_profile", f"pbs_profile: {error}") from None


def _attention(value: Mapping[str, Any]) -> Attention:
    if "method" in value or not set(value) & set(_WIRE_NAMES):
        return _from_options(value)
    message = _messages.AttentionOptions()
    try:
        json_format.ParseDict(value, message)
    except json_format.ParseError as error:
        raise ValueError(str(error)) from None
    attention = Attention.from_message(message)
    if attention.to_message() != message:
        raise ValueError("use_given_order and use_given_lists are options of Attend")
    return attention


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


# Members of the message that are objects: by them its JSON is known.
_WIRE_NAMES = {
    form for name in (*METHODS, "permutation") for form in (name, _camel(name))
}


def _from_options(value: Mapping[str, Any]) -> Attention:
    """From a method's name beside its options and those that methods share."""
    name = value.get("method")
    if name is not None and not (isinstance(name, str) and name in METHODS):
        known = ", ".join(METHODS)
        raise ValueError(f"method {_shown(name)} is not one of {known}")
    kind = METHODS[name] if name is not None else None
    # Each of METHODS is a dataclass.
    own = {f.name for f in dataclasses.fields(kind)} if kind else set()  # type: ignore[arg-type]
    shared = {f.name for f in dataclasses.fields(Attention)} - {"method"}
    unknown = sorted(set(value) - own - shared - {"method"})
    if unknown:
        of = f"method {name}" if name else "the default profile"
        raise ValueError(f"{_shown(unknown[0])} is no option of {of}")
    options = {k: v for k, v in value.items() if k in shared}
    permute = options.get("permute")
    if isinstance(permute, dict):
        options["permute"] = Permute(**permute)
    method = kind(**{k: v for k, v in value.items() if k in own}) if kind else None
    return Attention(method, **options)


def _shown(value: Any) -> str:
    """A number or a name in a message, cut."""
    return repr(value)[:_SHOWN_CHARACTERS_MAX]
