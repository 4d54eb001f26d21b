"""One run: start everything, load and faults, then wait until everything has gone that should go."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from splitwise_sched.keys import Keys
from splitwise_sched.settings import SchedulerSettings
from tests.chaos.checks import leftovers, repairs, unsettled
from tests.chaos.children.main import faketime_library
from tests.chaos.faults import Adversary
from tests.chaos.fleet import LINK, Fleet, Member
from tests.chaos.kills import Kills
from tests.chaos.leaks import leaks_of
from tests.chaos.ledger import Ledger
from tests.chaos.plan import PLANS, Event, draw_plan
from tests.chaos.report import Result
from tests.chaos.rigs import Rig, make_rig
from tests.chaos.spec import RunSpec

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 20.0
LINKED = ("frontend2", "prefill1", "decode1")
SKEW_S = 3600
SKEWED = {"frontend0": -SKEW_S, "decode0": SKEW_S}
POLL_S = 0.25
MARGIN_S = 5.0


async def run(spec: RunSpec, events: Sequence[Event] | None = None) -> Result:
    """One run; ``events`` instead of what its seed would draw.

    Raises RigMissing when the server is not on this machine.
    """
    folder = Path(tempfile.mkdtemp(prefix="splitwise-chaos-"))
    topic = f"chaos-{spec.seed}"
    rig = await asyncio.to_thread(make_rig, spec.server, topic)
    try:
        result = await _Run(spec, folder, rig, topic).go(events)
    finally:
        await rig.close()
    if result.problems:
        result.notes.append(f"logs are in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return result


class _Run:
    def __init__(self, spec: RunSpec, folder: Path, rig: Rig, topic: str) -> None:
        self.spec, self.rig = spec, rig
        self.settings: dict[str, Any] = {
            **rig.settings(), "scheduler_topic": topic, "scheduler_ttl": spec.ttl_s,
            "scheduler_max_attempts": 100, "frontend_lease_s": 4.0, **spec.settings,
        }  # fmt: skip
        self.parsed = SchedulerSettings(**self.settings)
        self.keys = Keys(topic)
        self.ledger = Ledger(spec.timeout_s, spec.grace_s)
        self.kills = Kills(rig.client, self.keys)
        template = {"timeout_s": spec.timeout_s, "step_s": spec.step_s, "mutation": spec.mutation}
        self.fleet = Fleet(folder, template, self._settings_of, self._hear)
        self.is_linked = rig.address is not None and any(
            fault.split()[0] in ("cut", "delay", "loss") for fault in PLANS[spec.plan].weights
        )
        lease_s = {role: self.parsed.instance_lease_s for role in ("prefill", "decode", "mixed", "sweeper")}
        lease_s["frontend"] = self.parsed.frontend_lease_s
        self.rate_each = spec.rate / spec.shape.frontend
        self.adversary = Adversary(
            self.fleet,
            rig,
            self.ledger,
            self.kills,
            keys=self.keys,
            lease_s=lease_s,
            orphan_grace_s=spec.grace_s / 2,
            rate_each=self.rate_each,
        )
        self.notes: list[str] = []
        self.failed: list[str] = []
        self.leaked: list[str] = []

    async def go(self, events: Sequence[Event] | None) -> Result:
        spec = self.spec
        possible = self.rig.faults | ({"links"} if self.is_linked else frozenset())
        plan = draw_plan(spec.plan, spec.seed, spec.duration_s, possible) if events is None else events
        async with self.fleet:
            members = await self._start()
            await asyncio.sleep(1.0)
            for member in members:
                member.sample()
            idle = {m.name: m.samples[-1] for m in members}
            begin = time.monotonic()
            for member in self.fleet.up("frontend"):
                self.fleet.command(member, "rate", self.rate_each)
            await self.adversary.carry_out(plan)
            await asyncio.sleep(max(0.0, begin + spec.duration_s - time.monotonic()))
            for member in self.fleet.up("frontend"):
                self.fleet.command(member, "rate", 0)
            load_s = time.monotonic() - begin
            await self._settle()
            for member in members:
                if member.is_up:
                    member.sample()
                    self.leaked += leaks_of(member, idle[member.name])
                elif member.is_spared:
                    self.failed.append(f"{member.name} ended by itself")
            if self.ledger.lost or self.ledger.wrong or self.leaked:
                for member in self.fleet.up():
                    member.signal(signal.SIGUSR1)
                await asyncio.sleep(1.0)
            else:
                await self._end()
        adversary = self.adversary
        self.notes += [f"first {name}: {text}" for name, text in self.ledger.refused_with.items()]
        return Result(
            spec=spec, server=self.rig.version, load_s=load_s, requests=self.ledger.to_json(), faults=adversary.done,
            skipped=dict(adversary.skipped), lost=self.ledger.lost, wrong=self.ledger.wrong, late=self.ledger.late,
            leaked=self.leaked, failed=self.failed + adversary.problems, notes=self.notes,
            relocations=self.kills.relocations(self.ledger), gaps=self.kills.gaps(self.ledger),
        )  # fmt: skip

    async def _start(self) -> list[Member]:
        if self.is_linked:
            link = await self.fleet.spawn(LINK, LINK, is_spared=True)
            await self.fleet.started(link)
        skewed = SKEWED if PLANS[self.spec.plan].has_skew else {}
        if skewed and faketime_library() is None:
            self.notes.append("no process had a wrong clock: there is no libfaketime (Debian: package faketime)")
            skewed = {}
        elif skewed:
            self.notes.append(f"wrong clocks: {', '.join(f'{name} {s:+d} s' for name, s in skewed.items())}")
        members = []
        for role, count in vars(self.spec.shape).items():
            for i in range(count):
                name = f"{role}{i}"
                members.append(await self.fleet.spawn(name, role, is_spared=i == 0, clock_offset_s=skewed.get(name, 0)))
        await self.fleet.started(*members)
        return members

    def _settings_of(self, name: str) -> dict[str, Any]:
        if name == LINK:
            return {"targets": {linked: self.rig.address for linked in LINKED}}
        if name in self.fleet.ports:
            return {**self.settings, "scheduler_host": "127.0.0.1", "scheduler_port": self.fleet.ports[name]}
        return self.settings

    def _hear(self, member: Member, event: list[Any]) -> None:
        kind, *args = event
        if kind == "submitting":
            self.ledger.submitting((member.name, member.generation), *args)
        elif kind == "end":
            self.ledger.ended(*args)
        elif kind == "assigned":
            request_id, epoch, _, at = args
            self.ledger.assigned(request_id, epoch, at)

    async def _settle(self) -> None:
        """No load comes any more: all requests have to end, and all that they held has to come free."""
        spec = self.spec

        async def nobody_waits() -> list[str]:
            return [f"{self.ledger.num_open} users wait"] if self.ledger.num_open else []

        await _until_none(nobody_waits, spec.timeout_s + spec.grace_s)
        self.ledger.close()
        await self.adversary.close()
        self.leaked += self.adversary.leaked
        # A failover may bring requests back that had ended; these live until their deadlines at most.
        loses_writes = "failover" in self.rig.faults
        longest_s = spec.grace_s + (spec.timeout_s if loses_writes else 0.0)
        self.leaked += await _until_none(lambda: unsettled(self.rig.client, self.keys, self.fleet), longest_s)
        if not loses_writes:
            self.leaked += await repairs(self.rig.client, self.keys)

    async def _end(self) -> None:
        """Everybody but sweepers closes; what is left in Redis has to go by itself."""
        workers = [m for m in self.fleet.up() if m.role not in ("sweeper", LINK)]
        self.failed += await self.fleet.close(workers, CLOSE_TIMEOUT_S)
        spec = self.spec
        self.leaked += await _until_none(
            lambda: leftovers(self.rig.client, self.keys), spec.timeout_s + spec.ttl_s + MARGIN_S
        )
        self.failed += await self.fleet.close(self.fleet.up("sweeper", LINK), CLOSE_TIMEOUT_S)


async def _until_none(look: Callable[[], Awaitable[list[str]]], timeout_s: float) -> list[str]:
    """Look until nothing is found, for so long; what was found last."""
    deadline = time.monotonic() + timeout_s
    while (found := await look()) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)
    return found
