"""More requests than can be served: the queue stays short, who is refused hears why and when to come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from splitwise_sched import connection
from splitwise_sched.errors import DeadlineUnreachable, QueueFull
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.store import Flow, Store
from splitwise_sched.types import Request, Role, SamplingParams
from tests.integration.toy import ToyInstance, settings_for, tokens_of, toy_answer
from tests.scripts_topic import HOUR_MS, claim, register, reply_of

GIVEN = {
    "frontend_id": "f0", "retain_ms": HOUR_MS, "input_tokens": 8, "kv_tokens": 16, "model": "toy",
    "flow": Flow("default", 4, "-"),
}  # fmt: skip


@pytest.fixture
async def store(redis_server, topic) -> AsyncIterator[Store]:
    async with open_store(redis_server, topic) as opened:
        yield opened


@asynccontextmanager
async def open_store(server, topic) -> AsyncIterator[Store]:
    opened = Store(settings_for(server, topic))
    await opened.connect()
    await opened.open_out("f0", HOUR_MS)
    yield opened
    await opened.close()


async def submit(store: Store, request_id: str, timeout_ms: int = HOUR_MS) -> tuple[str, list[int]]:
    return await store.submit(request_id, b"body", nonce=request_id, timeout_ms=timeout_ms, **GIVEN)


async def know(store: Store, *, rate: float | None = None, service_ms: float | None = None) -> None:
    """What was measured before."""
    if rate is not None:
        await store.call("SET", f"{store.keys.prefix}prefill-rate", rate)
    if service_ms is not None:
        await store.call("HSET", f"{store.keys.prefix}service-ms", "default", service_ms)


async def test_what_others_took_after_their_claim_counts_beside_the_wait(store):
    await know(store, rate=8.0)
    assert (await submit(store, "r0"))[0] == "QUEUED"
    # A second of prefill is before it, a quarter more for doubt.
    assert (await submit(store, "r1", 1300))[0] == "QUEUED"
    await know(store, rate=16.0, service_ms=400)
    assert await submit(store, "r2", 1600) == ("LATE", [2, 1650])
    assert (await submit(store, "r3", 1700))[0] == "QUEUED"
    # Others that take longer than it may at all say little of it: half its time is left for waiting.
    await know(store, rate=24.0, service_ms=60_000)
    assert (await submit(store, "r4", 2600))[0] == "QUEUED"


async def test_time_from_claim_to_end_is_learned_from_one_in_eight(store):
    await register(store, "m", "mixed", 1024, 100)
    for i in range(9):
        await submit(store, f"r{i}")
    claims = await claim(store, "m", 9)
    await store.bind("m", claims, HOUR_MS)
    took_ms = [1000, *[70_000] * 7, 2000]
    learned = []
    for i, took in enumerate(took_ms):
        await store.call("HINCRBY", store.keys.request(f"r{i}"), "claimed_ms", -took)
        output = '1:0:7:{"finish":"stop"}'
        await reply_of(store.finish, f"r{i}", 1, "m", output, retain_ms=HOUR_MS, reason="stop", notes={})
        learned.append(float(await store.call("HGET", f"{store.keys.prefix}service-ms", "default")))
    assert len(set(learned[:8])) == 1 and 1000 <= learned[0] < 3000
    assert learned[0] < learned[8] < took_ms[8] + 3000
    assert 0 < await store.call("TTL", f"{store.keys.prefix}service-ms") <= 600


async def next_millisecond(store: Store) -> None:
    async def now_ms() -> int:
        seconds, micros = await store.call("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    before = await now_ms()
    while await now_ms() == before:
        pass


async def test_claim_that_waits_for_room_is_not_overtaken_by_what_came_later_to_another(
    redis_server, topic, monkeypatch
):
    texts = connection.script_texts()
    impatient = texts["bind"].replace("SLACK_MS, SAID_MS = 100, 50", "SLACK_MS, SAID_MS = 0, 60000")
    assert impatient != texts["bind"]
    monkeypatch.setattr(connection, "script_texts", lambda: {**texts, "bind": impatient})
    async with open_store(redis_server, topic) as store:
        await register(store, "p", "prefill", 1024, 8)
        await register(store, "q", "prefill", 1024, 8)
        await register(store, "d", "decode", 1024, 1)
        held = {}
        for request_id, name in (("r0", "p"), ("r1", "p"), ("r2", "q"), ("r3", "q")):
            await submit(store, request_id)
            held[request_id] = await claim(store, name, 1)
            await next_millisecond(store)

        async def bind(request_id: str, name: str) -> str:
            (bound,) = await store.bind(name, held[request_id], HOUR_MS)
            return bound.verdict

        async def finish(request_id: str) -> None:
            output = '1:0:7:{"finish":"stop"}'
            given = {"retain_ms": HOUR_MS, "reason": "stop", "notes": {}}
            assert await reply_of(store.finish, request_id, 1, "d", output, **given) == 1

        assert await bind("r0", "p") == "BOUND"
        # Whoever asks first: the older one is heard.
        assert [await bind("r2", "q"), await bind("r1", "p"), await bind("r2", "q")] == ["WAIT"] * 3
        await finish("r0")
        assert await bind("r2", "q") == "WAIT", "there is room, but it is r1's turn"
        assert await bind("r1", "p") == "BOUND"
        assert await bind("r2", "q") == "WAIT"
        await finish("r1")
        assert await bind("r3", "q") == "WAIT"
        # Its holder is gone, and says no longer that it waits.
        await store.call("DEL", f"{store.keys.prefix}oldest-claim")
        assert await bind("r3", "q") == "BOUND"


async def test_overload_is_refused_and_what_was_accepted_is_served(redis_server, topic):
    settings = settings_for(redis_server, topic, scheduler_max_size=12)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "m", room=2) as mixed:
        mixed.gate.clear()
        refused: list[QueueFull] = []
        depths, streams = [], []
        for i in range(80):
            request = Request(f"r{i}", "toy", (i + 1,), SamplingParams(max_tokens=4, temperature=0))
            try:
                streams.append((request, await frontend.submit(request)))
            except QueueFull as exc:
                refused.append(exc)
            depths.append(await frontend.store.queue_depth())
        assert refused and len(streams) >= 12 and max(depths) <= 12
        assert all(exc.depth >= 12 and exc.retry_after_s > 0 for exc in refused)
        assert all(isinstance(exc, DeadlineUnreachable) or exc.limit == 12 for exc in refused)
        mixed.gate.set()
        answers = await asyncio.gather(*(tokens_of(s) for _, s in streams))
        assert answers == [toy_answer(request) for request, _ in streams]
        # Normal at once: nothing is left of it.
        last = Request("last", "toy", (5,), SamplingParams(max_tokens=4, temperature=0))
        assert await tokens_of(await frontend.submit(last)) == toy_answer(last)
        assert await frontend.store.queue_depth() == 0
