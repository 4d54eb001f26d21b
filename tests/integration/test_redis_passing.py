"""A server that takes no writes for a moment: what it refused is tried again, and done once; on every server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from splitwise_sched.errors import StoreUnavailable
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.store import Store
from tests.integration.toy import request_of, settings_for
from tests.redis_rigs import RedisServer, server_programs

# What stops writes, and what lets them through again.
STATES = {
    "READONLY": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    "NOREPLICAS": (("CONFIG", "SET", "min-replicas-to-write", "1"), ("CONFIG", "SET", "min-replicas-to-write", "0")),
}


@pytest.fixture(params=sorted(server_programs()))
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(server_programs()[request.param]) as server:
        yield server


@pytest.mark.parametrize("state", STATES)
async def test_what_is_refused_for_now_is_done_once_when_it_can_be(server, topic, state):
    stop, go = STATES[state]
    settings = settings_for(server, topic)
    onlooker = Store(settings)
    async with FrontEnd(settings) as frontend:
        before = await frontend.submit(request_of("before"))
        server.ask(*stop)
        waiting = [asyncio.create_task(frontend.submit(request_of(f"r{i}"))) for i in range(3)]
        cancelling = asyncio.create_task(frontend.cancel("before", "for a test"))
        for _ in range(20):
            assert await onlooker.request_states(["before", "r0"]) == [("queued", 1), None]
        assert not any(task.done() for task in (*waiting, cancelling))
        server.ask(*go)
        for task in waiting:
            await asyncio.wait_for(task, 20)
        assert await asyncio.wait_for(cancelling, 20)
        assert [o async for o in before]
        assert (await onlooker.counters())["submitted"] == "4"
    await onlooker.close()


async def test_what_stays_refused_fails_when_time_is_over_and_says_why(server, topic):
    async with FrontEnd(settings_for(server, topic, redis_timeout_s=0.5)) as frontend:
        server.ask(*STATES["READONLY"][0])
        with pytest.raises(StoreUnavailable, match="READONLY"):
            await frontend.submit(request_of("r0"))
        server.ask(*STATES["READONLY"][1])
