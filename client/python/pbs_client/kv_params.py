"""kv_transfer_params: a finished prefill as routers carry it from HTTP body to HTTP body.

A router copies the object from the reply of the prefill worker into the request of the
decode worker, unread. Both ends are ours: pbs-gateway writes it, the vLLM connector
reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbs_client.kv import Array, KvTicket

_STRINGS = (
    "ticket",
    "endpoint",
    "epoch",
    "model_digest",
    "sparsity_digest",
    "prompt_digest",
)
_INTEGERS = ("tokens", "expires_unix_ms", "first_token_id")


@dataclass(frozen=True)
class KvTransferParams:
    """A held cache, and what its consumer checks before it uses it.

    Attributes:
        ticket: of the cache, with its endpoint.
        tokens: of the prompt, each of which the cache has.
        prompt_digest: prompt_digest() of the prompt's ids.
        expires_unix_ms: when the lease ends, unless it is renewed.
        first_token_id: the greedy next token.
    """

    ticket: KvTicket
    tokens: int
    prompt_digest: str
    expires_unix_ms: int
    first_token_id: int

    def to_json_object(self) -> dict[str, Any]:
        """The object, with the two flags by which engines tell its direction.

        The epoch is a string, because readers that know only doubles would round it.
        """
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "ticket": self.ticket.handle,
            "endpoint": self.ticket.endpoint,
            "epoch": str(self.ticket.epoch),
            "model_digest": self.ticket.model_digest,
            "sparsity_digest": self.ticket.sparsity_digest,
            "tokens": self.tokens,
            "prompt_digest": self.prompt_digest,
            "expires_unix_ms": self.expires_unix_ms,
            "first_token_id": self.first_token_id,
        }

    @classmethod
    def from_json_object(cls, value: Any) -> KvTransferParams:
        """From to_json_object(); further fields are ignored.

        Raises:
            ValueError: a field is missing or has another type; it is named.
        """
        if not isinstance(value, Mapping):
            raise ValueError("kv_transfer_params is not a JSON object")
        for name in _STRINGS:
            if not isinstance(value.get(name), str):
                raise ValueError(f"kv_transfer_params field {name} is not a string")
        for name in _INTEGERS:
            number = value.get(name)
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ValueError(
                    f"kv_transfer_params field {name} is not an integer of at least 0"
                )
        epoch = value["epoch"]
        if not epoch.isascii() or not epoch.isdecimal() or int(epoch) >= 1 << 64:
            raise ValueError(
                "kv_transfer_params field epoch is not a decimal 64-bit number"
            )
        ticket = KvTicket(
            value["ticket"],
            int(epoch),
            value["model_digest"],
            value["sparsity_digest"],
            value["endpoint"],
        )
        return cls(
            ticket,
            value["tokens"],
            value["prompt_digest"],
            value["expires_unix_ms"],
            value["first_token_id"],
        )


def prompt_digest(token_ids: Sequence[int] | Array) -> str:
    """The string "sha256:" and 64 hex digits over the ids, each as 4 little-endian bytes."""
    ids = np.asarray(token_ids, dtype="<u4")
    return "sha256:" + hashlib.sha256(ids.tobytes()).hexdigest()
