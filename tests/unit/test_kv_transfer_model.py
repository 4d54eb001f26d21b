"""The two state machines of a transfer against each other, in every order that hypothesis can think of.

A source rank and one to three destination ranks run on a model of memory: a block of the source is true until the
source says that the transfer has ended; from then on it is somebody else's. Messages of a connection arrive in order,
or not at all once it is lost; fetches are carried out late; peers fall silent for as long as they like.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.effects import Allow, Cancel, Effect, Fetch, Forget, Report, Revoke, Sign, Tell
from kv_transfer.events import Received, Sent, TransferEvent, TransferFailed
from kv_transfer.layout import KVLayout
from kv_transfer.plan import plan_pair
from kv_transfer.protocol import Abort, Applied, Blocks, Confirmed, Drained, End, Message, Reserve
from kv_transfer.receiving import Leg, ReceiveTransfer
from kv_transfer.sending import Receiver, SendTransfer

NUM_BLOCKS = 4
LAYOUT = KVLayout("e", "m", "uint8", 1, 1, 64, 1, 100, kv_planes=1)
PLAN = plan_pair(LAYOUT, LAYOUT)
TRUE, FALSE, UNWRITTEN, REUSED = "true", "false", "unwritten", "reused"


class Destination:
    """One destination rank, its connection to the source, and its pool."""

    def __init__(self, rank: int, checksum: str = "none") -> None:
        self.rank = rank
        self.peer = bytes([rank])
        self.leg = Leg(self.peer, "source", PLAN, 100, 1)
        self.machine = ReceiveTransfer(
            "r@1", np.arange(NUM_BLOCKS), [self.leg], block_size=1, checksum=checksum, now=0.0, deadline_s=100.0
        )
        self.to_source: deque[Message] = deque()
        self.from_source: deque[Message] = deque()
        self.connected = True
        self.fetches: deque[Fetch] = deque()
        self.cancels = 0
        self.pool = [UNWRITTEN] * NUM_BLOCKS
        self.event: TransferEvent | None = None


class World:
    def __init__(self, num_destinations: int, is_signed: bool = False) -> None:
        self.now = 0.0
        self.is_signed = is_signed
        self.signs: deque[Sign] = deque()
        self.source = SendTransfer("r@1", NUM_BLOCKS, block_size=1, now=0.0, deadline_s=100.0, drain_s=1.0)
        self.source_event: TransferEvent | None = None
        self.block = TRUE
        self.next_index = 0
        self.revokes: deque[bytes] = deque()
        self.allowed: set[bytes] = set()
        self.destinations = [Destination(rank, "crc32" if is_signed else "none") for rank in range(num_destinations)]

    def run_source(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert self.source_event is None, "nothing comes after the report"
            if isinstance(effect, Tell):
                destination = self.destinations[effect.peer[0]]
                if destination.connected:
                    destination.from_source.append(effect.message)
            elif isinstance(effect, Allow):
                self.allowed.add(effect.token)
            elif isinstance(effect, Sign):
                self.signs.append(effect)
            elif isinstance(effect, Revoke):
                self.revokes.append(effect.token)
            elif isinstance(effect, Forget):
                self.allowed.discard(effect.token)
            elif isinstance(effect, Report):
                self.source_event = effect.event
                self.block = FALSE

    def run_destination(self, d: Destination, effects: list[Effect]) -> None:
        for effect in effects:
            assert d.event is None, "nothing comes after the report"
            if isinstance(effect, Tell):
                if d.connected:
                    d.to_source.append(effect.message)
            elif isinstance(effect, Fetch):
                if self.is_signed:
                    assert effect.sums is not None
                    assert effect.sums[:, 0].tolist() == effect.src_ids.tolist(), "each block keeps its own sum"
                d.fetches.append(effect)
            elif isinstance(effect, Cancel):
                d.cancels += 1
            elif isinstance(effect, Report):
                d.event = effect.event
                if isinstance(effect.event, Received):
                    assert d.pool == [TRUE] * NUM_BLOCKS, "what is received is what the source held"
                    assert effect.event.aux == b"aux"
                d.pool = [REUSED] * NUM_BLOCKS

    def actions(self) -> list[str]:
        """What could happen next; a name, and for which destination."""
        found = ["tick"]
        if self.source_event is None and self.source.is_open:
            if self.next_index < NUM_BLOCKS:
                found.append("offer")
            elif self.next_index == NUM_BLOCKS:
                found.append("finish")
            found.append("source aborts")
        if self.signs:
            found.append("signed")
        if self.revokes:
            found.append("revoked")
        for d in self.destinations:
            if d.event is None and not d.leg.reserved and d.machine.is_open:
                found.append(f"ready {d.rank}")
            if d.to_source:
                found.append(f"to source {d.rank}")
            if d.from_source:
                found.append(f"from source {d.rank}")
            if d.fetches:
                found.append(f"fetch {d.rank}")
            if d.cancels:
                found.append(f"cancelled {d.rank}")
            if d.event is None and d.machine.is_open:
                found.append(f"destination aborts {d.rank}")
            if d.connected:
                found.append(f"cut {d.rank}")
        return found

    def do(self, action: str) -> None:
        name, _, number = action.rpartition(" ")
        if not number.isdigit():
            self.do_source(action)
            return
        d = self.destinations[int(number)]
        if name == "ready":
            self.run_destination(d, d.machine.ready(d.leg.token, "shm", self.now))
        elif name == "to source":
            self.deliver_to_source(d, d.to_source.popleft())
        elif name == "from source":
            self.deliver_to_destination(d, d.from_source.popleft())
        elif name == "fetch":
            fetch = d.fetches.popleft()
            # Also after a cancel that has not been confirmed: until then the copy may still be under way.
            for index in fetch.dst_ids.tolist():
                d.pool[index] = self.block
            if d.event is None:
                self.run_destination(d, d.machine.fetched(d.leg.token, len(fetch.dst_ids)))
        elif name == "cancelled":
            d.cancels -= 1
            d.fetches.clear()
            if d.event is None:
                self.run_destination(d, d.machine.cancelled(d.leg.token))
        elif name == "destination aborts":
            self.run_destination(d, d.machine.abort("enough", ""))
        elif name == "cut":
            d.connected = False
            d.to_source.clear()
            d.from_source.clear()
            if self.source_event is None:
                self.run_source(self.source.lose(d.peer, "cut", self.now))
            if d.event is None:
                self.run_destination(d, d.machine.abort("cut", "source"))

    def do_source(self, action: str) -> None:
        if action == "tick":
            self.now += 0.5
            if self.source_event is None:
                self.run_source(self.source.tick(self.now))
            for d in self.destinations:
                if d.event is None:
                    self.run_destination(d, d.machine.tick(self.now))
        elif action == "offer":
            self.run_source(self.source.offer(self.next_index, np.array([self.next_index + 10])))
            self.next_index += 1
        elif action == "finish":
            self.run_source(self.source.finish(b"aux"))
            self.next_index += 1
        elif action == "source aborts":
            self.run_source(self.source.abort("enough", "", self.now))
        elif action == "signed":
            sign = self.signs.popleft()
            if self.source_event is None and sign.token in self.source.receivers:
                sums = sign.block_ids.astype("<u8").tobytes()
                self.run_source(self.source.signed(sign.token, sign.first_index, sign.block_ids, sums, self.now))
        elif action == "revoked":
            token = self.revokes.popleft()
            if self.source_event is None:
                self.run_source(self.source.revoked(token, self.now))

    def deliver_to_source(self, d: Destination, message: Message) -> None:
        if isinstance(message, Reserve):
            if self.source_event is not None:
                d.from_source.append(Abort(message.token, "has ended"))
                return
            receiver = Receiver(d.peer, message.token, d.rank, f"d{d.rank}", "shm", 1, is_signed=self.is_signed)
            expected = frozenset(range(len(self.destinations)))
            self.run_source(self.source.reserve(receiver, expected, message.num_blocks, self.now))
            return
        assert isinstance(message, Applied | Abort | Drained)
        known = self.source_event is None and message.token in self.source.receivers
        if isinstance(message, Applied):
            if known:
                self.run_source(self.source.applied(message.token, message.num_bytes, self.now))
            else:
                d.from_source.append(Abort(message.token, "has ended"))
        elif known and isinstance(message, Abort):
            self.run_source(self.source.abort(message.reason, "d", self.now))
        elif known:
            self.run_source(self.source.drained(message.token, self.now))

    def deliver_to_destination(self, d: Destination, message: Message) -> None:
        if d.event is not None:
            return
        if isinstance(message, Blocks):
            ids = np.frombuffer(message.block_ids, "<u4").astype(np.int64)
            self.run_destination(d, d.machine.blocks(message.token, message.first_index, ids, message.sums))
        elif isinstance(message, End):
            self.run_destination(d, d.machine.end(message.token, message.aux))
        elif isinstance(message, Confirmed):
            self.run_destination(d, d.machine.confirmed(message.token, self.now))
        elif isinstance(message, Abort):
            self.run_destination(d, d.machine.abort(message.reason, "source"))

    def settle(self) -> None:
        """Let everything happen that is still to happen; time passes only when nothing else can."""
        for _ in range(5000):
            if self.source_event is not None and all(d.event is not None for d in self.destinations):
                return
            quiet = [a for a in self.actions() if not a.startswith(("cut", "source aborts", "destination aborts"))]
            self.do(next((a for a in quiet if a != "tick"), "tick"))
        raise AssertionError("the transfer does not end")


@settings(deadline=None, max_examples=400)
@given(st.integers(1, 3), st.booleans(), st.data())
def test_a_transfer_ends_once_on_each_side_and_only_true_bytes_are_received(
    num: int, is_signed: bool, data: st.DataObject
) -> None:
    world = World(num, is_signed)
    # Most steps go forward; trouble comes now and then.
    for _ in range(data.draw(st.integers(0, 60))):
        actions = world.actions()
        trouble = data.draw(st.integers(0, 11)) == 0
        calm = [a for a in actions if not a.startswith(("cut", "source aborts", "destination aborts"))]
        world.do(data.draw(st.sampled_from(actions if trouble else calm)))
    world.settle()
    assert isinstance(world.source_event, Sent | TransferFailed)
    if isinstance(world.source_event, Sent):
        assert all(d.leg.applied for d in world.destinations)
    for d in world.destinations:
        while d.fetches or d.cancels:
            world.do(f"fetch {d.rank}" if d.fetches and not d.cancels else f"cancelled {d.rank}")
        assert d.pool == [REUSED] * NUM_BLOCKS, "nothing is written after the end"


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_without_trouble_everything_is_sent_and_received(num: int, is_signed: bool) -> None:
    world = World(num, is_signed)
    world.settle()
    assert isinstance(world.source_event, Sent)
    assert all(isinstance(d.event, Received) for d in world.destinations)


def test_a_source_that_aborts_confirms_nothing_that_was_read_before_or_after() -> None:
    world = World(1)
    d = world.destinations[0]
    while not d.leg.applied:
        world.do(
            next(
                a for a in world.actions() if a not in ("tick", "source aborts") and "abort" not in a and "cut" not in a
            )
        )
    world.run_source(world.source.abort("lease lost", "", world.now))
    world.settle()
    assert isinstance(d.event, TransferFailed)
    assert isinstance(world.source_event, TransferFailed)


@pytest.mark.parametrize(
    ("ids", "first", "words"),
    [([1, 2, 3, 4, 5], 0, "out of turn"), ([100], 0, "outside its pool"), ([1], 4, "out of turn")],
)
def test_a_destination_does_not_fetch_what_a_source_cannot_mean(ids: list[int], first: int, words: str) -> None:
    d = Destination(0)
    d.machine.ready(d.leg.token, "shm", 0.0)
    d.machine.blocks(d.leg.token, first, np.array(ids))
    (report,) = [e for e in d.machine.cancelled(d.leg.token) if isinstance(e, Report)]
    assert isinstance(report.event, TransferFailed)
    assert words in report.event.reason


def test_a_destination_refuses_an_end_before_all_blocks_and_a_confirmation_before_it_applied() -> None:
    for step, words in (
        (lambda m, t: m.end(t, b""), "with some missing"),
        (lambda m, t: m.confirmed(t, 0.0), "not applied"),
    ):
        d = Destination(0)
        d.machine.ready(d.leg.token, "shm", 0.0)
        step(d.machine, d.leg.token)
        (report,) = [e for e in d.machine.cancelled(d.leg.token) if isinstance(e, Report)]
        assert isinstance(report.event, TransferFailed)
        assert words in report.event.reason


@pytest.mark.parametrize(("checksum", "sums"), [("crc32", b""), ("crc32", bytes(24)), ("none", bytes(16))])
def test_checksums_that_do_not_belong_to_the_blocks_fail_the_transfer(checksum: str, sums: bytes) -> None:
    d = Destination(0, checksum)
    d.machine.ready(d.leg.token, "shm", 0.0)
    d.machine.blocks(d.leg.token, 0, np.array([1, 2]), sums)
    (report,) = [e for e in d.machine.cancelled(d.leg.token) if isinstance(e, Report)]
    assert isinstance(report.event, TransferFailed)
    assert "bytes of checksums for 2 blocks" in report.event.reason


def test_the_end_waits_for_the_checksums_of_all_blocks() -> None:
    source = SendTransfer("r@1", 2, block_size=1, now=0.0, deadline_s=10.0, drain_s=1.0)
    source.reserve(Receiver(b"d", b"t", 0, "d0", "shm", 1, is_signed=True), frozenset({0}), 2, 0.0)
    assert [type(e) for e in source.offer(0, np.array([3, 4]))] == [Sign]
    assert source.finish(b"aux") == []
    effects = source.signed(b"t", 0, np.array([3, 4]), bytes(16), 0.0)
    assert [type(e.message if isinstance(e, Tell) else e) for e in effects] == [Allow, Blocks, End]
    assert isinstance(source.applied(b"t", 2, 0.0)[0], Forget)


def test_blocks_that_cannot_be_hashed_fail_the_transfer() -> None:
    source = SendTransfer("r@1", 1, block_size=1, now=0.0, deadline_s=10.0, drain_s=1.0)
    source.reserve(Receiver(b"d", b"t", 0, "d0", "shm", 1, is_signed=True), frozenset({0}), 1, 0.0)
    source.offer(0, np.array([3]))
    source.signed(b"t", 0, np.array([3]), None, 0.0)
    assert not source.is_open


def test_a_live_peer_that_still_reads_is_waited_for_and_a_silent_one_only_so_long() -> None:
    for silent in (False, True):
        source = SendTransfer("r@1", 1, block_size=1, now=0.0, deadline_s=10.0, drain_s=1.0)
        source.reserve(Receiver(b"d", b"t", 0, "d0", "shm", 1), frozenset({0}), 1, 0.0)
        source.offer(0, np.array([3]))
        assert not [e for e in source.abort("enough", "", 2.0) if isinstance(e, Report)]
        assert not [e for e in source.revoked(b"t", 2.0) if isinstance(e, Report)]
        assert not source.tick(2.9)
        effects = source.tick(3.0) if silent else source.drained(b"t", 2.9)
        assert [type(e) for e in effects] == [Report]


def test_only_the_ranks_that_the_plan_names_may_reserve_each_once() -> None:
    source = SendTransfer("r@1", 1, block_size=1, now=0.0, deadline_s=10.0, drain_s=1.0)
    expected = frozenset({0, 1})
    assert not source.reserve(Receiver(b"a", b"t0", 0, "d0", "shm", 1), expected, 1, 0.0)
    for receiver, ranks in (
        (Receiver(b"b", b"t1", 0, "d0", "shm", 1), expected),
        (Receiver(b"b", b"t2", 2, "d2", "shm", 1), expected),
        (Receiver(b"b", b"t3", 1, "d1", "shm", 1), frozenset({1})),
    ):
        (effect,) = source.reserve(receiver, ranks, 1, 0.0)
        assert isinstance(effect, Tell)
        assert isinstance(effect.message, Abort)
    assert source.is_open
    assert set(source.receivers) == {b"t0"}
