"""Replies of the server, as plain frozen dataclasses.

Durations are seconds of wall time and sizes are bytes, unless a name states another
unit. `to_json` converts each to plain dicts and lists for `json.dumps`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbs_client import _messages, dtypes
from pbs_client.options import Attention, Method, as_float32, method_of

_EXACT_INTEGER_MAX = 1 << 53
_METHOD_NAMES = {n: k.lower() for k, n in _messages.enum_numbers("Method").items()}


def method_name(number: int) -> str:
    """A name such as "mean_pooling"; "method_9" for a method unknown to this client."""
    return _METHOD_NAMES.get(number, f"method_{number}")


def to_json(value: Any) -> Any:
    """Converts dataclasses, tuples and numbers for json.dumps.

    NaN and Inf become null; integers that a double cannot hold become strings.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: to_json(getattr(value, f.name)) for f in fields}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, np.dtype):
        return dtypes.short_name(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if type(value) is int and abs(value) > _EXACT_INTEGER_MAX:
        return str(value)
    return value


@dataclass(frozen=True)
class StageSeconds:
    """Seconds by stage; a stage that did not run is 0."""

    queue: float
    embed: float
    qkv: float
    permute: float
    select: float
    attend: float
    mlp: float
    copy: float
    send: float

    @classmethod
    def from_message(cls, message: Any) -> StageSeconds:
        """From a StageSeconds message."""
        return cls(*(getattr(message, f.name) for f in dataclasses.fields(cls)))


@dataclass(frozen=True)
class BackendInfo:
    """A backend of the server: its name, instruction set, device, head dims, dtypes."""

    name: str
    isa: str
    device: str
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]

    @classmethod
    def from_message(cls, message: Any) -> BackendInfo:
        """From a BackendInfo message."""
        known = (dtypes.from_wire(number) for number in message.dtypes)
        return cls(
            message.name,
            message.isa,
            message.device,
            tuple(message.head_dims),
            tuple(dtypes.short_name(dtype) for dtype in known if dtype is not None),
        )


@dataclass(frozen=True)
class ServerLimits:
    """Limits of the server; names state the unit: tokens, requests, bytes, seconds."""

    tokens_max: int
    attend_tokens_max: int
    queue_requests_max: int
    memory_bytes_max: int
    chunk_bytes_default: int
    chunk_bytes_max: int
    receive_message_bytes_max: int
    lease_ttl_seconds_default: int
    lease_ttl_seconds_max: int
    logit_positions_max: int
    top_logits_max: int

    @classmethod
    def from_message(cls, message: Any) -> ServerLimits:
        """From a ServerLimits message."""
        return cls(*(getattr(message, f.name) for f in dataclasses.fields(cls)))


@dataclass(frozen=True)
class ServerInfo:
    """Version, backends, methods and limits of a server.

    Attributes:
        epoch: changes with every start of the server; tickets contain it.
        methods: the names of the methods that the server runs, as in options.METHODS.
        default_profile: the attention of requests that name no method.
    """

    version: str
    protocol_version: str
    commit: str
    epoch: int
    backends: tuple[BackendInfo, ...]
    methods: tuple[str, ...]
    limits: ServerLimits
    default_profile: Attention

    @property
    def default_attention(self) -> Method | None:
        """The method of default_profile.

        None when the server did not state it or this client does not know it.
        """
        return method_of(self.default_profile.method)

    @classmethod
    def from_message(cls, message: Any) -> ServerInfo:
        """From a ServerInfo message."""
        return cls(
            version=message.version,
            protocol_version=message.protocol_version,
            commit=message.commit,
            epoch=message.epoch,
            backends=tuple(BackendInfo.from_message(b) for b in message.backends),
            methods=tuple(method_name(number) for number in message.methods),
            limits=ServerLimits.from_message(message.limits),
            default_profile=Attention.from_message(message.default_attention),
        )


