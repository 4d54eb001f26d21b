"""A topic on a real server, operated through the scripts one operation at a time, beside the model of it.

``Lab.do`` carries out one operation on both, compares the results and then everything that either holds. An operation
is a tuple, its name first, so that a sequence of them is plain data: generated, shrunk, or written down.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from splitwise_sched.errors import Fenced, SplitwiseError
from splitwise_sched.records import Claim
from splitwise_sched.store import Flow, Preference, Store
from tests import scripts_model
from tests.scripts_topic import BLOCK_SIZE, HOUR_MS, PRIORITIES, Parted, claim, register, reply_of, snapshot

LIVE = scripts_model.LIVE
MAX_SIZE, MAX_ATTEMPTS = 7, 3
# role, KV tokens, requests. Inputs are 8, 40 and 200 tokens: the largest fits nowhere but on the mixed instance.
SLOTS = {
    "p0": ("prefill", 64, 8),
    "p1": ("prefill", 64, 8),
    "d0": ("decode", 96, 8),
    "d1": ("decode", 128, 2),
    "m0": ("mixed", 256, 3),
}
REQUESTS = tuple(f"r{i}" for i in range(12))
INPUT_TOKENS = (8, 40, 200)


_ARGUMENTS = {
    "submit": ("new_request", ""),
    "submit_as": ("new_request", ""),
    "submit_again": ("live_request",),
    "resubmit": ("lost_request", ""),
    "recall": ("live_request",),
    "cancel": ("live_request",),
    "cancel_waiting": ("waiting_request",),
    "late": ("live_request",),
    "spill": ("preferring_request",),
    "claim": ("claimer", ""),
    "bind": ("binder",),
    "bind_again": ("binder",),
    "give_back_claims": ("binder",),
    "take": ("taker",),
    "step": ("to_step",),
    "finish": ("run",),
    "give_back": ("run", ""),
    "lapse": ("holder",),
    "leave": ("holder", ""),
    "drain": ("holder",),
    "reap": ("fallen", ""),
    "register": ("fallen",),
    "renew": ("fallen",),
}


def _fenced(operation: Callable[..., Any], *args: Any) -> Any:
    try:
        return operation(*args)
    except scripts_model.Fenced:
        return "FENCED"


@dataclass
class Submitted:
    """What a front end keeps of a request."""

    given: scripts_model.Given
    body: bytes
    epoch_seen: int = 1
    attempts: int = 0

    def to_store(self) -> dict[str, Any]:
        given = asdict(self.given)
        del given["prefer"], given["flow"]
        # Who came earlier has the earlier deadline, even within one millisecond.
        times = {"timeout_ms": HOUR_MS + 1000 * int(self.given.nonce[1:]), "retain_ms": HOUR_MS}
        return {"frontend_id": given.pop("frontend"), "model": "toy", "flow": self.given.flow, **given, **times}


@dataclass
class Known:
    """What an instance under one id knows of its work."""

    claims: list[tuple[Claim, scripts_model.QueueEntry]] = field(default_factory=list)
    last_bind: list[tuple[Claim, scripts_model.QueueEntry]] = field(default_factory=list)


class Lab:
    """Operations name requests and slots of instances; what participants would know is kept here.

    In the place of a name may stand a number: how far down the list of those that the operation is for, ones for which
    it does something on top. The same holds for runs, which have no name.

    A slot stands for a process that may start again: its instance gets a new id then, while the runs that the old one
    knew stay in ``runs``, so that zombies act on them.
    """

    def __init__(self, store: Store, short_queue: int) -> None:
        self.store = store
        self.model = scripts_model.Topic(MAX_SIZE, MAX_ATTEMPTS, short_queue)
        self.ids = {slot: f"{slot}-0" for slot in SLOTS}
        self.known: dict[str, Known] = {}
        self.runs: list[tuple[str, int, str]] = []
        self.submits: dict[str, Submitted] = {}
        self.frontends = {"f0", "f1"}
        self.log: list[Any] = []
        self._nonces = 0

    async def open(self) -> None:
        for frontend in sorted(self.frontends):
            await self.store.open_out(frontend, HOUR_MS)
            self.model.open_out(frontend)
        for slot in SLOTS:
            await self.do(("register", slot))

    async def do(self, op: tuple[Any, ...]) -> None:
        """Raises Parted."""
        kinds = _ARGUMENTS.get(op[0], ())
        named = [self._name(kind, x) if kind else x for kind, x in itertools.zip_longest(kinds, op[1:])]
        if None in named:
            return  # there is nobody and nothing that it could be for
        op = (op[0], *named)
        self.log.append(op)
        try:
            real, expected = await getattr(self, f"_{op[0]}")(*named)
            if real != expected:
                raise Parted(f"it gave {real!r}, not {expected!r}")
            await self.compare()
        except (Parted, SplitwiseError) as exc:
            raise Parted(f"{op}: {exc}; all operations: {self.log}") from exc

    async def compare(self) -> None:
        expected = self.model.snapshot()
        names = list(self.model.instances)
        real = await snapshot(self.store, names, sorted(self.frontends), sorted(self.submits))
        for part, value in expected.items():
            if real[part] != value:
                raise Parted(f"{part} has {real[part]!r}, not {value!r}")

    # ---- whom an operation is for --------------------------------------------------------------------------------

    def _name(self, kind: str, value: Any) -> Any:
        if not isinstance(value, int):
            return value
        candidates, rank = getattr(self, f"_{kind}s")()
        ranked = sorted(candidates, key=rank)
        return ranked[value % len(ranked)] if ranked else None

    def _state(self, request_id: str) -> str:
        r = self.model.requests.get(request_id)
        return "" if r is None else r.state

    def _new_requests(self) -> Any:
        return REQUESTS, lambda i: i in self.submits

    def _live_requests(self) -> Any:
        return self.submits, lambda i: (self._state(i) not in ("prefill", "decode"), self._state(i) not in LIVE)

    def _waiting_requests(self) -> Any:
        return self.submits, lambda i: i not in self.model.requests or self.model.requests[i] not in self.model.room

    def _preferring_requests(self) -> Any:
        return self.submits, lambda i: i not in self.model.requests or not self.model.requests[i].waits_for_preferred

    def _lost_requests(self) -> Any:
        order = ("lost", "", "done", "queued", "prefill", "decode", "cancelled", "expired", "failed")
        return self.submits, lambda i: order.index(self._state(i))

    def _claimers(self) -> Any:
        return (s for s in SLOTS if SLOTS[s][0] != "decode"), lambda s: not self._has_lease(s)

    def _binders(self) -> Any:
        return (s for s in SLOTS if SLOTS[s][0] != "decode"), lambda s: not self._of(s).claims

    def _takers(self) -> Any:
        return (s for s in SLOTS if SLOTS[s][0] != "prefill"), lambda s: not self._untaken(s)

    def _holders(self) -> Any:
        return SLOTS, lambda s: (not self.model.holds_something(self.ids[s]), not self._has_lease(s))

    def _fallens(self) -> Any:
        return SLOTS, lambda s: (self._has_lease(s), not self.model.holds_something(self.ids[s]))

    def _runs(self) -> Any:
        """Those that are still on come first, what was heard of last first of all."""
        return reversed(self.runs), lambda run: not self._is_on(run)

    def _to_steps(self) -> Any:
        def rank(run: tuple[str, int, str]) -> Any:
            r = self.model.requests.get(run[0])
            return not self._is_on(run), r is None or r.decode != run[2] or r.state != "prefill"

        return reversed(self.runs), rank

    def _is_on(self, run: tuple[str, int, str]) -> bool:
        r = self.model.requests.get(run[0])
        return r is not None and r.epoch == run[1] and r.state in LIVE

    def _has_lease(self, slot: str) -> bool:
        instance = self.model.instances.get(self.ids[slot])
        return instance is not None and instance.has_lease

    def _untaken(self, slot: str) -> list[tuple[str, int, str]]:
        """Runs in its inbox that the instance has not read of."""
        name = self.ids[slot]
        inbox = self.model.instances[name].inbox if name in self.model.instances else ()
        return [run for e in inbox if (run := (e.request_id, e.epoch, name)) not in self.runs]

    # ---- front ends ----------------------------------------------------------------------------------------------

    def _nonce(self) -> str:
        self._nonces += 1
        return f"n{self._nonces}"

    async def _submit(self, request_id: str, frontend: str, size: int, *prefer: str) -> Any:
        return await self._submit_as(request_id, frontend, size, "default", "-", *prefer)

    async def _submit_as(
        self, request_id: str, frontend: str, size: int, priority: str, tenant: str, *prefer: str
    ) -> Any:
        flow = Flow(priority, PRIORITIES[priority], tenant)
        if frontend not in self.model.out:
            return None, None
        nonce, tokens = self._nonce(), INPUT_TOKENS[size]
        given = scripts_model.Given(frontend, nonce, tokens, tokens + 10, tuple(self.ids[p] for p in prefer), flow)
        s = Submitted(given, f"{request_id} {nonce}".encode())
        expected = self.model.submit(request_id, given, s.body)
        if expected[0] == "QUEUED" or request_id not in self.submits:
            self.submits[request_id] = s
        return await self._call_submit(request_id, s), expected

    async def _submit_again(self, request_id: str) -> Any:
        """The same call, because its reply was lost."""
        s = self.submits[request_id]
        if request_id not in self.model.requests:
            return None, None
        expected = self.model.submit(request_id, s.given, s.body)
        return await self._call_submit(request_id, s), expected

    async def _call_submit(self, request_id: str, s: Submitted) -> tuple[str, Any]:
        preference = Preference(" ".join(s.given.prefer), HOUR_MS)
        verdict, (detail,) = await self.store.submit(request_id, s.body, **s.to_store(), preference=preference)
        return verdict, detail

    async def _recall(self, request_id: str) -> Any:
        return await self._resubmit(request_id, False, recall=True)

    async def _recall_of(self, request_id: str, epoch: int) -> Any:
        """By a front end that has not heard of anything since ``epoch``."""
        s = self.submits[request_id]
        seen = {"epoch_seen": epoch, "attempts": s.attempts, "done_too": False, "recall": True}
        expected = self.model.resubmit(request_id, s.given, b"stale", **seen)
        return await self.store.resubmit(request_id, b"stale", **s.to_store(), **seen), expected

    async def _resubmit(self, request_id: str, done_too: bool, *, recall: bool = False) -> Any:
        s = self.submits[request_id]
        if s.given.frontend not in self.model.out:
            return None, None
        if (known := self.model.requests.get(request_id)) is not None:
            s.epoch_seen, s.attempts = known.epoch, known.attempts
        seen = {"epoch_seen": s.epoch_seen, "attempts": s.attempts, "done_too": done_too, "recall": recall}
        body = f"{request_id} again {self._nonce()}".encode()
        expected = self.model.resubmit(request_id, s.given, body, **seen)
        return await self.store.resubmit(request_id, body, **s.to_store(), **seen), expected

    async def _cancel(self, request_id: str) -> Any:
        return await self.store.cancel(request_id, "enough", HOUR_MS), self.model.cancel(request_id, "enough")

    async def _cancel_waiting(self, request_id: str) -> Any:
        return await self._cancel(request_id)

    async def _late(self, request_id: str) -> Any:
        """Its deadline passes."""
        r = self.model.requests.get(request_id)
        if r is not None and r.state in LIVE:
            self.model.make_late(request_id)
            await self.store.call("HSET", self.store.keys.request(request_id), "deadline_ms", 1)
            await self.store.call("ZADD", self.store.keys.deadlines, "XX", 1, request_id)
        return None, None

    async def _spill(self, request_id: str) -> Any:
        """Its time to wait for a preferred instance is over."""
        self.model.make_spill(request_id)
        await self.store.call("ZADD", f"{self.store.keys.prefix}preferred", "XX", 1, request_id)
        return None, None

    async def _expire(self) -> Any:
        return await self.store.expire(100, HOUR_MS), self.model.expire()

    async def _frontend_dies(self, frontend: str) -> Any:
        await self.store.close_out(frontend)
        self.model.close_out(frontend)
        return None, None

    async def _cancel_orphans(self, frontend: str) -> Any:
        cancelled, look_on = await self.store.cancel_orphans(frontend, 100, HOUR_MS)
        return (cancelled, look_on), (self.model.cancel_orphans(frontend), "0")

    async def _audit(self) -> Any:
        """Scripts have left nothing to put right."""
        found = [await self.store.audit(which, 100) for which in range(len(self.model.load))]
        return found, [None] * len(found)

    async def _frontend_wakes(self, frontend: str) -> Any:
        if frontend not in self.model.out:
            await self.store.open_out(frontend, HOUR_MS)
            self.model.open_out(frontend)
        return None, None

    # ---- instances -----------------------------------------------------------------------------------------------

    def _of(self, slot: str) -> Known:
        return self.known.setdefault(self.ids[slot], Known())

    async def _register(self, slot: str) -> Any:
        """Once more under its id while it has its lease (the reply was lost); else as a new process."""
        instance = self.model.instances.get(self.ids[slot])
        if instance is not None and not instance.has_lease:
            name, generation = self.ids[slot].split("-")
            self.ids[slot] = f"{name}-{int(generation) + 1}"
        role, tokens, requests = SLOTS[slot]
        self.model.register(self.ids[slot], role, tokens, requests, BLOCK_SIZE)
        return await register(self.store, self.ids[slot], role, tokens, requests), ("OK",)

    async def _renew(self, slot: str) -> Any:
        name = self.ids[slot]
        return await self.store.renew(name, HOUR_MS, {"running": 1}), self.model.renew(name)

    async def _drain(self, slot: str) -> Any:
        name = self.ids[slot]
        return await self.store.drain(name), self.model.drain(name)

    async def _lapse(self, slot: str) -> Any:
        await self.store.call("UNLINK", self.store.keys.instance(self.ids[slot]))
        self.model.lapse(self.ids[slot])
        return None, None

    async def _reap(self, slot: str, limit: int) -> Any:
        name = self.ids.get(slot, slot)
        return await self.store.reap(name, limit), self.model.reap(name, limit)

    async def _leave(self, slot: str, limit: int) -> Any:
        name = self.ids.get(slot, slot)
        return await self.store.reap(name, limit, leave=True), self.model.reap(name, limit, leave=True)

    async def _claim(self, slot: str, count: int) -> Any:
        name = self.ids[slot]
        try:
            claims = await claim(self.store, name, count)
        except Fenced:
            return "FENCED", _fenced(self.model.claim, name, count)
        expected = _fenced(self.model.claim, name, count)
        if expected != "FENCED":
            self._of(slot).claims += zip(claims, expected, strict=False)
            expected = [(e.queue, e.request_id, e.epoch) for e in expected]
        return [(c.queue, c.request_id, c.epoch) for c in claims], expected

    async def _bind(self, slot: str) -> Any:
        known = self._of(slot)
        known.last_bind = known.claims
        return await self._bind_again(slot)

    async def _bind_again(self, slot: str) -> Any:
        """What was bound last, once more: the reply was lost."""
        name, known = self.ids[slot], self._of(slot)
        claims = [real for real, _ in known.last_bind]
        if not claims:
            return None, None
        expected = _fenced(self.model.bind, name, [entry for _, entry in known.last_bind])
        try:
            bound = await self.store.bind(name, claims, HOUR_MS)
        except Fenced:
            return "FENCED", expected
        over = []
        for claimed, answer in zip(claims, bound, strict=True):
            run = (claimed.request_id, claimed.epoch, name)
            if answer.verdict == "BOUND" and run not in self.runs:
                self.runs.append(run)
            if answer.verdict != "WAIT":
                over.append(claimed)
        known.claims = [pair for pair in known.claims if pair[0] not in over]
        return [(b.request_id, b.verdict, b.decode_instance, b.frontend_id) for b in bound], expected

    async def _take(self, slot: str) -> Any:
        """A decode instance reads its inbox. What is in it is compared anyway."""
        self.runs += self._untaken(slot)
        return None, None

    async def _step(self, run: tuple[str, int, str]) -> Any:
        return await reply_of(self.store.step, *run, {"lane": "none"}), self.model.step(*run)

    async def _finish(self, run: tuple[str, int, str]) -> Any:
        request_id, epoch, name = run
        output = f"{epoch}:0:7:{json.dumps({'finish': 'stop'})}"
        given = {"retain_ms": HOUR_MS, "reason": "stop", "notes": {"decode_ms": 1.5}}
        real = await reply_of(self.store.finish, *run, output, **given)
        return real, self.model.finish(request_id, epoch, name, "stop")

    async def _give_back(self, run: tuple[str, int, str], retry: bool) -> Any:
        real = await reply_of(self.store.give_back, *run, "it broke", retry=retry, retain_ms=HOUR_MS)
        return real, self.model.give_back(*run, "it broke", retry=retry)

    async def _give_back_claims(self, slot: str) -> Any:
        """What a draining instance does with claims that it has not bound."""
        claims, self._of(slot).claims = self._of(slot).claims, []
        real, expected = [], []
        for c, _ in claims:
            run = (c.request_id, c.epoch, self.ids[slot], "it drains")
            real.append(await reply_of(self.store.give_back, *run, retry=True, retain_ms=HOUR_MS))
            expected.append(self.model.give_back(*run, retry=True))
        return real, expected

    # ---- all ends ------------------------------------------------------------------------------------------------

    async def _forget(self) -> Any:
        """Redis loses this topic; front ends make their streams anew, instances are without a lease."""
        await self.forget()
        opened = list(self.model.out)
        self.model.forget()
        for frontend in opened:
            await self._frontend_wakes(frontend)
        return None, None

    async def forget(self) -> None:
        if keys := await self.store.call("KEYS", self.store.keys.prefix.replace("[", "\\[") + "*"):
            await self.store.call("UNLINK", *keys)

    async def settle(self) -> None:
        """Let everything end as it would with a healthy instance, and check that nothing is left behind."""
        for frontend in sorted(self.frontends):
            await self.do(("frontend_wakes", frontend))
        for name in sorted({*self.model.instances, *self.known}):
            while self.model.holds_something(name):
                await self.do(("leave", name, 100))
            await self.do(("leave", name, 100))
        await self.do(("register", "m0"))
        for _ in range(20 * MAX_SIZE):
            if not any(r.state in LIVE for r in self.model.requests.values()):
                break
            for request_id in sorted(self.submits):
                await self.do(("resubmit", request_id, False))
            await self.do(("claim", "m0", 4))
            await self.do(("bind", "m0"))
            for back in range(4):
                await self.do(("finish", back))
        await self._check_nothing_is_held()

    async def _check_nothing_is_held(self) -> None:
        real = await snapshot(self.store, list(self.model.instances), sorted(self.frontends), sorted(self.submits))
        states = {i: r["state"] for i, r in real["requests"].items()}
        assert not {i: s for i, s in states.items() if s in LIVE}, self.log
        assert not any(real["queues"].values()) and not real["preferred"] and not real["deadlines"], self.log
        assert not any(real["inboxes"].values()), self.log
        assert set(real["leases"].values()) <= {(0, 0)}, self.log
        assert not any(r["body"] for r in real["requests"].values()), self.log
        assert not await self.store.call("KEYS", self.store.keys.prefix.replace("[", "\\[") + "incoming:*"), self.log
        for ended in states:
            # The last word under the epoch that the record ended with has been said once.
            words = [w for rows in real["out"].values() for w in rows if w[0] == ended and w[2] != "lost"]
            at_end = [w for w in words if w[1] == real["requests"][ended]["epoch"]]
            assert len(at_end) <= 1, self.log
