"""What a kill costs: when the requests of the dead instance run elsewhere, and for how long their users see nothing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import NamedTuple

from redis.exceptions import RedisError

from splitwise_sched.keys import PREFILL_GROUP, Keys
from tests.chaos.fleet import Member
from tests.chaos.ledger import Ledger

LOOK_TIMEOUT_S = 0.5
MAX_HELD = 5000


@dataclass(frozen=True)
class Victim:
    """A run that an instance held when it was killed."""

    request_id: str
    epoch: int
    role: str
    killed_at: float


class Pause(NamedTuple):
    """
    Attributes:
        in_outage: a fault of the server fell into it, too.
    """

    seconds: float
    in_outage: bool


class Kills:
    """
    Attributes:
        outages: monotonic, (begin, end): faults of the server, until all agree on a master again.
    """

    def __init__(self, client, keys: Keys) -> None:
        self.outages: list[tuple[float, float]] = []
        self.victims: list[Victim] = []
        self.num_unseen = 0
        self._client, self._keys = client, keys

    async def note(self, member: Member, ledger: Ledger) -> None:
        """Right after the kill of an instance."""
        at = time.monotonic()
        try:
            held = await asyncio.wait_for(self.held_by(member), LOOK_TIMEOUT_S)
        except (RedisError, OSError, asyncio.TimeoutError):
            self.num_unseen += 1  # Redis was away, too
            return
        for request_id, epoch in held:
            if request_id in ledger.entries:
                ledger.entries[request_id].is_victim = True
                self.victims.append(Victim(request_id, epoch, member.role, at))

    async def held_by(self, member: Member) -> list[tuple[str, int]]:
        """Runs that an instance has, as (request id, epoch)."""
        instance_id = member.instance_id
        if instance_id is None:
            return []
        rows = await self._client.xrange(self._keys.inbox(instance_id), count=MAX_HELD)
        if member.role != "decode":
            queue = self._keys.queue
            pending = await self._client.xpending_range(queue, PREFILL_GROUP, "-", "+", MAX_HELD, instance_id)
            for claim in pending:
                rows += await self._client.xrange(queue, claim["message_id"], claim["message_id"])
        return [(fields["id"], int(fields["epoch"])) for _, fields in rows]

    def relocations(self, ledger: Ledger) -> list[Pause]:
        """From the kill until another instance was given the request, of those that went on."""
        again = ((victim, _began_again_at(victim, ledger)) for victim in self.victims)
        return [self._pause(victim.killed_at, max(at, victim.killed_at)) for victim, at in again if at is not None]

    def gaps(self, ledger: Ledger) -> list[Pause]:
        """Silence that users of streams saw whose decode instance was killed."""
        found: list[Pause] = []
        for victim in self.victims:
            entry, again_at = ledger.entries.get(victim.request_id), _began_again_at(victim, ledger)
            if entry is None or again_at is None or victim.role != "decode" or entry.outcome != "complete":
                continue
            around = [self._pause(*gap) for gap in entry.gaps if gap[0] <= again_at and gap[1] >= victim.killed_at]
            if around:
                found.append(max(around))
        return found

    def _pause(self, begin: float, end: float) -> Pause:
        return Pause(end - begin, any(begin <= over and end >= since for since, over in self.outages))


def _began_again_at(victim: Victim, ledger: Ledger) -> float | None:
    entry = ledger.entries.get(victim.request_id)
    return min((at for epoch, at in entry.epochs.items() if epoch > victim.epoch), default=None) if entry else None
