"""An instance's lease: renewed, with its load, as long as its serving loop comes round."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping

from splitwise_sched.errors import StoreUnavailable
from splitwise_sched.store import Store

# So many that a Redis which stands still for three quarters of a lease costs nobody its place.
RENEWALS_A_LEASE = 4.5
POLL_S = 0.02

logger = logging.getLogger(__name__)


class Lease:
    """
    Args:
        lease_s: how long it lasts without a renewal, and how long the serving loop may take to come round.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._load: dict[str, int | float | str] = {}
        self._alive_at = 0.0

    @property
    def lease_ms(self) -> int:
        return int(self._lease_s * 1000)

    @property
    def is_stuck(self) -> bool:
        """The serving loop has not come round for longer than a lease."""
        return time.monotonic() - self._alive_at > self._lease_s

    def alive(self, load: Mapping[str, int | float | str] | None = None) -> None:
        """The serving loop is going round; ``load`` is told with the next renewal."""
        self._alive_at = time.monotonic()
        if load is not None:
            self._load = dict(load)

    async def until_alive(self, name: str) -> None:
        """A loop that is stuck would claim requests each time it registers, and keep them for as long as a lease."""
        if self.is_stuck:
            logger.warning("%s registers again when its serving loop comes round", name)
        while self.is_stuck:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)

    async def keep(self, store: Store, instance_id: str, lose: Callable[[str], None]) -> None:
        """Renew until cancelled, or until it is found to have lapsed: ``lose`` is then told so."""
        while True:
            await asyncio.sleep(self._lease_s / RENEWALS_A_LEASE)
            if self.is_stuck:
                logger.warning("the serving loop has not come round for %.1f s", time.monotonic() - self._alive_at)
                continue
            with contextlib.suppress(StoreUnavailable):
                if not await store.renew(instance_id, self.lease_ms, self._load):
                    lose(f"the lease of {self._lease_s:g} s was not renewed in time")
                    return
