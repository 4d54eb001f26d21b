"""This project's side: zero-work instances and front ends as child processes."""

from __future__ import annotations

import asyncio
import time
from multiprocessing.connection import Connection as Pipe
from typing import Any

import uvloop

from benchmarks.sched.children import Address, serve
from benchmarks.sched.work import PROMPT, Load
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.instance import InstanceSession
from splitwise_sched.records import DecodeAssigned, InstanceEvent, PrefillAssigned, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import FinishReason, Output, Request, Role, SamplingParams

ROOM = 64
ALIVE_PERIOD_S = 0.5
# Steps whose outputs may be on their way; an engine computes on meanwhile.
STEPS_UNDER_WAY = 32


def settings_at(address: Address) -> SchedulerSettings:
    return SchedulerSettings(
        scheduler_host=address.host,
        scheduler_port=address.port,
        scheduler_topic=address.topic,
        scheduler_max_size=1_000_000,
    )


def registration_of(name: str, role: Role) -> Registration:
    return Registration(
        name=name,
        role=role,
        model="none",
        must_match={"kv.dtype": "none"},
        capacity_tokens=1_000_000,
        capacity_requests=10_000,
        block_size=64,
        max_model_len=100_000,
    )


class ZeroWorkInstance:
    """Gives the first tokens of all prompts that came in a turn of the loop, or steps all sequences that it decodes."""

    def __init__(self, address: Address, role: Role, name: str) -> None:
        self.session = InstanceSession(settings_at(address), registration_of(name, role), self._on_event)
        self.arrivals: dict[str, float] = {}
        self._assigned: list[InstanceEvent] = []
        self._running: dict[tuple[str, int], tuple[int, int]] = {}
        self._stepping: asyncio.Task[None] | None = None

    def _on_event(self, event: InstanceEvent) -> None:
        if isinstance(event, PrefillAssigned):
            self.arrivals[event.request.request_id] = time.monotonic()
        if not self._assigned:
            asyncio.get_running_loop().call_soon(self._take)
        self._assigned.append(event)

    def _take(self) -> None:
        assigned, self._assigned = self._assigned, []
        outputs = []
        for event in assigned:
            if isinstance(event, PrefillAssigned):
                outputs.append(Output(event.request.request_id, event.epoch, 0, (7,)))
            elif isinstance(event, DecodeAssigned):
                request_id, last = event.request.request_id, event.request.sampling.max_tokens - 1
                self.session.step(request_id, event.epoch, {})
                if last == 1:
                    outputs.append(Output(request_id, event.epoch, 1, (8,), finish_reason=FinishReason.LENGTH))
                else:
                    self._running[(request_id, event.epoch)] = (1, last)
        if outputs:
            self.session.publish(outputs)
        self.session.set_room(ROOM)
        if self._running and self._stepping is None:
            self._stepping = asyncio.create_task(self._step_all())

    async def _step_all(self) -> None:
        steps = 0
        while self._running:
            outputs = []
            for (request_id, epoch), (index, last) in list(self._running.items()):
                reason = FinishReason.LENGTH if index == last else None
                outputs.append(Output(request_id, epoch, index, (8,), finish_reason=reason))
                if reason is None:
                    self._running[(request_id, epoch)] = (index + 1, last)
                else:
                    del self._running[(request_id, epoch)]
            self.session.publish(outputs)
            steps += 1
            if steps % STEPS_UNDER_WAY:
                await asyncio.sleep(0)
            else:
                await self.session.store.settle()
        self._stepping = None

    async def keep_alive(self) -> None:
        while True:
            self.session.alive({"running": len(self._running)})
            await asyncio.sleep(ALIVE_PERIOD_S)

    async def take_arrivals(self) -> dict[str, float]:
        arrivals, self.arrivals = self.arrivals, {}
        return arrivals


def run_instance(pipe: Pipe, address: Address, role: str, name: str) -> None:
    async def main() -> None:
        instance = ZeroWorkInstance(address, Role(role), name)
        await instance.session.start()
        instance.session.set_room(ROOM)
        alive = asyncio.create_task(instance.keep_alive())
        await serve(pipe, {"arrivals": instance.take_arrivals})
        alive.cancel()
        await instance.session.close()

    uvloop.run(main())


class LoadGenerator:
    """Users of one front end."""

    def __init__(self, frontend: FrontEnd) -> None:
        self._frontend = frontend
        self._submitted: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._num_tokens = 0

    async def run(self, load: Load) -> dict[str, Any]:
        """Returns seconds from the first submit to the last token, tokens received, and when (monotonic) what came."""
        self._submitted, self._first, self._num_tokens = {}, {}, 0
        started = time.perf_counter()
        if load.rate is None:
            ids = iter(load.ids())
            await asyncio.gather(*(self._closed(ids, load) for _ in range(load.window)))
        else:
            await self._open(load)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": self._num_tokens, "submitted": self._submitted, "first": self._first}

    async def enqueue(self, load: Load) -> int:
        """Submit and wait for nothing."""
        for request_id in load.ids():
            await self._frontend.submit(_request(request_id, load))
        return load.num_requests

    async def _closed(self, ids: Any, load: Load) -> None:
        for request_id in ids:
            await self._one(request_id, load)

    async def _open(self, load: Load) -> None:
        loop = asyncio.get_running_loop()
        start, tasks = loop.time(), []
        assert load.rate is not None
        for i, request_id in enumerate(load.ids()):
            await asyncio.sleep(start + i / load.rate - loop.time())
            tasks.append(asyncio.create_task(self._one(request_id, load)))
        await asyncio.gather(*tasks)

    async def _one(self, request_id: str, load: Load) -> None:
        self._submitted[request_id] = time.monotonic()
        stream = await self._frontend.submit(_request(request_id, load))
        async for output in stream:
            if not output.index:
                self._first[request_id] = time.monotonic()
            self._num_tokens += len(output.token_ids)


def _request(request_id: str, load: Load) -> Request:
    return Request(request_id, "none", PROMPT, SamplingParams(max_tokens=load.num_tokens, temperature=0.0))


def run_frontend(pipe: Pipe, address: Address) -> None:
    async def main() -> None:
        async with FrontEnd(settings_at(address)) as frontend:
            generator = LoadGenerator(frontend)
            await serve(pipe, {"run": generator.run, "enqueue": generator.enqueue})

    uvloop.run(main())
