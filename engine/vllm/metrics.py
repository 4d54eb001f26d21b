"""How the connector's loads end, for vLLM's own log and ``/metrics``."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from engine.vllm.scheduler_side import LoadCounts

METRICS = {
    "loads": ("vllm:splitwise_kv_loads", "Prompts whose KV was to come from prefill, and whose load has ended."),
    "loads_failed": ("vllm:splitwise_kv_loads_failed", "Those of them whose KV did not come."),
}


class LoadStats(KVConnectorStats):  # type: ignore[misc]
    """Counts since the last look, by the names of ``METRICS``."""

    data: dict[str, int]

    @classmethod
    def of(cls, counts: LoadCounts) -> LoadStats:
        return cls(data={"loads": counts.num_ended, "loads_failed": counts.num_failed})

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> LoadStats:
        return LoadStats(data={name: self.data.get(name, 0) + other.data.get(name, 0) for name in METRICS})

    def reduce(self) -> dict[str, int | float]:
        return {name: self.data.get(name, 0) for name in METRICS}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, labelvalues)
        make = metric_types[Counter]
        self._counters = {
            key: create_metric_per_engine(make(name=name, documentation=what, labelnames=labelnames), labelvalues)
            for key, (name, what) in METRICS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, counter in self._counters.items():
            counter[engine_idx].inc(transfer_stats_data.get(key, 0))