@dataclass(frozen=True)
class ProfileInfo:
    """A profile of a model, which Attention(profile=...) names.

    Attributes:
        attention: its method and options.
        mean_threshold: of the query heads' own thresholds; None when they have none.
        dense_heads: number of query heads, of all layers, whose own threshold is 1.
        thresholds_digest: digest of the heads' own thresholds; "" without them.
    """

    name: str
    attention: Attention
    mean_threshold: float | None
    dense_heads: int
    thresholds_digest: str

    @classmethod
    def from_message(cls, message: Any) -> ProfileInfo:
        """From a ProfileInfo message."""
        has_mean = message.HasField("mean_threshold")
        return cls(
            message.name,
            Attention.from_message(message.attention),
            message.mean_threshold if has_mean else None,
            message.dense_heads,
            message.thresholds_digest,
        )


@dataclass(frozen=True)
class ModelInfo:
    """A model of the server.

    Attributes:
        model_digest: digest of weights, architecture, rotary embedding and dtype.
        tokens_max: longest prompt.
        kv_dtype: dtype of the held caches: "f32", "f16" or "bf16".
        eos_token_ids: tokens at which decoding should stop.
        rope_attention_factor: the factor of cosines and sines of rotary positions; 1
            except for yarn, 0 from a server that does not state it.
        profiles: the profiles that a prefill may name.
    """

    name: str
    architecture: str
    model_digest: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    tokens_max: int
    kv_dtype: str
    compute_dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    eos_token_ids: tuple[int, ...]
    rope_attention_factor: float
    profiles: tuple[ProfileInfo, ...] = ()

    @classmethod
    def from_message(cls, message: Any) -> ModelInfo:
        """From a ModelInfo message."""
        values = {f.name: getattr(message, f.name) for f in dataclasses.fields(cls)}
        for name in ("kv_dtype", "compute_dtype"):
            dtype = dtypes.from_wire(values[name])
            values[name] = "unknown" if dtype is None else dtypes.short_name(dtype)
        values["eos_token_ids"] = tuple(message.eos_token_ids)
        values["profiles"] = tuple(map(ProfileInfo.from_message, message.profiles))
        return cls(**values)


@dataclass(frozen=True)
class IterationTimes:
    """Seconds of one repetition of a benchmark."""

    permute_seconds: float
    select_seconds: float
    attend_seconds: float


@dataclass(frozen=True)
class AttendStats:
    """Statistics of an attention call.

    Attributes:
        method_run: the method that ran; "dense" also for short prompts and when all
            order heads fell back.
        dense_fallback: at least one order head fell back to dense.
        density: share of dense_blocks that was executed, 0 .. 1; 1 for dense runs.
        lower_density: share of causal_blocks that was executed, 0 .. 1.
        head_density: [num_heads], `density` of each query head.
        executed_blocks: products of a query block with a key block that were computed.
        dense_blocks: blocks that dense attention would compute on the same tiles: where
            keys were permuted, every block up to the end of the query block's segment;
            else the causal blocks.
        causal_blocks: blocks on or below the diagonal.
        coverage: mean share of exact attention mass inside the executed blocks, over
            `coverage_rows` sampled rows.
        head_coverage: [num_heads], `coverage` of each query head; empty without rows.
        guarded_heads: query heads that coverage_min made read every block.
        iterations: times of each repetition.
        isa: instruction set that ran, such as "avx512".
    """

    method_run: str
    dense_fallback: bool
    density: float
    lower_density: float
    head_density: tuple[float, ...]
    executed_blocks: int
    causal_blocks: int
    dense_blocks: int
    executed_flops: float
    dense_flops: float
    coverage: float
    coverage_rows: int
    head_coverage: tuple[float, ...]
    guarded_heads: tuple[int, ...]
    stages: StageSeconds
    iterations: tuple[IterationTimes, ...]
    backend: str
    isa: str

    @classmethod
    def from_message(cls, message: Any) -> AttendStats:
        """From an AttendStats message."""
        values = {f.name: getattr(message, f.name) for f in dataclasses.fields(cls)}
        values["method_run"] = method_name(message.method_run)
        for name in ("head_density", "head_coverage", "guarded_heads"):
            values[name] = tuple(values[name])
        values["stages"] = StageSeconds.from_message(message.stages)
        values["iterations"] = tuple(
            IterationTimes(i.permute_seconds, i.select_seconds, i.attend_seconds)
            for i in message.iterations
        )
        return cls(**values)


