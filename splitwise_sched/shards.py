"""A topic's shards as a front end has them: what it keeps of each, and which of them gets a request.

A shard is a cell: its queue, its instances and the pairs that they form are its own, and of one model and KV layout;
another shard may have others. With one shard, none of the choosing here runs.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence

from splitwise_sched.errors import SplitwiseError, UnknownModel
from splitwise_sched.records import InstanceRecord
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.store import Store
from splitwise_sched.types import Role

INSTANCES_CACHE_S = 0.5
LOOK_PERIOD_S = 0.25


class Shard:
    """
    Attributes:
        index: its number in the topic.
        read_up_to: the last entry that was read of this front end's stream there.
        seen_at: monotonic, s: when Redis last answered.
        caught_up_at: monotonic, s: what was in this front end's stream by then is read.
        depth: requests queued or in prefill, as of the last look, and those that this front end has added since.
        model: of the instances that are or were there; None: nobody was seen yet.
        is_live: somebody is there.
        unserved_since: monotonic, s: since when no pair could be formed there, as far as is known; None: one can.
    """

    def __init__(self, settings: SchedulerSettings, index: int) -> None:
        self.index = index
        self.store = Store(settings, index)
        self.read_up_to = "0-0"
        self.seen_at = 0.0
        self.caught_up_at = 0.0
        self.verify_now = asyncio.Event()
        self.spill_now = asyncio.Event()
        self.depth = 0
        self.model: str | None = None
        self.is_live = False
        self.unserved_since: float | None = time.monotonic()
        self._num_prefill = 0
        self._reading: asyncio.Task[list[InstanceRecord]] | None = None
        self._reading_since = float("-inf")
        self._instances: tuple[float, list[InstanceRecord]] = (float("-inf"), [])

    async def instances(self, max_age_s: float = INSTANCES_CACHE_S) -> list[InstanceRecord]:
        """Live instances, as of so long ago at most."""
        asked_at = time.monotonic()
        read_at, records = self._instances
        if asked_at - read_at <= max_age_s:
            return records
        # Many may ask at a time: the first one's answer, or failure, is all of theirs.
        reading = self._reading
        if reading is None or reading.done() or asked_at - self._reading_since > max_age_s:
            reading = self._reading = asyncio.create_task(self._read_instances(asked_at))
            self._reading_since = asked_at
            # Whoever waited for it may have gone.
            reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(reading)

    async def _read_instances(self, began_at: float) -> list[InstanceRecord]:
        records = await self.store.live_instances()
        if began_at > self._instances[0]:
            self._instances = (began_at, records)
        return records

    @property
    def pressure(self) -> float:
        """Requests that wait for each prefill instance."""
        return self.depth / max(1, self._num_prefill)

    async def look(self, max_age_s: float = INSTANCES_CACHE_S) -> None:
        """How long its queue is, and who is there to serve it. A shard that does not answer has nobody."""
        try:
            depth, records = await asyncio.gather(self.store.depth(), self.instances(max_age_s))
        except SplitwiseError:
            self.is_live = False
            self._serves(False)
            return
        self.is_live = bool(records)
        if records:
            self.model = records[0].model
        self.depth = depth
        self._num_prefill = sum(record.role is not Role.DECODE for record in records)
        self._serves(self._num_prefill > 0 and any(record.role is not Role.PREFILL for record in records))

    def _serves(self, can_pair: bool) -> None:
        if can_pair:
            self.unserved_since = None
        elif self.unserved_since is None:
            self.unserved_since = time.monotonic()


class Shards:
    """All of a topic; ``shards[index]``, and in order by iteration."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._shards = tuple(Shard(settings, index) for index in range(settings.scheduler_shards))
        # Longer than an instance that lost its lease takes to come back, or a restarted one to take its place.
        self._patience_s = 2 + 2 * settings.instance_lease_s

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Shard:
        return self._shards[index]

    def __iter__(self) -> Iterator[Shard]:
        return iter(self._shards)

    async def look(self) -> None:
        await asyncio.gather(*(shard.look() for shard in self._shards))

    async def keep_looking(self) -> None:
        """Until cancelled. Between two looks, each submit counts itself."""
        while True:
            await asyncio.sleep(LOOK_PERIOD_S)
            await self.look()

    async def choose(self, model: str, prefer: Sequence[str]) -> Shard:
        """Where a new request goes: among the shards of its model to the instance that it prefers, or else to where
        fewer wait.

        Of two random shards the one with less pressure: many front ends that look at the same figures do not all run
        to the same shard (Mitzenmacher, The Power of Two Choices, 2001).
        """
        if len(self._shards) == 1:
            return self._shards[0]
        shards = await self._of_model(model)
        serving = [shard for shard in shards if shard.unserved_since is None]
        if prefer:
            for wanted in prefer:
                for shard in serving:
                    if any(wanted in (r.name, r.instance_id) for r in await shard.instances()):
                        return shard
        if not serving:
            # Whoever was there last may be back soon.
            return _served_last(shards)
        chosen = serving[0] if len(serving) == 1 else min(random.sample(serving, 2), key=lambda shard: shard.pressure)
        chosen.depth += 1
        return chosen

    def refuge(self, shard: Shard, model: str) -> Shard | None:
        """Where a request for ``model`` goes on whose shard has another by now, or has had nobody to serve it for some
        time; None: it stays."""
        if len(self._shards) == 1:
            return None
        others = [other for other in self._shards if other is not shard and other.model == model]
        serving = [other for other in others if other.unserved_since is None]
        if shard.model not in (None, model):
            return _least_pressed(serving) if serving else _served_last(others) if others else None
        since = shard.unserved_since
        if since is None or time.monotonic() - since < self._patience_s:
            return None
        return _least_pressed(serving) if serving else None

    async def _of_model(self, model: str) -> Sequence[Shard]:
        """Those that have it, or had it last; all of them when nobody is anywhere.

        Raises:
            UnknownModel: others are served, and this one is not.
        """
        for has_looked in (False, True):
            if found := [shard for shard in self._shards if shard.model == model]:
                return found
            if has_looked:
                break
            # Its first instance may have come since the last look.
            await self.look()
        if served := self.served:
            raise UnknownModel(model, served)
        return self._shards

    @property
    def served(self) -> list[str]:
        """Models that somebody serves."""
        return sorted({shard.model for shard in self._shards if shard.is_live and shard.model is not None})


def _least_pressed(shards: Sequence[Shard]) -> Shard:
    return min(shards, key=lambda shard: shard.pressure)


def _served_last(shards: Sequence[Shard]) -> Shard:
    return max(shards, key=lambda shard: (shard.unserved_since or 0.0, -shard.index))
