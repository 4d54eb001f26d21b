"""Says that Redis is away when that begins, and now and then while it lasts; and that it is back."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

REPEAT_S = 10.0


class Outage:
    """One for each who tries again and again, at any rate."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._said_at = 0.0

    def failed(self, failure: Exception) -> None:
        now = time.monotonic()
        if self._began is None:
            self._began = now
        elif now - self._said_at < REPEAT_S:
            return
        self._said_at = now
        logger.warning("%s", failure)

    def over(self) -> None:
        if self._began is not None:
            logger.warning("Redis answers again, after %.1f s", time.monotonic() - self._began)
            self._began = None
