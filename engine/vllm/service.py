"""An instance of a topic whose engine is vLLM: claims, KV hand-over through the connector, outputs through Redis.

vLLM drives itself, in processes of its own; here one event loop hands requests to it and outputs on. What is said of a
prefill and a decode instance in engine/port.py holds: decode asks prefill's ranks for the KV as soon as it has
allocated blocks, which is while prefill still computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from engine.vllm.params import LOAD_FAILED, decode_params
from engine.vllm.sampling import output_of, sampling_of
from kv_transfer.endpoint import endpoints_from_text, endpoints_to_text
from kv_transfer.options import TransferOptions
from splitwise_sched.errors import Fenced, SplitwiseError
from splitwise_sched.instance import InstanceSession
from splitwise_sched.records import DecodeAssigned, Dropped, InstanceEvent, LeaseLost, PrefillAssigned, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import FinishReason, Output, Request, Role

logger = logging.getLogger(__name__)

ALIVE_PERIOD_S = 0.2
CLAIM_AT_ONCE = 4
CLOSE_TIMEOUT_S = 10.0


class VllmFailed(SplitwiseError):
    """vLLM has ended; what it held goes back to the queue."""


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


@dataclass(slots=True)
class ServiceStats:
    """Plain counters since start."""

    num_prefilled: int = 0
    num_finished: int = 0
    num_output_tokens: int = 0
    num_recomputed: int = 0
    num_dropped: int = 0
    num_leases_lost: int = 0


class _Load(StatLoggerBase):  # type: ignore[misc]
    """vLLM's own figures, as they are after each of its steps."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.figures: dict[str, int | float | str] = {"running": 0, "waiting": 0, "kv_usage": 0.0}

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is not None:
            self.figures = {
                "running": scheduler_stats.num_running_reqs,
                "waiting": scheduler_stats.num_waiting_reqs,
                "kv_usage": round(scheduler_stats.kv_cache_usage, 4),
            }

    def log_engine_initialized(self) -> None:
        pass


