"""What a run is, and what each of its processes is told at its start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

INSTANCE_ROLES = ("prefill", "decode", "mixed")


@dataclass(frozen=True)
class Shape:
    """Processes of each role. The first of a role is spared by faults aimed at processes, for leaks to show in it."""

    frontend: int = 3
    prefill: int = 3
    decode: int = 4
    sweeper: int = 2


@dataclass(frozen=True)
class RunSpec:
    """One run.

    Attributes:
        duration_s: of the load and the faults; what follows until everything has gone comes on top.
        rate: requests a second, over all front ends.
        timeout_s: deadline of each request; record and body stay for ``ttl_s`` longer.
        grace_s: past its deadline, a user is told within it.
        step_s: between two tokens of a stream.
        settings: of SchedulerSettings, beside the address.
        mutation: name of a planted bug (mutations.py).
    """

    seed: int = 1
    duration_s: float = 60.0
    plan: str = "mixed"
    server: str = "redis"
    rate: float = 200.0
    timeout_s: float = 30.0
    grace_s: float = 6.0
    ttl_s: float = 10.0
    step_s: float = 0.05
    shape: Shape = field(default_factory=Shape)
    settings: dict[str, Any] = field(default_factory=dict)
    mutation: str | None = None


@dataclass(frozen=True)
class ChildSpec:
    """One process.

    Attributes:
        generation: times that the name was used before.
        clock_offset_s: by which its wall clock is wrong.
        settings: arguments of SchedulerSettings.
    """

    name: str
    role: str
    generation: int
    hub: str
    log: str
    settings: dict[str, Any]
    timeout_s: float = 30.0
    step_s: float = 0.05
    clock_offset_s: int = 0
    mutation: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ChildSpec:
        return cls(**json.loads(text))
