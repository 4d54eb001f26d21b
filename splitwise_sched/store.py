"""The topic in Redis: one typed method a script or command (lua/, keys.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from splitwise_sched.connection import Connection, as_dict
from splitwise_sched.errors import CommandRefused, StoreUnavailable
from splitwise_sched.records import Bound, Claim, InstanceRecord, Registration

RECORD_FIELDS = frozenset(
    (
        "state", "epoch", "attempts", "frontend", "nonce", "model", "input_tokens", "kv_tokens", "class", "weight",
        "tenant", "prefer", "prefer_ms", "created_ms", "deadline_ms", "queue", "queue_entry", "prefill", "decode",
        "inbox_entry", "kv_reserved", "claimed_ms", "decoding_ms", "finished_ms", "reason", "history", "orphaned",
    )
)  # fmt: skip
OUT_MAXLEN = 200_000
OnReply = Callable[[Any], None]
NO_BODY = "no such key"  # the error of RENAME
HELLO = "#hello"  # a field that is no request id: it only makes the stream exist
ORPHANED = "orphaned"


class Flow(NamedTuple):
    """Whose share of the service a request is charged to."""

    priority: str
    weight: float
    tenant: str


class Preference(NamedTuple):
    """Instances on which a request would rather be prefilled.

    Attributes:
        instance_ids: apart by spaces, best first.
        wait_ms: that it waits for one of them before anyone may take it.
    """

    instance_ids: str = ""
    wait_ms: int = 0


NO_PREFERENCE = Preference()


class Lapsed(NamedTuple):
    """Ids of those whose lease has lapsed and that were not yet swept; whether ``expire`` has something to do."""

    instances: list[str]
    frontends: list[str]
    is_due: bool


class Repaired(NamedTuple):
    """What ``audit`` found reserved on a decode instance for nobody, and put right."""

    instance_id: str
    tokens: int
    requests: int
    inbox_entries: int


class Store(Connection):
    """What front ends and instances do to a topic."""

    # ---- front ends ----------------------------------------------------------------------------------------------

    async def submit(
        self,
        request_id: str,
        body: bytes,
        *,
        frontend_id: str,
        nonce: str,
        timeout_ms: int,
        retain_ms: int,
        input_tokens: int,
        kv_tokens: int,
        model: str,
        flow: Flow,
        preference: Preference = NO_PREFERENCE,
    ) -> tuple[str, list[Any]]:
        """See submit.lua: the verdict and what comes with it. The body of a request that is refused does not stay.

        With durability "wait", the number of replicas that have it comes last.

        Raises:
            StoreUnavailable: the server does not answer, or has no memory left for the body.
        """
        k = self.keys
        keys = (k.request(request_id), k.queue, k.deadlines, k.counters, k.incoming(nonce), k.body(request_id))
        args = (
            request_id, frontend_id, nonce, self.max_size, timeout_ms, retain_ms, input_tokens,
            kv_tokens, model, *flow, *preference,
        )  # fmt: skip
        set_body = ("SET", k.incoming(nonce), body, "PX", timeout_ms + retain_ms)
        for is_last in (False, False, True):
            stored: list[Any] = []
            try:
                if self.waits_for_replicas:
                    # On the same connection: WAIT speaks of what was written there.
                    self.tell_and_wait(*set_body)
                    reply, num_replicas = await self.script_and_wait("submit", keys, *args)
                    return reply[0], [*reply[1:], num_replicas]
                self.tell(*set_body, on_reply=stored.append)
                reply = await self.script("submit", keys, *args)
                return reply[0], reply[1:]
            except CommandRefused as exc:
                # The script finds no body that the server would not take.
                if refused := next((r for r in stored if isinstance(r, CommandRefused)), None):
                    raise StoreUnavailable(f"Redis did not take the request's body: {refused}") from exc
                # Or it ran, after a failover, on a server that does not have what its predecessor took.
                if is_last or NO_BODY not in str(exc):
                    raise
        raise AssertionError("the last try returns or raises")

    async def resubmit(
        self,
        request_id: str,
        body: bytes,
        *,
        frontend_id: str,
        nonce: str,
        epoch_seen: int,
        timeout_ms: int,
        retain_ms: int,
        input_tokens: int,
        kv_tokens: int,
        model: str,
        attempts: int,
        done_too: bool,
        recall: bool = False,
        flow: Flow,
    ) -> list[Any]:
        """See resubmit.lua. The body is replaced when the request is queued by this."""
        k = self.keys
        self.call("SET", k.incoming(nonce), body, "PX", timeout_ms + retain_ms)
        keys = (k.request(request_id), k.queue, k.deadlines, k.counters, k.incoming(nonce), k.body(request_id))
        return cast("list[Any]", await self.script(
            "resubmit", keys, request_id, frontend_id, nonce,
            epoch_seen, timeout_ms, retain_ms, input_tokens, kv_tokens, model,
            self._settings.scheduler_max_attempts, attempts, 2 if recall else int(done_too), *flow,
        ))  # fmt: skip

    async def cancel(self, request_id: str, why: str, retain_ms: int, state: str = "cancelled") -> tuple[bool, str]:
        """See cancel.lua: whether it was ended by this call, and the state that it was in."""
        k = self.keys
        keys = (k.request(request_id), k.queue, k.deadlines, k.counters)
        reply = await self.script("cancel", keys, request_id, why, retain_ms, state)
        return bool(reply[0]), reply[1]

    async def open_out(self, frontend_id: str, lease_ms: int) -> None:
        """Make the front end's stream and lease; keeps what is in the stream."""
        await self.renew_frontend(frontend_id, lease_ms, "0-0")

    async def renew_frontend(self, frontend_id: str, lease_ms: int, read_up_to: str) -> bool:
        """See renew_frontend.lua. False: the stream was gone, and what was in it is lost."""
        k = self.keys
        keys = (k.frontend(frontend_id), k.out(frontend_id), k.frontends)
        return bool(await self.script("renew_frontend", keys, frontend_id, lease_ms, read_up_to, HELLO))

    async def close_out(self, frontend_id: str) -> None:
        """Give the lease up, so that sweepers end what the front end may have left behind."""
        await asyncio.gather(
            self.call("ZADD", self.keys.frontends, 0, frontend_id),
            self.call("UNLINK", self.keys.out(frontend_id), self.keys.frontend(frontend_id)),
        )

    async def request_states(self, request_ids: Sequence[str]) -> list[tuple[str, int] | None]:
        """[num_requests] state and epoch of each, None where Redis does not know it.

        ``ORPHANED`` stands for the state of what was cancelled only because its front end's lease had lapsed.
        """
        calls = [self.call("HMGET", self.keys.request(i), "state", "epoch", "orphaned") for i in request_ids]
        replies = await asyncio.gather(*calls)
        return [
            (ORPHANED if orphaned else state, int(epoch or 0)) if state else None for state, epoch, orphaned in replies
        ]

    async def request_record(self, request_id: str) -> dict[str, str]:
        return as_dict(await self.call("HGETALL", self.keys.request(request_id)))

    async def counters(self) -> dict[str, str]:
        return as_dict(await self.call("HGETALL", self.keys.counters))

    async def depth(self) -> int:
        """Requests that wait for prefill or are in it, in the queue and in the waiting room."""
        length, waiting = await asyncio.gather(
            self.call("XLEN", self.keys.queue), self.call("HGET", self.keys.counters, "waiting")
        )
        return int(length) + int(waiting or 0)

    async def queue_depth(self) -> int:
        return int(await self.call("XLEN", self.keys.queue))

    # ---- instances -----------------------------------------------------------------------------------------------

    async def register(self, instance_id: str, registration: Registration, lease_ms: int) -> tuple[str, ...]:
        """See register.lua: ("OK",) or ("INCOMPATIBLE", other instance, field, its value)."""
        k, r = self.keys, registration
        must_match = {"model": r.model, **r.must_match}
        rest = {
            "name": r.name,
            "capacity_tokens": str(r.capacity_tokens),
            "capacity_requests": str(r.capacity_requests),
            "block_size": str(r.block_size),
            "max_model_len": str(r.max_model_len),
            **r.details,
        }
        reply = await self.script(
            "register", (k.instance(instance_id), k.instances, k.decode_load, k.queue, k.control(instance_id)),
            instance_id, lease_ms, r.role.value, len(must_match), *_flat({**must_match, **rest}),
        )  # fmt: skip
        return tuple(reply)

    async def renew(self, instance_id: str, lease_ms: int, load: Mapping[str, int | float | str]) -> bool:
        """False: the lease has lapsed."""
        return bool(await self.script("renew", (self.keys.instance(instance_id),), lease_ms, *_flat(load)))

    async def drain(self, instance_id: str) -> bool:
        """See drain.lua. False: the lease has lapsed."""
        keys = (self.keys.instance(instance_id), self.keys.decode_load)
        return bool(await self.script("drain", keys, instance_id))

    async def reap(self, instance_id: str, limit: int = 200, *, leave: bool = False) -> tuple[int, bool]:
        """See reap.lua: how many requests were taken back, and whether nothing of the instance is left."""
        k = self.keys
        reply = await self.script(
            "reap", (k.instance(instance_id), k.queue, k.inbox(instance_id), k.control(instance_id), k.instances,
                     k.decode_load, k.counters), instance_id, limit, "leave" if leave else "",
        )  # fmt: skip
        return int(reply[0]), bool(reply[1])

    async def lapsed(self, max_frontends: int = 100) -> Lapsed:
        """See lapsed.lua."""
        k = self.keys
        keys = (k.instances, k.queue, k.frontends, k.deadlines)
        instances, frontends, is_due = await self.script("lapsed", keys, max_frontends)
        return Lapsed(sorted(instances), frontends, bool(is_due))

    async def lacks_lease(self, instance_id: str) -> bool:
        return not await self.call("EXISTS", self.keys.instance(instance_id))

    async def live_instances(self) -> list[InstanceRecord]:
        members = sorted(await self.call("SMEMBERS", self.keys.instances))
        replies = await asyncio.gather(*(self.call("HGETALL", self.keys.instance(m)) for m in members))
        records = (InstanceRecord.from_fields(m, as_dict(f)) for m, f in zip(members, replies, strict=True) if f)
        return [r for r in records if r is not None]

    async def instance_fields(self, instance_id: str) -> dict[str, str]:
        return as_dict(await self.call("HGETALL", self.keys.instance(instance_id)))

    async def inbox_depth(self, instance_id: str) -> int:
        """Requests that a decode instance holds, or is about to hear of."""
        return int(await self.call("XLEN", self.keys.inbox(instance_id)))

    def bodies(self, request_ids: Sequence[str]) -> asyncio.Future[list[bytes | None]]:
        """[num_requests], at least one; None where there is none."""
        return self.call("MGET", *map(self.keys.body, request_ids), binary=True)

    async def bind(self, instance_id: str, claims: Sequence[Claim], retain_ms: int) -> list[Bound]:
        """See bind.lua. Raises Fenced when this instance has no lease."""
        k = self.keys
        flat = [x for c in claims for x in (c.queue, c.entry_id, c.request_id, c.epoch)]
        reply = await self.script(
            "bind", (k.instance(instance_id), k.queue, k.decode_load, k.counters), instance_id, retain_ms, *flat
        )
        return [Bound(*row) for row in reply]

    def step(
        self,
        request_id: str,
        epoch: int,
        instance_id: str,
        notes: Mapping[str, float | int | str],
        *,
        on_reply: OnReply,
    ) -> None:
        """See step.lua; ``on_reply`` gets 1, 0 or an exception."""
        keys = (self.keys.request(request_id), self.keys.queue)
        self.tell_script("step", keys, request_id, epoch, instance_id, *_notes(notes), on_reply=on_reply)

    def finish(
        self,
        request_id: str,
        epoch: int,
        instance_id: str,
        output: str,
        *,
        retain_ms: int,
        reason: str,
        notes: Mapping[str, float | int | str],
        on_reply: OnReply,
    ) -> None:
        """See finish.lua; ``on_reply`` gets 1, 0 or an exception."""
        k = self.keys
        keys = (k.request(request_id), k.queue, k.deadlines, k.counters, k.body(request_id))
        args = (request_id, epoch, instance_id, output, retain_ms, reason, *_notes(notes))
        self.tell_script("finish", keys, *args, on_reply=on_reply)

    def give_back(
        self,
        request_id: str,
        epoch: int,
        instance_id: str,
        why: str,
        *,
        retry: bool,
        pair_failed: bool = False,
        retain_ms: int,
        on_reply: OnReply,
    ) -> None:
        """See give_back.lua; ``on_reply`` gets 1, 0, [prefill, decode, ms] of a pair to avoid, or an exception."""
        k = self.keys
        keys = (k.request(request_id), k.queue, k.deadlines, k.counters)
        args = (
            request_id,
            epoch,
            instance_id,
            why,
            "retry" if retry else "fail",
            retain_ms,
            "pair" if pair_failed else "",
        )
        self.tell_script("give_back", keys, *args, on_reply=on_reply)

    def publish(self, frontend_id: str, values: Sequence[str], *, on_reply: OnReply) -> None:
        """One entry for a front end: request id, output, request id, output ...; dropped when the front end is gone."""
        out = self.keys.out(frontend_id)
        self.tell("XADD", out, "NOMKSTREAM", "MAXLEN", "~", OUT_MAXLEN, "*", *values, on_reply=on_reply)

    async def cancel_orphans(
        self, frontend_id: str, limit: int, retain_ms: int, look_on: str = "0", num_before: int = 0
    ) -> tuple[int, str]:
        """See orphans.lua: how many requests were cancelled, and where to look on, "0" when all are looked at."""
        k = self.keys
        keys = (k.frontend(frontend_id), k.frontends, k.out(frontend_id), k.deadlines, k.counters)
        num_cancelled, look_on = await self.script("orphans", keys, frontend_id, limit, look_on, retain_ms, num_before)
        return int(num_cancelled), look_on

    async def audit(self, which: int, limit: int) -> Repaired | None:
        """See audit.lua. None: there was nothing to put right."""
        reply = await self.script("audit", (self.keys.decode_load, self.keys.counters), which, limit)
        return Repaired(*reply) if reply else None

    async def expire(self, limit: int, retain_ms: int) -> int:
        """See expire.lua."""
        k = self.keys
        return int(await self.script("expire", (k.deadlines, k.queue, k.counters), limit, retain_ms))


def _flat(fields: Mapping[str, Any]) -> list[Any]:
    return [x for pair in fields.items() for x in pair]


def _notes(notes: Mapping[str, Any]) -> list[Any]:
    """What an instance wants to see in a record; fields that the scripts go by are not its to set."""
    return _flat({name: value for name, value in notes.items() if name not in RECORD_FIELDS}) if notes else []
