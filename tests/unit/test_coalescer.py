"""What waits for a server that does not answer."""

from __future__ import annotations

import asyncio

import pytest

from splitwise_sched.coalesce import MAX_PIPELINE, Coalescer, Command
from splitwise_sched.errors import StoreUnavailable


async def test_outage_is_not_waited_for_once_more_by_every_pipeline():
    begun, over = asyncio.Event(), asyncio.Event()
    batches: list[int] = []

    async def send(batch: list[Command]) -> list[str]:
        batches.append(len(batch))
        if len(batches) > 1:
            return ["ok"] * len(batch)
        begun.set()
        await over.wait()
        raise StoreUnavailable("nobody answers")

    coalescer = Coalescer(send)
    first = coalescer.call(Command(b"PING"))
    await begun.wait()
    told: list[object] = []
    waiting = [coalescer.call(Command(b"PING")) for _ in range(3 * MAX_PIPELINE)]
    coalescer.tell(Command(b"PING"), told.append)
    over.set()
    for future in (first, *waiting):
        with pytest.raises(StoreUnavailable):
            await future
    assert [type(reply) for reply in told] == [StoreUnavailable]
    assert batches == [1]
    assert await coalescer.call(Command(b"PING")) == "ok"
    await coalescer.close()
