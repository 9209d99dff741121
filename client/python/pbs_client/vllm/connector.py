"""PbsPrefillConnector: the class that vLLM loads, once per scheduler and per worker.

Each hook passes on to SchedulerSide or WorkerSide. Loads are asynchronous: a request
waits, without a slot in the batch, until the loader has filled its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from pbs_client.vllm.connections import Connections
from pbs_client.vllm.leases import Leases
from pbs_client.vllm.loader import LoadOrder
from pbs_client.vllm.scheduler_side import EnginePolicy, SchedulerSide, blocks_of
from pbs_client.vllm.settings import Settings
from pbs_client.vllm.worker_side import WorkerSide, check_groups, spec_of


@dataclass
class LoadOrders(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler sends to the workers with a step."""

    orders: list[LoadOrder] = field(default_factory=list)


class PbsPrefillConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Loads prompts' KV caches from pbs-prefill."""

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any
    ) -> None:
        """As vLLM's factory calls it.

        Raises:
            ValueError: settings, role or model do not suit the connector.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_role != "kv_consumer":
            raise ValueError(
                f"kv_role is {transfer.kv_role!r}; the connector loads caches and "
                "makes none, so it must be 'kv_consumer'"
            )
        self._settings = Settings.from_extra_config(transfer.kv_connector_extra_config)
        check_groups(kv_cache_config, vllm_config)
        self._worker: WorkerSide | None = None
        self._scheduler: SchedulerSide | None = None
        self._failed_blocks: set[int] = set()
        if role is KVConnectorRole.SCHEDULER:
            self._lease_connections = Connections()
            self._leases = Leases(
                self._lease_connections, self._settings.call_seconds_max
            )
            policy = EnginePolicy(
                spec_of(kv_cache_config).block_size,
                bool(vllm_config.cache_config.enable_prefix_caching),
                transfer.kv_load_failure_policy == "fail",
            )
            self._scheduler = SchedulerSide(self._settings, policy, self._leases)

    # ---- the scheduler's process

    def on_new_request(self, request: Any) -> None:
        """A request has arrived; its lease is kept from here on."""
        self._scheduling.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Tokens to load, and that they load asynchronously."""
        tokens = self._scheduling.matched_tokens(request, num_computed_tokens)
        return tokens, tokens > 0

    def update_state_after_alloc(
        self, request: Any, blocks: Any, num_external_tokens: int
    ) -> None:
        """The request has its blocks."""
        self._scheduling.allocated(request, blocks_of(blocks), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> LoadOrders:
        """The loads that this step starts."""
        return LoadOrders(self._scheduling.take_orders())

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers reported."""
        self._scheduling.loaded(
            connector_output.finished_recving or (),
            connector_output.invalid_block_ids or (),
        )

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request has ended. Its blocks may be freed as vLLM decides."""
        self._scheduling.finished(request.request_id)
        return False, None

    # ---- the worker's process

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The engine has its caches. ValueError: the connector cannot fill them."""
        self._worker = WorkerSide(
            self._settings, self._vllm_config, self._kv_cache_config, kv_caches
        )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Starts this step's loads, beside the engine."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, LoadOrders)
        if metadata.orders:
            self._working.submit(metadata.orders)

    def get_finished(
        self, finished_req_ids: set[str]
    ) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads ended; the failed blocks of the same loads follow."""
        results = self._working.take(finished_req_ids)
        self._failed_blocks.update(results.failed_blocks)
        return None, set(results.request_ids) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of the failed loads that get_finished() reported."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request runs only when its load has ended."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: the connector loads only."""

    def wait_for_save(self) -> None:
        """Nothing: the connector loads only."""

    # ---- both

    def shutdown(self) -> None:
        """Releases the leases and ends the loads."""
        if self._scheduler is not None:
            self._leases.close()
            self._lease_connections.close()
        if self._worker is not None:
            self._worker.close()

    @property
    def _scheduling(self) -> SchedulerSide:
        assert self._scheduler is not None, "not the scheduler's connector"
        return self._scheduler

    @property
    def _working(self) -> WorkerSide:
        assert self._worker is not None, "the engine has not registered its caches"
        return self._worker
