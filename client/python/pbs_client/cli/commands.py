"""The commands of `pbs-client`, as functions of their parsed arguments."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import Any

import numpy as np

from pbs_client import dtypes, safetensors_file
from pbs_client._prefill import find_model
from pbs_client.attend_options import Given, Packed, Timing
from pbs_client.block_lists import flat_mask
from pbs_client.capture import read as read_capture
from pbs_client.cli.attention import attention_from
from pbs_client.cli.connection import connect
from pbs_client.cli.files import check_output, read_tokens
from pbs_client.cli.progress import ProgressBar
from pbs_client.client import Client
from pbs_client.errors import PbsError
from pbs_client.kv import KvCache, KvFormat
from pbs_client.options import Attention, method_of
from pbs_client.prefill_options import Delivery, Inline, Lease, Logits, Push
from pbs_client.results import to_json

_RELEASE_TIMEOUT_SECONDS = 5.0


def info(arguments: argparse.Namespace) -> None:
    """`pbs-client info`."""
    with connect(arguments) as client:
        found = client.info(timeout=arguments.timeout)
    line: dict[str, Any] = to_json(found)
    del line["default_profile"]
    print_line({**line, "default_attention": _profile(found.default_profile)})


def _profile(profile: Attention) -> dict[str, Any] | None:
    """A profile as one flat JSON object; None when its method is unknown here."""
    method = method_of(profile.method)
    if method is None:
        return None
    shared = to_json(profile)
    for name in ("method", "profile", "head_thresholds", "threshold_min"):
        del shared[name]  # the first is below, and a profile has no others
    return {"method": method.name, **to_json(method), **shared}


def models(arguments: argparse.Namespace) -> None:
    """`pbs-client models`."""
    with connect(arguments) as client:
        for model in client.models(timeout=arguments.timeout):
            profiles = [
                {**to_json(profile), "attention": _profile(profile.attention)}
                for profile in model.profiles
            ]
            print_line({**to_json(model), "profiles": profiles})


def attend(arguments: argparse.Namespace) -> None:
    """`pbs-client attend`."""
    attention = attention_from(arguments)
    check_output(arguments.output)
    tensors = _read_tensors(arguments)
    with connect(arguments) as client, ProgressBar() as bar:
        begin = time.monotonic()
        result = client.attend(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            attention,
            want=arguments.want,
            packed=_packed(tensors),
            given=Given(tensors.get("order"), block_mask=tensors.get("block_mask")),
            allow_non_finite=arguments.allow_non_finite,
            timing=Timing(arguments.warmup, arguments.repetitions),
            timeout=arguments.timeout,
            progress=bar.update_bytes,
        )
        seconds = time.monotonic() - begin
    if arguments.output is not None:
        found = {name: getattr(result, name) for name in arguments.want}
        if isinstance(found.get("block_mask"), tuple):
            found["block_mask"] = flat_mask(found["block_mask"])
        safetensors_file.write(arguments.output, found)
    line = to_json(result.stats)
    if arguments.repetitions <= 1:
        del line["iterations"]
    line = {"method": arguments.method, **line, "seconds": seconds}
    print_line({**line, "output": arguments.output})


def prefill(arguments: argparse.Namespace) -> None:
    """`pbs-client prefill`."""
    attention, tokens = attention_from(arguments), read_tokens(arguments.tokens)
    check_output(arguments.kv)
    delivery: Delivery | None = None
    if arguments.push is not None:
        if arguments.lease or arguments.kv:
            raise ValueError("--push sends the cache away: not with --lease or --kv")
        delivery = Push(arguments.push, arguments.kv_dtype)
    elif arguments.lease:
        delivery = Lease(arguments.ttl)
    elif arguments.kv:
        delivery = Inline(
            arguments.kv_dtype,
            wire_dtype=arguments.wire_dtype,
            page_tokens=arguments.page_tokens,
        )
    layers: list[dict[str, Any]] = []
    with connect(arguments) as client, ProgressBar() as bar:
        begin = time.monotonic()
        result = client.prefill(
            arguments.model,
            tokens,
            attention,
            delivery=delivery,
            logits=Logits(arguments.top_logits),
            timeout=arguments.timeout,
            on_layer=_layer_bar(client, arguments.model, bar, layers),
        )
        cache = result.kv
        if arguments.kv and result.ticket is not None:
            cache = client.fetch(
                result.ticket,
                kv_format=_kv_format(arguments, arguments.kv_dtype),
                timeout=arguments.timeout,
                progress=bar.update_bytes,
            )
        seconds = time.monotonic() - begin
    if cache is not None:
        write_cache(arguments.kv, cache)
    for layer, ran in zip(layers, result.stats.layer_method):
        layer["method"] = ran
    stats = to_json(result.stats)
    for name in ("layer_density", "layer_method"):
        del stats[name]  # `layers` has them
    print_line(
        {
            "first_token": result.first_token,
            "top_logits": to_json(result.top_logits),
            **stats,
            "layers": layers,
            "ticket": None
            if result.ticket is None
            else json.loads(result.ticket.to_json()),
            "lease_expires_unix_seconds": result.lease_expires_unix_seconds,
            "model_digest": result.model_digest,
            "sparsity_digest": result.sparsity_digest,
            "seconds": seconds,
            "kv": arguments.kv,
        }
    )


def generate(arguments: argparse.Namespace) -> None:
    """`pbs-client generate`."""
    attention, tokens = attention_from(arguments), read_tokens(arguments.tokens)
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {arguments.max_new_tokens} is below 1")
    from pbs_client import hf  # needs torch and transformers

    clock = _StageClock()
    # Load before the lease exists, because loading can take longer than it lives.
    model = hf.load_model(
        arguments.model_path, dtype=arguments.dtype, device=arguments.device
    )
    clock.stage("load_model")
    with connect(arguments) as client, ProgressBar() as bar:
        hf.check_same_model(model, find_model(client.models(), arguments.model))
        result = client.prefill(
            arguments.model,
            tokens,
            attention,
            delivery="lease",
            timeout=arguments.timeout,
            on_layer=_layer_bar(client, arguments.model, bar, []),
        )
        clock.stage("prefill")
        assert result.ticket is not None
        try:
            cache = client.fetch(
                result.ticket,
                kv_format=_kv_format(arguments, None),
                timeout=arguments.timeout,
                progress=bar.update_bytes,
            )
        finally:
            # Best effort: if the release fails, the lease expires.
            with contextlib.suppress(PbsError):
                client.release(result.ticket, timeout=_RELEASE_TIMEOUT_SECONDS)
        clock.stage("fetch")
    new_tokens = hf.generate(
        model,
        tokens,
        cache,
        first_token=result.first_token,
        max_new_tokens=arguments.max_new_tokens,
        ignore_eos=arguments.ignore_eos,
    )
    clock.stage("decode")
    print_line(
        {
            "tokens": new_tokens,
            "first_token": result.first_token,
            "prompt_tokens": len(tokens),
            "density": result.stats.density,
            "stages": to_json(result.stats.stages),
            "seconds": clock.seconds,
            "kv_bytes": cache.nbytes,
            "model_digest": result.model_digest,
            "sparsity_digest": result.sparsity_digest,
        }
    )


def _kv_format(arguments: argparse.Namespace, dtype: str | None) -> KvFormat:
    return KvFormat(
        dtype, wire_dtype=arguments.wire_dtype, page_tokens=arguments.page_tokens
    )


class _StageClock:
    """Seconds between one stage() and the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.monotonic()

    def stage(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = now - self._begin
        self._begin = now


def capture(arguments: argparse.Namespace) -> None:
    """`pbs-client capture`."""
    check_output(arguments.output)
    tokens = read_tokens(arguments.tokens)
    with connect(arguments) as client, ProgressBar() as bar:
        begin = time.monotonic()
        found = client.capture(
            arguments.model,
            tokens,
            arguments.layers,
            dtype=arguments.dtype,
            timeout=arguments.timeout,
            progress=bar.update_bytes,
        )
        seconds = time.monotonic() - begin
    found.write(arguments.output)
    print_line({**found.metadata(), "seconds": seconds, "output": arguments.output})


def _read_tensors(arguments: argparse.Namespace) -> dict[str, Any]:
    """The file's tensors that the arguments ask for, by name."""
    if arguments.layer is not None:
        return _read_layer(arguments)
    names = ["q", "k", "v"]
    optional = ["cu_seqlens", "cu_seqlens_k"]
    if arguments.use_order:
        names.append("order")
    if arguments.use_block_mask:
        names.append("block_mask")
    tensors: dict[str, Any] = {}
    try:
        tensors = dict(safetensors_file.read(arguments.input, names + optional))
    except safetensors_file.SafetensorsError as error:
        raise ValueError(f"{arguments.input}: {error}") from None
    if "cu_seqlens_k" in tensors:
        names.append("cu_seqlens")
    for name in names:
        if name not in tensors:
            raise ValueError(f"{arguments.input} has no tensor {name}")
    for name in ("q", "k", "v"):
        tensors[name] = _cast(name, tensors[name], arguments.dtype)
    return tensors


def _read_layer(arguments: argparse.Namespace) -> dict[str, Any]:
    """The heads of one layer of a capture, as a batch of one."""
    if arguments.use_order or arguments.use_block_mask:
        raise ValueError("a capture has no order and no block_mask; leave out --layer")
    heads = read_capture(arguments.input, [arguments.layer]).layers[arguments.layer]
    return {
        name: _cast(name, getattr(heads, name)[np.newaxis], arguments.dtype)
        for name in ("q", "k", "v")
    }


def _packed(tensors: dict[str, Any]) -> Packed | None:
    """Where sequences begin and end. None when the file does not say so."""
    if "cu_seqlens" not in tensors:
        return None
    return Packed(tensors["cu_seqlens"], tensors.get("cu_seqlens_k"))


def _cast(name: str, array: Any, dtype: str | None) -> Any:
    """`array` in the requested dtype, rounded to nearest even."""
    if array.dtype not in dtypes.FLOAT_DTYPES.values():
        raise ValueError(f"tensor {name} has dtype {array.dtype}, not f32, f16 or bf16")
    if dtype is None:
        return array
    with np.errstate(over="ignore"):  # the server refuses what became infinite
        return array.astype(dtypes.FLOAT_DTYPES[dtype], copy=False)


def _layer_bar(
    client: Client, model: str, bar: ProgressBar, layers: list[dict[str, Any]]
) -> Any:
    """An on_layer that draws and collects."""
    total = 0
    if bar.is_active:
        total = find_model(client.models(), model).num_layers

    def on_layer(progress: Any) -> None:
        layers.append(to_json(progress))
        bar.update("prefill", progress.index + 1, total, " layers")

    return on_layer


def write_cache(path: str, cache: KvCache) -> None:
    """Writes a cache to a safetensors file."""
    metadata = {
        "prompt_tokens": str(cache.prompt_tokens),
        "first_token": str(cache.first_token),
        "model_digest": cache.model_digest,
        "sparsity_digest": cache.sparsity_digest,
    }
    safetensors_file.write(path, cache.tensors(), metadata)


def print_line(line: dict[str, Any]) -> None:
    """Prints a line of JSON."""
    print(json.dumps(line, allow_nan=False), flush=True)
