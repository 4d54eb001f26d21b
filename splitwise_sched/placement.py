"""Which shard of its topic an instance serves.

A shard needs both prefill and decode, and all its instances have one model and KV that they can exchange; shards of a
topic may differ in that. So of those that have its kind, or nobody yet, an instance goes where it completes one; else
where nobody is, so that the next of the other role completes that; else where the fewest of its role are. Among equals
rendezvous hashing decides (Thaler and Ravishankar, 1998), so that an instance comes back to where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from splitwise_sched.errors import NoShardLeft, SplitwiseError
from splitwise_sched.records import InstanceRecord, Registration
from splitwise_sched.settings import SchedulerSettings
from splitwise_sched.store import Store
from splitwise_sched.types import Role

_NEEDS_ME, _EMPTY, _WHOLE, _MY_KIND_ALONE = range(4)
LOCK_MS = 5000
LOCK_POLL_S = 0.03

# [num_shards] the live instances of each; None for one that does not answer.
Census = Sequence[Sequence[InstanceRecord] | None]


def choose_shard(name: str, role: Role, census: Census, *, wants_company: bool = False) -> int | None:
    """
    Args:
        wants_company: it was alone where it was: only where the other kind is, is better.
    Returns:
        None when it wants company, and there is none.
    """

    def place(shard: int) -> tuple[int, int, int]:
        others = census[shard] or ()
        has_prefill = any(record.role is not Role.DECODE for record in others)
        has_decode = any(record.role is not Role.PREFILL for record in others)
        needs_me = (not has_prefill and role is not Role.DECODE) or (not has_decode and role is not Role.PREFILL)
        if others and needs_me:
            rank = _NEEDS_ME
        elif not others:
            rank = _EMPTY
        elif has_prefill and has_decode:
            rank = _WHOLE
        else:
            rank = _MY_KIND_ALONE
        num_alike = sum(record.role is role for record in others)
        return rank, num_alike, -_weight(name, shard)

    candidates = [shard for shard, others in enumerate(census) if others is not None]
    if wants_company:
        candidates = [shard for shard in candidates if place(shard)[0] in (_NEEDS_ME, _WHOLE)]
    return min(candidates, key=place, default=None)


def has_company(role: Role, others: Sequence[InstanceRecord]) -> bool:
    """Whether an instance of ``role`` can be half of a pair there."""
    if role is Role.MIXED:
        return True
    counterpart = Role.DECODE if role is Role.PREFILL else Role.PREFILL
    return any(record.role in (counterpart, Role.MIXED) for record in others)


def _weight(name: str, shard: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name}:{shard}".encode(), digest_size=8).digest(), "big")


async def take_census(settings: SchedulerSettings) -> Census:
    """Raises StoreUnavailable when no shard answers."""
    stores = [Store(settings, shard) for shard in range(settings.scheduler_shards)]
    try:
        found = await asyncio.gather(*(store.live_instances() for store in stores), return_exceptions=True)
    finally:
        await asyncio.gather(*(store.close() for store in stores))
    failures = [answer for answer in found if isinstance(answer, BaseException)]
    unforeseen = [failure for failure in failures if not isinstance(failure, SplitwiseError)]
    if unforeseen or len(failures) == len(found):
        raise [*unforeseen, *failures][0]
    return [None if isinstance(answer, BaseException) else answer for answer in found]


def open_to(registration: Registration, found: Census) -> Census:
    """The census for an instance of this kind: shards of another kind are None, as if they did not answer."""
    kind = registration.kind
    return [
        None if records is None or any(field_that_differs(kind, record) for record in records) else records
        for records in found
    ]


def field_that_differs(kind: Mapping[str, str], record: InstanceRecord) -> str | None:
    """The first by which instances of a kind and this one cannot be in one shard."""
    return next((name for name, value in kind.items() if record.fields.get(name, value) != value), None)


def no_shard_left(registration: Registration, topic: str, found: Census) -> NoShardLeft:
    """Says what each shard has that this instance has not."""
    kinds = []
    for shard, records in enumerate(found):
        for record in (records or ())[:1]:
            name = field_that_differs(registration.kind, record) or "model"
            kinds.append(f"shard {shard}: {record.model!r}, {name} {record.fields.get(name)!r}")
    return NoShardLeft(registration.model, topic, kinds)


@asynccontextmanager
async def one_at_a_time(settings: SchedulerSettings) -> AsyncIterator[None]:
    """Instances that start together choose one after another, as each should see the one before.

    Whoever does not get its turn within a few seconds goes ahead all the same.
    """
    async with _closing(Store(settings)) as store:
        key, mine = store.keys.placement, secrets.token_hex(8)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LOCK_MS / 1000
        while not await store.call("SET", key, mine, "NX", "PX", LOCK_MS) and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(LOCK_POLL_S)
        try:
            yield
        finally:
            with suppress(SplitwiseError):
                if await store.call("GET", key) == mine:
                    await store.call("UNLINK", key)


@asynccontextmanager
async def _closing(store: Store) -> AsyncIterator[Store]:
    try:
        yield store
    finally:
        await store.close()
