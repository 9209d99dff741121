"""Client.capture(): a prefill with captured queries, and its fetches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pbs_client._prefill import find_model
from pbs_client._transport import Deadline
from pbs_client.capture import Capture, HeadsOfLayer
from pbs_client.errors import PbsError
from pbs_client.kv import Array, KvFormat, KvPart
from pbs_client.prefill_options import Lease

if TYPE_CHECKING:
    from pbs_client._attend import ProgressCallback
    from pbs_client.client import Client

_RELEASE_TIMEOUT_SECONDS = 5.0


def capture_heads(
    client: Client,
    model: str,
    tokens: Sequence[int] | Array,
    layers: Sequence[int] | Array,
    method: Any,
    dtype: Any,
    deadline: Deadline,
    progress: ProgressCallback | None,
) -> Capture:
    """See Client.capture(). The lease is released, also after an error."""
    lease = Lease(capture_query_layers=layers)
    if not lease.capture_query_layers:
        raise ValueError("layers is empty")
    kv_format = KvFormat(dtype)
    name = find_model(client.models(timeout=deadline.left()), model).name
    result = client.prefill(
        model, tokens, method, delivery=lease, timeout=deadline.left()
    )
    assert result.ticket is not None
    heads: dict[int, HeadsOfLayer] = {}
    try:
        for layer in lease.capture_query_layers:
            q = client.fetch_queries(
                result.ticket,
                layer,
                kv_format=kv_format,
                timeout=deadline.left(),
                progress=progress,
            )
            kv = client.fetch(
                result.ticket,
                part=KvPart(layers=(layer, 1)),
                kv_format=kv_format,
                timeout=deadline.left(),
                progress=progress,
            )
            heads[layer] = HeadsOfLayer(q, kv.k[0], kv.v[0])
    finally:
        # Best effort: if the release fails, the lease expires.
        with contextlib.suppress(PbsError):
            client.release(result.ticket, timeout=_RELEASE_TIMEOUT_SECONDS)
    return Capture(heads, name, result.model_digest)
