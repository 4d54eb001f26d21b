"""How work comes to an instance: claims, which are bound to decode instances; its inbox and its control stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from splitwise_sched.codec import decode_request
from splitwise_sched.connection import BlockingReader, as_dict
from splitwise_sched.errors import Fenced, InvalidRequest, StoreUnavailable, UnknownModel
from splitwise_sched.records import Claim, DecodeAssigned, InstanceEvent, PrefillAssigned
from splitwise_sched.runs import Runs
from splitwise_sched.store import Store
from splitwise_sched.types import Request, RequestState

BLOCK_MS = 5000
MAX_CLAIM = 64
MAX_HELD = 100_000
MAX_PEERS = 1024
INBOX_COUNT = 64  # the bodies of so many are in memory at once
INBOX_FIELDS = {"id", "epoch", "prefill", "frontend"}
BIND_RETRY_S = 0.01
PAUSE_AFTER_FAILURE_S = 0.2


class Room:
    """How many more prompts the engine would take now."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.is_there = asyncio.Event()

    def set(self, num_requests: int) -> None:
        self.num_requests = num_requests
        if num_requests > 0:
            self.is_there.set()
        else:
            self.is_there.clear()


class GiveBack(Protocol):
    """See InstanceSession.give_back."""

    def __call__(self, request_id: str, epoch: int, why: str, *, retry: bool) -> None: ...


