"""Write mode on simulated verbs, at the transport's contract: what is refused, and when nothing lands any more."""

from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest

from kv_transfer import KVPool, RdmaOptions, TransferOptions
from kv_transfer.endpoint import RankEndpoint
from kv_transfer.identity import ProcessIdentity
from kv_transfer.leases import LeaseTable
from kv_transfer.plan import plan_pair
from kv_transfer.protocol import TOKEN_BYTES
from kv_transfer.transports.base import Cancelled, Fetched, LaneEvent, Link, LinkDown, LinkUp, Refusal, Revoked
from kv_transfer.transports.rdma import RdmaTransport, fetching, serving, wire
from kv_transfer.transports.rdma.orders import Order, pack_order
from kv_transfer.transports.rdma.queue_pair import BAD_ORDER
from tests.integration.kv_rank import LAYOUT, WAIT_S, differing, pattern, wait_for
from tests.simulated_verbs import Fabric

SESSION, TOKEN, OTHER = (bytes([n]) * TOKEN_BYTES for n in (1, 2, 3))
PLAN = plan_pair(LAYOUT, LAYOUT)
IDS = np.arange(LAYOUT.num_blocks)
AnyEvent = TypeVar("AnyEvent")


class End:
    """One transport, its pool, and what it posts."""

    def __init__(self, seed: int, **rdma: Any) -> None:
        self.options = TransferOptions(protocols=("rdma",), rdma=RdmaOptions(mode="write", **rdma))
        self.pool = KVPool.allocate(LAYOUT)
        self.view = self.pool.as_array()
        self.view[:] = pattern(LAYOUT, seed)
        self.leases = LeaseTable(LAYOUT.num_blocks)
        self.events: queue.SimpleQueue[LaneEvent] = queue.SimpleQueue()
        self.transport = RdmaTransport(self.pool, self.options, self.leases, self.events.put)
        process = ProcessIdentity("host", 1, 1)
        offer = self.transport.offer()
        self.endpoint = RankEndpoint("prefill", "127.0.0.1", 1, "0" * 32, process, LAYOUT, 1, {"rdma": offer})
        self.port = int(offer["port"])

    def allow(self, token: bytes, block_ids: Sequence[int], session: bytes = SESSION) -> None:
        self.leases.admit(session)
        self.leases.grant(token, session, PLAN, self.pool.view(PLAN, "src"))
        self.leases.allow(token, np.array(block_ids))

    def revoke(self, token: bytes) -> None:
        self.leases.end(token)
        self.transport.revoke(token)

    def next(self, kind: type[AnyEvent]) -> AnyEvent:
        event = self.events.get(timeout=WAIT_S)
        assert isinstance(event, kind), event
        return event

    def settle(self) -> None:
        """Until its thread has done what it was told so far."""
        done, thread = threading.Event(), self.transport._thread
        assert thread is not None and thread.submit(done.set)
        assert done.wait(WAIT_S)

    def close(self) -> None:
        self.transport.close()
        self.pool.close()


@pytest.fixture
def end(fabric: Fabric) -> Iterator[Callable[..., End]]:
    with ExitStack() as stack:

        def make(seed: int, **rdma: Any) -> End:
            made = End(seed, **rdma)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def source(end: Callable[..., End]) -> End:
    made = end(1)
    made.leases.admit(SESSION)
    return made


@pytest.fixture
def destination(end: Callable[..., End]) -> End:
    return end(2)


def link_between(source: End, destination: End) -> Link:
    link = destination.transport.open_link(source.endpoint, SESSION, PLAN)
    destination.next(LinkUp)
    return link


def warm_link_between(source: End, destination: End) -> Link:
    """One over which something has gone already, as one that never worked is given up at its first error."""
    link = link_between(source, destination)
    source.allow(SESSION, [256])
    link.fetch(0, SESSION, IDS[256:], IDS[256:])
    destination.next(Fetched)
    return link


def assert_only(destination: End, dst_ids: Sequence[int], wanted: np.ndarray) -> None:
    """These blocks are as wanted, and all others but the warm one as they were."""
    expected = pattern(LAYOUT, 2)
    expected[list(dst_ids)] = wanted
    assert differing(LAYOUT, destination.view[:256], expected[:256]) == []


