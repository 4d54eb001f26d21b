"""What Redis holds, judged against what it should: nothing in anybody's hands once all requests have ended, and after
the last record has expired nothing but counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from splitwise_sched.keys import PREFILL_GROUP, Keys
from splitwise_sched.types import RequestState
from tests.chaos.fleet import Fleet

LIVE = {s.value for s in (RequestState.QUEUED, RequestState.PREFILL, RequestState.DECODE, RequestState.LOST)}
STREAMS = ("queue", "preferred:", "inbox:")
MEMORIES = ("prefill-rate", "service-ms", "virtual-time", "served:")  # measurements, which expire by themselves
MAX_NAMED = 5


async def _scan(client: Any, keys: Keys) -> list[str]:
    pattern = keys.prefix.replace("[", "\\[") + "*"
    return sorted([key async for key in client.scan_iter(match=pattern, count=1000)])


async def unsettled(client: Any, keys: Keys, fleet: Fleet) -> list[str]:
    """What is still held, reserved or waiting, while every process is there."""
    problems = []
    names = await _scan(client, keys)
    live = {m.instance_id for m in fleet.up() if m.is_instance}
    registered = set(await client.smembers(keys.instances))
    problems += [f"{i} is registered, and no process is behind it" for i in sorted(registered - live)]
    problems += [f"{i} runs, and is not registered" for i in sorted(map(str, live - registered))]
    for instance_id in sorted(registered & live):
        reserved = await client.hmget(keys.instance(instance_id), "reserved_tokens", "reserved_requests")
        if reserved != ["0", "0"]:
            problems.append(f"{instance_id} has {reserved[0]} tokens for {reserved[1]} requests reserved")
    for instance_id, load in await client.zrange(keys.decode_load, 0, -1, withscores=True):
        if load or instance_id not in live:
            problems.append(f"decode-load has {instance_id} at {load}")
    for name in names:
        short = name.removeprefix(keys.prefix)
        if short.startswith(STREAMS) and (length := await client.xlen(name)):
            problems.append(f"{short} has {length} entries")
        if short == "queue" or short.startswith("preferred:"):
            pending = (await client.xpending(name, PREFILL_GROUP))["pending"]
            if pending:
                problems.append(f"{short} has {pending} claims that nobody acknowledged")
        if short in ("deadlines", "waiting", "preferred") or short.startswith("waiting:"):
            problems.append(f"{short} has {await client.zcard(name)} entries")
    if int(await client.hget(keys.counters, "waiting") or 0):
        problems.append(f"counters say that {await client.hget(keys.counters, 'waiting')} wait")
    problems += await _live_records(client, keys, names)
    problems += [f"{m.name} still holds {m.stats[1]} requests" for m in fleet.up() if m.stats[1]]
    return problems


async def _live_records(client: Any, keys: Keys, names: list[str]) -> list[str]:
    prefix = keys.request("")
    found = await live_among(client, keys, [name.removeprefix(prefix) for name in names if name.startswith(prefix)])
    if not found:
        return []
    named = ", ".join(f"{request_id} {state}" for request_id, state in list(found.items())[:MAX_NAMED])
    return [f"{len(found)} records are of live requests: {named}"]


async def live_among(client: Any, keys: Keys, request_ids: Sequence[str]) -> dict[str, str]:
    """Those that have not ended, as far as Redis knows, and their states."""
    found: dict[str, str] = {}
    for start in range(0, len(request_ids), 500):
        some = request_ids[start : start + 500]
        pipe = client.pipeline(transaction=False)
        for request_id in some:
            pipe.hget(keys.request(request_id), "state")
        found |= {i: state for i, state in zip(some, await pipe.execute(), strict=True) if state in LIVE}
    return found


async def repairs(client: Any, keys: Keys) -> list[str]:
    """Reservations that a sweeper had to put right: a script, or a loss of data, had left them wrong."""
    count = int(await client.hget(keys.counters, "reservations_repaired") or 0)
    return [f"reservations of nobody were put right {count} times"] if count else []


async def leftovers(client: Any, keys: Keys) -> list[str]:
    """Keys that should be gone when every process has ended and all times are over."""
    problems = []
    for name in await _scan(client, keys):
        short = name.removeprefix(keys.prefix)
        if short == "counters":
            continue
        if short == "queue":
            # The queue is made by the first instance, and stays: an empty stream and its group.
            consumers = await client.xinfo_consumers(name, PREFILL_GROUP)
            if await client.xlen(name) or consumers:
                problems.append(f"queue has {await client.xlen(name)} entries and {len(consumers)} consumers")
            continue
        left_ms = await client.pttl(name)
        if left_ms == -1 or not short.startswith(MEMORIES):
            problems.append(f"{short} is left, for {left_ms} ms more (-1: for ever)")
    return problems
