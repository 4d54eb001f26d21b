"""vLLM in this process, through its ``AsyncLLM``, as an instance of a topic."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from engine.vllm import lifetime
from engine.vllm.instance import Load, VllmInstance
from engine.vllm.parts import Part, RunFailed, RunRefused, VllmFailed
from engine.vllm.registration import registration_of
from engine.vllm.sampling import part_of, sampling_of
from kv_transfer.endpoint import endpoints_from_text
from kv_transfer.options import TransferOptions
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Request, Role

ALIVE_PERIOD_S = 0.2
CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """
    Attributes:
        name: of the instance; its id is this and a boot nonce.
        engine_args: of vLLM's AsyncEngineArgs; the connector's are put in here.
        max_waiting_tokens: prompt tokens claimed ahead of their computation.
        details: further fields of the lease record.
    """

    name: str
    role: Role
    engine_args: Mapping[str, Any]
    transfer: TransferOptions = field(default_factory=TransferOptions)
    max_waiting_tokens: int = 2048
    details: Mapping[str, str] = field(default_factory=dict)


class _Load(StatLoggerBase):  # type: ignore[misc]
    """vLLM's own figures, as they are after each of its steps."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.figures: Load = {"running": 0, "waiting": 0, "kv_usage": 0.0}

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is not None:
            self.figures = {
                "running": scheduler_stats.num_running_reqs,
                "waiting": scheduler_stats.num_waiting_reqs,
                "kv_usage": round(scheduler_stats.kv_cache_usage, 4),
            }

    def log_engine_initialized(self) -> None:
        pass


class VllmService(VllmInstance):
    def __init__(self, settings: SchedulerSettings, options: ServiceOptions) -> None:
        super().__init__(settings, options.role, options.max_waiting_tokens)
        self._options = options
        self._engine: Any = None
        self._load: _Load | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="splitwise-vllm-")

    async def start(self) -> None:
        args = dict(self._options.engine_args)
        transfer = asdict(self._options.transfer)
        transfer["protocols"] = list(transfer["protocols"])
        args["kv_transfer_config"] = {
            "kv_connector": "SplitwiseConnector",
            "kv_connector_module_path": "engine.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                **transfer,
                "endpoint_dir": self._directory.name,
                "transfer_timeout_s": min(86_400.0, self._settings.scheduler_ttl),
            },
            **args.get("kv_transfer_config", {}),
        }
        lifetime.ask_children()
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args), stat_loggers=[self._make_load])
        self._engine = engine
        config = engine.vllm_config
        self.model = str(args.get("served_model_name") or args["model"])
        ranks = [Path(self._directory.name) / f"rank-{i}" for i in range(config.parallel_config.world_size)]
        endpoints = [e for path in ranks for e in endpoints_from_text(path.read_text())]
        registration = registration_of(
            endpoints,
            name=self._options.name,
            role=self.role,
            model=self.model,
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            details=self._options.details,
        )
        await self._join(registration)
        self._keeper = self._start(self._keep_alive())

    async def close(self) -> None:
        """Hand back what is held, leave the topic, end vLLM. Idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper], timeout=CLOSE_TIMEOUT_S)
        await super().close()
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None
        self._directory.cleanup()

    def load(self) -> Load:
        return dict(self._load.figures) if self._load is not None else {}

    def _make_load(self, vllm_config: Any, engine_index: int = 0) -> _Load:
        self._load = _Load(vllm_config, engine_index)
        return self._load

    async def _keep_alive(self) -> None:
        """The lease goes on only while vLLM's processes are well."""
        while True:
            try:
                await self._engine.check_health()
            except EngineDeadError as exc:
                self._end(VllmFailed(f"vLLM has ended: {exc}"))
                return
            self.heard_at = time.monotonic()
            self.session.alive(self.load())
            await asyncio.sleep(ALIVE_PERIOD_S)

    async def _generate(
        self, request: Request, max_tokens: int, transfer: Mapping[str, Any] | None, key: str
    ) -> AsyncGenerator[Part, None]:
        prompt = {"prompt_token_ids": list(request.input_token_ids)}
        try:
            sampling = sampling_of(request, max_tokens, transfer)
            async for result in self._engine.generate(prompt, sampling, request_id=key):
                yield part_of(result)
        except ValueError as exc:
            # vLLM's word for a request that it can never run.
            raise RunRefused(str(exc)) from exc
        except EngineDeadError as exc:
            raise RunFailed(f"vLLM has ended: {exc}") from exc
