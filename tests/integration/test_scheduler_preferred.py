"""A request may wait for an instance that it prefers, for a bound; it never waits for one that will not come."""

from __future__ import annotations

import asyncio

import pytest

from splitwise_sched.errors import InvalidRequest
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.records import PrefillAssigned
from splitwise_sched.types import Request, Role, SamplingParams
from tests.integration.toy import ToyInstance, settings_for, tokens_of, toy_answer, until


def request_of(request_id: str, *prefer: str) -> Request:
    return Request(request_id, "toy", (5, 6, 7), SamplingParams(max_tokens=4), prefer=prefer)


def prefilled(instance: ToyInstance) -> set[str]:
    return {e.request.request_id for e in instance.events if isinstance(e, PrefillAssigned)}


async def no_preferred_keys(frontend: FrontEnd) -> bool:
    prefix = frontend.store.keys.prefix
    streams = await frontend.store.call("KEYS", f"{prefix}preferred:*")
    lengths = [await frontend.store.call("XLEN", s) for s in streams]
    return await frontend.store.call("EXISTS", f"{prefix}preferred") == 0 and not any(lengths)


async def test_preferred_instance_gets_the_request_by_name_or_id(every_redis_server, topic):
    settings = settings_for(every_redis_server, topic, preferred_wait_ms=20_000)
    async with (
        ToyInstance(settings, Role.MIXED, "m0"),
        ToyInstance(settings, Role.MIXED, "m1") as wanted,
        FrontEnd(settings) as frontend,
    ):
        names = ("m1", wanted.session.instance_id)
        requests = [request_of(f"r{i}", "nobody", names[i % 2]) for i in range(8)]
        for request in requests:
            assert await tokens_of(await frontend.submit(request)) == toy_answer(request)
        assert prefilled(wanted) == {r.request_id for r in requests}
        assert await no_preferred_keys(frontend)


async def test_request_spills_to_the_others_when_its_instance_has_no_room(redis_server, topic):
    settings = settings_for(redis_server, topic, preferred_wait_ms=100)
    async with (
        ToyInstance(settings, Role.MIXED, "busy", room=0) as busy,
        ToyInstance(settings, Role.MIXED, "other") as other,
        FrontEnd(settings) as frontend,
    ):
        requests = [request_of(f"r{i}", "busy") for i in range(5)]
        streams = [await frontend.submit(r) for r in requests]
        assert await asyncio.gather(*map(tokens_of, streams)) == [toy_answer(r) for r in requests]
        assert prefilled(busy) == set() and len(prefilled(other)) == 5
        assert (await frontend.store.counters())["spilled"] == "5"
        assert await no_preferred_keys(frontend)


async def test_more_than_a_few_do_not_wait_for_one_instance(redis_server, topic):
    settings = settings_for(redis_server, topic, preferred_wait_ms=60_000)
    async with (
        ToyInstance(settings, Role.MIXED, "busy", room=0),
        ToyInstance(settings, Role.MIXED, "other") as other,
        FrontEnd(settings) as frontend,
    ):
        for i in range(12):
            await frontend.submit(request_of(f"r{i}", "busy"))
        await other.wait_for(PrefillAssigned, 4)
        assert prefilled(other) == {"r8", "r9", "r10", "r11"}


@pytest.mark.parametrize("how", ["dies", "drains", "leaves", "is cancelled"])
async def test_what_waits_for_an_instance_that_will_not_take_it_goes_to_the_others(redis_server, topic, how):
    settings = settings_for(redis_server, topic, preferred_wait_ms=60_000)
    async with FrontEnd(settings) as frontend, ToyInstance(settings, Role.MIXED, "busy", room=0) as busy:
        request = request_of("r0", "busy")
        stream = await frontend.submit(request)
        if how == "dies":
            busy.vanish_now()
        elif how == "drains":
            await busy.session.drain()
        elif how == "leaves":
            await busy.stop()
        else:
            await frontend.cancel("r0")
            assert await no_preferred_keys(frontend)
            return
        async with ToyInstance(settings, Role.MIXED, "other"):
            assert await tokens_of(stream) == toy_answer(request)
            await until(lambda: no_preferred_keys(frontend))


def test_too_many_or_unusable_names_are_refused():
    with pytest.raises(InvalidRequest, match="prefer has 9 instances: give 8 at most"):
        request_of("r0", *"abcdefghi")
    with pytest.raises(InvalidRequest, match="instance id 'a b' is not usable"):
        request_of("r0", "a b")