def fetch_what_is_stuck(fabric: Fabric, source: End, link: Link) -> None:
    """TOKEN's writes stay on the wire, as all that follow until the fabric is released."""
    source.allow(TOKEN, range(40))
    fabric.is_stuck = True
    link.fetch(1, TOKEN, IDS[:40], IDS[:40])
    wait_for(lambda: fabric.num_held > 0)


def fetch_two_of_which_one_is_stuck(fabric: Fabric, source: End, link: Link) -> None:
    """TOKEN's writes stay on the wire; OTHER is asked for behind them."""
    fetch_what_is_stuck(fabric, source, link)
    source.allow(OTHER, range(40, 60))
    link.fetch(2, OTHER, IDS[40:60], IDS[100:120])
    fabric.is_stuck = False


def test_what_is_on_the_wire_when_a_link_has_said_cancelled_lands_nowhere(
    fabric: Fabric, source: End, end: Callable[..., End]
) -> None:
    destination = end(2, queue_pairs=1)
    link = warm_link_between(source, destination)
    fetch_two_of_which_one_is_stuck(fabric, source, link)
    # The source is not told: what it has posted stays under way.
    link.cancel(TOKEN)
    assert destination.next(Cancelled).token == TOKEN
    destination.view[:40] = 0xEE
    assert fabric.num_held > 0
    fabric.release()
    assert fabric.num_lost > 0
    assert destination.next(Fetched).chunk_id == 2
    assert (destination.view[:40] == 0xEE).all()
    assert differing(LAYOUT, destination.view[100:120], source.view[40:60]) == []


def test_writes_of_a_cancelled_transfer_that_end_soon_cost_no_queue_pair(
    fabric: Fabric, source: End, destination: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "CANCEL_GRACE_S", WAIT_S)
    link = link_between(source, destination)
    fetch_what_is_stuck(fabric, source, link)
    link.cancel(TOKEN)
    destination.settle()
    assert destination.events.empty(), "nothing may be said while something can land"
    fabric.release()
    assert destination.next(Cancelled).token == TOKEN
    assert destination.transport.counters().get("rebuilds", 0) == 0


def test_a_revoked_transfer_is_read_by_nobody_once_the_source_says_so(
    fabric: Fabric, source: End, destination: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "REVOKE_GRACE_S", WAIT_S)
    link = link_between(source, destination)
    fetch_what_is_stuck(fabric, source, link)
    source.revoke(TOKEN)
    source.settle()
    assert source.events.empty(), "the device may read the pool yet"
    fabric.release()
    assert source.next(Revoked).token == TOKEN
    assert destination.next(Fetched).chunk_id == 1
    assert_only(destination, range(40), pattern(LAYOUT, 1)[:40])


def test_a_revoked_transfer_whose_writes_do_not_end_costs_its_queue_pairs_and_no_other_transfer(
    fabric: Fabric, source: End, end: Callable[..., End]
) -> None:
    destination = end(2, queue_pairs=1)
    # Nothing has ever gone over this link: what the source gives up must not be taken for a link that does not work.
    link = link_between(source, destination)
    fetch_two_of_which_one_is_stuck(fabric, source, link)
    source.revoke(TOKEN)
    assert source.next(Revoked).token == TOKEN
    source.view[:40] = 0xEE
    wait_for(lambda: destination.transport.counters().get("rebuilds", 0) == 1)
    fabric.release()
    # Asked for again on new queue pairs, and refused.
    ended = [destination.next(LaneEvent), destination.next(LaneEvent)]  # type: ignore[arg-type]
    assert sorted(type(event).__name__ for event in ended) == ["Fetched", "Refusal"]
    assert not (destination.view == 0xEE).all(axis=1).any()
    assert differing(LAYOUT, destination.view[100:120], source.view[40:60]) == []
    wait_for(lambda: source.transport.counters().get("pairs_failed", 0) == 1)


def test_orders_that_wait_at_the_source_are_not_carried_out_once_revoked(
    fabric: Fabric, end: Callable[..., End], destination: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "REVOKE_GRACE_S", WAIT_S)
    monkeypatch.setattr(fetching, "CANCEL_GRACE_S", WAIT_S)
    source = end(1, queue_depth=2)
    source.leases.admit(SESSION)
    link = link_between(source, destination)
    for token, ids in ((TOKEN, range(0, 40, 2)), (OTHER, range(100, 140, 2))):
        source.allow(token, ids)
    fabric.is_stuck = True
    # Two of twenty writes are posted on a queue pair; the next order waits behind them.
    link.fetch(1, TOKEN, IDS[:40:2], IDS[40:0:-2])
    link.fetch(2, OTHER, IDS[100:140:2], IDS[140:100:-2])
    wait_for(lambda: fabric.num_held >= 2)
    source.revoke(TOKEN)
    source.settle()
    fabric.release()
    assert source.next(Revoked).token == TOKEN
    ended = [destination.next(LaneEvent), destination.next(LaneEvent)]  # type: ignore[arg-type]
    assert sorted(type(event).__name__ for event in ended) == ["Fetched", "Refusal"]
    assert fabric.num_writes <= 2 + 20
    assert differing(LAYOUT, destination.view[140:100:-2], source.view[100:140:2]) == []


