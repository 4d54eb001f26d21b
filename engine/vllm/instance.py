"""An instance of a topic whose engine is vLLM, in this process or beside it: claims, KV hand-over, outputs.

vLLM drives itself; here one event loop hands requests to it and outputs on. What is said of a prefill and a decode
instance in engine/port.py holds: decode asks prefill's ranks for the KV as soon as it has allocated blocks, which is
while prefill still computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.vllm.params import LOAD_FAILED, decode_params
from engine.vllm.parts import Part, RunFailed, RunRefused, VllmFailed, first_output, output_of
from splitwise_sched.errors import Fenced, SplitwiseError, StoreUnavailable
from splitwise_sched.instance import InstanceSession
from splitwise_sched.records import DecodeAssigned, Dropped, InstanceEvent, LeaseLost, PrefillAssigned, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import Request, Role

logger = logging.getLogger(__name__)

CLAIM_AT_ONCE = 4
CLOSE_TIMEOUT_S = 10.0
Load = dict[str, int | float | str]


@dataclass(slots=True)
class InstanceStats:
    """Plain counters since start."""

    num_prefilled: int = 0
    num_finished: int = 0
    num_output_tokens: int = 0
    num_recomputed: int = 0
    num_dropped: int = 0
    num_leases_lost: int = 0


class VllmInstance(ABC):
    """``start``, then ``run`` until ``stop`` or the end of a drain; ``close`` in any case. All in one event loop.

    Args:
        max_waiting_tokens: prompt tokens claimed ahead of their computation.

    Attributes:
        model: name that requests ask for.
        heard_at: when vLLM was last seen to be well (monotonic).
    """

    def __init__(self, settings: SchedulerSettings, role: Role, max_waiting_tokens: int) -> None:
        self.stats = InstanceStats()
        self.role = role
        self.heard_at = time.monotonic()
        self.model = ""
        self._settings = settings
        self._max_waiting_tokens = max_waiting_tokens
        self._session: InstanceSession | None = None
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._waiting_tokens = 0
        self._ended = asyncio.Event()
        self._failure: SplitwiseError | None = None
        self._draining: asyncio.Task[None] | None = None

    @abstractmethod
    async def start(self) -> None:
        """Find vLLM well, and register. Raises SplitwiseError; ``close`` is still due then."""

    @abstractmethod
    def load(self) -> Load:
        """What vLLM holds now; goes into the lease record."""

    @abstractmethod
    def _generate(
        self, request: Request, max_tokens: int, transfer: Mapping[str, Any] | None, key: str
    ) -> AsyncGenerator[Part, None]:
        """Run a request; closing the generator ends it in vLLM.

        Args:
            max_tokens: of this run.
            transfer: ``kv_transfer_params``.
            key: of the run.
        Raises:
            RunRefused, RunFailed
        """

    @property
    def session(self) -> InstanceSession:
        assert self._session is not None, "start() comes first"
        return self._session

    @property
    def instance_id(self) -> str:
        """Of this moment; "" when it is not in the topic."""
        return "" if self._session is None else self._session.instance_id

    @property
    def num_held(self) -> int:
        """Requests that were assigned here and have not ended."""
        return 0 if self._session is None else self._session.num_held

    @property
    def server(self) -> str:
        """Name and version of the Redis server."""
        return self.session.store.server

    async def run(self) -> None:
        """Until ``stop``, or the end of a drain. Raises SplitwiseError when it cannot go on."""
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
        if self._session is not None:
            await self._session.change_role(role, timeout_s)

    async def close(self) -> None:
        """Hand back what is held and leave the topic. Idempotent."""
        if self._draining is not None:
            self._draining.cancel()
        await self._leave()

    # ---- for subclasses ------------------------------------------------------------------------------------------

    async def _join(self, registration: Registration) -> None:
        """Enter the topic. Raises SplitwiseError."""
        session = InstanceSession(self._settings, registration, self._on_event)
        await session.start()
        self._session = session
        self._make_room()

    async def _leave(self) -> None:
        """End all runs, hand them back, and leave the topic. Idempotent."""
        await self._end_runs()
        if self._session is not None:
            await self._session.close()
            # Those that were assigned meanwhile.
            await self._end_runs()
            self._session = None

    async def _end_runs(self) -> None:
        for run in self._runs.values():
            run.cancel()
        if self._runs:
            await asyncio.wait(list(self._runs.values()), timeout=CLOSE_TIMEOUT_S)

    def _start(self, keeper: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """What has to go on as long as the instance; should a bug end it, ``run`` ends too."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (exc := task.exception()) is not None:
                logger.error("%s failed", keeper, exc_info=exc)
                self._end(VllmFailed(f"this instance has a bug: {exc!r}"))

        task = asyncio.get_running_loop().create_task(keeper)
        task.add_done_callback(ended)
        return task

    def _end(self, failure: SplitwiseError) -> None:
        """``run`` ends with this."""
        if self._failure is None:
            self._failure = failure
        self._ended.set()

    # ---- drain ---------------------------------------------------------------------------------------------------

    async def _drain(self, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(self._drained(), timeout_s)
        except asyncio.TimeoutError:
            logger.warning("%d requests did not end in time and go back to the queue", self.num_held)
        except StoreUnavailable as exc:
            logger.warning("%d requests go back to the queue: %s", self.num_held, exc)
        self._ended.set()

    async def _drained(self) -> None:
        if self._session is None:
            return
        await self._session.drain()
        await self._session.until_empty()
        while self._runs:
            await asyncio.wait(list(self._runs.values()))

    def _has_room(self) -> bool:
        return self._waiting_tokens < self._max_waiting_tokens

    def _make_room(self) -> None:
        if self._session is not None:
            self._session.set_room(CLAIM_AT_ONCE if self._has_room() else 0)

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
        except RunRefused as exc:
            self.session.give_back(request.request_id, epoch, str(exc), retry=False)
        except RunFailed as exc:
            self.session.give_back(request.request_id, epoch, str(exc), retry=True)

    async def _prefill(self, event: PrefillAssigned) -> None:
        request, started = event.request, time.monotonic()
        transfer = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": event.key}
        with self._is_waiting(request):
            async for part in self._parts(request, 1, transfer, event.key):
                if not part.token_ids:
                    continue
                self.stats.num_prefilled += 1
                self.stats.num_output_tokens += 1
                stats = {"prefill_ms": _ms_since(started)}
                first = output_of(request, event.epoch, len(request.emitted_token_ids), part, stats)
                self.session.publish([first_output(request, first)])
        # The connector keeps the blocks until decode has them; of the request nothing is left to do here.
        self.session.release(request.request_id, event.epoch)

    async def _decode(self, event: DecodeAssigned) -> None:
        endpoints = event.prefill_fields.get("kv_endpoints", "")
        await self._generate_all(event, decode_params(event.key, endpoints, event.request.num_input_tokens))

    async def _whole(self, event: PrefillAssigned) -> None:
        with contextlib.ExitStack() as waiting:
            waiting.enter_context(self._is_waiting(event.request))
            await self._generate_all(event, None, on_first=waiting.close)

    @contextlib.contextmanager
    def _is_waiting(self, request: Request) -> Iterator[None]:
        """While this lasts, the prompt counts as one that was claimed and is not computed."""
        self._waiting_tokens += request.num_input_tokens
        self._make_room()
        try:
            yield
        finally:
            self._waiting_tokens -= request.num_input_tokens
            self._make_room()

    async def _generate_all(
        self,
        event: PrefillAssigned | DecodeAssigned,
        transfer: Mapping[str, Any] | None,
        on_first: Callable[[], None] | None = None,
    ) -> None:
        request, epoch = event.request, event.epoch
        index = len(request.emitted_token_ids)
        started, decoding_at = time.monotonic(), None
        async for part in self._parts(request, request.sampling.max_tokens - index, transfer, event.key):
            if decoding_at is None:
                decoding_at = time.monotonic()
                notes: dict[str, float | int | str] = {"engine_ttft_ms": _ms_since(started)}
                if part.num_cached_tokens is not None:
                    notes["cached_tokens"] = part.num_cached_tokens
                self.session.step(request.request_id, epoch, notes)
                if on_first is not None:
                    on_first()
            stats: dict[str, float | int | str] = {"decode_ms": _ms_since(decoding_at)}
            if part.transfer == LOAD_FAILED:
                self.stats.num_recomputed += 1
                stats["kv_load_failed"] = 1
            output = output_of(request, epoch, index, part, stats)
            index += len(part.token_ids)
            self.stats.num_output_tokens += len(part.token_ids)
            self.stats.num_finished += output.finish_reason is not None
            self.session.publish([output])

    async def _parts(
        self, request: Request, max_tokens: int, transfer: Mapping[str, Any] | None, key: str
    ) -> AsyncGenerator[Part, None]:
        async with contextlib.aclosing(self._generate(request, max_tokens, transfer, key)) as parts:
            async for part in parts:
                if part.is_broken_off:
                    raise RunFailed(f"vLLM ended it with {part.finish_reason!r}")
                yield part


def _ms_since(moment: float) -> float:
    return round(1000 * (time.monotonic() - moment), 3)
