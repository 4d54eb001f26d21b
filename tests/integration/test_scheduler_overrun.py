"""A front end that lags so far behind that its stream is trimmed before it is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from splitwise_sched import recovery
from splitwise_sched.errors import RequestFailed
from splitwise_sched.frontend import FrontEnd
from splitwise_sched.records import Dropped
from splitwise_sched.types import Request, Role, SamplingParams
from tests.integration.toy import ToyInstance, settings_for, tokens_of, toy_answer, until


@pytest.fixture(autouse=True)
def verify_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "VERIFY_PERIOD_S", 0.1)
    monkeypatch.setattr(recovery, "VERIFY_AFTER_S", 0.1)


def lose_outputs(frontend: FrontEnd, is_lost: Callable[[int, str], bool]) -> None:
    """The front end never sees what ``is_lost`` says of: (number of the output that it reads, its text)."""
    take, count = frontend._take, 0

    def taken(request_id: str, values: list[str]) -> None:
        nonlocal count
        kept = []
        for value in values:
            count += 1
            if not is_lost(count, value):
                kept.append(value)
        if kept:
            take(request_id, kept)

    frontend._take = taken  # type: ignore[method-assign]


REQUEST = Request("r0", "toy", (3, 4, 5), SamplingParams(max_tokens=40, temperature=0))


async def test_outputs_that_never_came_are_made_again_while_the_run_still_goes_on(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with ToyInstance(settings, Role.MIXED, "m", pause_s=0.01) as mixed, FrontEnd(settings) as frontend:
        lose_outputs(frontend, lambda count, _: 5 <= count < 8)
        stream = await frontend.submit(REQUEST)
        await until(lambda: stream.assembly.has_gap and not mixed.gate.clear())
        await mixed.wait_for(Dropped)
        mixed.gate.set()
        assert await tokens_of(stream) == toy_answer(REQUEST)
        record = await frontend.request_record("r0")
        assert record["state"] == "done" and record["attempts"] == "2"
        assert "in decode on m-" in record["history"] and "never came to its front end" in record["history"]


async def test_end_that_never_came_is_made_again(redis_server, topic):
    settings = settings_for(redis_server, topic)
    async with ToyInstance(settings, Role.MIXED, "m"), FrontEnd(settings) as frontend:
        num_lost = 0

        def first_end(_: int, value: str) -> bool:
            nonlocal num_lost
            num_lost += "finish" in value
            return "finish" in value and num_lost == 1

        lose_outputs(frontend, first_end)
        stream = await frontend.submit(REQUEST)
        assert await tokens_of(stream) == toy_answer(REQUEST)


async def test_front_end_that_always_lags_ends_its_request_with_an_error_that_says_so(redis_server, topic):
    settings = settings_for(redis_server, topic, scheduler_max_attempts=2)
    async with ToyInstance(settings, Role.MIXED, "m", pause_s=0.02) as mixed, FrontEnd(settings) as frontend:
        lose_outputs(frontend, lambda _, value: ":9:" in value)
        stream = await frontend.submit(REQUEST)

        async def hold_when_it_lags() -> None:
            while True:
                if stream.assembly.has_gap:
                    mixed.gate.clear()
                else:
                    mixed.gate.set()
                await asyncio.sleep(0.005)

        holding = asyncio.create_task(hold_when_it_lags())
        with pytest.raises(RequestFailed, match="given up after 2 attempts, the last: some of its outputs never came"):
            async for _ in stream:
                pass
        holding.cancel()
