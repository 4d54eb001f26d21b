"""Kills, restarts and stalls instances of a fleet in turn, as machines would."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from engine.demo.fleet import Fleet
from splitwise_sched.records import InstanceRecord
from splitwise_sched.store import Store
from splitwise_sched.types import Role

PERIOD_S = 3.0
FIRST_TURN_TIMEOUT_S = 120.0
POLL_S = 0.02
WAIT_FOR_STREAM_S = 5.0


@dataclass
class Faults:
    """How many instances met with what."""

    killed_prefill: int = 0
    killed_decode: int = 0
    stalled_decode: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class Chaos:
    """``run`` until it is cancelled, by whoever gave it its time.

    Each turn a prefill and a decode instance are killed and started again, and a decode instance is stopped in
    mid-stream for longer than its lease; the next turn begins when the fleet is whole again.

    Args:
        on_fault: called with a line for people.
    """

    def __init__(self, fleet: Fleet, num_instances: int, on_fault: Callable[[str], None], seed: int = 0) -> None:
        self.faults = Faults()
        self._gone: set[str] = set()
        self._fleet = fleet
        self._num_instances = num_instances
        self._on_fault = on_fault
        self._rng = random.Random(seed)

    @property
    def had_each_fault(self) -> bool:
        return min(self.faults.to_dict().values()) > 0

    async def run(self) -> None:
        store = Store(self._fleet.settings)
        try:
            await store.connect()
            while True:
                await self._kill(store, Role.PREFILL)
                await self._kill(store, Role.DECODE)
                await asyncio.sleep(PERIOD_S)
                await self._stall(store)
                await self._fleet.wait_for_instances(self._num_instances)
                await asyncio.sleep(PERIOD_S)
        finally:
            await store.close()

    async def _kill(self, store: Store, role: Role) -> None:
        victim = await self._busy(store, role)
        self._fleet.kill(victim.name)
        self._gone.add(victim.instance_id)
        self._on_fault(f"killed {victim.name}")
        if role is Role.PREFILL:
            self.faults.killed_prefill += 1
        else:
            self.faults.killed_decode += 1
        self._fleet.restart(victim.name)

    async def _stall(self, store: Store) -> None:
        name = (await self._busy(store, Role.DECODE)).name
        process = self._fleet.members[name].process
        process.send_signal(signal.SIGSTOP)
        try:
            self._on_fault(f"stopped {name} in mid-stream")
            await asyncio.sleep(1.5 * self._fleet.settings.instance_lease_s)
        finally:
            process.send_signal(signal.SIGCONT)
        self.faults.stalled_decode += 1
        self._on_fault(f"let {name} go on, past its lease")

    async def _busy(self, store: Store, role: Role) -> InstanceRecord:
        """An instance that has work at this moment; any that serves after a while.

        One that was killed has its lease, and its work, for some seconds more: those are not its successor's.
        """
        deadline = time.monotonic() + WAIT_FOR_STREAM_S
        while True:
            live = [r for r in await store.live_instances() if r.role is role and r.instance_id not in self._gone]
            busy = [record for record in live if await self._has_work(store, record.instance_id, role)]
            if busy or (live and time.monotonic() > deadline):
                return self._rng.choice(busy or live)
            await asyncio.sleep(POLL_S)

    async def _has_work(self, store: Store, instance_id: str, role: Role) -> bool:
        if role is Role.DECODE:
            return await store.inbox_depth(instance_id) > 0
        return (await store.instance_fields(instance_id)).get("waiting", "0") != "0"
