"""Instances that take a known time for each request, by sleeping: what they can do in a second is known beforehand."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

import uvloop

from benchmarks.sched.children import serve
from splitwise_sched.instance import InstanceSession
from splitwise_sched.records import DecodeAssigned, Dropped, InstanceEvent, LeaseLost, PrefillAssigned, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import FinishReason, Output, Request, Role

ALIVE_PERIOD_S = 0.5


@dataclass(frozen=True)
class Service:
    """
    Attributes:
        prefills: instances that take one prompt at a time, ``prefill_s`` each.
        decodes: instances with ``slots`` requests at a time, ``decode_s`` each on average, from half to one and a half.
    """

    prefills: int
    prefill_s: float
    decodes: int
    slots: int
    decode_s: float

    @property
    def capacity(self) -> float:
        """Requests a second. Decode holds a request while it is in prefill too."""
        return min(self.prefills / self.prefill_s, self.decodes * self.slots / self.service_s)

    @property
    def service_s(self) -> float:
        return self.prefill_s + self.decode_s


class SleepingInstance:
    """Gives a request's first token after ``prefill_s``, or its last after ``decode_s``."""

    def __init__(self, settings: SchedulerSettings, role: Role, name: str, service: Service) -> None:
        registration = Registration(
            name=name, role=role, model="none", must_match={}, capacity_tokens=1_000_000,
            capacity_requests=service.slots, block_size=64, max_model_len=100_000,
        )  # fmt: skip
        self.session = InstanceSession(settings, registration, self._on_event)
        self._service = service
        self._running: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._computing = asyncio.Lock()
        self._lengths = random.Random(name)
        self._ticker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> SleepingInstance:
        await self.session.start()
        self.session.set_room(1)
        self._ticker = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in (self._ticker, *self._running.values()):
            if task is not None:
                task.cancel()
        await self.session.close()

    async def _keep_alive(self) -> None:
        while True:
            self.session.alive({"running": len(self._running)})
            await asyncio.sleep(ALIVE_PERIOD_S)

    def _on_event(self, event: InstanceEvent) -> None:
        if isinstance(event, PrefillAssigned):
            self._begin(event.request, event.epoch, self._prefill(event.request, event.epoch))
        elif isinstance(event, DecodeAssigned):
            self._begin(event.request, event.epoch, self._decode(event.request, event.epoch))
        elif isinstance(event, Dropped):
            if (task := self._running.pop((event.request_id, event.epoch), None)) is not None:
                task.cancel()
                self._make_room()
        elif isinstance(event, LeaseLost):
            for task in self._running.values():
                task.cancel()
            self._running.clear()

    def _begin(self, request: Request, epoch: int, work: Coroutine[Any, Any, None]) -> None:
        self._running[(request.request_id, epoch)] = asyncio.create_task(work)

    def _make_room(self) -> None:
        self.session.set_room(max(0, 2 - len(self._running)))

    async def _prefill(self, request: Request, epoch: int) -> None:
        # One ahead, so that the next begins when this one ends.
        self._make_room()
        async with self._computing:
            await asyncio.sleep(self._service.prefill_s)
        self.session.publish([Output(request.request_id, epoch, 0, (7,))])
        self.session.release(request.request_id, epoch)
        self._running.pop((request.request_id, epoch), None)
        self._make_room()

    async def _decode(self, request: Request, epoch: int) -> None:
        # There is no KV to wait for; its time begins when prefill has had its own.
        await asyncio.sleep(self._service.prefill_s)
        self.session.step(request.request_id, epoch, {})
        # Answers differ in length: those that began together do not end together.
        await asyncio.sleep(self._service.decode_s * self._lengths.uniform(0.5, 1.5))
        output = Output(request.request_id, epoch, 0, (7, 8), finish_reason=FinishReason.LENGTH)
        self.session.publish([output])
        self._running.pop((request.request_id, epoch), None)


def run_fleet(pipe: Pipe, settings: SchedulerSettings, service: Service) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            for role, count in ((Role.PREFILL, service.prefills), (Role.DECODE, service.decodes)):
                for i in range(count):
                    instance = SleepingInstance(settings, role, f"{role.value}-{i}", service)
                    await stack.enter_async_context(instance)
            await serve(pipe, {})

    uvloop.run(main())
