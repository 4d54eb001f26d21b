"""What the processes of a run have in common: they start although Redis is away, and say how they are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from splitwise_sched.errors import StoreUnavailable
from tests.chaos.channel import Channel

STATS_PERIOD_S = 0.5
START_PAUSE_S = 0.3


async def start(attempt: Callable[[], Awaitable[Any]]) -> Any:
    """As whatever supervises a process does: try again until Redis is there."""
    while True:
        try:
            return await attempt()
        except StoreUnavailable as exc:
            logging.info("not started yet: %s", exc)
            await asyncio.sleep(START_PAUSE_S)


async def tell_stats(channel: Channel, held: Callable[[], int]) -> None:
    """How many asyncio tasks there are, and what this process still holds."""
    while True:
        channel.tell("stats", len(asyncio.all_tasks()), held())
        await asyncio.sleep(STATS_PERIOD_S)
