"""What Redis says is trusted in nothing: whatever stands in records, scripts get through, and others are served."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitwise_sched.connection import as_dict
from splitwise_sched.errors import Fenced
from splitwise_sched.store import Flow, Store
from splitwise_sched.sweeper import Sweeper
from tests.integration.test_scripts_model import loop_of, store_for
from tests.scripts_topic import HOUR_MS, claim, register, reply_of

NUM_EXAMPLES = int(os.environ.get("SPLITWISE_FUZZ_EXAMPLES", "40"))
FIELDS = (
    "state", "epoch", "attempts", "frontend", "nonce", "model", "input_tokens", "kv_tokens", "class", "weight",
    "tenant", "prefer", "prefer_ms", "created_ms", "deadline_ms", "queue", "queue_entry", "prefill", "decode",
    "inbox_entry", "kv_reserved", "claimed_ms", "reason", "history", "orphaned",
)  # fmt: skip
LEASE_FIELDS = (
    "role", "capacity_tokens", "capacity_requests", "block_size", "reserved_tokens", "reserved_requests", "draining",
    "avoids_until_ms",
)  # fmt: skip
_garbage = st.one_of(
    st.sampled_from(
        ["", "nan", "-nan", "inf", "-1", "1e308", "0x7fffffff", "9" * 400, "1.5", "0", "queued", "decode", "queue",
         "0-0", "counters", "request:other", "d", "p", "{}", "\\", "*", "$", "> <", "1-1 2-2", "\x00", "é" * 50]
    ),
    st.binary(max_size=40),
)  # fmt: skip
_GONE = object()
_damage = st.dictionaries(st.sampled_from(FIELDS), st.one_of(_garbage, st.just(_GONE)), min_size=1, max_size=5)
_lease_damage = st.dictionaries(st.sampled_from(LEASE_FIELDS), _garbage, max_size=3)
STATES = ("room", "queued", "preferred", "claimed", "prefill", "decode", "lost", "done")


async def bring(store: Store, state: str) -> None:
    """Request ``victim`` into ``state``, beside one that is well, on prefill p and decode d."""
    await register(store, "p", "prefill", 1024, 8)
    await register(store, "d", "decode", 1024, 8)
    await store.open_out("f0", HOUR_MS)
    if state == "room":
        await store.call("ZADD", f"{store.keys.prefix}waiting", 0, "other")
        await store.call("ZADD", f"{store.keys.prefix}waiting:other", 0, "-")
        await store.call("ZADD", f"{store.keys.prefix}waiting:other:-", 1, "nobody")
    await submit(store, "victim", prefer="p" if state == "preferred" else "")
    if state in ("claimed", "prefill", "decode", "lost", "done"):
        claims = await claim(store, "p", 1)
        if state != "claimed":
            await store.bind("p", claims, HOUR_MS)
    if state in ("decode", "done"):
        await reply_of(store.step, "victim", 1, "d", {})
    if state == "lost":
        await reply_of(store.give_back, "victim", 1, "d", "it broke", retry=True, retain_ms=HOUR_MS)
    if state == "done":
        await finish(store, "victim", 1)


async def submit(store: Store, request_id: str, prefer: str = "") -> Any:
    return await store.submit(
        request_id, b"body", frontend_id="f0", nonce=f"n-{request_id}", timeout_ms=HOUR_MS, retain_ms=HOUR_MS,
        input_tokens=8, kv_tokens=16, model="toy", flow=Flow("default", 4, "-"), preference=(prefer, HOUR_MS),
    )  # fmt: skip


async def resubmit(store: Store, recall: bool) -> Any:
    return await store.resubmit(
        "victim", b"again", frontend_id="f0", nonce="n-victim", epoch_seen=1, timeout_ms=HOUR_MS, retain_ms=HOUR_MS,
        input_tokens=8, kv_tokens=16, model="toy", attempts=0, done_too=True, recall=recall,
        flow=Flow("default", 4, "-"),
    )  # fmt: skip


async def finish(store: Store, request_id: str, epoch: int) -> int:
    output = f'{epoch}:0:7:{{"finish":"stop"}}'
    return int(await reply_of(store.finish, request_id, epoch, "d", output, retain_ms=HOUR_MS, reason="stop", notes={}))


async def damage(store: Store, key: str, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if value is _GONE:
            await store.call("HDEL", key, name)
        else:
            await store.call("HSET", key, name, value)


async def everything(store: Store) -> None:
    """Every script once. A CommandRefused is a script that ended in the middle."""
    claims = await claim(store, "p", 8)
    claims += await claim(store, "p", 8)
    with contextlib.suppress(Fenced):
        await store.bind("p", claims, HOUR_MS)
    await reply_of(store.step, "victim", 1, "d", {})
    await reply_of(store.give_back, "victim", 1, "d", "x", retry=True, pair_failed=True, retain_ms=HOUR_MS)
    await finish(store, "victim", 1)
    for recall in (True, False):
        await resubmit(store, recall)
    await submit(store, "victim")
    await store.call("ZADD", store.keys.deadlines, "XX", 1, "victim")
    await store.audit(0, 100)
    await store.expire(100, HOUR_MS)
    await resubmit(store, False)
    await store.close_out("f0")
    await store.cancel_orphans("f0", 100, HOUR_MS)
    await store.open_out("f0", HOUR_MS)
    await resubmit(store, False)
    await store.cancel("victim", "enough", HOUR_MS)
    for name in ("p", "d"):
        await store.drain(name)
        await store.reap(name, 100, leave=True)


async def well_again(store: Store) -> None:
    """Another request is served as if nothing had been."""
    await Sweeper(store, retain_ms=HOUR_MS, period_s=3600).sweep()
    await register(store, "p2", "prefill", 1024, 8)
    await register(store, "d2", "decode", 1024, 8)
    await store.open_out("f0", HOUR_MS)
    verdict, _ = await submit(store, "well")
    assert verdict == "QUEUED"
    # It expires by itself, within moments.
    await store.call("DEL", f"{store.keys.prefix}oldest-claim")
    for _ in range(4):
        claims = await claim(store, "p2", 8)
        bound = await store.bind("p2", claims, HOUR_MS) if claims else []
        if any((b.request_id, b.verdict, b.decode_instance) == ("well", "BOUND", "d2") for b in bound):
            break
    else:
        raise AssertionError(await store.request_record("well"))
    output = '1:0:7:{"finish":"stop"}'
    given_ = {"retain_ms": HOUR_MS, "reason": "stop", "notes": {}}
    assert await reply_of(store.finish, "well", 1, "d2", output, **given_) == 1


async def forget(store: Store) -> None:
    keys = await store.call("KEYS", store.keys.prefix.replace("[", "\\[") + "*", binary=True)
    if keys:
        await store.call("UNLINK", *keys)


def test_scripts_get_through_whatever_stands_in_a_record(redis_server):
    store = store_for(redis_server)
    with loop_of(store) as loop:

        @settings(max_examples=NUM_EXAMPLES * len(STATES), deadline=None, database=None, print_blob=False,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(st.sampled_from(STATES), _damage, _lease_damage, _lease_damage)
        def holds(state: str, record: dict[str, Any], of_p: dict[str, Any], of_d: dict[str, Any]) -> None:
            async def play() -> None:
                await forget(store)
                await bring(store, state)
                await damage(store, store.keys.request("victim"), record)
                await damage(store, store.keys.instance("p"), of_p)
                await damage(store, store.keys.instance("d"), of_d)
                await asyncio.wait_for(everything(store), 10)
                await asyncio.wait_for(well_again(store), 10)

            loop.run_until_complete(play())

        holds()
        loop.run_until_complete(forget(store))


async def test_request_whose_record_is_not_of_this_version_goes_to_the_dead_letter_with_the_reason(redis_server):
    store = store_for(redis_server)
    await store.connect()
    try:
        await bring(store, "queued")
        await submit(store, "other")
        await store.call("HSET", store.keys.request("victim"), "kv_tokens", "many")
        claims = await claim(store, "p", 8)
        verdicts = {b.request_id: b.verdict for b in await store.bind("p", claims, HOUR_MS)}
        assert verdicts == {"victim": "STALE", "other": "BOUND"}
        record = await store.request_record("victim")
        assert record["state"] == "failed" and record["reason"].endswith("does not read: kv_tokens")
        ((_, entry),) = await store.call("XRANGE", store.keys.dead_letter, "-", "+")
        assert as_dict(entry)["id"] == "victim" and "kv_tokens" in as_dict(entry)["why"]
        out = await store.call("XRANGE", store.keys.out("f0"), "-", "+")
        assert "does not read: kv_tokens" in str(out)
    finally:
        await forget(store)
        await store.close()
