"""What an instance holds: runs that wait to be admitted, in order, and those that its engine has. No I/O."""

from __future__ import annotations

from collections import deque
from typing import Any

from splitwise_sched.fastdeploy.messages import Run

HANDED_OVER_S = 60.0
EARLY_S = 10.0
MAX_EARLY = 10_000
MAX_OVER = 10_000


class Runs:
    """The runs by the name that the engine has for each; for one thread at a time."""

    def __init__(self) -> None:
        self.waiting: deque[Run] = deque()
        self._by_name: dict[str, Run] = {}
        self._names: dict[tuple[str, int], str] = {}
        self._over: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, run: Run, *, waits: bool) -> None:
        self._by_name[run.name] = run
        self._names[(run.request_id, run.epoch)] = run.name
        if waits:
            self.waiting.append(run)

    def get(self, name: str) -> Run | None:
        """The run that the engine calls so; None when it is over, or is not known."""
        return self._by_name.get(name)

    def is_over(self, name: str) -> bool:
        """It ended, or was taken away, not long ago."""
        return name in self._over

    def drop(self, request_id: str, epoch: int) -> None:
        name = self._names.pop((request_id, epoch), None)
        if name is None:
            return
        run = self._by_name.pop(name)
        if run in self.waiting:
            self.waiting.remove(run)
        self._over[name] = None
        if len(self._over) > MAX_OVER:
            del self._over[next(iter(self._over))]

    def clear(self) -> None:
        for request_id, epoch in list(self._names):
            self.drop(request_id, epoch)

    def forget_silent(self, now: float, period_s: float) -> list[Run]:
        """Drop what nothing was told of for ``period_s``; returns it."""
        silent = [
            run
            for run in self._by_name.values()
            if now - run.told_at > (min(period_s, HANDED_OVER_S) if run.is_handed_over else period_s)
        ]
        for run in silent:
            self.drop(run.request_id, run.epoch)
        return silent


class EarlyResults:
    """Results of runs that this decode instance is not told of yet: its engine may hear of them from prefill first."""

    def __init__(self) -> None:
        self._held: deque[tuple[float, str, Any]] = deque()

    def hold(self, now: float, name: str, result: Any) -> None:
        while self._held and (now - self._held[0][0] > EARLY_S or len(self._held) >= MAX_EARLY):
            self._held.popleft()
        self._held.append((now, name, result))

    def take(self, name: str) -> list[Any]:
        """All that are held of this run, in order."""
        taken = [result for _, held_name, result in self._held if held_name == name]
        if taken:
            self._held = deque(item for item in self._held if item[1] != name)
        return taken
