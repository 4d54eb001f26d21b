"""An instance with a toy model: the next token is a function of how many came before, and of the first prompt token.

Everything around the model is real: lease, claims, placement, outputs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from splitwise_sched.frontend import FrontEnd
from splitwise_sched.instance import InstanceSession
from splitwise_sched.output_stream import OutputStream
from splitwise_sched.records import DecodeAssigned, Dropped, InstanceEvent, LeaseLost, PrefillAssigned, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.types import FinishReason, Output, Request, Role, SamplingParams


def settings_for(server, topic: str, **more: object) -> SchedulerSettings:
    return SchedulerSettings(
        scheduler_host=server.host,
        scheduler_port=server.port,
        scheduler_topic=topic,
        **{"instance_lease_s": 1.0, **more},
    )


def toy_token(request: Request, index: int) -> int:
    return (request.prompt_token_ids[0] * 31 + index * 7) % 50_000


def toy_answer(request: Request) -> list[int]:
    return [toy_token(request, i) for i in range(request.sampling.max_tokens)]


def request_of(request_id: str, max_tokens: int = 8, prompt: int = 20, model: str = "toy", **more: object) -> Request:
    first = 1 + sum(map(ord, request_id)) % 997
    tokens = tuple(range(first, first + prompt))
    return Request(request_id, model, tokens, SamplingParams(max_tokens=max_tokens), **more)


async def tokens_of(stream: OutputStream, timeout_s: float = 30.0) -> list[int]:
    """All that a request's user is given, from the first token on."""

    async def read() -> list[int]:
        tokens: list[int] = []
        async for output in stream:
            assert output.index == len(tokens)
            tokens += output.token_ids
        return tokens

    return await asyncio.wait_for(read(), timeout_s)


async def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    """What ``condition`` gives, or what that gives when awaited, once it is true; for what nothing here can await."""

    async def poll() -> Any:
        while True:
            found = condition()
            if isinstance(found, Awaitable):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.005)

    return await asyncio.wait_for(poll(), timeout_s)


async def until_state(frontend: FrontEnd, request_id: str, *states: str) -> None:
    """Until the request's record says one of these."""

    async def is_there() -> bool:
        return (await frontend.request_record(request_id)).get("state") in states

    await until(is_there)


class ToyInstance:
    """``gate`` holds decode back while it is cleared; ``hold_prefill`` keeps prompts without an answer,
    ``keep_after_prefill`` those that decode has not taken over yet."""

    def __init__(
        self,
        settings: SchedulerSettings,
        role: Role,
        name: str,
        *,
        capacity_tokens: int = 100_000,
        block_size: int = 16,
        must_match: dict[str, str] | None = None,
        model: str = "toy",
        room: int = 8,
        pause_s: float = 0.0,
    ) -> None:
        registration = Registration(
            name=name,
            role=role,
            model=model,
            must_match=must_match or {"kv.dtype": "float32"},
            capacity_tokens=capacity_tokens,
            capacity_requests=64,
            block_size=block_size,
            max_model_len=4096,
        )
        self.session = InstanceSession(settings, registration, self._on_event)
        self.events: list[InstanceEvent] = []
        self.changed = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.hold_prefill = False
        self.keep_after_prefill = False
        self.running: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._role = role
        self._room = room
        self._pause_s = pause_s
        self._ticker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ToyInstance:
        await self.session.start()
        self.session.set_room(self._room)
        self._ticker = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        self.vanish_now()
        await self.session.close()

    def vanish_now(self) -> None:
        """Stop serving without a word; the lease lapses."""
        if self._ticker is not None:
            self._ticker.cancel()
        for task in self.running.values():
            task.cancel()
        self.running.clear()

    async def wait_for(self, kind: type, count: int = 1) -> list[InstanceEvent]:
        async def wait() -> list[InstanceEvent]:
            while len(found := [e for e in self.events if isinstance(e, kind)]) < count:
                self.changed.clear()
                await self.changed.wait()
            return found

        return await asyncio.wait_for(wait(), 15)

    async def _tick(self) -> None:
        while True:
            self.session.alive({"running": len(self.running)})
            if not self.hold_prefill:
                self.session.set_room(self._room)
            await asyncio.sleep(0.05)

    def _on_event(self, event: InstanceEvent) -> None:
        self.events.append(event)
        self.changed.set()
        if isinstance(event, PrefillAssigned):
            self._spawn(event.request, event.epoch, self._prefill(event))
        elif isinstance(event, DecodeAssigned):
            self._spawn(event.request, event.epoch, self._decode(event.request, event.epoch))
        elif isinstance(event, Dropped):
            if (task := self.running.pop((event.request_id, event.epoch), None)) is not None:
                task.cancel()
        elif isinstance(event, LeaseLost):
            for task in self.running.values():
                task.cancel()
            self.running.clear()

    def _spawn(self, request: Request, epoch: int, work) -> None:
        self.running[(request.request_id, epoch)] = asyncio.create_task(work)

    async def _prefill(self, event: PrefillAssigned) -> None:
        if self.hold_prefill:
            return
        request, index = event.request, len(event.request.emitted_token_ids)
        self.session.publish([Output(request.request_id, event.epoch, index, (toy_token(request, index),))])
        if event.decode_instance == self.session.instance_id:
            await self._decode(request, event.epoch)
        elif not self.keep_after_prefill:
            self.session.release(request.request_id, event.epoch)
            self.running.pop((request.request_id, event.epoch), None)

    async def _decode(self, request: Request, epoch: int) -> None:
        if self._role is Role.DECODE:
            await self.gate.wait()
        self.session.step(request.request_id, epoch, {"lane": "none"})
        last = request.sampling.max_tokens - 1
        for index in range(len(request.emitted_token_ids), last):
            await asyncio.sleep(self._pause_s)
            await self.gate.wait()
            self.session.publish([Output(request.request_id, epoch, index, (toy_token(request, index),))])
        self.session.publish(
            [Output(request.request_id, epoch, last, (toy_token(request, last),), finish_reason=FinishReason.LENGTH)]
        )
        self.running.pop((request.request_id, epoch), None)
