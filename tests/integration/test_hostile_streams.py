"""Stream entries, leases and bodies that nobody of this version wrote are left out, and requests are served."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from splitwise_sched.errors import RequestFailed
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.records import LeaseLost
from splitwise_sched.types import Request, Role, SamplingParams
from tests.integration.toy import ToyInstance, settings_for, tokens_of, toy_answer

VALUES: tuple[Any, ...] = (
    "", "nan", "-1", "0", "1", "9" * 400, "1:0:5", "1:0:-5", "1:99999999999:5", "9" * 30 + ":0:5", '1:0::{"lost":[]}',
    '1:0::{"finish":"stop"', '1:0::{"finish":{}}', b"\xff\xfe\x00", "x" * 20_000, "{}", "r0", "drop", "[" * 3000,
)  # fmt: skip
NAMES: tuple[Any, ...] = (
    "id", "epoch", "prefill", "frontend", "drop", "why", "hello", "tokens", "model", "r0", "r1", "#hello", "", b"\xff",
    "role", "max_model_len", "kv_endpoints", "name",
)  # fmt: skip


def request(request_id: str) -> Request:
    return Request(request_id, "toy", (7, 8, 9), SamplingParams(max_tokens=12, temperature=0))


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_streams_full_of_garbage_hurt_nobody(redis_server, topic, seed):
    rng = random.Random(seed)
    settings = settings_for(redis_server, topic)
    async with (
        FrontEnd(settings) as frontend,
        ToyInstance(settings, Role.PREFILL, "p") as prefill,
        ToyInstance(settings, Role.DECODE, "d") as decode,
    ):
        store, k = frontend.store, frontend.store.keys
        ids = [i.session.instance_id for i in (prefill, decode)]
        streams = [k.queue, k.out(frontend.frontend_id), *map(k.inbox, ids), *map(k.control, ids), k.preferred(ids[0])]
        for _ in range(40):
            for stream in streams:
                names = rng.sample(NAMES, rng.randint(1, 5))
                await store.call("XADD", stream, "*", *(x for name in names for x in (name, rng.choice(VALUES))))
        for stranger in ("x", "\x00", "é" * 300):
            await store.call("SADD", k.instances, stranger)
            for name in rng.sample(NAMES, 6):
                await store.call("HSET", k.instance(stranger), name, rng.choice(VALUES))
            await store.call("ZADD", k.decode_load, 0, stranger)
            await store.call("ZADD", k.frontends, 1, stranger)
            await store.call("ZADD", k.deadlines, 1, stranger)
        streams_of = [await frontend.submit(request(f"good{i}")) for i in range(6)]
        answers = [await tokens_of(stream) for stream in streams_of]
        assert answers == [toy_answer(request("good0"))] * 6
        assert frontend.healthy and len(await frontend.instances()) >= 2
        assert all(not task.done() for task in frontend._tasks)
        for instance in (prefill, decode):
            assert not [e for e in instance.events if isinstance(e, LeaseLost)], "it did not have to begin anew"


async def test_bodies_that_are_no_bodies_end_their_requests_alone(redis_server, topic):
    settings = settings_for(redis_server, topic)
    rng = random.Random(1)
    async with FrontEnd(settings) as frontend:
        bodies = [b"", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x81\xa1v\x01", rng.randbytes(500), b"\x80" * 100_000]
        bad = [await frontend.submit(request(f"bad{i}")) for i in range(len(bodies))]
        for i, body in enumerate(bodies):
            await frontend.store.call("SET", frontend.store.keys.body(f"bad{i}"), body)
        good = await frontend.submit(request("good"))
        async with ToyInstance(settings, Role.MIXED, "m"):

            async def failure(stream: Any) -> str:
                with pytest.raises(RequestFailed) as failed:
                    [output async for output in stream]
                return failed.value.detail

            details = await asyncio.wait_for(asyncio.gather(*map(failure, bad)), 20)
            assert all("request body" in detail for detail in details)
            assert await tokens_of(good) == toy_answer(request("good"))
        assert await frontend.store.call("XLEN", frontend.store.keys.dead_letter) == len(bodies)
