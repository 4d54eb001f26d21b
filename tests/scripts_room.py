"""The waiting room as it must be, without Redis: start-time fair queueing, between classes and inside them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Protocol


class Waiter(Protocol):
    """What waits: whose it is, what it costs, and who of a tenant goes first."""

    request_id: str

    @property
    def priority(self) -> str: ...

    @property
    def tenant(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def cost(self) -> int: ...

    @property
    def turn(self) -> int: ...


class Ring:
    """Flows that have something waiting, by the start of their next service."""

    def __init__(self) -> None:
        self.starts: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        self.now: float | None = None

    def activate(self, flow: str) -> None:
        self.starts.setdefault(flow, max(self.now or 0.0, self.ends.get(flow, 0.0)))

    def first(self) -> str:
        return min(self.starts, key=lambda flow: (self.starts[flow], flow))

    def charge(self, flow: str, amount: float, *, has_more: bool) -> None:
        start = self.starts[flow]
        self.now = round(start, 6)
        if has_more:
            self.starts[flow] = start + amount
        else:
            del self.starts[flow]
            self.ends = {f: end for f, end in self.ends.items() if end > start} | {flow: start + amount}

    def leave(self, flow: str) -> None:
        """It has nothing waiting any more, and was not served."""
        self.starts.pop(flow, None)


class Room:
    def __init__(self) -> None:
        self.classes = Ring()
        self.tenants: defaultdict[str, Ring] = defaultdict(Ring)
        self.waiting: defaultdict[tuple[str, str], list[Any]] = defaultdict(list)

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def __contains__(self, waiter: Waiter) -> bool:
        return waiter in self.waiting[waiter.priority, waiter.tenant]

    def enter(self, waiter: Waiter) -> None:
        waiters = self.waiting[waiter.priority, waiter.tenant]
        waiters.append(waiter)
        waiters.sort(key=lambda w: w.turn)
        self.tenants[waiter.priority].activate(waiter.tenant)
        self.classes.activate(waiter.priority)

    def leave(self, waiter: Waiter) -> None:
        priority, tenant = waiter.priority, waiter.tenant
        self.waiting[priority, tenant].remove(waiter)
        if not self.waiting[priority, tenant]:
            self.tenants[priority].leave(tenant)
            if not self.tenants[priority].starts:
                self.classes.leave(priority)

    def serve(self) -> Any:
        """Whose turn it is; it is charged and leaves."""
        priority = self.classes.first()
        tenants = self.tenants[priority]
        tenant = tenants.first()
        waiter = self.waiting[priority, tenant].pop(0)
        tenants.charge(tenant, waiter.cost, has_more=bool(self.waiting[priority, tenant]))
        self.classes.charge(priority, waiter.cost / waiter.weight, has_more=bool(tenants.starts))
        return waiter

    def snapshot(self) -> dict[str, Any]:
        """As ``scripts_topic.room`` reads it from a server."""
        rings = {"classes": self.classes, **{f"class:{name}": ring for name, ring in self.tenants.items()}}
        return {
            "waiting": {flow: [w.request_id for w in waiters] for flow, waiters in self.waiting.items() if waiters},
            "starts": {name: _rounded(ring.starts) for name, ring in rings.items() if ring.starts},
            "ends": {name: _rounded(ring.ends) for name, ring in rings.items() if ring.ends},
            "now": {name: ring.now for name, ring in rings.items() if ring.now is not None},
        }


def _rounded(times: dict[str, float]) -> dict[str, float]:
    return {flow: round(time, 6) for flow, time in times.items()}
