"""Carries a plan out: each fault at its time, on whoever is there to have it, and undone after its time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections import Counter
from collections.abc import Sequence

from redis.exceptions import RedisError

from splitwise_sched.keys import Keys
from tests.chaos.checks import live_among
from tests.chaos.fleet import LINK, Fleet, Member
from tests.chaos.kills import Kills
from tests.chaos.ledger import Ledger
from tests.chaos.plan import Event
from tests.chaos.rigs import Rig

logger = logging.getLogger(__name__)
LEAVE_TIMEOUT_S = 60.0
REPLACED_TIMEOUT_S = 15.0
HARMLESS = ("script flush", "client kill")  # the server answers all the while


class Adversary:
    """Args:
    lease_s: of instances and of front ends, by role; what is stopped, is for longer.
    orphan_grace_s: after two leases of a killed front end, until its requests must have ended.
    """

    def __init__(
        self, fleet: Fleet, rig: Rig, ledger: Ledger, kills: Kills, *, keys: Keys, lease_s: dict[str, float],
        orphan_grace_s: float, rate_each: float,
    ) -> None:  # fmt: skip
        self.done: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.problems: list[str] = []
        self.leaked: list[str] = []
        self._watches: list[asyncio.Task[None]] = []
        self._keys = keys
        self._orphan_grace_s = orphan_grace_s
        self._fleet, self._rig, self._ledger, self._kills = fleet, rig, ledger, kills
        self._lease_s = lease_s
        self._rate_each = rate_each
        self._server = asyncio.Lock()
        self._num_extra = 0

    async def carry_out(self, plan: Sequence[Event]) -> None:
        """Returns when every fault is over."""
        begin = time.monotonic()
        tasks = []
        for event in plan:
            await asyncio.sleep(max(0.0, begin + event.at_s - time.monotonic()))
            tasks.append(asyncio.create_task(self._try(event)))
        for event, outcome in zip(plan, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if isinstance(outcome, BaseException):
                self.problems.append(f"{event.fault} at {event.at_s:g} s could not be carried out: {outcome!r}")
                logger.error("%s at %g s failed", event.fault, event.at_s, exc_info=outcome)

    async def close(self) -> None:
        """Returns when all that was to happen after faults has, or should have."""
        await asyncio.gather(*self._watches)

    async def _try(self, event: Event) -> None:
        verb, _, role = event.fault.partition(" ")
        if verb in ("kill", "stop", "zombie", "leave") and role in self._lease_s:
            member = self._victim(role, event.pick)
            did = member is not None and await getattr(self, f"_{verb}")(member, event.seconds)
        elif verb == "join":
            did = await self._join(role, event.seconds)
        elif verb in ("cut", "delay", "loss"):
            did = await self._link(role, verb, event)
        elif self._server.locked():
            did = False
        else:
            async with self._server:
                logger.info("%s for %g s", event.fault, event.seconds)
                begin = time.monotonic()
                try:
                    await self._rig.do(event.fault, event.seconds)
                finally:
                    if event.fault not in HARMLESS:
                        self._kills.outages.append((begin, time.monotonic()))
                did = True
        (self.done if did else self.skipped)[event.fault] += 1

    def _victim(self, role: str, pick: float) -> Member | None:
        there = [
            m for m in self._fleet.up(role)
            if not m.is_spared and not m.is_stopped and not m.is_leaving and m.ready.done()
        ]  # fmt: skip
        return there[int(pick * len(there))] if there else None

    async def _kill(self, member: Member, seconds: float) -> bool:
        logger.info("kill %s (%s)", member.name, member.instance_id)
        member.is_leaving = True
        member.signal(signal.SIGKILL)
        if member.is_instance:
            await self._kills.note(member, self._ledger)
        await member.gone
        if member.role == "frontend":
            orphans = self._ledger.killed((member.name, member.generation))
            self._watches.append(asyncio.create_task(self._see_off(member.name, orphans)))
        await asyncio.sleep(seconds)
        await self._replace(member)
        return True

    async def _see_off(self, name: str, orphans: set[str]) -> None:
        """The requests of a front end that was killed have to end soon after its lease, wherever they are, and however
        often; while Redis is away, nobody can end them."""
        patience_s = 2 * self._lease_s["frontend"] + self._orphan_grace_s
        deadline = time.monotonic() + patience_s
        live = sorted(orphans)
        while live and time.monotonic() < deadline:
            await asyncio.sleep(0.25)
            try:
                live = sorted(await live_among(self._rig.client, self._keys, sorted(orphans)))
            except (RedisError, OSError):
                deadline = time.monotonic() + patience_s
            if self._server.locked():
                deadline = time.monotonic() + patience_s
        if live:
            self.leaked.append(f"{len(live)} requests of {name} outlived it for long: {', '.join(live[:3])}")

    async def _replace(self, member: Member) -> None:
        successor = await self._fleet.spawn(member.name, member.role)
        await self._fleet.started(successor)
        if member.role == "frontend":
            self._fleet.command(successor, "rate", self._rate_each)

    async def _stop(self, member: Member, seconds: float) -> bool:
        seconds += self._lease_s[member.role]
        logger.info("stop %s (%s) for %.1f s", member.name, member.instance_id, seconds)
        member.is_stopped = True
        member.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            if member.role == "frontend":
                self._ledger.stopped((member.name, member.generation), seconds)
            member.signal(signal.SIGCONT)
            member.is_stopped = False
        return True

    async def _zombie(self, member: Member, seconds: float) -> bool:
        """Stopped until one of its requests has run elsewhere for so long: what it sends then is stale for sure."""
        logger.info("stop %s (%s) until it is replaced", member.name, member.instance_id)
        member.is_stopped = True
        member.signal(signal.SIGSTOP)
        try:
            held: list[tuple[str, int]] = []
            with contextlib.suppress(RedisError, OSError):  # then it is stopped for so long
                held = await self._kills.held_by(member)
            deadline = time.monotonic() + REPLACED_TIMEOUT_S
            while not self._ledger.is_rerun(held) and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(seconds)
        finally:
            member.signal(signal.SIGCONT)
            member.is_stopped = False
        return True

    async def _leave(self, member: Member, seconds: float) -> bool:
        logger.info("%s (%s) leaves", member.name, member.instance_id)
        member.is_leaving = True
        self._fleet.command(member, "leave")
        await asyncio.wait([member.gone], timeout=LEAVE_TIMEOUT_S)
        if member.is_up:
            self.problems.append(f"{member.name} did not leave within {LEAVE_TIMEOUT_S:g} s")
            member.signal(signal.SIGKILL)
            await member.gone
        await asyncio.sleep(seconds)
        await self._replace(member)
        return True

    async def _join(self, role: str, seconds: float) -> bool:
        self._num_extra += 1
        member = await self._fleet.spawn(f"{role}-extra{self._num_extra}", role)
        member.is_leaving = True
        logger.info("%s joins", member.name)
        await self._fleet.started(member)
        await asyncio.sleep(seconds)
        self._fleet.command(member, "leave")
        await asyncio.wait([member.gone], timeout=LEAVE_TIMEOUT_S)
        if member.is_up:
            self.problems.append(f"{member.name} did not leave within {LEAVE_TIMEOUT_S:g} s")
        return True

    async def _link(self, role: str, mode: str, event: Event) -> bool:
        names = [m.name for m in self._fleet.up(role) if m.name in self._fleet.ports]
        if not names:
            return False
        name = names[int(event.pick * len(names))]
        logger.info("%s of %s for %.1f s", mode, name, event.seconds)
        link = self._fleet.members[LINK]
        self._fleet.command(link, "link", name, mode, event.amount)
        await asyncio.sleep(event.seconds)
        self._fleet.command(link, "link", name, "pass", 0.0)
        return True
