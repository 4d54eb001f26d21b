"""The serving side of tcp, seen from a bare socket: what it gives, to whom, and until when."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from kv_transfer import KVPool, TransferOptions
from kv_transfer.leases import LeaseTable
from kv_transfer.plan import PairPlan, plan_pair
from kv_transfer.reactor import Reactor
from kv_transfer.transports.base import LaneEvent, Revoked
from kv_transfer.transports.tcp import TcpTransport
from kv_transfer.transports.tcp_wire import MAGIC, MAX_IDS_PER_REQUEST, PREFACE, REQUEST, RESPONSE
from tests.integration.kv_rank import LAYOUT, WAIT_S, pattern

SESSION, TOKEN = b"s" * 16, b"t" * 16
BIG = replace(LAYOUT, num_layers=64, num_blocks=512)


class Serving:
    """A transport that serves a filled pool, and the table of who may fetch from it."""

    def __init__(self) -> None:
        self.pool = KVPool.allocate(BIG)
        self.pool.as_array()[:] = pattern(BIG, 1)
        self.leases = LeaseTable(BIG.num_blocks)
        self.events: queue.Queue[LaneEvent] = queue.Queue()
        self.transport = TcpTransport(self.pool, TransferOptions(), self.leases, self.events.put)
        self._reactor, self._lock, self._closing = Reactor(), threading.Lock(), False
        self.transport.attach(self._reactor)
        self.port = int(self.transport.offer()["port"])
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def between_turns(self, call: Callable[[], None]) -> None:
        """Have the transport do something as a messenger would."""
        with self._lock:
            call()
            self._reactor.flush()

    def _run(self) -> None:
        while not self._closing:
            found = self._reactor.wait(WAIT_S)
            with self._lock:
                self._reactor.dispatch(found)
                self._reactor.flush()

    def connect(self, session: bytes = SESSION) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        sock.sendall(PREFACE.pack(MAGIC, session))
        return sock

    def close(self) -> None:
        self._closing = True
        self._reactor.wake()
        self._thread.join(WAIT_S)
        self.transport.close()
        self._reactor.close("")
        self.pool.close()


@pytest.fixture
def serving() -> Iterator[Serving]:
    made = Serving()
    yield made
    made.close()


@pytest.fixture
def lease(serving: Serving) -> Callable[[int], PairPlan]:
    """Grants TOKEN the first so many blocks."""

    def grant(num_blocks: int) -> PairPlan:
        plan = plan_pair(BIG, BIG)
        serving.leases.admit(SESSION)
        serving.leases.grant(TOKEN, SESSION, plan, serving.pool.view(plan, "src"))
        serving.leases.allow(TOKEN, np.arange(num_blocks))
        return plan

    return grant


def ask(sock: socket.socket, number: int, ids: list[int], token: bytes = TOKEN) -> None:
    sock.sendall(REQUEST.pack(token, number, len(ids)) + np.array(ids, "<u4").tobytes())


def read(sock: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(size - len(parts))
        assert part, "the connection was closed"
        parts += part
    return bytes(parts)


def test_blocks_that_are_leased_come_in_the_order_asked_for(serving: Serving, lease: Callable[[int], PairPlan]) -> None:
    lease(10)
    with serving.connect() as sock:
        ask(sock, 7, [3, 4, 9, 0])
        assert RESPONSE.unpack(read(sock, RESPONSE.size)) == (7, 0, 4 * BIG.block_bytes)
        assert read(sock, 4 * BIG.block_bytes) == pattern(BIG, 1)[[3, 4, 9, 0]].tobytes()


@pytest.mark.parametrize("ids", [[10], [0, 10], [BIG.num_blocks], [2**32 - 1]])
def test_blocks_that_are_not_leased_are_refused_with_no_bytes(
    serving: Serving, lease: Callable[[int], PairPlan], ids: list[int]
) -> None:
    lease(10)
    with serving.connect() as sock:
        ask(sock, 0, ids)
        ask(sock, 1, [0], token=b"x" * 16)
        for number in range(2):
            assert RESPONSE.unpack(read(sock, RESPONSE.size)) == (number, 1, 0)


def test_another_session_may_not_use_the_token(serving: Serving, lease: Callable[[int], PairPlan]) -> None:
    lease(10)
    serving.leases.admit(b"o" * 16)
    with serving.connect(b"o" * 16) as sock:
        ask(sock, 0, [0])
        assert RESPONSE.unpack(read(sock, RESPONSE.size)) == (0, 1, 0)


def test_after_a_revocation_the_pool_is_read_no_more_and_the_stream_stays_in_step(
    serving: Serving, lease: Callable[[int], PairPlan]
) -> None:
    lease(BIG.num_blocks)
    with serving.connect() as sock:
        ids = list(range(BIG.num_blocks))
        ask(sock, 0, ids)
        ask(sock, 1, [1])
        size = BIG.pool_bytes
        assert RESPONSE.unpack(read(sock, RESPONSE.size)) == (0, 0, size)
        serving.leases.end(TOKEN)
        serving.between_turns(lambda: serving.transport.revoke(TOKEN))
        event = serving.events.get(timeout=WAIT_S)
        assert isinstance(event, Revoked)
        assert event.token == TOKEN
        # From here on the blocks belong to somebody else, whose bytes must not show up.
        serving.pool.as_array()[:] = 0xEE
        body = np.frombuffer(read(sock, size), np.uint8)
        wanted = pattern(BIG, 1).reshape(-1)
        sent = int(np.flatnonzero(body != wanted)[0])
        assert sent < size, "the response was not sent as a whole before the revocation"
        assert not body[sent:].any(), "zeros follow"
        answers = RESPONSE.unpack(read(sock, RESPONSE.size))
        assert answers in ((1, 0, BIG.block_bytes), (1, 1, 0))
        if answers[1] == 0:
            assert not any(read(sock, BIG.block_bytes))
        ask(sock, 2, [1])
        assert RESPONSE.unpack(read(sock, RESPONSE.size)) == (2, 1, 0)


def test_a_request_for_too_many_blocks_ends_the_connection(serving: Serving, lease: Callable[[int], PairPlan]) -> None:
    lease(10)
    for num_ids in (0, MAX_IDS_PER_REQUEST + 1):
        with serving.connect() as sock:
            sock.sendall(REQUEST.pack(TOKEN, 0, num_ids))
            assert sock.recv(1) == b""


def test_hanging_up_closes_what_a_session_has_opened_and_nothing_else(
    serving: Serving, lease: Callable[[int], PairPlan]
) -> None:
    lease(10)
    serving.leases.admit(b"o" * 16)
    with serving.connect() as mine, serving.connect(b"o" * 16) as other:
        for sock in (mine, other):
            ask(sock, 0, [1], token=b"x" * 16)
            read(sock, RESPONSE.size)
        serving.between_turns(lambda: serving.transport.hang_up(SESSION))
        assert mine.recv(1) == b""
        ask(other, 1, [1], token=b"x" * 16)
        assert RESPONSE.unpack(read(other, RESPONSE.size)) == (1, 1, 0)
