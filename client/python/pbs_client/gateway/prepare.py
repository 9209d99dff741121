"""A body as a request to the node: JSON, chat template, tokens, checks.

Threading: prepare() takes processor time, so it runs in a thread; it may run in several.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbs_client._prefill import make_request
from pbs_client.gateway import fields
from pbs_client.gateway.apis import Api, Request, Text
from pbs_client.gateway.chat_template import Chat
from pbs_client.gateway.errors import RefusedError, bad
from pbs_client.gateway.fields import checked_text
from pbs_client.gateway.node import ServedModel
from pbs_client.gateway.tokenizer import Tokenizer
from pbs_client.kv_params import prompt_digest
from pbs_client.prefill_options import Lease, Logits

REQUEST_ID_BYTES_MAX = 128  # the node's


@dataclass(frozen=True)
class Prepared:
    """A request for the node, without the prompt itself.

    Attributes:
        request: the body, without its prompt.
        model: its model's name, as the reply shows it.
        message: the serialized PrefillRequest.
        prompt_tokens: of the prompt.
        prompt_digest: of its ids.
        served: the model.
    """

    request: Request
    model: str
    message: bytes
    prompt_tokens: int
    prompt_digest: str
    served: ServedModel


class Preparer:
    """Prepares requests for one gateway."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_tokens_max: int,
        lease_seconds: int | None,
    ) -> None:
        """Without a tokenizer, prompts are ids only."""
        self._tokenizer = tokenizer
        self._prompt_tokens_max = prompt_tokens_max
        self._lease_seconds = lease_seconds

    def prepare(
        self, api: Api, raw: bytearray, served: ServedModel, request_id: str
    ) -> Prepared | RefusedError:
        """The node's request for a body, or why there is none."""
        try:
            return self._prepare(api, raw, served, request_id)
        except RefusedError as refusal:
            return refusal.alone()

    def _prepare(
        self, api: Api, raw: bytearray, served: ServedModel, request_id: str
    ) -> Prepared:
        request = api.decode(fields.parse(raw))
        model = _model(request.model, served)
        ids = np.asarray(self._ids(request.prompt), dtype=np.uint32)
        self._check_length(len(ids), served)
        message = self._message(request, ids, served.info.name, request_id)
        return Prepared(
            request=dataclasses.replace(request, prompt=None),
            model=model,
            message=message.SerializeToString(),
            prompt_tokens=len(ids),
            prompt_digest=prompt_digest(ids),
            served=served,
        )

    def text_of(self, token_id: int, skip_special_tokens: bool) -> str:
        """The text of a token; "" without a tokenizer."""
        if self._tokenizer is None:
            return ""
        return self._tokenizer.text_of(token_id, skip_special_tokens)

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        if self._tokenizer is None:
            raise bad(
                "prompt",
                "this gateway has no tokenizer, so a prompt is a list of token ids; send "
                "ids to /v1/completions, or start pbs-gateway with --tokenizer FOLDER",
            )
        if isinstance(prompt, Chat):
            if self._tokenizer.chat is None:
                raise bad(
                    "messages",
                    "the tokenizer's folder has no chat template; start pbs-gateway with "
                    "--chat-template FILE, or send a prompt to /v1/completions",
                )
            rendered = self._tokenizer.chat.render(prompt)
            # The template writes the special tokens.
            prompt = Text(checked_text("messages", rendered), add_special_tokens=False)
        ids = self._tokenizer.encode(prompt.text, prompt.add_special_tokens)
        return ids

    def _check_length(self, count: int, served: ServedModel) -> None:
        if count == 0:
            raise bad("prompt", "the prompt has 0 tokens; a prefill needs one")
        for name, limit in (
            ("prompt_tokens_max of the gateway", self._prompt_tokens_max),
            ("tokens_max of the model", served.info.tokens_max),
        ):
            if count > limit:
                raise bad(
                    "prompt",
                    f"the prompt has {count} tokens, more than {name}, {limit}",
                )

    def _message(self, request: Request, ids: Any, model: str, request_id: str) -> Any:
        options, candidates = request.options, request.candidates
        try:
            return make_request(
                model,
                ids,
                options.attention,
                Lease(ttl_seconds=self._lease_seconds) if options.lease else None,
                # The token's own log-probability is that of the best candidate.
                Logits(top=0 if candidates is None else max(1, candidates)),
                priority=options.priority,
                tenant_salt=options.tenant_salt,
                request_id=request_id,
            )
        except (TypeError, ValueError) as error:
            # Options only: the ids have been checked.
            raise bad(None, str(error)) from None


def _model(named: str, served: ServedModel) -> str:
    """The model's name in the reply. RefusedError: it is another model."""
    if not named:
        return served.names[0]
    if named in served.names:
        return named
    known = ", ".join(map(repr, served.names))
    raise RefusedError(
        404,
        f"model {named[:128]!r} is not served here; these are: {known}",
        param="model",
    )
