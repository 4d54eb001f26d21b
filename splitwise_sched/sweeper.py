"""Takes back what dead instances held, and ends requests whose time is over.

Any process may run it, several at once: the scripts do each thing once.
"""

from __future__ import annotations

import asyncio
import logging

from splitwise_sched.errors import SplitwiseError
from splitwise_sched.store import Store

logger = logging.getLogger(__name__)

BATCH = 200


class Sweeper:
    """Sweeps every ``period_s`` until cancelled; see ``sweep``."""

    def __init__(self, store: Store, *, retain_ms: int, period_s: float) -> None:
        self._store = store
        self._retain_ms = retain_ms
        self._period_s = period_s

    async def run(self) -> None:
        while True:
            try:
                await self.sweep()
            except SplitwiseError as exc:
                logger.warning("sweep failed, the next one is due in %g s: %s", self._period_s, exc)
            await asyncio.sleep(self._period_s)

    async def sweep(self) -> int:
        """One round; returns how many requests were taken back or ended."""
        moved = 0
        for instance_id in await self._store.instances_without_lease():
            finished = False
            while not finished:
                taken, finished = await self._store.reap(instance_id, BATCH)
                moved += taken
                if not taken and not finished:
                    # It has a lease again, or its last entries were removed just now.
                    finished = not await self._store.lacks_lease(instance_id)
            logger.info("reaped %s", instance_id)
        while (ended := await self._store.expire(BATCH, self._retain_ms)) == BATCH:
            moved += ended
        return moved + ended