def test_what_no_lease_allows_is_refused_and_nothing_is_written(fabric: Fabric, source: End, destination: End) -> None:
    link = warm_link_between(source, destination)
    source.allow(TOKEN, range(10))
    source.allow(OTHER, range(100), session=bytes(TOKEN_BYTES))
    writes = fabric.num_writes
    for token, ids in ((TOKEN, IDS[:11]), (OTHER, IDS[:5]), (b"?" * TOKEN_BYTES, IDS[:1])):
        link.fetch(1, token, ids, ids)
        assert destination.next(Refusal).token == token
    source.leases.end(TOKEN)
    link.fetch(2, TOKEN, IDS[:1], IDS[:1])
    assert destination.next(Refusal).token == TOKEN
    assert fabric.num_writes == writes
    assert_only(destination, [], pattern(LAYOUT, 2)[:0])
    wait_for(lambda: source.transport.counters()["orders_refused"] == 4)


def test_more_chunks_than_there_is_room_for_never_overrun_a_queue(fabric: Fabric, end: Callable[..., End]) -> None:
    source, destination = end(1, queue_depth=3), end(2, queue_depth=3, queue_pairs=2)
    source.allow(TOKEN, range(250))
    link = link_between(source, destination)
    fabric.is_stuck = True
    for number in range(250):
        link.fetch(number, TOKEN, IDS[number : number + 1], IDS[249 - number : 250 - number])
    wait_for(lambda: fabric.num_held == 6)
    fabric.release()
    assert {destination.next(Fetched).chunk_id for _ in range(250)} == set(range(250))
    assert_only(destination, range(249, -1, -1), pattern(LAYOUT, 1)[:250])


def test_a_source_that_hears_late_of_its_own_answers_does_not_blame_who_has_heard_already(
    fabric: Fabric, source: End, end: Callable[..., End]
) -> None:
    destination = end(2, queue_depth=2, queue_pairs=1)
    source.allow(TOKEN, range(100))
    link = link_between(source, destination)
    fabric.is_deaf = True
    for number in range(100):
        link.fetch(number, TOKEN, IDS[number : number + 1], IDS[number : number + 1])
    assert {destination.next(Fetched).chunk_id for _ in range(100)} == set(range(100))
    assert destination.transport.counters().get("rebuilds", 0) == 0


def test_a_peer_that_answers_what_was_not_asked_loses_its_queue_pairs(
    fabric: Fabric, source: End, destination: End
) -> None:
    link = warm_link_between(source, destination)
    numbers = [lane.pair.number for lane in link._connection.lanes]  # type: ignore[attr-defined]
    pair = fabric.pairs[numbers[0]]
    pair.attributes.rcq.push(0, 0, numbers[0], socket.htonl(12345))
    wait_for(lambda: destination.transport.counters().get("rebuilds", 0) == 1)
    source.allow(TOKEN, range(10))
    link.fetch(1, TOKEN, IDS[:10], IDS[:10])
    assert destination.next(Fetched).chunk_id == 1
    assert_only(destination, range(10), pattern(LAYOUT, 1)[:10])


def connected(source: End, regions: Sequence[wire.RemoteRegion], num_orders: int = 4) -> socket.socket:
    """A peer that has been let in, and keeps to the protocol until here."""
    port = wire.PortAddress(bytes(16), 0, 5, 16, True)
    request = wire.Request(port, wire.MODE_WRITE, num_orders, [wire.PairAddress(77, 0)], list(regions))
    sock = socket.create_connection(("127.0.0.1", source.port), timeout=WAIT_S)
    sock.sendall(wire.pack_request(SESSION, request))
    assert sock.recv(1) == bytes([wire.STATUS_OK])
    rest = wire.ANSWER_HEAD_BYTES + wire.regions_bytes(1) + wire.pairs_bytes(1)
    while rest:
        rest -= len(sock.recv(rest))
    return sock


