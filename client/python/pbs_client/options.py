"""Attention methods and their options in a request.

Every field may be None: the server then uses its documented default (in brackets
below). Types are checked when a value is made; errors are those of check_fields(). The
server checks ranges; its errors name option, value and limit.

A method is a dataclass here and a message of the protocol, NAME and NAMEOptions, whose
fields have the same names. A further method needs a dataclass and its name here, and a
flag in cli/attention.py for each field of a new name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pbs_client import _messages
from pbs_client._arguments import check_fields, checked

# What the package has of this file.
__all__ = [
    "Attention",
    "Dense",
    "FlashPrefill",
    "FlexPrefill",
    "MInference",
    "MeanPooling",
    "Pbs",
    "Permute",
    "Prism",
    "XAttention",
]

_WIRE = _messages.AttentionOptions.DESCRIPTOR
# The message of each method, by its name.
_WIRE_METHODS = {
    field.name: field.message_type for field in _WIRE.oneofs_by_name["method"].fields
}

SCOPES = ("kv_head", "query_head")
BLOCK_SIZE_DEFAULT = 128  # of every method; AttentionOptions in the .proto files

METHODS: dict[str, type[Method]] = {}  # by name, in the order of the classes below


class Method:
    """The base of the methods.

    Attributes:
        name: as in METHODS, in results and on command lines.
        selects: the method selects blocks, so it takes block lists and the options that
            Attention has for such methods.
        permutes: the method sorts keys without Attention.permute.
        lacks: options of Attention that the method does not have, although it selects.
    """

    name: ClassVar[str] = ""
    selects: ClassVar[bool] = False
    permutes: ClassVar[bool] = False
    lacks: ClassVar[frozenset[str]] = frozenset()
    block_size: int | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, message in _WIRE_METHODS.items():
            if message.name == f"{cls.__name__}Options":
                METHODS[name], cls.name = cls, name
                cls.selects = "use_given_lists" in message.fields_by_name
                cls.permutes = "use_given_order" in message.fields_by_name

    def __post_init__(self) -> None:
        check_fields(self)
        _check_scope(self)

    def fill(self, options: Any) -> None:
        """Writes the method into an AttentionOptions message."""
        _fill(getattr(options, self.name), self)


@dataclass(frozen=True)
class Dense(Method):
    """All blocks: full causal attention.

    Attributes:
        block_size: tokens of the blocks in the reply's lists [128].
    """

    block_size: int | None = None


@dataclass(frozen=True)
class Pbs(Method):
    """Sorts keys inside segments, then as mean_pooling (arXiv 2510.21270).

    Attributes:
        block_size: tokens; a power of two in [16, 256] [128].
        segment_size: tokens; a multiple of block_size, at most 16384 [256].
        threshold: attention mass to keep per query block, (0, 1]; a higher value is
            slower and nearer to dense attention; 1 keeps every block [0.9].
        scope: "kv_head": one key order per KV head; "query_head": one per query head
            [kv_head].
        force_first_block: every query block also reads the block of key 0 [true].
    """

    block_size: int | None = None
    segment_size: int | None = None
    threshold: float | None = None
    scope: str | None = None
    force_first_block: bool | None = None


@dataclass(frozen=True)
class MeanPooling(Method):
    """Selects blocks by the means of their queries and keys.

    Attributes:
        block_size: tokens; a power of two in [16, 256] [128].
        threshold: attention mass to keep per query block, (0, 1] [0.9].
        force_first_block: every query block also reads the block of key 0 [true].
    """

    block_size: int | None = None
    threshold: float | None = None
    force_first_block: bool | None = None


@dataclass(frozen=True)
class XAttention(Method):
    """Selects blocks by sums of sampled antidiagonals (arXiv 2503.16428).

    Attributes:
        block_size: tokens; a power of two in [16, 256] [128].
        stride: tokens between antidiagonals; a power of two in [2, 64], at most
            block_size; a higher value is faster and coarser [8].
        threshold: attention mass to keep per query block, (0, 1] [0.9].
        force_first_block: every query block also reads the block of key 0 [true].
    """

    block_size: int | None = None
    stride: int | None = None
    threshold: float | None = None
    force_first_block: bool | None = None


@dataclass(frozen=True)
class MInference(Method):
    """Columns and diagonals that the last queries choose (arXiv 2407.02490).

    Attributes:
        block_size: tokens; a power of two in [16, 256] [128].
        vertical_tokens: key columns to keep, in tokens, 1 .. 1048576 [1000].
        slash_tokens: diagonals to keep, in tokens, 1 .. 1048576 [6096]; a sequence of
            at most this many tokens runs dense.
    """

    lacks: ClassVar[frozenset[str]] = frozenset({"coverage_min"})

    block_size: int | None = None
    vertical_tokens: int | None = None
    slash_tokens: int | None = None


@dataclass(frozen=True)
class FlexPrefill(Method):
    """As minference or mean_pooling, as fits the head (arXiv 2502.20766).

    Attributes:
        block_size: tokens; a power of two in [16, 256] [128].
        gamma: attention mass to keep, (0, 1] [0.95].
        tau: a head selects blocks by their means where these estimate the last
            queries' attention with a distance below this, [0, 1] [0.1].
        force_first_block: every query block also reads the block of key 0 [true].
    """

    block_size: int | None = None
    gamma: float | None = None
    tau: float | None = None
    force_first_block: bool | None = None


@dataclass(frozen=True)
class Prism(Method):
    """As mean_pooling, for slow and fast rotary pairs (arXiv 2602.08426).

    Attributes:
        block_size: tokens; a power of two in [16, 256] [128].
        threshold: attention mass to keep per query block and band, (0, 1] [0.95].
        fast_threshold: the threshold of the fast band, (0, 1] [threshold].
        slow_dims: columns of the slow rotary pairs; even, at most head_dim [three
            quarters of head_dim].
        fast_dims: columns of the fast rotary pairs; even, at most head_dim [half of
            head_dim].
        force_first_block: every query block also reads the block of key 0 [true].
    """

    block_size: int | None = None
    threshold: float | None = None
    fast_threshold: float | None = None
    slow_dims: int | None = None
    fast_dims: int | None = None
    force_first_block: bool | None = None


@dataclass(frozen=True)
class FlashPrefill(Method):
    """Blocks that reach a share of the largest score (arXiv 2603.06199).

    Attributes:
        block_size: tokens; a power of two in [16, 256] [128].
        alpha: share of the largest score of the query block, (0, 1]; a higher value is
            faster and further from dense attention [0.1].
    """

    block_size: int | None = None
    alpha: float | None = None


def method_of(method: Any) -> Method | None:
    """A method from a method object or a name; None stays None.

    Raises:
        ValueError: it is no method.
    """
    if method is None or isinstance(method, Method):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    classes = ", ".join(f"{kind.__name__}(...)" for kind in METHODS.values())
    raise ValueError(
        f"method {method!r} is not one of {', '.join(map(repr, METHODS))}, nor one of "
        f"{classes}"
    )


@dataclass(frozen=True)
class Permute:
    """Sorts keys inside segments before a method selects blocks, as Pbs does.

    Attributes:
        segment_size: tokens; a multiple of the method's block_size, at most 16384
            [256].
        scope: "kv_head": one key order per KV head; "query_head": one per query head
            [kv_head].
    """

    segment_size: int | None = None
    scope: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_scope(self)


@dataclass(frozen=True)
class Attention:
    """A method and the options that methods share.

    The fields from coverage_min on are options of every method except Dense.

    Attributes:
        method: Dense(), Pbs(...), another method, or the name of one with its defaults,
            such as "dense"; None is in prefill the server's default profile, which
            the other fields change, and in attend Pbs().
        dense_fallback: run dense where nearly all blocks are selected; None is the
            call's default (false in attend, true in prefill).
        coverage_rows: number of query rows per sequence and head whose exact attention
            coverage is measured, 0 .. 1024 [0].
        coverage_min: a query head whose coverage_rows rows keep less than this share of
            the attention mass reads every block instead; the stats name it; not an
            option of MInference, 0 .. 1 [0: no head].
        dense_tail_blocks: number of last query blocks of a sequence that read every
            earlier block, 0 .. 65535 [0; in a prefill that names a method 2].
        sink_blocks: number of first key blocks that every query block reads, 0 .. 65535
            [0].
        window_blocks: number of key blocks, up to and including its own, that every
            query block reads, 0 .. 65535 [0].
        mean_correction: a block that is not selected takes part as one key, with the
            mean of its keys and values (arXiv 2608.19758) [false].
        as_published: options that are None take the values of the method's published
            code, and what that code does unlike its paper is repeated; needs a method
            [false].
        permute: Permute(...) sorts keys inside segments for a method that does not;
            True is Permute() [None: no].
        profile: in prefill: the name of a profile of the model (ModelInfo.profiles),
            instead of a method; the other fields change it [None: the method].
        head_thresholds: in prefill: [num_layers][num_heads], a threshold in (0, 1] for
            every query head, for a method with a threshold, which is then None
            [None: the method's threshold].
        threshold_min: in prefill: the server may lower the threshold to at least this
            where the call would else miss its timeout, (0, threshold];
            PrefillStats.threshold tells [None: it may not].

    Raises:
        ValueError: the method or permute is none of these, profile or head_thresholds
            is empty, or profile is given with a method, head_thresholds or
            as_published.
        TypeError, ValueError: as check_fields(), also for each of head_thresholds.
    """

    method: Method | str | None = None
    dense_fallback: bool | None = None
    coverage_rows: int | None = None
    coverage_min: float | None = None
    dense_tail_blocks: int | None = None
    sink_blocks: int | None = None
    window_blocks: int | None = None
    mean_correction: bool | None = None
    as_published: bool | None = None
    permute: Permute | bool | None = None
    profile: str | None = None
    head_thresholds: Sequence[Sequence[float]] | None = None
    threshold_min: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        method_of(self.method)
        if self.profile == "":
            raise ValueError("Attention.profile is empty; None is no profile")
        if self.head_thresholds is not None:
            object.__setattr__(self, "head_thresholds", _rows(self.head_thresholds))
        for name in ("method", "head_thresholds", "as_published"):
            if self.profile is not None and getattr(self, name):
                raise ValueError(f"profile {self.profile!r} and {name} exclude each other")
        if not isinstance(self.permute, (Permute, bool, type(None))):
            raise ValueError(f"permute {self.permute!r} is not Permute(...)")

    def to_message(self) -> Any:
        """As an AttentionOptions message, without what only a prefill has."""
        message, method = _messages.AttentionOptions(), method_of(self.method)
        if method is not None:
            method.fill(message)
        if self.permute:
            permute = self.permute if isinstance(self.permute, Permute) else Permute()
            _fill(message.permutation, permute)
        _fill(message, self)
        return message

    def fill_prefill(self, request: Any) -> None:
        """Writes all of itself into a PrefillRequest message."""
        request.attention.CopyFrom(self.to_message())
        if self.profile is not None:
            request.profile = self.profile
        if self.threshold_min is not None:
            request.threshold_min = self.threshold_min
        for layer in self.head_thresholds or ():
            request.layers.add().thresholds.extend(layer)

    def check_attend(self) -> None:
        """ValueError for what only a prefill has."""
        for name in ("profile", "head_thresholds", "threshold_min"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is an option of prefill, not of attend")

    @classmethod
    def from_message(cls, message: Any) -> Attention:
        """From an AttentionOptions message; a method unknown to this client is None."""
        values = _values(cls, message)
        kind = METHODS.get(message.WhichOneof("method"))
        if kind is not None:
            values["method"] = _read(kind, getattr(message, kind.name))
        if message.HasField("permutation"):
            values["permute"] = _read(Permute, message.permutation)
        return cls(**values)


def attention_of(method: Method | str | Attention | None) -> Attention:
    """An Attention from one, or from its method alone.

    Raises:
        ValueError: it is no method.
    """
    return method if isinstance(method, Attention) else Attention(method)


def _rows(values: Any) -> tuple[tuple[float, ...], ...]:
    """head_thresholds as tuples. TypeError, ValueError: it is no table of float32."""
    name = "Attention.head_thresholds"
    try:
        rows = tuple(tuple(row) for row in values)
    except TypeError:
        raise TypeError(
            f"{name} is not a table of numbers, [num_layers][num_heads]"
        ) from None
    if not rows:
        raise ValueError(f"{name} is empty; None is the method's threshold")
    return tuple(
        tuple(checked("float", f"{name}[{i}][{j}]", x) for j, x in enumerate(row))
        for i, row in enumerate(rows)
    )


def _check_scope(options: Any) -> None:
    scope = getattr(options, "scope", None)
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"scope {scope!r} is not one of {', '.join(SCOPES)}")


def _scalars(kind: Any, message: Any) -> list[Any]:
    """The message's fields that a dataclass has, as descriptors."""
    wire = message.DESCRIPTOR.fields_by_name
    return [wire[f.name] for f in dataclasses.fields(kind) if f.name in wire]


def _fill(message: Any, options: Any) -> None:
    """Writes the fields of a dataclass that are not None into its message."""
    message.SetInParent()
    for field in _scalars(options, message):
        value = getattr(options, field.name)
        if value is None:
            continue
        if field.enum_type is not None:
            value = field.enum_type.values_by_name[value.upper()].number
        setattr(message, field.name, value)


def _read(kind: Any, message: Any) -> Any:
    """A dataclass from its message. Fields that are not set are None."""
    return kind(**_values(kind, message))


def _values(kind: Any, message: Any) -> dict[str, Any]:
    fields = _scalars(kind, message)
    return {f.name: _get(message, f) for f in fields if message.HasField(f.name)}


def _get(message: Any, field: Any) -> Any:
    """A field that is set.

    A float32 is the shortest number that rounds to it; an enum is its name, None when
    that is unknown here.
    """
    value = getattr(message, field.name)
    if field.enum_type is not None:
        named = field.enum_type.values_by_number.get(value)
        return None if value == 0 or named is None else named.name.lower()
    return as_float32(value) if isinstance(value, float) else value


def as_float32(value: float) -> float:
    """The shortest number that rounds to the same float32."""
    return float(str(np.float32(value)))
