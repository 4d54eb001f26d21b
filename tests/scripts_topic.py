"""One operation at a time on a real topic, and all that the topic holds as a value."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

from splitwise_sched.connection import as_dict
from splitwise_sched.errors import CommandRefused, Fenced
from splitwise_sched.keys import PREFILL_GROUP
from splitwise_sched.outputs import Lost, decode_output
from splitwise_sched.records import Claim, Registration
from splitwise_sched.store import HELLO, Store
from splitwise_sched.types import Role

HOUR_MS = 3_600_000
BLOCK_SIZE = 16
PRIORITIES = {"interactive": 8, "default": 4, "batch": 1}
TENANTS = ("-", "mine", "yours")


class Parted(AssertionError):
    """The server does not do what the model does."""


async def claim(store: Store, name: str, count: int) -> list[Claim]:
    """What an instance claims, without waiting. Raises Fenced when a queue is gone."""
    k = store.keys
    queues = {k.preferred(name): f"preferred:{name}", k.queue: "queue"}
    try:
        reply = await store.call(
            "XREADGROUP", "GROUP", PREFILL_GROUP, name, "COUNT", count, "STREAMS", *queues, *(">" for _ in queues)
        )
    except CommandRefused as exc:
        raise Fenced(str(exc)) from exc
    streams = reply.items() if isinstance(reply, dict) else reply or []
    rows = [(queues[key], entry, as_dict(fields)) for key, entries in streams for entry, fields in entries]
    return [Claim(queue, entry, fields["id"], int(fields["epoch"])) for queue, entry, fields in rows]


async def reply_of(operation: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
    """The reply that ``on_reply`` gets."""
    reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    operation(*args, **kwargs, on_reply=reply.set_result)
    answer = await asyncio.wait_for(reply, 10)
    if isinstance(answer, Exception):
        raise answer
    return answer


async def register(store: Store, name: str, role: str, tokens: int, requests: int) -> tuple[str, ...]:
    return await store.register(
        name, Registration(name, Role(role), "toy", {}, tokens, requests, BLOCK_SIZE, 4096), HOUR_MS
    )


async def snapshot(store: Store, names: list[str], frontends: list[str], request_ids: list[str]) -> dict[str, Any]:
    """Everything that the topic holds, in the form of ``scripts_model.Topic.snapshot``; one round trip."""
    k = store.keys
    call = store.call

    async def each(*calls: Any) -> list[Any]:
        return list(await asyncio.gather(*calls))

    keys = [k.queue, *map(k.preferred, names)]
    (
        queues, pending, registered, load, deadlines, waiting, preferred, dead, counters, records, bodies, leases,
        inboxes, controls, outs, opened,
    ) = await asyncio.gather(
        each(*(call("XRANGE", key, "-", "+") for key in keys)),
        asyncio.gather(*(call("XPENDING", q, PREFILL_GROUP, "-", "+", 1000) for q in keys), return_exceptions=True),
        call("SMEMBERS", k.instances),
        call("ZRANGE", k.decode_load, 0, -1, "WITHSCORES"),
        call("ZRANGE", k.deadlines, 0, -1),
        room(store),
        call("ZRANGE", f"{k.prefix}preferred", 0, -1),
        call("XRANGE", k.dead_letter, "-", "+"),
        store.counters(),
        each(*(store.request_record(i) for i in request_ids)),
        each(*(call("GET", k.body(i), binary=True) for i in request_ids)),
        each(*(store.instance_fields(n) for n in names)),
        each(*(call("XRANGE", k.inbox(n), "-", "+") for n in names)),
        each(*(call("XRANGE", k.control(n), "-", "+") for n in names)),
        each(*(call("XRANGE", k.out(f), "-", "+") for f in frontends)),
        call("ZRANGE", k.frontends, 0, -1),
    )  # fmt: skip
    entries: dict[tuple[str, str], dict[str, str]] = {}
    in_queues: dict[str, list[tuple[str, int, str | None]]] = {}
    for key, rows, held in zip(keys, queues, pending, strict=True):
        claimed = {} if isinstance(held, CommandRefused) else {row[0]: row[1] for row in held}
        if not set(claimed) <= {entry for entry, _ in rows}:
            raise Parted("a deleted entry of a queue is still pending")
        name = key.removeprefix(k.prefix)
        entries |= {(name, entry): as_dict(fields) for entry, fields in rows}
        in_queues[name] = [(f["id"], int(f["epoch"]), claimed.get(e)) for e, f in ((e, as_dict(f)) for e, f in rows)]
    requests = {}
    for request_id, record, body in zip(request_ids, records, bodies, strict=True):
        if record:
            requests[request_id] = {
                **{name: record.get(name) for name in ("state", "frontend", "prefill", "decode", "reason")},
                **{name: int(record[name]) for name in ("epoch", "attempts", "input_tokens", "kv_tokens")},
                "kv_reserved": int(record.get("kv_reserved", 0)),
                "history": re.sub(r"after [0-9.]+ s", "after 0 s", record.get("history", "")),
                "is_orphaned": "orphaned" in record,
                "in_queue": "queue_entry" in record,
                "in_inbox": "inbox_entry" in record,
                "body": body,
            }
            if "queue_entry" in record:
                fields = entries.get((record["queue"], record["queue_entry"]), {})
                if (fields.get("id"), fields.get("epoch")) != (request_id, record["epoch"]):
                    raise Parted(f"the record of {request_id} names a queue entry that is not its own: {fields}")
        elif body is not None:
            raise Parted(f"the body of {request_id} outlives its record")
    return {
        "requests": requests,
        "queues": {name: rows for name, rows in in_queues.items() if rows or name == "queue"},
        "room": waiting,
        "preferred": set(preferred),
        "inboxes": {n: [_inbox_row(as_dict(f)) for _, f in rows] for n, rows in zip(names, inboxes, strict=True)},
        "controls": {n: _control_rows(rows) for n, rows in zip(names, controls, strict=True)},
        "leases": {
            n: (int(f["reserved_tokens"]), int(f["reserved_requests"])) for n, f in zip(names, leases, strict=True) if f
        },
        "registered": set(registered),
        "load": _scores(load),
        "deadlines": set(deadlines),
        "out": {f: _out_rows(rows) for f, rows in zip(frontends, outs, strict=True) if rows},
        "frontends": set(opened),
        "dead_letter": [(f["id"], f["why"], int(f["attempts"])) for f in (as_dict(f) for _, f in dead)],
        "counters": {name: int(n) for name, n in counters.items() if name != "instances_reaped"},
    }


async def room(store: Store) -> dict[str, Any]:
    """The waiting room (lua/waiting_room.lua) in the form of ``scripts_room.Room.snapshot``."""
    prefix = store.keys.prefix
    rings = {"classes": "waiting", **{f"class:{priority}": f"waiting:{priority}" for priority in PRIORITIES}}
    flows = [(priority, tenant) for priority in PRIORITIES for tenant in TENANTS]
    starts, ends, waiting, now = await asyncio.gather(
        asyncio.gather(*(store.call("ZRANGE", f"{prefix}{key}", 0, -1, "WITHSCORES") for key in rings.values())),
        asyncio.gather(*(store.call("ZRANGE", f"{prefix}served:{name}", 0, -1, "WITHSCORES") for name in rings)),
        asyncio.gather(*(store.call("ZRANGE", f"{prefix}waiting:{p}:{t}", 0, -1) for p, t in flows)),
        store.call("HGETALL", f"{prefix}virtual-time"),
    )

    def times(rows: Any) -> dict[str, dict[str, float]]:
        named = {name: _scores(scores) for name, scores in zip(rings, rows, strict=True) if scores}
        return {name: {flow: round(time, 6) for flow, time in scores.items()} for name, scores in named.items()}

    return {
        "waiting": {flow: ids for flow, ids in zip(flows, waiting, strict=True) if ids},
        "starts": times(starts),
        "ends": times(ends),
        "now": {name: float(time) for name, time in as_dict(now).items()},
    }


def _scores(rows: list[Any]) -> dict[str, float]:
    """Members and scores out of RESP2's flat list or RESP3's pairs."""
    flat = [x for row in rows for x in (row if isinstance(row, list) else [row])]
    return {member: float(score) for member, score in zip(flat[::2], flat[1::2], strict=True)}


def _inbox_row(fields: dict[str, str]) -> tuple[str, int, str, str]:
    return fields["id"], int(fields["epoch"]), fields["prefill"], fields["frontend"]


def _control_rows(rows: list[Any]) -> list[tuple[str, int, str]] | None:
    """Words to drop a run; None when there is no stream."""
    told = [as_dict(fields) for _, fields in rows]
    return [(f["drop"], int(f["epoch"]), f["why"]) for f in told if "drop" in f] if rows else None


def _out_rows(rows: list[Any]) -> list[tuple[str, int, str, str]]:
    """(request, epoch, "lost", "tokens" or how it ended, why)"""
    found = []
    for _, fields in rows:
        for request_id, value in as_dict(fields).items():
            if request_id != HELLO:
                output = decode_output(request_id, value)
                if isinstance(output, Lost):
                    found.append((request_id, output.epoch, "lost", output.reason))
                else:
                    kind = "tokens" if output.finish_reason is None else output.finish_reason.value
                    found.append((request_id, output.epoch, kind, output.detail or ""))
    return found
