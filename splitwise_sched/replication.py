"""What ``durability="wait"`` comes to: requests that a replica has, and those that none had in time."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

WARN_PERIOD_S = 10.0


class ReplicationWatch:
    """Counts what was not confirmed, and warns of it now and then."""

    def __init__(self, timeout_ms: int) -> None:
        self.num_unconfirmed = 0
        self._timeout_ms = timeout_ms
        self._warned_at = float("-inf")
        self._num_warned = 0

    def note(self, request_id: str, num_replicas: int) -> None:
        """A request is queued, and so many replicas have it."""
        if num_replicas > 0:
            return
        self.num_unconfirmed += 1
        now = time.monotonic()
        if now - self._warned_at < WARN_PERIOD_S:
            return
        logger.warning(
            "%d requests, the last of them %s, are queued on the master alone: no replica had them within %d ms "
            "(--durability-timeout-ms). They go on, and are put back from here should the master lose them; see that "
            "its replicas run and keep up",
            self.num_unconfirmed - self._num_warned,
            request_id,
            self._timeout_ms,
        )
        self._warned_at, self._num_warned = now, self.num_unconfirmed
