"""Tasks end when they are told to, and loops go on when they fail."""

from __future__ import annotations

import asyncio

from splitwise_sched import tasks


async def test_a_task_that_swallows_a_cancellation_is_cancelled_again(monkeypatch):
    monkeypatch.setattr(tasks, "CANCEL_AGAIN_S", 0.01)
    swallowed = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            swallowed.set()
        await asyncio.sleep(60)

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await asyncio.wait_for(tasks.end(task), 10)
    assert swallowed.is_set()
    assert task.cancelled()


async def test_ending_what_has_ended_waits_for_nothing():
    async def over() -> None:
        return None

    task = asyncio.create_task(over())
    await task
    await asyncio.wait_for(tasks.end(task), 10)
    await asyncio.wait_for(tasks.end(), 10)
