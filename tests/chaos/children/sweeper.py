"""A sweeper in a process of its own."""

from __future__ import annotations

import asyncio

from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.store import Store
from splitwise_sched.sweeper import Sweeper
from tests.chaos.channel import Channel
from tests.chaos.children.common import start, tell_stats


async def run(settings: SchedulerSettings, channel: Channel, commands: asyncio.Queue[list]) -> None:
    async def connect() -> Store:
        store = Store(settings)
        try:
            await store.connect()
        except BaseException:
            await store.close()
            raise
        return store

    store = await start(connect)
    sweeper = Sweeper(store, retain_ms=int(settings.scheduler_ttl * 1000), period_s=settings.instance_lease_s / 4)
    tasks = [asyncio.create_task(sweeper.run()), asyncio.create_task(tell_stats(channel, lambda: 0))]
    channel.tell("ready")
    while (await commands.get())[0] != "close":
        pass
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await store.close()
    channel.tell("closed")
    await channel.flush()