@dataclass(frozen=True)
class Admitted:
    """The server has admitted a prefill.

    Attributes:
        queue_position: requests ahead of this one.
        predicted_seconds: time until it is done; 0 while the server has no estimate.
    """

    queue_position: int
    predicted_seconds: float


@dataclass(frozen=True)
class LayerProgress:
    """A layer's KV is ready: its index, attention density and seconds."""

    index: int
    density: float
    seconds: float


@dataclass(frozen=True)
class TokenLogit:
    """A candidate next token and its natural-log probability."""

    token_id: int
    log_probability: float


@dataclass(frozen=True)
class PositionLogits:
    """The best next tokens after prompt position `position`, best first."""

    position: int
    top: tuple[TokenLogit, ...]


def token_logits(messages: Any) -> tuple[TokenLogit, ...]:
    """From repeated TokenLogit messages."""
    return tuple(TokenLogit(m.token_id, m.log_probability) for m in messages)


@dataclass(frozen=True)
class HeadStats:
    """Statistics of the query heads of a layer.

    Attributes:
        density: [num_heads], share of the blocks that was executed.
        coverage: [num_heads], share of the attention mass that was kept.
        guarded: query heads that coverage_min made read every block.
    """

    density: tuple[float, ...]
    coverage: tuple[float, ...]
    guarded: tuple[int, ...]


@dataclass(frozen=True)
class PrefillStats:
    """Statistics of a prefill.

    Attributes:
        layer_density: [num_layers]; `density` is its mean.
        layer_method: the method that ran in each layer; "dense" where it fell back.
        fallback_layers: number of layers that fell back to dense.
        executed_flops: FLOPs of attention; `dense_flops` are those of dense attention.
        total_seconds: time from admission to the last layer.
        planned_bytes: bytes that the server charged: cache, workspace, result.
        kv_copy_seconds: copying keys and values from a device, mostly in parallel with
            other stages; `stages.copy` is the part that the prefill waited for.
        layer_heads: [num_layers], the query heads of each layer; empty without
            coverage_rows.
        threshold: the threshold that was used; None for a method without one, and where
            every query head has its own.
    """

    prompt_tokens: int
    stages: StageSeconds
    layer_density: tuple[float, ...]
    density: float
    layer_method: tuple[str, ...]
    fallback_layers: int
    executed_flops: float
    dense_flops: float
    coverage: float
    time_to_first_layer_seconds: float
    total_seconds: float
    backend: str
    isa: str
    planned_bytes: int
    kv_copy_seconds: float
    layer_heads: tuple[HeadStats, ...]
    threshold: float | None = None

    @classmethod
    def from_message(cls, message: Any) -> PrefillStats:
        """From a PrefillStats message."""
        values = {f.name: getattr(message, f.name) for f in dataclasses.fields(cls)}
        threshold = as_float32(message.threshold)
        values["threshold"] = threshold if message.HasField("threshold") else None
        values["stages"] = StageSeconds.from_message(message.stages)
        values["layer_density"] = tuple(message.layer_density)
        values["layer_method"] = tuple(method_name(n) for n in message.layer_method)
        values["layer_heads"] = tuple(
            HeadStats(tuple(h.density), tuple(h.coverage), tuple(h.guarded))
            for h in message.layer_heads
        )
        return cls(**values)
