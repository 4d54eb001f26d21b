"""The word to drop a run and the run itself come on different connections: either may be first."""

from __future__ import annotations

import asyncio

from splitwise_sched.frontend import FrontEnd
from splitwise_sched.records import PrefillAssigned
from splitwise_sched.types import Request, Role, SamplingParams
from tests.integration.toy import ToyInstance, settings_for, tokens_of, toy_answer, until

TWO = SamplingParams(max_tokens=2, temperature=0)


async def test_run_that_is_dropped_while_its_peer_is_looked_up_is_not_assigned(redis_server, topic, monkeypatch):
    settings = settings_for(redis_server, topic)
    async with (
        ToyInstance(settings, Role.PREFILL, "p") as prefill,
        ToyInstance(settings, Role.DECODE, "d"),
        FrontEnd(settings) as frontend,
    ):
        looking, go = asyncio.Event(), asyncio.Event()
        look_up = prefill.session._intake._fields_of

        async def held_up(instance_id):
            looking.set()
            await go.wait()
            return await look_up(instance_id)

        monkeypatch.setattr(prefill.session._intake, "_fields_of", held_up)
        await frontend.submit(Request("dropped", "toy", (3,), TWO))
        await asyncio.wait_for(looking.wait(), 15)
        assert await frontend.cancel("dropped")
        await until(lambda: prefill.session.num_held == 0)
        go.set()
        stream = await frontend.submit(Request("next", "toy", (4,), TWO))
        assert await tokens_of(stream) == toy_answer(stream.request)
        assigned = [e.request.request_id for e in prefill.events if isinstance(e, PrefillAssigned)]
        assert assigned == ["next"]


async def test_run_whose_drop_was_read_before_it_is_not_assigned(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with ToyInstance(settings, Role.MIXED, "m") as mixed, FrontEnd(settings) as frontend:
        # As read from the control stream before the reply of bind.
        mixed.session._runs.drop("dropped", 1, "it was cancelled")
        await frontend.submit(Request("dropped", "toy", (3,), TWO))
        stream = await frontend.submit(Request("next", "toy", (4,), TWO))
        assert await tokens_of(stream) == toy_answer(stream.request)
        assigned = [e.request.request_id for e in mixed.events if isinstance(e, PrefillAssigned)]
        assert assigned == ["next"]
