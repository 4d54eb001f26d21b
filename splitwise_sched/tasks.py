"""Tasks that nobody waits for: loops that a bug does not end in silence, and small work that is done on the side."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from splitwise_sched.errors import StoreUnavailable

logger = logging.getLogger(__name__)

BEGIN_AGAIN_S = 1.0
CANCEL_AGAIN_S = 1.0


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended.

    Until Python 3.12, asyncio.wait_for may swallow a cancellation that comes as what it waits for is done; so one that
    goes on is cancelled again.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)


async def keep_going(loop: Callable[..., Awaitable[None]], *args: Any) -> None:
    """Run a loop that should never end, until cancelled.

    What it raises is a bug of this package's. It is logged with its traceback, and the loop begins anew: without it,
    requests that are fine otherwise would wait for their deadlines.
    """
    while True:
        try:
            await loop(*args)
            return
        except Exception:
            logger.exception("%s failed, and begins again in %g s", loop.__qualname__, BEGIN_AGAIN_S)
        await asyncio.sleep(BEGIN_AGAIN_S)


class Chores:
    """Things to tell Redis that nobody waits for, and that it finds out by itself when it cannot be reached."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def do(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(self._one(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel what is under way."""
        await end(*self._tasks)

    @staticmethod
    async def _one(work: Coroutine[Any, Any, object]) -> None:
        with contextlib.suppress(StoreUnavailable):
            await work
