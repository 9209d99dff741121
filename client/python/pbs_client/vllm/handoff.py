"""Hand-offs: what a request's kv_transfer_params offer, and whether it may be used.

The parameters come from the HTTP API, so nothing in them is believed: the prompt's ids,
the server and the kind of cache are checked here, sizes and digests when the server has
described the cache (fetching.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pbs_client.kv import KvTicket
from pbs_client.kv_params import KvTransferParams, prompt_digest
from pbs_client.vllm.settings import DIGEST_CHARACTERS_MAX, Settings

_HANDLE = re.compile(r"[0-9a-f]{32}")
_EXACT = "exact"  # of dense attention; with a tenant's salt "exact-..."


class HandoffError(Exception):
    """A hand-off cannot be used; the message says why and what to do."""


class LoadCancelledError(HandoffError):
    """The request ended while its cache was being loaded."""


class Request(Protocol):
    """What the connector reads of vLLM's request."""

    request_id: str
    num_tokens: int
    prompt_token_ids: Sequence[int] | None
    kv_transfer_params: Mapping[str, Any] | None
    cache_salt: str | None
    lora_request: Any
    mm_features: Any
    prompt_embeds: Any


@dataclass(frozen=True)
class Handoff:
    """A cache that a request may load, at most.

    Attributes:
        ticket: with an endpoint that is allowed.
        tokens: of the cache; the prompt begins with exactly these.
        prompt_digest: of these.
    """

    ticket: KvTicket
    tokens: int
    prompt_digest: str


def read_handoff(params: Any, settings: Settings) -> Handoff | None:
    """The hand-off that kv_transfer_params describe; None when they describe none.

    Raises:
        HandoffError: a field is missing or wrong, or the server is not allowed.
    """
    if not isinstance(params, Mapping) or params.get("do_remote_prefill") is not True:
        return None
    try:
        given = KvTransferParams.from_json_object(params)
        ticket = given.ticket
        if not ticket.endpoint and not settings.server:
            raise HandoffError(
                "the ticket names no endpoint; set kv_connector_extra_config server"
            )
        endpoint = ticket.endpoint or settings.server
        settings.endpoints.check(endpoint)
    except ValueError as error:
        raise HandoffError(str(error)) from None
    if not _HANDLE.fullmatch(ticket.handle):
        raise HandoffError("kv_transfer_params field ticket is not 32 hex digits")
    for name in ("model_digest", "sparsity_digest"):
        digest = getattr(ticket, name)
        if not digest.isascii() or not 0 < len(digest) <= DIGEST_CHARACTERS_MAX:
            raise HandoffError(
                f"kv_transfer_params field {name} is not 1 to {DIGEST_CHARACTERS_MAX} "
                "ASCII characters"
            )
    ticket = dataclasses.replace(ticket, endpoint=endpoint)
    return Handoff(ticket, given.tokens, given.prompt_digest)


def check_handoff(
    handoff: Handoff, request: Request, settings: Settings, prefix_caching: bool
) -> None:
    """Refuses a cache that is not of this request or may not be mixed with others.

    Args:
        handoff: of the request.
        request: the request.
        settings: the connector's.
        prefix_caching: other requests may reuse the blocks of this one.

    Raises:
        HandoffError: it is refused.
    """
    _check_request(request)
    _check_prompt(handoff, request.prompt_token_ids or ())
    _check_method(handoff.ticket, request.cache_salt, settings, prefix_caching)
    wanted = settings.model_digest
    if wanted and handoff.ticket.model_digest != wanted:
        raise HandoffError(
            "the cache's model_digest is not that of kv_connector_extra_config "
            "model_digest: the prefill server has another model"
        )


def is_exact(sparsity_digest: str) -> bool:
    """True for a cache of dense attention."""
    return sparsity_digest == _EXACT or sparsity_digest.startswith(f"{_EXACT}-")


def _check_request(request: Request) -> None:
    refused = {
        "prompt_embeds": request.prompt_embeds is not None,
        "multimodal inputs": bool(request.mm_features),
        "a LoRA adapter": request.lora_request is not None,
        "no prompt ids": request.prompt_token_ids is None,
    }
    for what, is_so in refused.items():
        if is_so:
            raise HandoffError(
                f"the request has {what}, which a prefill server does not know; send "
                "it without kv_transfer_params"
            )


def _check_prompt(handoff: Handoff, prompt: Sequence[int]) -> None:
    if not 1 <= handoff.tokens <= len(prompt):
        raise HandoffError(
            f"kv_transfer_params field tokens is {handoff.tokens}, and the prompt has "
            f"{len(prompt)} tokens; the cache is of another prompt"
        )
    if prompt_digest(prompt[: handoff.tokens]) != handoff.prompt_digest:
        raise HandoffError(
            "the prompt's ids are not those of prompt_digest: the cache is of another "
            "prompt, or another tokenizer or chat template made the ids"
        )


def _check_method(
    ticket: KvTicket, salt: str | None, settings: Settings, prefix_caching: bool
) -> None:
    if is_exact(ticket.sparsity_digest) or settings.dedicated or not prefix_caching:
        return
    if salt != ticket.sparsity_digest:
        raise HandoffError(
            "the cache is approximate, and exact requests could reuse it from vLLM's "
            "prefix cache: send the request's sparsity_digest as cache_salt, or set "
            'kv_connector_extra_config {"dedicated": true}, or start vLLM with '
            "--no-enable-prefix-caching"
        )
