"""Takes back what dead instances held, cancels what dead front ends wanted, ends requests whose time is over.

Any process may run it, several at once, and any may be killed in the middle: the scripts do each thing once, and who is
dead stays written down until all of theirs is done.
"""

from __future__ import annotations

import asyncio
import logging
import random

from splitwise_sched.errors import SplitwiseError
from splitwise_sched.store import Store

logger = logging.getLogger(__name__)

BATCH = 200
MAX_AUDITED = 10_000


class Sweeper:
    """Sweeps every ``period_s`` until cancelled; see ``sweep``."""

    def __init__(self, store: Store, *, retain_ms: int, period_s: float) -> None:
        self._store = store
        self._retain_ms = retain_ms
        self._period_s = period_s
        self._overdue: set[str] = set()

    async def run(self) -> None:
        while True:
            try:
                await self.sweep()
            except SplitwiseError as exc:
                logger.warning("sweep failed, the next one is due in %g s: %s", self._period_s, exc)
            # Not all at the same moment: those that run it were perhaps started together.
            await asyncio.sleep(self._period_s * random.uniform(0.75, 1.25))

    async def sweep(self) -> int:
        """One round; returns how many requests were taken back or ended.

        A front end is swept when two rounds in a row found it without a lease: after a Redis that was away for longer
        than that, all are, until each has come round. When nothing is to be done, a round costs two scripts.
        """
        lapsed = await self._store.lapsed()
        moved, ended = 0, BATCH if lapsed.is_due else 0
        for instance_id in lapsed.instances:
            moved += await self._reap(instance_id)
        for frontend_id in lapsed.frontends:
            if frontend_id in self._overdue:
                moved += await self._cancel_orphans(frontend_id)
        self._overdue = set(lapsed.frontends)
        while ended == BATCH:
            ended = await self._store.expire(BATCH, self._retain_ms)
            moved += ended
        if (repaired := await self._store.audit(random.randrange(1 << 30), MAX_AUDITED)) is not None:
            logger.warning(
                "%s had %d KV tokens of %d requests reserved for nobody, and %d inbox entries of nobody; put right",
                *repaired,
            )
        return moved

    async def _reap(self, instance_id: str) -> int:
        moved, finished = 0, False
        while not finished:
            taken, finished = await self._store.reap(instance_id, BATCH)
            moved += taken
            if not taken and not finished:
                # It has a lease again, or its last entries were removed just now.
                finished = not await self._store.lacks_lease(instance_id)
        logger.info("reaped %s", instance_id)
        return moved

    async def _cancel_orphans(self, frontend_id: str) -> int:
        """Look through all requests until a look finds none of its own."""
        total = 0
        while True:
            cancelled, look_on = await self._store.cancel_orphans(frontend_id, BATCH, self._retain_ms)
            while look_on != "0":
                more, look_on = await self._store.cancel_orphans(
                    frontend_id, BATCH, self._retain_ms, look_on, cancelled
                )
                cancelled += more
            total += cancelled
            if not cancelled:
                break
        if total:
            logger.warning("front end %s is gone, and its %d requests are cancelled", frontend_id, total)
        return total
