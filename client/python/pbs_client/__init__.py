"""Client of pbs-prefill: prefill over gRPC, KV caches as NumPy arrays.

Modules of this package: client.py (Client), options.py (Dense, Pbs, MeanPooling),
results.py, kv.py, block_lists.py, errors.py, safetensors_file.py and, with torch and
transformers installed, hf.py.
"""

from pbs_client._attend import AttendResult
from pbs_client._prefill import PrefillResult
from pbs_client._version import __version__
from pbs_client.block_lists import BlockGrid, BlockLists
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
from pbs_client.kv import KvCache, KvDescriptor, KvLease, KvTicket
from pbs_client.options import Dense, MeanPooling, Pbs
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

__all__ = [
    "AbortedError",
    "Admitted",
    "AttendResult",
    "AttendStats",
    "BlockGrid",
    "BlockLists",
    "CallCancelledError",
    "Client",
    "CorruptDataError",
    "DeadlineExceededError",
    "Dense",
    "FailedPreconditionError",
    "InternalError",
    "InvalidArgumentError",
    "KvCache",
    "KvDescriptor",
    "KvLease",
    "KvTicket",
    "LayerProgress",
    "MeanPooling",
    "ModelInfo",
    "NotFoundError",
    "Pbs",
    "PbsError",
    "PrefillResult",
    "PrefillStats",
    "ResourceExhaustedError",
    "ServerInfo",
    "StageSeconds",
    "TokenLogit",
    "UnavailableError",
    "UnimplementedError",
    "__version__",
]
