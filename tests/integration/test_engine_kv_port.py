"""Engines that drive themselves: their own loops call ``KVPort``, and KV goes from one to the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from engine.messenger_port import MessengerPort
from engine.port import Loaded, PortEvent, Rejected, Released
from kv_transfer import KVLayout, KVPool, TransferOptions

LAYOUT = KVLayout(
    engine="toy", model="m", dtype="uint8", num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, num_blocks=16
)
WAIT_S = 20.0


class Loop:
    """Half an engine: a pool, a port, and a wish to know of events."""

    def __init__(self, name: str, transport: str) -> None:
        self.pool = KVPool.allocate(LAYOUT)
        self._changed = threading.Event()
        self.port = MessengerPort(
            self.pool, TransferOptions(protocols=(transport,)), name=name, on_event=self._changed.set
        )

    def event(self) -> PortEvent:
        """The only event that comes."""
        while True:
            self._changed.clear()
            if events := self.port.poll():
                (event,) = events
                return event
            assert self._changed.wait(WAIT_S), "nothing came"

    def close(self) -> None:
        self.port.close()
        self.port.close()
        self.pool.close()


@pytest.fixture(params=["shm", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Loop, Loop]]:
    loops = Loop("prefill", request.param), Loop("decode", request.param)
    yield loops
    for loop in loops:
        loop.close()


def fill(loop: Loop, block_ids: list[int]) -> None:
    for block_id in block_ids:
        loop.pool.as_array()[block_id] = block_id + 1


def test_blocks_move_by_chunks_into_reserved_ones_and_both_sides_are_told(pair: tuple[Loop, Loop]) -> None:
    prefill, decode = pair
    decode.port.reserve("a", [prefill.port.endpoint], [7, 3, 9], deadline_s=WAIT_S)
    prefill.port.hold("a", num_blocks=3, deadline_s=WAIT_S)
    fill(prefill, [1, 2])
    prefill.port.on_blocks("a", 0, [1, 2])
    fill(prefill, [5])
    prefill.port.on_blocks("a", 2, [5])
    prefill.port.on_prefill_done("a", b"first token")
    assert decode.event() == Loaded("a", b"first token")
    assert prefill.event() == Released("a")
    assert decode.pool.as_array()[[7, 3, 9], 0].tolist() == [2, 3, 6]
    assert decode.pool.as_array()[[0, 1, 2]].max() == 0


@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_abort_on_either_side_ends_both(pair: tuple[Loop, Loop], who: str) -> None:
    prefill, decode = pair
    prefill.port.hold("a", num_blocks=2, deadline_s=WAIT_S)
    decode.port.reserve("a", [prefill.port.endpoint], [1, 2], deadline_s=WAIT_S)
    prefill.port.on_blocks("a", 0, [4])
    {"prefill": prefill, "decode": decode}[who].port.abort("a", "preempted")
    released, rejected = prefill.event(), decode.event()
    assert isinstance(released, Released) and "preempted" in str(released.failure)
    assert isinstance(rejected, Rejected) and "preempted" in rejected.reason
    # A forward pass that was under way meanwhile says what it has done.
    prefill.port.on_blocks("a", 1, [5])
    prefill.port.on_prefill_done("a", b"")
    prefill.port.abort("a", "again")
    assert prefill.port.poll() == []


def test_deadline_ends_a_hold_that_nobody_fetches(pair: tuple[Loop, Loop]) -> None:
    prefill, _ = pair
    prefill.port.hold("a", num_blocks=1, deadline_s=0.2)
    released = prefill.event()
    assert isinstance(released, Released) and "deadline" in str(released.failure)


def test_what_cannot_be_begun_is_an_event_and_no_exception(pair: tuple[Loop, Loop]) -> None:
    prefill, decode = pair
    decode.port.reserve("a", [prefill.port.endpoint], [99], deadline_s=WAIT_S)
    assert isinstance(decode.event(), Rejected)
    decode.port.reserve("b", [], [1], deadline_s=WAIT_S)
    assert isinstance(decode.event(), Rejected)
    prefill.port.hold("a", num_blocks=0, deadline_s=WAIT_S)
    assert isinstance(prefill.event(), Released)
