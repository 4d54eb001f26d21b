"""The scheduler in a serving loop that is no coroutine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from splitwise_sched import sync
from splitwise_sched.errors import ConfigError, IncompatibleInstance, InvalidRequest, StoreUnavailable
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.output_stream import OutputStream
from splitwise_sched.records import DecodeAssigned, Dropped, LeaseLost, PrefillAssigned, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.sync import Instance
from splitwise_sched.types import FinishReason, Output, Request, Role, SamplingParams
from tests.integration.toy import settings_for, tokens_of, toy_answer, toy_token, until


def registration(role: Role = Role.MIXED, **must_match: str) -> Registration:
    return Registration("loop", role, "toy", must_match, 10_000, 64, 16, 4096)


class Loop:
    """A serving loop in a thread; ``go`` lets it come round, clearing it wedges the loop."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self.wake, self.go, self.end = threading.Event(), threading.Event(), threading.Event()
        self.go.set()
        self.instance = Instance(settings, registration(), on_event=self.wake.set)
        self.lost: list[LeaseLost] = []
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> Loop:
        self.instance.start()
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.end.set()
        self.go.set()
        self.wake.set()
        self.thread.join(10)
        self.instance.close()

    def run(self) -> None:
        running: dict[tuple[str, int], tuple[Request, int]] = {}
        while not self.end.is_set():
            self.go.wait()
            for event in self.instance.poll(room=4, load={"running": len(running)}):
                if isinstance(event, PrefillAssigned):
                    running[(event.request.request_id, event.epoch)] = (event.request, 0)
                elif isinstance(event, Dropped):
                    running.pop((event.request_id, event.epoch), None)
                elif isinstance(event, LeaseLost):
                    self.lost.append(event)
                    running.clear()
                else:
                    assert isinstance(event, DecodeAssigned)
            outputs = []
            for (request_id, epoch), (request, index) in list(running.items()):
                if index == 0:
                    self.instance.step(request_id, epoch, {})
                last = index + 1 == request.sampling.max_tokens
                finish = FinishReason.LENGTH if last else None
                outputs.append(Output(request_id, epoch, index, (toy_token(request, index),), finish_reason=finish))
                running[(request_id, epoch)] = (request, index + 1)
                if last:
                    del running[(request_id, epoch)]
            self.instance.publish(outputs)
            if not running:
                self.wake.wait(0.05)
            self.wake.clear()


async def ask(frontend: FrontEnd, request_id: str) -> None:
    request = Request(request_id, "toy", (7, 8, 9), SamplingParams(max_tokens=20))
    stream = await frontend.submit(request)
    assert await tokens_of(stream) == toy_answer(request)


