"""Runs of requests that were assigned to an instance and have not ended there."""

from __future__ import annotations

from collections.abc import Callable

from splitwise_sched.records import Dropped, InstanceEvent, Run

MAX_DROPPED_EARLY = 10_000


class Runs:
    """Those of one registration.

    Args:
        emit: is told of a run that is dropped.

    Attributes:
        frontends: whom each run's outputs go to.
    """

    def __init__(self, emit: Callable[[InstanceEvent], None]) -> None:
        self._emit = emit
        self.frontends: dict[Run, str] = {}
        self._dropped_early: dict[Run, None] = {}

    def __len__(self) -> int:
        return len(self.frontends)

    def __contains__(self, run: Run) -> bool:
        return run in self.frontends

    def hold(self, run: Run, frontend_id: str) -> bool:
        """A run was assigned. False: the word to drop it came on another connection, before it."""
        if run in self._dropped_early:
            del self._dropped_early[run]
            return False
        self.frontends[run] = frontend_id
        return True

    def forget(self, run: Run) -> None:
        """It goes on elsewhere, or has ended."""
        self.frontends.pop(run, None)

    def drop(self, request_id: str, epoch: int, reason: str) -> None:
        """It is over here, others say; a run that is not known yet is not taken when it comes."""
        run = (request_id, epoch)
        if self.frontends.pop(run, None) is not None:
            self._emit(Dropped(request_id, epoch, reason))
            return
        self._dropped_early[run] = None
        if len(self._dropped_early) > MAX_DROPPED_EARLY:
            del self._dropped_early[next(iter(self._dropped_early))]
