"""Connector for vLLM: the KV cache of a prompt comes from pbs-prefill.

vLLM loads it by name, with kv_connector "PbsPrefillConnector" and
kv_connector_module_path "pbs_client.vllm"; docs/DISAGGREGATION.md has the command line.

| module | concern |
|---|---|
| connector | the class that vLLM loads: passes each hook to one of the two sides |
| scheduler_side | which requests load, from which token on, into which blocks |
| handoff | reads and checks kv_transfer_params |
| leases | keeps leases while requests need them, then releases them |
| worker_side | reads the engine's shape, and answers vLLM's worker |
| loader | threads that load |
| fetching | fetches one cache and checks it |
| parts | the heads, layers and blocks of a rank |
| layouts | writes keys and values into vLLM's blocks |
| settings, endpoints, connections | settings, allowed servers, connections to them |

Only connector, worker_side and layouts import vLLM or torch, so that the rest can be
used and tested without them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PbsPrefillConnector"]


def __getattr__(name: str) -> Any:
    """The connector, imported when vLLM asks for it."""
    if name != "PbsPrefillConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pbs_client.vllm.connector import PbsPrefillConnector

    return PbsPrefillConnector
