"""Client of pbs-prefill: prefill over gRPC, KV caches as NumPy arrays.

Modules of this package: client.py (Client), options.py (Attention, and the methods:
Dense, Pbs, ...), attend_options.py (Packed, Given, Timing, Synthetic),
prefill_options.py (Inline, Lease, Push, Logits), sink.py (KvSink), kv.py (KvPart,
KvFormat and caches), capture.py (heads of a model, and their files), results.py,
block_lists.py, errors.py, safetensors_file.py and, with torch and transformers
installed, hf.
"""

from pbs_client._attend import AttendResult
from pbs_client._prefill import PrefillResult
from pbs_client._version import __version__
from pbs_client.attend_options import Given, Packed, Synthetic, Timing
from pbs_client.block_lists import BlockGrid, BlockLists
from pbs_client.capture import Capture, CaptureError, HeadsOfLayer
from pbs_client.client import Client
from pbs_client.errors import (
    AbortedError,
    CallCancelledError,
    CorruptDataError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PbsError,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
)
from pbs_client.kv import KvCache, KvDescriptor, KvFormat, KvLease, KvPart, KvTicket
from pbs_client.options import *  # noqa: F403  Attention and the methods
from pbs_client.options import __all__ as _options
from pbs_client.prefill_options import Inline, Lease, Logits, Push
from pbs_client.results import (
    Admitted,
    AttendStats,
    LayerProgress,
    ModelInfo,
    PrefillStats,
    ServerInfo,
    StageSeconds,
    TokenLogit,
)
from pbs_client.sink import KvSink, PushedCache, PushHeader

__all__ = [
    "AbortedError",
    "Admitted",
    "AttendResult",
    "AttendStats",
    "BlockGrid",
    "BlockLists",
    "CallCancelledError",
    "Capture",
    "CaptureError",
    "Client",
    "CorruptDataError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "Given",
    "HeadsOfLayer",
    "Inline",
    "InternalError",
    "InvalidArgumentError",
    "KvCache",
    "KvDescriptor",
    "KvFormat",
    "KvLease",
    "KvPart",
    "KvSink",
    "KvTicket",
    "LayerProgress",
    "Lease",
    "Logits",
    "ModelInfo",
    "NotFoundError",
    "Packed",
    "PbsError",
    "PrefillResult",
    "PrefillStats",
    "Push",
    "PushHeader",
    "PushedCache",
    "ResourceExhaustedError",
    "ServerInfo",
    "StageSeconds",
    "Synthetic",
    "Timing",
    "TokenLogit",
    "UnavailableError",
    "UnimplementedError",
    "__version__",
]
__all__ += _options