REGION = wire.RemoteRegion(1 << 20, 1, LAYOUT.pool_bytes)
GOOD = Order(TOKEN, IDS[:1], IDS[:1])


@pytest.mark.parametrize(
    ("said", "regions"),
    [
        (pack_order(1, 1, GOOD), [REGION]),
        (pack_order(1 << 31, 0, GOOD), [REGION]),
        (pack_order(1, 0, replace(GOOD, dst_ids=np.array([1 << 31]))), [REGION]),
        (pack_order(1, 0, GOOD), [replace(REGION, num_bytes=10)]),
        (pack_order(1, 0, Order(TOKEN, IDS[:1], None, 0, 0)), [REGION]),
        (pack_order(1, 0, Order(TOKEN, IDS[:1], None, 9, 0)), [REGION]),
        (pack_order(1, 0, Order(TOKEN, IDS[:1], None, 0, (1 << 64) - 1)), [REGION]),
        (pack_order(1, 0, Order(TOKEN, IDS[:0], IDS[:0])), [REGION]),
        (struct.pack("<IHBHH16sQ", 1, 0, 7, 0, 1, TOKEN, 0), [REGION]),
        (struct.pack("<IHBHH16sQ", 1, 0, 0, 0, 65535, TOKEN, 0), [REGION]),
        (b"".join(pack_order(n, 0, GOOD) for n in range(300)), [REGION]),
    ],
    ids=[
        "queue pair that is not there", "number too large", "past the end of the pool", "smaller pool",
        "not a staged part", "no part", "slot that cannot be", "no units", "unknown kind", "too many units",
        "more than announced",
    ],
)  # fmt: skip
def test_an_order_that_cannot_be_is_hung_up_on_and_others_are_served(
    fabric: Fabric, source: End, destination: End, said: bytes, regions: Sequence[wire.RemoteRegion]
) -> None:
    source.allow(TOKEN, range(10))
    link = warm_link_between(source, destination)
    fabric.is_stuck = True
    with connected(source, regions) as sock:
        sock.sendall(said)
        assert sock.recv(1) == bytes([BAD_ORDER])
        assert sock.recv(1) == b""
    fabric.release()
    link.fetch(1, TOKEN, IDS[:10], IDS[:10])
    assert destination.next(Fetched).chunk_id == 1
    assert_only(destination, range(10), pattern(LAYOUT, 1)[:10])


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": 2},
        {"num_orders": 0},
        {"num_orders": wire.MAX_ORDERS + 1},
        {"regions": []},
        {"mode": wire.MODE_READ},
        {"pairs": []},
        {"regions": [replace(REGION, num_bytes=1 << 60)]},
        {"regions": [replace(REGION, address=(1 << 64) - 1)]},
    ],
)
def test_a_request_that_cannot_be_gets_no_queue_pair(fabric: Fabric, source: End, wrong: dict[str, Any]) -> None:
    port = wire.PortAddress(bytes(16), 0, 5, 16, True)
    good = wire.Request(port, wire.MODE_WRITE, 4, [wire.PairAddress(77, 0)], [REGION])
    with socket.create_connection(("127.0.0.1", source.port), timeout=WAIT_S) as sock:
        sock.sendall(wire.pack_request(SESSION, replace(good, **wrong)))
        assert sock.recv(1) == b""
    assert fabric.open["QP"] == 0


def test_a_peer_of_another_version_is_told_so_by_both_sides(fabric: Fabric, source: End, destination: End) -> None:
    with socket.create_connection(("127.0.0.1", source.port), timeout=WAIT_S) as sock:
        sock.sendall(wire.MAGIC + b"\x01" + SESSION)
        assert sock.recv(2) == bytes([wire.STATUS_OTHER_VERSION])
    old = {name: value for name, value in source.endpoint.transports["rdma"].items() if name != "version"}
    obstacle = destination.transport.obstacle(replace(source.endpoint, transports={"rdma": old}))
    assert obstacle == "it connects queue pairs by version 1, we by 2: run one release on both"
    assert destination.transport.obstacle(source.endpoint) is None


def test_a_source_that_ends_takes_its_link_along(fabric: Fabric, source: End, destination: End) -> None:
    link_between(source, destination)
    source.close()
    assert destination.next(LinkDown).reason == "the peer has closed it"
