"""Which faults, when, on whom: drawn from a seed before the run begins, so that the same seed gives the same plan."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

FIRST_S = 2.0
QUIET_S = 3.0  # at the end, without a new fault

# Seconds that a fault lasts: for a stopped process beyond its lease, for a zombie beyond the start of a re-run.
DURATIONS: Mapping[str, tuple[float, float]] = {
    "kill": (0.1, 1.5),
    "stop": (0.3, 2.5),
    "zombie": (0.0, 0.3),
    "leave": (0.1, 1.0),
    "join": (4.0, 10.0),
    "cut": (0.5, 6.0),
    "delay": (2.0, 5.0),
    "loss": (2.0, 5.0),
    "redis stall": (1.5, 1.5),
    "redis kill": (0.1, 1.0),
    "redis empty": (0.1, 1.0),
    "output limits": (0.5, 1.0),
    "out of memory": (0.5, 1.5),
}
_PROCESSES = {
    "kill prefill": 3, "kill decode": 4, "kill frontend": 1, "kill sweeper": 1,
    "stop prefill": 2, "stop decode": 3, "stop frontend": 1, "stop sweeper": 1,
    "zombie decode": 1, "zombie prefill": 0.5,
    "leave prefill": 1, "leave decode": 1, "join prefill": 0.5, "join decode": 0.5, "join mixed": 1,
}  # fmt: skip
_NETWORK = {
    "cut prefill": 1, "cut decode": 1, "cut frontend": 1, "delay decode": 0.5, "delay frontend": 0.5,
    "loss prefill": 0.5, "loss frontend": 0.5,
}  # fmt: skip
_SERVER = {
    "redis stall": 1, "redis kill": 1, "redis empty": 0.5, "flushall": 0.5, "script flush": 1, "client kill": 1.5,
    "output limits": 1, "out of memory": 0.5, "failover": 1.5, "double failover": 0.7, "migrate": 1.5,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A sort of run.

    Attributes:
        weights: how often each fault is drawn, against the others.
        period_s: mean time between faults.
        has_skew: one front end and one decode instance have clocks that are wrong by an hour.
    """

    weights: Mapping[str, float]
    period_s: float
    has_skew: bool = False


PLANS: Mapping[str, Kind] = {
    "mixed": Kind({**_PROCESSES, **_NETWORK, **_SERVER}, 2.5, has_skew=True),
    "kills": Kind({"kill prefill": 1, "kill decode": 2}, 2.5),
    "processes": Kind(_PROCESSES, 1.5),
    "network": Kind(_NETWORK, 2.0),
    "server": Kind(_SERVER, 5.0),
    "stalls": Kind({"stop prefill": 1, "stop decode": 1, "zombie decode": 1}, 3.0),
    "frontends": Kind({"kill frontend": 2, "stop frontend": 1}, 4.0),
    "forgetful": Kind({"flushall": 1}, 4.0),
    "none": Kind({}, 1.0),
}


@dataclass(frozen=True)
class Event:
    """One fault.

    Attributes:
        pick: 0 to 1: which of those that it may be aimed at, in the order of their names.
        seconds: that it lasts, or until a process that it ended is replaced.
        amount: of a link: delay in s, or part of what is lost.
    """

    at_s: float
    fault: str
    pick: float
    seconds: float
    amount: float = 0.0


def draw_plan(name: str, seed: int, duration_s: float, possible: frozenset[str]) -> list[Event]:
    """Args:
    possible: the faults that the server can have; those of processes and links always are.
    """
    draw = random.Random(f"{name}/{seed}")
    kind = PLANS[name]
    weights = {f: w for f, w in kind.weights.items() if f not in _SERVER or f in possible}
    weights = {f: w for f, w in weights.items() if f not in _NETWORK or "links" in possible}
    events: list[Event] = []
    if not weights:
        return events
    at_s = FIRST_S + draw.uniform(0, 0.5) * kind.period_s
    while at_s < duration_s - QUIET_S:
        fault = draw.choices(list(weights), list(weights.values()))[0]
        low, high = DURATIONS.get(fault, DURATIONS.get(fault.split()[0], (0.0, 0.0)))
        amount = draw.uniform(0.05, 0.3) if fault.startswith("delay") else draw.uniform(0.01, 0.1)
        events.append(Event(round(at_s, 2), fault, draw.random(), round(draw.uniform(low, high), 2), round(amount, 3)))
        at_s += draw.uniform(0.5, 1.5) * kind.period_s
    return events