async def test_loop_serves_requests_and_leaves_nothing_behind(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as frontend:
        with Loop(settings) as loop:
            await asyncio.wait_for(asyncio.gather(*(ask(frontend, f"r{i}") for i in range(40))), 20)
            assert loop.instance.server.startswith(("redis", "valkey"))
        assert await frontend.store.live_instances() == []
        assert not [t for t in threading.enumerate() if t.name == "splitwise-instance"]


async def test_wedged_loop_loses_its_lease_and_has_another_when_it_is_back(redis_server, topic, caplog):
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as frontend:
        with Loop(settings) as loop:
            old_id = loop.instance.instance_id
            loop.go.clear()
            await until(lambda: frontend.store.lacks_lease(old_id))
            asking = asyncio.create_task(ask(frontend, "r0"))
            await until(lambda: "registers again when its serving loop comes round" in caplog.text)
            # It has nothing to do with a request that it would not come to.
            await asyncio.sleep(2 * settings.instance_lease_s)
            assert await frontend.store.live_instances() == []
            assert (await frontend.request_record("r0"))["state"] == "queued"
            loop.go.set()
            await asyncio.wait_for(asking, 20)
            assert loop.lost and loop.instance.instance_id != old_id


def test_start_that_fails_leaves_no_thread(redis_server, topic):
    settings = settings_for(redis_server, topic)
    first = Instance(settings, registration(dtype="a"))
    first.start()
    try:
        with pytest.raises(IncompatibleInstance):
            Instance(settings, registration(dtype="b")).start()
    finally:
        first.close()
    nobody = settings.model_copy(update={"scheduler_port": 1})
    with pytest.raises(StoreUnavailable):
        Instance(nobody, registration()).start()
    with pytest.raises(ConfigError, match="scheduler_host is not set"):
        Instance(SchedulerSettings(), registration()).start()
    with pytest.raises(InvalidRequest, match="'a b' is not usable"):
        Instance(settings, replace(registration(), name="a b")).start()
    with pytest.raises(TypeError):
        Instance(settings, replace(registration(), details={"address": None})).start()
    assert not [t for t in threading.enumerate() if t.name == "splitwise-instance"]


async def test_loop_drains_once_all_that_it_held_has_ended(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with FrontEnd(settings) as frontend:
        with Loop(settings) as loop:
            loop.go.clear()
            asking = asyncio.create_task(ask(frontend, "r0"))
            await until(lambda: loop.instance.num_held == 1)
            loop.instance.drain()
            loop.instance.drain()

            async def draining() -> bool:
                return all("draining" in r.fields for r in await frontend.store.live_instances())

            await until(draining)
            assert not loop.instance.is_drained
            loop.go.set()
            await asyncio.wait_for(asking, 20)
            await until(lambda: loop.instance.is_drained)
            late = await frontend.submit(Request("late", "toy", (1,)))
            assert (await frontend.request_record("late"))["state"] == "queued"
            await late.aclose()


def test_a_loop_that_spins_tells_at_once_what_is_new_and_the_rest_now_and_then(redis_server, topic):
    looks: list[int] = []

    def load() -> dict[str, int | float | str]:
        looks.append(len(looks))
        return {"running": 0}

    with Instance(settings_for(redis_server, topic), registration()) as instance:
        for _ in range(1000):
            instance.poll(1, load)
        assert 1 <= len(looks) < 1000
        looks.clear()
        for i in range(100):
            instance.poll(i % 2, load)
        assert len(looks) >= 99


class Streaming:
    """A request that an instance without a loop has in hand; ``woken`` counts how often its I/O thread was."""

    def __init__(self, instance: Instance, stream: OutputStream) -> None:
        self.instance, self.stream, self.woken = instance, stream, 0
        call = instance._loop.call_soon_threadsafe

        def count(*args):
            self.woken += 1
            return call(*args)

        instance._loop.call_soon_threadsafe = count

    def publish(self, index: int, finish: FinishReason | None = None) -> None:
        self.instance.publish([Output("r0", 1, index, (index,), finish_reason=finish)])

    async def has(self, count: int) -> None:
        while len(self.stream.assembly.token_ids) < count:
            await asyncio.wait_for(anext(self.stream), 10)
        assert self.stream.assembly.token_ids == list(range(count))


@asynccontextmanager
async def streaming(settings: SchedulerSettings) -> AsyncIterator[Streaming]:
    wake = threading.Event()
    async with FrontEnd(settings) as frontend:
        stream = await frontend.submit(Request("r0", "toy", (7,), SamplingParams(max_tokens=100)))
        with Instance(settings, registration(), on_event=wake.set) as instance:
            while not instance.poll(1, {}):
                await asyncio.to_thread(wake.wait, 0.05)
                wake.clear()
            yield Streaming(instance, stream)


async def test_tokens_arrive_though_the_loop_says_nothing_more(redis_server, topic):
    """Nobody is woken for those that come soon after others: the I/O thread looks again by itself."""
    async with streaming(settings_for(redis_server, topic)) as request:
        for count in range(5, 101, 5):
            for index in range(count - 5, count):
                request.publish(index, FinishReason.LENGTH if index == 99 else None)
            await request.has(count)


async def test_first_and_last_token_wake_the_io_thread_and_those_between_ride_with_others(
    redis_server, topic, monkeypatch
):
    monkeypatch.setattr(sync, "LOOK_AGAIN_S", 3600)
    async with streaming(settings_for(redis_server, topic)) as request:
        request.publish(0)
        await request.has(1)
        woken = request.woken
        for index in range(1, 9):
            request.publish(index)
        assert request.woken == woken
        request.publish(9, FinishReason.LENGTH)
        assert request.woken == woken + 1
        await request.has(10)


async def test_loop_hears_of_an_output_that_cannot_be_sent(redis_server, topic):
    settings = settings_for(redis_server, topic)
    taken, refused, wake = threading.Event(), [], threading.Event()
    async with FrontEnd(settings) as frontend:
        stream = await frontend.submit(Request("r0", "toy", (7,), SamplingParams(max_tokens=2)))
        with Instance(settings, registration(), on_event=wake.set) as instance:

            def serve() -> None:
                while not taken.is_set():
                    for event in instance.poll(1, {}):
                        assert isinstance(event, PrefillAssigned)
                        assert event.key == "r0@1"
                        instance.publish([Output("r0", event.epoch, 0, (5,), extra={"when": object()})])
                        taken.set()
                    wake.wait(0.05)
                    wake.clear()
                while not refused:
                    try:
                        instance.poll(1, {})
                    except TypeError as exc:
                        refused.append(str(exc))
                instance.publish([Output("r0", 1, 0, (5, 6), finish_reason=FinishReason.LENGTH)])

            await asyncio.wait_for(asyncio.to_thread(serve), 20)
            assert [output.token_ids async for output in stream] == [(5, 6)]
    assert "not JSON serializable" in refused[0]
