"""The KV connector that vLLM loads: ``--kv-transfer-config '{"kv_connector": "SplitwiseConnector",
"kv_connector_module_path": "engine.vllm.connector", "kv_role": "kv_both", ...}'``.

vLLM makes one in its scheduler and one in each worker. ``kv_connector_extra_config`` takes what ``TransferOptions``
takes (``protocols``, ``secret``, ``bind_host``, ``advertise_host`` ...), and what ``ConnectorOptions`` adds to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from engine.vllm.lifetime import end_with_parent
from engine.vllm.metrics import LoadStats, PromMetrics
from engine.vllm.options import ConnectorOptions
from engine.vllm.regions import ModelShape, layout_of
from engine.vllm.scheduler_side import SchedulerSide, StepPlan
from engine.vllm.versions import check_version
from engine.vllm.worker_side import WorkerSide
from kv_transfer.endpoint import endpoints_from_text, endpoints_to_text
from kv_transfer.host_pool import TensorPool
from kv_transfer.pool import BlockPool
from kv_transfer.transports.cuda_ipc.pool import CudaPool
from splitwise_sched.errors import ConfigError

check_version(vllm.__version__)


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    plan: StepPlan


@dataclass
class EndpointMetadata(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """How one rank is reached (kv_transfer.endpoints_to_text)."""

    endpoint: str


class SplitwiseConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Moves KV blocks of finished prefill chunks to decode, which asks for them; loads on decode are asynchronous."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._vllm_config = vllm_config
        self._options = ConnectorOptions.parse(self._kv_transfer_config.kv_connector_extra_config)
        if kv_cache_config is not None and len(kv_cache_config.kv_cache_groups) > 1:
            raise ConfigError(
                "this model has KV caches of several kinds (sliding window beside full attention, or states), which "
                "the connector does not move: serve it without disaggregation"
            )
        # Where vLLM forks, or is told not to load plugins, nothing has done so yet.
        end_with_parent()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            engine_id = self._kv_transfer_config.engine_id
            self._scheduler = SchedulerSide(vllm_config.cache_config.block_size, engine_id)

    @property
    def scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None, "only in the scheduler"
        return self._scheduler

    # ---- scheduler -----------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        endpoints = [e for rank in sorted(metadata) for e in endpoints_from_text(metadata[rank].endpoint)]
        self.scheduler.endpoints = endpoints_to_text(endpoints)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        count = self.scheduler.num_external_tokens(
            request.request_id, request.kv_transfer_params, request.num_prompt_tokens, num_computed_tokens
        )
        return count, count > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = request.kv_transfer_params
        if params:
            ids = blocks.get_block_ids()
            self.scheduler.allocated(
                request.request_id, params, ids[0] if ids else (), num_external_tokens, request.num_prompt_tokens
            )

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        scheduler = self.scheduler
        scheduler.preempted(scheduler_output.preempted_req_ids or ())
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            count = scheduled[new.req_id]
            scheduler.scheduled(new.req_id, new.block_ids[0], new.num_computed_tokens, count)
        cached = scheduler_output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            ids = cached.new_block_ids[i]
            scheduler.scheduled(request_id, ids[0] if ids else (), cached.num_computed_tokens[i], scheduled[request_id])
        return StepMetadata(scheduler.take_plan())

    def update_connector_output(self, connector_output: Any) -> None:
        self.scheduler.received(connector_output.finished_recving or (), connector_output.failed_recving)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        status = request.status.name
        return self.scheduler.finished(
            request.request_id, is_complete=status in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")
        )

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0] if block_ids else [])

    def get_kv_connector_stats(self) -> LoadStats | None:
        counts = None if self._scheduler is None else self._scheduler.take_counts()
        return None if counts is None else LoadStats.of(counts)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LoadStats:
        return LoadStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> PromMetrics:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- worker --------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed import get_tensor_model_parallel_rank

        tensors = list(kv_caches.values())
        config, rank = self._vllm_config, get_tensor_model_parallel_rank()
        device = tensors[0].device.type
        model = ModelShape(
            engine=f"vllm-{vllm.__version__}-{device}",
            fingerprint=_fingerprint(config.model_config),
            dtype=str(tensors[0].dtype).removeprefix("torch."),
            num_layers=len(tensors),
            num_blocks=self._kv_cache_config.num_blocks,
            block_size=config.cache_config.block_size,
            num_kv_heads=config.model_config.get_total_num_kv_heads(),
            tp_size=config.parallel_config.tensor_parallel_size,
            tp_rank=rank,
        )
        layout, names = layout_of(model, tuple(tensors[0].shape))
        pool: BlockPool
        if device == "cpu":
            pool = TensorPool(layout, tensors, names)
        else:
            on = tensors[0].device
            pool = CudaPool.of_named_tensors(
                layout, tensors, names, stream=lambda: int(torch.cuda.current_stream(on).cuda_stream)
            )
        name = f"vllm-{self._kv_transfer_config.engine_id}-{rank}"
        self._worker = WorkerSide(pool, self._options.transfer, name=name, timeout_s=self._options.transfer_timeout_s)
        self._endpoint = endpoints_to_text([self._worker.start()])
        if self._options.endpoint_dir is not None:
            _write_whole(Path(self._options.endpoint_dir) / f"rank-{rank}", self._endpoint)

    def get_handshake_metadata(self) -> EndpointMetadata | None:
        return EndpointMetadata(self._endpoint) if self._worker is not None else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None and kv_connector_metadata.plan.revoke:
            self._worker.revoke(kv_connector_metadata.plan.revoke)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            started = time.thread_time()
            self._worker.before_forward(self._get_connector_metadata().plan)
            self._worker.stats.hooks_s += time.thread_time() - started

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: vLLM computes a request only when all of its KV is here."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks go when all layers of a chunk are computed."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            started = time.thread_time()
            plan = self._get_connector_metadata().plan
            if plan.send_blocks and torch.cuda.is_available():
                # The messenger reads what the stream has computed; a chunk is long, its end is near.
                torch.cuda.current_stream().synchronize()
            self._worker.after_forward(plan)
            self._worker.stats.hooks_s += time.thread_time() - started

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        started = time.thread_time()
        ended = self._worker.take_ended(finished_req_ids)
        self._worker.stats.hooks_s += time.thread_time() - started
        return KVConnectorTransferResults(
            finished_sending=ended.sent, finished_recving=ended.received, failed_recving=ended.failed
        )

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending or None, results.finished_recving or None

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _fingerprint(model: Any) -> str:
    """Of the model's configuration; where it was read from does not count."""
    config = {k: v for k, v in model.hf_config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write_whole(path: Path, text: str) -> None:
    """Nobody reads half of it."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
