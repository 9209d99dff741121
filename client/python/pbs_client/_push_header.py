"""The header of a push: what a sink must know of the chunks to check them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pbs_client import _messages, _wire, dtypes
from pbs_client._kv_receiver import LAYOUT_NUMBERS, KvShape
from pbs_client.errors import CorruptDataError
from pbs_client.kv import LAYOUTS, Span

_LAYOUT_NAMES = {number: name for name, number in LAYOUT_NUMBERS.items()}
_HANDLE = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class PushHeader:
    """What a push says of its cache.

    Attributes:
        transfer_id: 32 hex digits, of this push.
        request_id: that of the prefill.
        model: its name at the prefill server.
        model_digest, sparsity_digest: see KvTicket.
        prompt_digest: kv_params.prompt_digest() of the prompt's ids.
        num_layers, num_kv_heads, head_dim, num_tokens: sizes of the cache.
        dtype: of the arrays; float32, float16 or ml_dtypes.bfloat16.
        wire_dtype: "f8_e4m3" when the cache travels so, which makes it approximate.
        layout: "HND" [kv_heads, tokens, head_dim] or "NHD" [tokens, kv_heads, head_dim].
        bytes: of all arrays.
    """

    transfer_id: str
    request_id: str
    model: str
    model_digest: str
    sparsity_digest: str
    prompt_digest: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    dtype: Any
    layout: str
    bytes: int
    wire_dtype: str | None = None


def shape_of(message: bytes) -> tuple[PushHeader, KvShape]:
    """The header and what its chunks must be. CorruptDataError when it is wrong."""
    first = _wire.parse(_messages.KvChunk, message)
    if not first.HasField("push_header") or first.payload:
        raise CorruptDataError("the first message is not a push_header alone")
    header = first.push_header
    if not _HANDLE.fullmatch(header.transfer_id):
        raise CorruptDataError("push_header: transfer_id is not 32 hex digits")
    sizes = {
        "num_layers": header.shape.num_layers,
        "num_kv_heads": header.shape.num_kv_heads,
        "head_dim": header.shape.head_dim,
        "num_tokens": header.num_tokens,
    }
    for name, size in sizes.items():
        if size < 1:
            raise CorruptDataError(f"push_header: {name} is {size}")
    is_fp8 = header.dtype == dtypes.F8_E4M3_NUMBER
    # What travels as F8_E4M3 is widened to the dtype that the server holds.
    number = header.shape.dtype if is_fp8 else header.dtype
    dtype = dtypes.from_wire(number)
    if dtype is None or dtype not in dtypes.FLOAT_DTYPES.values():
        raise CorruptDataError(f"push_header: unknown dtype {number}")
    if header.page_tokens < 1:
        raise CorruptDataError(f"push_header: page_tokens is {header.page_tokens}")
    layout = _LAYOUT_NAMES.get(header.layout)
    if layout not in LAYOUTS:
        raise CorruptDataError(f"push_header: unknown layout {header.layout}")
    shape = KvShape(
        layers=Span(0, sizes["num_layers"]),
        tokens=Span(0, sizes["num_tokens"]),
        heads=Span(0, sizes["num_kv_heads"]),
        head_dim=sizes["head_dim"],
        dtype=dtype,
        layout=layout,
        epoch=header.epoch,
        checksums=header.checksums,
        wire_dtype=dtypes.F8_E4M3 if is_fp8 else None,
        page_tokens=header.page_tokens,
    )
    if shape.total_bytes != header.bytes:
        raise CorruptDataError(
            f"push_header: bytes is {header.bytes}, but its sizes make "
            f"{shape.total_bytes}"
        )
    texts = ("transfer_id", "request_id", "model", "model_digest", "sparsity_digest")
    facts = PushHeader(
        **{name: getattr(header, name) for name in texts},
        **sizes,
        prompt_digest=header.prompt_digest,
        dtype=dtype,
        layout=layout,
        bytes=shape.stored_bytes,
        wire_dtype=shape.wire_dtype,
    )
    return facts, shape
