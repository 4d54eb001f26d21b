"""What the Lua scripts must do, once more and without Redis: a topic as plain Python values.

``Topic`` has the scripts' operations under their names, with their results. ``snapshot`` gives all that it holds in the
form in which ``scripts_topic.snapshot`` reads it from a server, so that both can be compared after each operation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from splitwise_sched.store import Flow
from tests.scripts_room import Room

LIVE = ("queued", "prefill", "decode", "lost")
HISTORY_CHARS = 2000
MAX_PREFERRED = 8
EPOCH_LEAP = 100
DEFAULT_FLOW = Flow("default", 4, "-")


@dataclass(eq=False)
class QueueEntry:
    queue: str
    request_id: str
    epoch: int
    claimed_by: str | None = None


@dataclass(eq=False)
class InboxEntry:
    request_id: str
    epoch: int
    prefill: str
    frontend: str


@dataclass(frozen=True)
class Given:
    """What a front end says of a request, whenever it submits it."""

    frontend: str
    nonce: str
    input_tokens: int
    kv_tokens: int
    prefer: tuple[str, ...] = ()
    flow: Flow = DEFAULT_FLOW

    @property
    def turn(self) -> int:
        """Who submitted earlier has the earlier deadline."""
        return int(self.nonce[1:])


@dataclass(eq=False)
class Request:
    request_id: str
    given: Given
    body: bytes | None
    state: str = "queued"
    epoch: int = 1
    attempts: int = 0
    prefill: str | None = None
    decode: str | None = None
    queue_entry: QueueEntry | None = None
    inbox_entry: InboxEntry | None = None
    kv_reserved: int = 0
    reason: str | None = None
    history: str = ""
    is_late: bool = False
    waits_for_preferred: bool = False
    is_to_spill: bool = False
    is_orphaned: bool = False

    @property
    def priority(self) -> str:
        return self.given.flow.priority

    @property
    def tenant(self) -> str:
        return self.given.flow.tenant

    @property
    def weight(self) -> float:
        return self.given.flow.weight

    @property
    def cost(self) -> int:
        return self.given.kv_tokens

    @property
    def turn(self) -> int:
        return self.given.turn


@dataclass(eq=False)
class Instance:
    role: str
    capacity_tokens: int
    capacity_requests: int
    block_size: int
    has_lease: bool = True
    is_draining: bool = False
    reserved_tokens: int = 0
    reserved_requests: int = 0
    inbox: list[InboxEntry] = field(default_factory=list)
    control: list[tuple[str, int, str]] | None = field(default_factory=list)


class Fenced(Exception):
    """The instance has no lease, or there is no queue."""


class Topic:
    def __init__(self, max_size: int, max_attempts: int, short_queue: int) -> None:
        self.max_size = max_size
        self.short_queue = short_queue
        self.max_attempts = max_attempts
        self.forget()

    def forget(self) -> None:
        """Redis loses everything."""
        self.requests: dict[str, Request] = {}
        self.entries: list[QueueEntry] = []
        self.room = Room()
        self.groups: set[str] = set()
        self.instances: dict[str, Instance] = {}
        self.registered: set[str] = set()
        self.load: dict[str, float] = {}
        self.out: dict[str, list[tuple[str, int, str, str]]] = {}
        self.frontends: set[str] = set()
        self.dead_letter: list[tuple[str, str, int]] = []
        self.counters: Counter[str] = Counter()

    # ---- what several operations do ------------------------------------------------------------------------------

    def _alive(self, name: str | None) -> Instance | None:
        instance = self.instances.get(name or "")
        return instance if instance is not None and instance.has_lease else None

    def _reserve(self, name: str, tokens: int, requests: int) -> None:
        instance = self._alive(name)
        if instance is not None:
            instance.reserved_tokens += tokens
            instance.reserved_requests += requests
            if name in self.load:
                self.load[name] = round(instance.reserved_tokens / instance.capacity_tokens, 6)

    def _notify(self, r: Request, epoch: int, kind: str, why: str) -> None:
        if r.given.frontend in self.out:
            self.out[r.given.frontend].append((r.request_id, epoch, kind, why))

    def _drop_from(self, name: str, r: Request, why: str) -> None:
        control = self.instances[name].control if name in self.instances else None
        if control is not None:
            control.append((r.request_id, r.epoch, why))

    def _let_go(self, r: Request, source: str, why: str) -> None:
        if r.queue_entry is not None:
            self.entries.remove(r.queue_entry)
        elif r in self.room:
            self._leave_room(r)
        if r.state == "queued":
            r.waits_for_preferred = r.is_to_spill = False
        if r.inbox_entry is not None:
            assert r.decode is not None
            self.instances[r.decode].inbox.remove(r.inbox_entry)
            self._reserve(r.decode, -r.kv_reserved, -1)
            if r.decode != source:
                self._drop_from(r.decode, r, why)
        if r.state == "prefill" and r.prefill not in (source, r.decode):
            assert r.prefill is not None
            self._drop_from(r.prefill, r, why)
        r.queue_entry, r.inbox_entry, r.kv_reserved = None, None, 0

    def _lose(self, r: Request, source: str, why: str) -> None:
        self._let_go(r, source, why)
        self._remember_run(r, why)
        r.epoch += 1
        r.state, r.reason = "lost", why
        self._notify(r, r.epoch, "lost", why)
        self.counters["lost"] += 1

    def _remember_run(self, r: Request, why: str) -> None:
        place = {"prefill": f" on {r.prefill} -> {r.decode}", "decode": f" on {r.decode}"}.get(r.state, "")
        r.history = (r.history + f"epoch {r.epoch}, after 0 s, in {r.state}{place}: {why}; ")[-HISTORY_CHARS:]

    def _close(self, r: Request, state: str, why: str) -> None:
        r.state, r.reason, r.body, r.is_late = state, why, None, False
        self.counters[state] += 1

    def _terminate(self, r: Request, state: str, why: str) -> None:
        self._let_go(r, "", why)
        if state == "failed" and r.state in ("queued", "prefill", "decode"):
            self._remember_run(r, why)
        r.epoch += 1
        self._close(r, state, why)
        if state == "failed":
            self.dead_letter.append((r.request_id, why, r.attempts))
        self._notify(r, r.epoch, "error" if state == "failed" else state, why)
        self._feed_queue()

    def _in_queue(self, queue: str) -> list[QueueEntry]:
        return [e for e in self.entries if e.queue == queue]

    def _enqueue(self, r: Request, queue: str = "queue") -> None:
        r.queue_entry = QueueEntry(queue, r.request_id, r.epoch)
        self.entries.append(r.queue_entry)

    def _place(self, r: Request) -> None:
        for name in r.given.prefer:
            instance = self._alive(name)
            queue = f"preferred:{name}"
            may_wait = instance is not None and instance.role != "decode" and not instance.is_draining
            if may_wait and len(self._in_queue(queue)) < MAX_PREFERRED:
                r.waits_for_preferred = True
                self._enqueue(r, queue)
                return
        self._enqueue(r)

    def _admit(self, r: Request) -> None:
        if not self.room and self._num_unclaimed() < self.short_queue:
            self._place(r)
        else:
            self.room.enter(r)
            self.counters["waiting"] += 1
            self._feed_queue()

    def _leave_room(self, r: Request) -> None:
        self.room.leave(r)
        self.counters["waiting"] -= 1

    def _num_unclaimed(self) -> int:
        return sum(e.claimed_by is None for e in self._in_queue("queue"))

    def _feed_queue(self) -> None:
        for _ in range(self.short_queue - self._num_unclaimed()):
            if not self.room:
                return
            self.counters["waiting"] -= 1
            self._place(self.room.serve())

    def _spill(self, r: Request | None) -> None:
        if r is None:
            return
        r.waits_for_preferred = r.is_to_spill = False
        if r.state == "queued" and r.queue_entry is not None and r.queue_entry.queue != "queue":
            self.entries.remove(r.queue_entry)
            self._enqueue(r)
            self.counters["spilled"] += 1

    def _spill_due(self) -> None:
        for _, r in sorted(self.requests.items()):
            if r.is_to_spill:
                self._spill(r)

    def _run(self, request_id: str, epoch: int, instance: str) -> Request | None:
        """The request, when this run of it is in the hands of ``instance``."""
        r = self.requests.get(request_id)
        if r is None or r.epoch != epoch:
            return None
        holders = {"prefill": (r.prefill, r.decode), "decode": (r.decode,)}.get(r.state, ())
        return r if instance in holders else None

    # ---- front ends ----------------------------------------------------------------------------------------------

    def open_out(self, frontend: str) -> None:
        self.out.setdefault(frontend, [])
        self.frontends.add(frontend)

    def close_out(self, frontend: str) -> None:
        self.out.pop(frontend, None)
        self.frontends.add(frontend)

    def cancel_orphans(self, frontend: str) -> int:
        """Those with the earliest deadline come first."""
        if frontend in self.out:
            return 0
        theirs = [r for r in self.requests.values() if r.state in LIVE and r.given.frontend == frontend]
        for r in sorted(theirs, key=lambda r: (not r.is_late, r.request_id if r.is_late else r.turn)):
            self._terminate(r, "cancelled", f"the lease of its front end {frontend} has lapsed")
            r.is_orphaned = True
        if theirs:
            self.counters["orphaned"] += len(theirs)
        else:
            self.frontends.discard(frontend)
        return len(theirs)

    def submit(self, request_id: str, given: Given, body: bytes) -> tuple[str, Any]:
        r = self.requests.get(request_id)
        if r is not None:
            return ("QUEUED", r.epoch) if r.given.nonce == given.nonce else ("DUPLICATE", r.state)
        depth = (
            len(self._in_queue("queue")) + len(self.room) + sum(r.waits_for_preferred for r in self.requests.values())
        )
        if depth >= self.max_size:
            self.counters["rejected"] += 1
            return "FULL", depth
        r = Request(request_id, given, body)
        self.requests[request_id] = r
        self._admit(r)
        self.counters["submitted"] += 1
        return "QUEUED", 1

    def resubmit(
        self,
        request_id: str,
        given: Given,
        body: bytes,
        *,
        epoch_seen: int,
        attempts: int,
        done_too: bool,
        recall: bool = False,
    ) -> list[Any]:
        r = self.requests.get(request_id)
        if recall and r is not None and r.state in ("prefill", "decode") and r.epoch == epoch_seen:
            self._lose(r, "", "some of its outputs never came to its front end")
        if r is not None:
            if r.state == "done" and done_too:
                r.epoch += 1
            elif r.state != "lost" and not r.is_orphaned:
                return ["HELD", r.state] if r.state in LIVE else ["ENDED", r.state, r.reason]
            if r.attempts >= self.max_attempts:
                why = f"given up after {r.attempts} attempts, the last: {r.reason}"
                self._terminate(r, "failed", why)
                return ["FAILED", why]
        else:
            r = Request(request_id, replace(given, prefer=()), None, epoch=epoch_seen + EPOCH_LEAP, attempts=attempts)
            self.requests[request_id] = r
        r.state, r.is_late, r.is_orphaned, r.body = "queued", False, False, body
        self._enqueue(r)
        self.counters["resubmitted"] += 1
        return ["QUEUED", r.epoch]

    def cancel(self, request_id: str, why: str) -> tuple[bool, str]:
        r = self.requests.get(request_id)
        if r is None:
            return False, ""
        state = r.state
        if state in LIVE:
            self._terminate(r, "cancelled", why)
        return state in LIVE, state

    def make_late(self, request_id: str) -> None:
        """Let the deadline of a request that has not ended pass."""
        r = self.requests.get(request_id)
        if r is not None and r.state in LIVE:
            r.is_late = True

    def make_spill(self, request_id: str) -> None:
        """Its time to wait for a preferred instance is over."""
        r = self.requests.get(request_id)
        if r is not None and r.waits_for_preferred:
            r.is_to_spill = True

    def expire(self) -> int:
        late = [r for _, r in sorted(self.requests.items()) if r.is_late]
        for r in late:
            self._terminate(r, "expired", f"it did not end before its deadline; it was {r.state}")
        self._spill_due()
        return len(late)

    # ---- instances -----------------------------------------------------------------------------------------------

    def register(self, name: str, role: str, capacity_tokens: int, capacity_requests: int, block_size: int) -> None:
        self.groups |= {"queue", f"preferred:{name}"}
        self.registered.add(name)
        if self._alive(name) is None:
            self.instances[name] = Instance(role, capacity_tokens, capacity_requests, block_size)
            if role != "prefill":
                self.load[name] = 0.0

    def renew(self, name: str) -> bool:
        return self._alive(name) is not None

    def drain(self, name: str) -> bool:
        self.load.pop(name, None)
        instance = self._alive(name)
        if instance is None:
            return False
        instance.is_draining = True
        self._spill_all(name, len(self.entries))
        return True

    def _spill_all(self, name: str, limit: int) -> int:
        """What was bound from there stays: its instance finishes it, or is reaped."""
        gone = 0
        for entry in self._in_queue(f"preferred:{name}")[:limit]:
            r = self.requests.get(entry.request_id)
            if r is None or r.queue_entry is not entry:
                self.entries.remove(entry)
            self._spill(r if r is not None and r.queue_entry is entry else None)
            gone += entry not in self.entries
        return gone

    def lapse(self, name: str) -> None:
        """The lease is over."""
        if (instance := self.instances.get(name)) is not None:
            instance.has_lease = False

    def claim(self, name: str, count: int) -> list[QueueEntry]:
        queues = (f"preferred:{name}", "queue")
        if not self.groups.issuperset(queues):
            raise Fenced
        fresh = [e for queue in queues for e in [e for e in self._in_queue(queue) if e.claimed_by is None][:count]]
        for entry in fresh:
            entry.claimed_by = name
        return fresh

    def _fits(self, candidate: Instance, r: Request) -> tuple[int | None, bool]:
        if r.given.input_tokens + 1 > candidate.capacity_tokens:
            return None, True
        tokens = math.ceil(r.given.kv_tokens / candidate.block_size) * candidate.block_size
        tokens = min(tokens, candidate.capacity_tokens)
        has_room = (
            candidate.reserved_tokens + tokens <= candidate.capacity_tokens
            and candidate.reserved_requests < candidate.capacity_requests
        )
        return (tokens if has_room else None), False

    def _pick(self, me: str, r: Request) -> tuple[str | None, int, bool]:
        own = self.instances[me]
        if own.role == "mixed" and me in self.load:
            tokens, _ = self._fits(own, r)
            if tokens is not None:
                return me, tokens, False
        never = []
        for name in sorted(self.load, key=lambda n: (self.load[n], n)):
            candidate = self._alive(name)
            if candidate is None:
                del self.load[name]
                continue
            tokens, too_small = self._fits(candidate, r)
            if tokens is not None:
                return name, tokens, False
            never.append(too_small)
        return None, 0, bool(never) and all(never)

    def bind(self, me: str, claims: list[QueueEntry]) -> list[tuple[str, str, str, str]]:
        if self._alive(me) is None:
            raise Fenced
        answers: list[tuple[str, str, str, str]] = []
        full = False
        for claim in claims:
            r = self.requests.get(claim.request_id)
            verdict = decode = frontend = ""
            if r is not None and r.state == "prefill" and r.prefill == me and r.queue_entry is claim:
                verdict, decode, frontend = "BOUND", r.decode or "", r.given.frontend
            elif r is None or r.state != "queued" or r.queue_entry is not claim:
                if claim in self.entries:
                    self.entries.remove(claim)
                verdict = "STALE"
            elif r.is_late:
                self._terminate(r, "expired", "its time was over before an instance had room for it")
                verdict = "STALE"
            elif r.given.frontend not in self.out:
                self._lose(r, me, "its front end is gone")
                verdict = "STALE"
            elif full:
                verdict = "WAIT"
            else:
                chosen, tokens, never = self._pick(me, r)
                if chosen is not None:
                    self._assign(r, me, chosen, tokens)
                    verdict, decode, frontend = "BOUND", chosen, r.given.frontend
                elif never:
                    why = f"no decode instance has a KV pool that holds its {r.given.input_tokens} input tokens"
                    self._terminate(r, "failed", why)
                    verdict = "STALE"
                else:
                    full, verdict = True, "WAIT"
            answers.append((claim.request_id, verdict, decode, frontend))
        self._spill_due()
        self._feed_queue()
        return answers

    def _assign(self, r: Request, prefill: str, decode: str, tokens: int) -> None:
        self._reserve(decode, tokens, 1)
        r.state, r.prefill, r.decode, r.kv_reserved = "prefill", prefill, decode, tokens
        r.attempts += 1
        r.waits_for_preferred = r.is_to_spill = False
        r.inbox_entry = InboxEntry(r.request_id, r.epoch, prefill, r.given.frontend)
        self.instances[decode].inbox.append(r.inbox_entry)
        self.counters["bound"] += 1

    def step(self, request_id: str, epoch: int, me: str) -> int:
        r = self._run(request_id, epoch, me)
        if r is None or r.decode != me:
            return 0
        if r.state == "prefill":
            assert r.queue_entry is not None
            self.entries.remove(r.queue_entry)
            r.state, r.queue_entry = "decode", None
        return 1

    def finish(self, request_id: str, epoch: int, me: str, reason: str) -> int:
        known = self.requests.get(request_id)
        if known is not None and known.epoch == epoch and known.state == "done":
            return 1
        r = self._run(request_id, epoch, me)
        if r is None:
            return 0
        self._let_go(r, me, "it is finished")
        self._close(r, "done", reason)
        self._notify(r, epoch, reason, "")
        return 1

    def give_back(self, request_id: str, epoch: int, me: str, why: str, *, retry: bool) -> int:
        r = self._run(request_id, epoch, me)
        queued = self.requests.get(request_id)
        if r is None and queued is not None and (queued.state, queued.epoch) == ("queued", epoch):
            r = queued
        if r is None:
            return 0
        if retry:
            self._lose(r, me, why)
        else:
            self._terminate(r, "failed", why)
        return 1

    def reap(self, me: str, limit: int, *, leave: bool = False) -> tuple[int, bool]:
        if leave:
            self.lapse(me)
        if self._alive(me) is not None:
            return 0, False
        self.load.pop(me, None)
        why = f"instance {me} " + ("stopped" if leave else "lost its lease")
        claimed = [
            e for queue in ("queue", f"preferred:{me}")
            for e in [e for e in self._in_queue(queue) if e.claimed_by == me][:limit]
        ]  # fmt: skip
        taken = 0
        for entry in claimed:
            r = self.requests.get(entry.request_id)
            if r is None or r.queue_entry is not entry:
                self.entries.remove(entry)
                continue
            taken += 1
            if r.state == "queued":
                self.entries.remove(entry)
                r.waits_for_preferred = r.is_to_spill = False
                r.epoch += 1
                self._enqueue(r)
            else:
                self._lose(r, me, why)
        inbox = self.instances[me].inbox[:limit] if me in self.instances else []
        for held in inbox:
            r = self.requests.get(held.request_id)
            if r is not None and r.inbox_entry is held:
                taken += 1
                self._lose(r, me, why)
            else:
                self.instances[me].inbox.remove(held)
        spilled = self._spill_all(me, limit)
        if claimed or inbox or spilled:
            return taken + spilled, False
        self.registered.discard(me)
        self.groups.discard(f"preferred:{me}")
        if me in self.instances:
            self.instances[me].control = None
        return taken, True

    def holds_something(self, name: str) -> bool:
        instance = self.instances.get(name)
        has_claims = any(e.claimed_by == name or e.queue == f"preferred:{name}" for e in self.entries)
        return has_claims or (instance is not None and bool(instance.inbox))

    def queues(self) -> Iterator[tuple[str, list[tuple[str, int, str | None]]]]:
        for queue in self.groups | {"queue"}:
            rows = [(e.request_id, e.epoch, e.claimed_by) for e in self._in_queue(queue)]
            if rows or queue == "queue":
                yield queue, rows

    # ---- comparing -----------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        return {
            "requests": {
                i: {
                    "state": r.state, "epoch": r.epoch, "attempts": r.attempts, "frontend": r.given.frontend,
                    "prefill": r.prefill, "decode": r.decode, "kv_reserved": r.kv_reserved, "reason": r.reason,
                    "history": r.history, "input_tokens": r.given.input_tokens, "kv_tokens": r.given.kv_tokens,
                    "is_orphaned": r.is_orphaned, "in_queue": r.queue_entry is not None,
                    "in_inbox": r.inbox_entry is not None, "body": r.body,
                }
                for i, r in self.requests.items()
            },
            "queues": dict(self.queues()),
            "room": self.room.snapshot(),
            "preferred": {i for i, r in self.requests.items() if r.waits_for_preferred},
            "inboxes": {
                name: [(e.request_id, e.epoch, e.prefill, e.frontend) for e in instance.inbox]
                for name, instance in self.instances.items()
            },
            "controls": {name: instance.control for name, instance in self.instances.items()},
            "leases": {
                name: (i.reserved_tokens, i.reserved_requests) for name, i in self.instances.items() if i.has_lease
            },
            "registered": self.registered,
            "load": self.load,
            "deadlines": {i for i, r in self.requests.items() if r.state in LIVE},
            "out": self.out,
            "frontends": self.frontends,
            "dead_letter": self.dead_letter,
            "counters": dict(self.counters),
        }  # fmt: skip
