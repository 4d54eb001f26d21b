"""Every request of a run as seen from outside: submitted, ended, how; and what is wrong with it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.workload import ask_of, fault_in

PRUNED_EVERY = 5000
KEPT_S = 120.0


@dataclass(slots=True)
class Entry:
    """One request.

    Attributes:
        owner: the process whose user it is, as (name, generation).
        epochs: when a re-run was given to an instance, by epoch: monotonic time.
        is_victim: an instance that held it was killed: it is kept to the end of the run.
    """

    owner: tuple[str, int]
    submitted_at: float
    ended_at: float | None = None
    outcome: str = ""
    epochs: dict[int, float] = field(default_factory=dict)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    is_victim: bool = False


class Ledger:
    """
    Args:
        timeout_s, grace_s: of a request; nobody may wait for longer than both together.

    Attributes:
        entries: of requests that are open, or ended not long ago.
    """

    def __init__(self, timeout_s: float, grace_s: float) -> None:
        self.entries: dict[str, Entry] = {}
        self.open: dict[tuple[str, int], set[str]] = {}
        self.num_submitted = 0
        self.num_reruns = 0
        self.outcomes: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.refused_with: dict[str, str] = {}
        self.lost: list[str] = []
        self.wrong: list[str] = []
        self.late: list[str] = []
        self.num_tokens = 0
        self._wait_s = timeout_s + grace_s
        self._stopped: Counter[tuple[str, int]] = Counter()

    def submitting(self, owner: tuple[str, int], request_id: str) -> None:
        if request_id in self.entries:
            self.wrong.append(f"{request_id}: submitted twice by the harness")
        self.num_submitted += 1
        if self.num_submitted % PRUNED_EVERY == 0:
            self._prune()
        self.entries[request_id] = Entry(owner, time.monotonic())
        self.open.setdefault(owner, set()).add(request_id)

    def ended(
        self, request_id: str, outcome: str, tokens: list[int], gaps: list[tuple[float, float]], detail: str
    ) -> None:
        entry = self.entries.get(request_id)
        if entry is None or entry.ended_at is not None:
            before = "long ago" if entry is None else entry.outcome
            self.wrong.append(f"{request_id}: ended twice: {before}, then {outcome}")
            return
        entry.ended_at, entry.outcome, entry.gaps = time.monotonic(), outcome, gaps
        self.open[entry.owner].discard(request_id)
        self.outcomes[outcome] += 1
        self.num_tokens += len(tokens)
        ask = ask_of(request_id)
        waited_s = entry.ended_at - entry.submitted_at - self._stopped[entry.owner]
        if waited_s > self._wait_s:
            self.late.append(f"{request_id}: {outcome} after {waited_s:.1f} s")
        fault = fault_in(ask, tokens, complete=outcome == "complete")
        if fault is not None:
            self.wrong.append(f"{request_id}: {fault} ({outcome} {detail})")
        elif outcome == "refused":
            name, _, text = detail.partition(": ")
            self.refusals[name] += 1
            self.refused_with.setdefault(name, text)
        elif outcome == "cancelled":
            if ask.cancel_after is None:
                self.lost.append(f"{request_id}: cancelled, though its user stayed: {detail}")
        elif outcome != "complete":
            self.lost.append(f"{request_id}: {outcome} after {len(tokens)} tokens: {detail}")
        elif detail:
            self.wrong.append(f"{request_id}: {detail}")

    def assigned(self, request_id: str, epoch: int, at: float) -> None:
        entry = self.entries.get(request_id)
        if entry is not None and epoch not in entry.epochs:
            self.num_reruns += 1
            entry.epochs[epoch] = at

    def is_rerun(self, runs: list[tuple[str, int]]) -> bool:
        """Whether one of these has begun again elsewhere."""
        found = ((self.entries.get(request_id), epoch) for request_id, epoch in runs)
        return any(entry is not None and max(entry.epochs, default=0) > epoch for entry, epoch in found)

    def killed(self, owner: tuple[str, int]) -> set[str]:
        """A front end was killed: nobody waits for its requests any more, which are returned."""
        orphans = self.open.pop(owner, set())
        for request_id in orphans:
            self.entries[request_id].ended_at = time.monotonic()
        self.outcomes["orphaned"] += len(orphans)
        return orphans

    def stopped(self, owner: tuple[str, int], seconds: float) -> None:
        """A front end was stopped for so long; its users could hear nothing, which is no fault."""
        self._stopped[owner] += seconds  # type: ignore[assignment]

    @property
    def num_open(self) -> int:
        return sum(map(len, self.open.values()))

    def _prune(self) -> None:
        now = time.monotonic()
        self.entries = {
            request_id: entry
            for request_id, entry in self.entries.items()
            if entry.ended_at is None or entry.is_victim or now - entry.ended_at < KEPT_S
        }

    def close(self) -> None:
        """Whoever still waits is lost."""
        for owner, request_ids in self.open.items():
            for request_id in sorted(request_ids):
                waits_s = time.monotonic() - self.entries[request_id].submitted_at
                self.lost.append(f"{request_id}: no end after {waits_s:.1f} s, at {owner[0]}.{owner[1]}")

    def to_json(self) -> dict[str, Any]:
        return {
            "submitted": self.num_submitted,
            "outcomes": dict(self.outcomes),
            "refusals": dict(self.refusals),
            "tokens": self.num_tokens,
            "reruns": self.num_reruns,
        }