class VllmService:
    """``start``, then ``run`` until ``stop`` or the end of a drain; ``close`` in any case. All in one event loop."""

    def __init__(self, settings: SchedulerSettings, options: ServiceOptions) -> None:
        self.stats = ServiceStats()
        self.role = options.role
        self.heard_at = time.monotonic()
        self.model = ""
        self._settings = settings
        self._options = options
        self._engine: Any = None
        self._session: InstanceSession | None = None
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._waiting_tokens = 0
        self._load: _Load | None = None
        self._ended = asyncio.Event()
        self._failure: SplitwiseError | None = None
        self._draining: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="splitwise-vllm-")

    @property
    def session(self) -> InstanceSession:
        assert self._session is not None, "start() comes first"
        return self._session

    @property
    def server(self) -> str:
        """Name and version of the Redis server."""
        return self.session.store.server

    async def start(self) -> None:
        """Load the model and register. Raises SplitwiseError; ``close`` is still due then."""
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
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args), stat_loggers=[self._make_load])
        self._engine = engine
        config = engine.vllm_config
        self.model = str(args.get("served_model_name") or args["model"])
        ranks = [Path(self._directory.name) / f"rank-{i}" for i in range(config.parallel_config.world_size)]
        endpoints = [e for path in ranks for e in endpoints_from_text(path.read_text())]
        layout = endpoints[0].layout
        registration = Registration(
            name=self._options.name,
            role=self._options.role,
            model=self.model,
            must_match={f"kv.{name}": value for name, value in layout.compatibility().items()},
            capacity_tokens=layout.num_blocks * layout.block_size,
            capacity_requests=config.scheduler_config.max_num_seqs,
            block_size=layout.block_size,
            max_model_len=config.model_config.max_model_len,
            details={**self._options.details, "kv_endpoints": endpoints_to_text(endpoints)},
        )
        session = InstanceSession(self._settings, registration, self._on_event)
        await session.start()
        self._session = session
        self._make_room()
        self._keeper = asyncio.create_task(self._keep_alive())

    async def run(self) -> None:
        """Until ``stop``, or the end of a drain. Raises VllmFailed or Fenced."""
        await self._ended.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        self._ended.set()

    def drain(self, timeout_s: float) -> None:
        """Take nothing more, finish what is held, then end ``run``; after ``timeout_s`` in any case. Idempotent."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain(timeout_s))

    async def change_role(self, role: Role, timeout_s: float) -> None:
        """Finish what is held, for ``timeout_s`` at most, then go on in another role."""
        self.role = role
        await self.session.change_role(role, timeout_s)

    async def close(self) -> None:
        """Hand back what is held, leave the topic, end vLLM. Idempotent."""
        tasks = [t for t in (self._keeper, self._draining, *self._runs.values()) if t is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
        if self._session is not None:
            await self._session.close()
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None
        self._directory.cleanup()

    def load(self) -> dict[str, int | float | str]:
        """What the instance holds now; goes into its lease record."""
        return dict(self._load.figures) if self._load is not None else {}

    # ---- life ----------------------------------------------------------------------------------------------------

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

    async def _drain(self, timeout_s: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drained(), timeout_s)
        self._ended.set()

    async def _drained(self) -> None:
        await self.session.drain()
        await self.session.until_empty()
        while self._runs:
            await asyncio.wait(list(self._runs.values()))

    def _end(self, failure: SplitwiseError) -> None:
        if self._failure is None:
            self._failure = failure
        self._ended.set()

    def _make_room(self) -> None:
        is_full = self._waiting_tokens >= self._options.max_waiting_tokens
        self.session.set_room(0 if is_full else CLAIM_AT_ONCE)

    # ---- events --------------------------------------------------------------------------------------------------

    def _on_event(self, event: InstanceEvent) -> None:
        if isinstance(event, (PrefillAssigned, DecodeAssigned)):
            task = asyncio.get_running_loop().create_task(self._run(event))
            self._runs[event.key] = task
            task.add_done_callback(lambda _: self._runs.pop(event.key, None))
        elif isinstance(event, Dropped):
            self.stats.num_dropped += 1
            if (run := self._runs.get(event.key)) is not None:
                run.cancel()
        elif isinstance(event, LeaseLost):
            self.stats.num_leases_lost += 1
            for run in self._runs.values():
                run.cancel()
            if event.new_instance_id is None:
                self._end(Fenced(f"this instance lost its place in the topic and cannot come back: {event.reason}"))

    async def _run(self, event: PrefillAssigned | DecodeAssigned) -> None:
        request, epoch = event.request, event.epoch
        try:
            if isinstance(event, DecodeAssigned):
                await self._decode(event)
            elif event.decode_instance == self.session.instance_id:
                await self._whole(event)
            else:
                await self._prefill(event)
        except ValueError as exc:
            # vLLM's word for a request that it can never run.
            self.session.give_back(request.request_id, epoch, str(exc), retry=False)
        except EngineDeadError as exc:
            self.session.give_back(request.request_id, epoch, f"vLLM has ended: {exc}", retry=True)

    async def _prefill(self, event: PrefillAssigned) -> None:
        request, started = event.request, time.monotonic()
        self._waiting_tokens += request.num_input_tokens
        self._make_room()
        try:
            transfer = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": event.key}
            sampling = sampling_of(request, 1, transfer)
            async for result in self._generate(request, sampling, event.key):
                part = result.outputs[0]
                if not part.token_ids:
                    continue
                self.stats.num_prefilled += 1
                self.stats.num_output_tokens += 1
                stats = {"prefill_ms": round(1000 * (time.monotonic() - started), 3)}
                first = output_of(request, event.epoch, len(request.emitted_token_ids), part, stats)
                self.session.publish([_first_of(request, first)])
        finally:
            self._waiting_tokens -= request.num_input_tokens
            self._make_room()
        # The connector keeps the blocks until decode has them; of the request nothing is left to do here.
        self.session.release(request.request_id, event.epoch)

    async def _decode(self, event: DecodeAssigned) -> None:
        endpoints = event.prefill_fields.get("kv_endpoints", "")
        transfer = decode_params(event.key, endpoints, event.request.num_input_tokens)
        await self._generate_all(event, transfer)

    async def _whole(self, event: PrefillAssigned) -> None:
        self._waiting_tokens += event.request.num_input_tokens
        self._make_room()
        try:
            await self._generate_all(event, None)
        finally:
            self._waiting_tokens -= event.request.num_input_tokens
            self._make_room()

    async def _generate_all(self, event: PrefillAssigned | DecodeAssigned, transfer: dict[str, Any] | None) -> None:
        request, epoch = event.request, event.epoch
        index = len(request.emitted_token_ids)
        sampling = sampling_of(request, request.sampling.max_tokens - index, transfer)
        started, decoding_at = time.monotonic(), None
        async for result in self._generate(request, sampling, event.key):
            part = result.outputs[0]
            if part.finish_reason is not None and part.finish_reason not in ("stop", "length"):
                why = f"vLLM ended it with {part.finish_reason!r}"
                self.session.give_back(request.request_id, epoch, why, retry=True)
                return
            if decoding_at is None:
                decoding_at = time.monotonic()
                waited_ms = round(1000 * (decoding_at - started), 3)
                notes = {"engine_ttft_ms": waited_ms, "cached_tokens": result.num_cached_tokens or 0}
                self.session.step(request.request_id, epoch, notes)
            stats = {"decode_ms": round(1000 * (time.monotonic() - decoding_at), 3)}
            if result.kv_transfer_params == LOAD_FAILED:
                self.stats.num_recomputed += 1
                stats["kv_load_failed"] = 1
            output = output_of(request, epoch, index, part, stats)
            index += len(part.token_ids)
            self.stats.num_output_tokens += len(part.token_ids)
            self.stats.num_finished += output.finish_reason is not None
            self.session.publish([output])

    def _generate(self, request: Request, sampling: Any, key: str) -> Any:
        prompt = {"prompt_token_ids": list(request.input_token_ids)}
        return self._engine.generate(prompt, sampling, request_id=key)


def _first_of(request: Request, output: Output) -> Output:
    """Prefill's token ends its request only when the request wants no more."""
    is_only = request.sampling.max_tokens - len(request.emitted_token_ids) == 1
    if output.finish_reason is FinishReason.LENGTH and not is_only:
        return replace(output, finish_reason=None, stats=None)
    return output
