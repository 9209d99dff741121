"""Attention methods and their options in a request.

Every field may be None: the server then uses its documented default (in brackets
below). The server checks ranges; its errors name value and limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import numpy as np

from pbs_client import _messages

_SCOPE_NUMBERS = _messages.enum_numbers("Scope")
SCOPES = ("kv_head", "query_head")


@dataclass(frozen=True)
class Dense:
    """Full causal attention: every block, identity order.

    Attributes:
        block_size: tokens of the blocks in the reply's lists [128].
    """

    block_size: int | None = None

    def fill(self, options: Any) -> None:
        """Writes the method into an AttentionOptions message."""
        options.dense.SetInParent()
        _set_fields(options.dense, block_size=self.block_size)


@dataclass(frozen=True)
class Pbs:
    """Permuted block-sparse attention: keys sorted inside segments, blocks selected.

    Attributes:
        block_size: tokens; a power of two in [16, 256] [128].
        segment_size: tokens; a multiple of block_size [256].
        threshold: attention mass to keep per query block, (0, 1]; a higher value is
            slower and nearer to dense attention [0.9].
        scope: "kv_head": one key order per KV head; "query_head": one per query head
            [kv_head].
        force_first_block: every query block also reads the block of key 0 [true].
    """

    block_size: int | None = None
    segment_size: int | None = None
    threshold: float | None = None
    scope: str | None = None
    force_first_block: bool | None = None

    def __post_init__(self) -> None:
        if self.scope is not None and self.scope not in SCOPES:
            raise ValueError(f"scope {self.scope!r} is not one of {', '.join(SCOPES)}")

    def fill(self, options: Any) -> None:
        """Writes the method into an AttentionOptions message."""
        options.pbs.SetInParent()
        _set_fields(
            options.pbs,
            block_size=self.block_size,
            segment_size=self.segment_size,
            threshold=self.threshold,
            scope=self.scope and _SCOPE_NUMBERS[self.scope.upper()],
            force_first_block=self.force_first_block,
        )


@dataclass(frozen=True)
class MeanPooling:
    """Block-sparse attention without permutation: blocks selected by pooled mass.

    Attributes:
        block_size: tokens; a power of two in [16, 256] [128].
        threshold: attention mass to keep per query block, (0, 1] [0.9].
        force_first_block: every query block also reads block 0 [true].
    """

    block_size: int | None = None
    threshold: float | None = None
    force_first_block: bool | None = None

    def fill(self, options: Any) -> None:
        """Writes the method into an AttentionOptions message."""
        options.mean_pooling.SetInParent()
        _set_fields(
            options.mean_pooling,
            block_size=self.block_size,
            threshold=self.threshold,
            force_first_block=self.force_first_block,
        )


Method = Union[Dense, Pbs, MeanPooling]

_METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "pbs": Pbs,
    "mean_pooling": MeanPooling,
}


def method_of(method: Any) -> Method | None:
    """A method from a method object or a name; None stays None.

    Raises:
        ValueError: it is no method.
    """
    if method is None or isinstance(method, (Dense, Pbs, MeanPooling)):
        return method
    if isinstance(method, str) and method in _METHODS:
        return _METHODS[method]()
    raise ValueError(
        f"method {method!r} is not one of {', '.join(map(repr, _METHODS))}, nor Dense(), "
        "Pbs(...) or MeanPooling(...)"
    )


BLOCK_SIZE_DEFAULT = 128  # of every method; AttentionOptions in the .proto files


@dataclass(frozen=True)
class Attention:
    """A method and the options that all methods share.

    Attributes:
        method: Dense(), Pbs(...), MeanPooling(...) or the name of one with its
            defaults, such as "dense"; None is the server's default profile.
        dense_fallback: run dense where nearly all blocks are selected; None is the
            call's default (false in attend, true in prefill).
        coverage_rows: number of query rows per sequence and head whose exact attention
            coverage is measured, 0 .. 1024 [0].

    Raises:
        ValueError: the method is none of these.
    """

    method: Method | str | None = None
    dense_fallback: bool | None = None
    coverage_rows: int | None = None

    def __post_init__(self) -> None:
        method_of(self.method)

    def to_message(self) -> Any:
        """As an AttentionOptions message."""
        message, method = _messages.AttentionOptions(), method_of(self.method)
        if method is not None:
            method.fill(message)
        _set_fields(
            message,
            dense_fallback=self.dense_fallback,
            coverage_rows=self.coverage_rows,
        )
        return message


def attention_of(method: Method | str | Attention | None) -> Attention:
    """An Attention from one, or from its method alone.

    Raises:
        ValueError: it is no method.
    """
    return method if isinstance(method, Attention) else Attention(method)


def method_from_message(message: Any) -> Method | None:
    """The method that an AttentionOptions message names; None for none or unknown."""
    name = message.WhichOneof("method")
    if name == "dense":
        return Dense(_get(message.dense, "block_size"))
    if name == "pbs":
        scope = _get(message.pbs, "scope")
        return Pbs(
            block_size=_get(message.pbs, "block_size"),
            segment_size=_get(message.pbs, "segment_size"),
            threshold=_get(message.pbs, "threshold"),
            scope="query_head" if scope == _SCOPE_NUMBERS["QUERY_HEAD"] else "kv_head",
            force_first_block=_get(message.pbs, "force_first_block"),
        )
    if name == "mean_pooling":
        return MeanPooling(
            block_size=_get(message.mean_pooling, "block_size"),
            threshold=_get(message.mean_pooling, "threshold"),
            force_first_block=_get(message.mean_pooling, "force_first_block"),
        )
    return None


def _set_fields(message: Any, **values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            setattr(message, name, value)


def _get(message: Any, name: str) -> Any:
    """A field, None when unset; a float32 as the shortest number that rounds to it."""
    if not message.HasField(name):
        return None
    value = getattr(message, name)
    return float(str(np.float32(value))) if isinstance(value, float) else value