class Intake:
    """That of one registration: ``claim`` and ``read_inbox`` run until cancelled.

    Args:
        model: what a request must ask for; another one may be served by another shard when ``has_shards``.
        emit: is told of assignments.
        give_back: for what cannot be begun.
        lose: the registration is no longer valid, and why.
    """

    def __init__(
        self,
        store: Store,
        instance_id: str,
        runs: Runs,
        room: Room,
        *,
        model: str,
        has_shards: bool,
        retain_ms: int,
        emit: Callable[[InstanceEvent], None],
        give_back: GiveBack,
        lose: Callable[[str], None],
    ) -> None:
        self._store = store
        self._instance_id = instance_id
        self._runs = runs
        self._room = room
        self._model = model
        self._has_shards = has_shards
        self._retain_ms = retain_ms
        self._emit = emit
        self._give_back = give_back
        self._lose = lose
        self._peers: dict[str, Mapping[str, str]] = {}
        self.binding = asyncio.Lock()

    async def claim(self) -> None:
        async with self._store.reader() as reader:
            await self._claim_with(reader)

    async def _claim_with(self, reader: BlockingReader) -> None:
        claims: list[Claim] = []
        again = False
        while True:
            try:
                if claims:
                    async with self.binding:
                        claims = await self._bind(claims)
                    if claims:
                        await asyncio.sleep(BIND_RETRY_S)
                    continue
                await self._room.is_there.wait()
                count = min(self._room.num_requests, MAX_CLAIM)
                claims = await reader.claim(self._instance_id, count, BLOCK_MS, again=again)
                if again:
                    claims = [c for c in claims if c.run not in self._runs]
                    again = False
            except Fenced as exc:
                self._lose(str(exc))
                return
            except StoreUnavailable as exc:
                reader.outage.failed(exc)
                again = not claims
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

    async def _bind(self, claims: list[Claim]) -> list[Claim]:
        """Bind what can be bound; returns the claims that have to wait for a decode instance, in order."""
        # In one round trip; the body of a claim that has to wait is fetched in vain, and again.
        bodies = self._store.bodies([claim.request_id for claim in claims])
        answers = await self._store.bind(self._instance_id, claims, self._retain_ms)
        by_id = {claim.request_id: (claim, body) for claim, body in zip(claims, await bodies, strict=True)}
        waiting = [by_id[a.request_id][0] for a in answers if a.verdict == "WAIT"]
        bound = [
            a for a in answers if a.verdict == "BOUND" and self._runs.hold(by_id[a.request_id][0].run, a.frontend_id)
        ]
        peers = [self._peers.get(a.decode_instance) or await self._fields_of(a.decode_instance) for a in bound]
        for answer, decode_fields in zip(bound, peers, strict=True):
            claim, body = by_id[answer.request_id]
            if claim.run not in self._runs:
                continue  # it was dropped meanwhile
            request = self._open(claim.request_id, claim.epoch, body)
            if request is not None:
                self._room.num_requests -= 1
                self._emit(PrefillAssigned(request, claim.epoch, answer.decode_instance, decode_fields))
        self._room.set(self._room.num_requests)
        return waiting

    async def read_inbox(self) -> None:
        async with self._store.reader() as reader:
            await self._read_inbox_with(reader)

    async def _read_inbox_with(self, reader: BlockingReader) -> None:
        inbox = self._store.keys.inbox(self._instance_id)
        control = self._store.keys.control(self._instance_id)
        positions = {inbox: "0-0", control: "0-0"}
        while True:
            try:
                entries = await reader.read(positions, BLOCK_MS, INBOX_COUNT)
                # An inbox entry is seen before the word to drop it.
                await self._take_in([as_dict(fields) for key, _, fields in entries if key == inbox])
                for key, entry_id, flat in entries:
                    fields = as_dict(flat) if key == control else {}
                    if "drop" in fields and fields.get("epoch", "").isdigit():
                        self._runs.drop(fields["drop"], int(fields["epoch"]), fields.get("why", ""))
                    positions[key] = entry_id
            except StoreUnavailable as exc:
                reader.outage.failed(exc)
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

    async def _take_in(self, entries: list[dict[str, str]]) -> None:
        """What the inbox says that this instance decodes; what it prefills itself is there too."""
        mine = [e for e in entries if e.keys() >= INBOX_FIELDS and e["epoch"].isdigit()]
        mine = [e for e in mine if e["prefill"] != self._instance_id]
        if not mine:
            return
        # All that may fail comes first: what was emitted once is not read again.
        bodies = await self._store.bodies([e["id"] for e in mine])
        peers = [self._peers.get(e["prefill"]) or await self._fields_of(e["prefill"]) for e in mine]
        for entry, body, prefill_fields in zip(mine, bodies, peers, strict=True):
            request_id, epoch = entry["id"], int(entry["epoch"])
            # Without its record, its lease has lapsed; whoever reaps it takes this run back.
            if not prefill_fields or not self._runs.hold((request_id, epoch), entry["frontend"]):
                continue
            request = self._open(request_id, epoch, body)
            if request is not None:
                self._emit(DecodeAssigned(request, epoch, entry["prefill"], prefill_fields))

    async def _fields_of(self, instance_id: str) -> Mapping[str, str]:
        """Lease record of another instance, {} when it lapsed; what does not change in it may be some time old."""
        if instance_id == self._instance_id:
            return {}
        fields = self._peers.get(instance_id)
        if fields is None:
            fields = await self._store.instance_fields(instance_id)
            if len(self._peers) > MAX_PEERS:
                self._peers.clear()
            if fields:
                self._peers[instance_id] = fields
        return fields

    def _open(self, request_id: str, epoch: int, body: bytes | None) -> Request | None:
        if body is None:
            self._give_back(request_id, epoch, "its body is gone from Redis", retry=True)
            return None
        try:
            request = decode_request(body)
        except InvalidRequest as exc:
            self._give_back(request_id, epoch, str(exc), retry=False)
            return None
        if request.model != self._model:
            # With other shards, one of them may serve it.
            why = str(UnknownModel(request.model, [self._model]))
            self._give_back(request_id, epoch, why, retry=self._has_shards)
            return None
        return request

    async def return_claims(self) -> None:
        """Give back what was claimed and not bound, also by a read that was broken off."""
        async with self._store.reader() as reader:
            claims = await reader.claim(self._instance_id, MAX_HELD, 1, again=True)
        states = await self._store.request_states([claim.request_id for claim in claims])
        for claim, state in zip(claims, states, strict=True):
            if state == (RequestState.QUEUED.value, claim.epoch):
                self._give_back(claim.request_id, claim.epoch, f"{self._instance_id} is draining", retry=True)
