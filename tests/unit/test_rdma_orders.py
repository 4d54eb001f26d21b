"""Orders, answers and requests for queue pairs survive their way, and what cannot be is refused by name."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.transports.rdma import wire
from kv_transfer.transports.rdma.orders import (
    HEAD_BYTES,
    MAX_UNITS,
    NUMBERS,
    BadOrder,
    Order,
    ids_bytes,
    pack_answer,
    pack_order,
    unpack_answer,
    unpack_order,
)

TOKEN = bytes(range(16))
PORT = wire.PortAddress(bytes(16), 7, 5, 16, False)


@settings(deadline=None)
@given(st.data())
def test_an_order_is_read_as_it_was_given(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 20))
    ids = st.lists(st.integers(0, 2**32 - 1), min_size=count, max_size=count).map(np.array)
    src_ids, dst_ids = data.draw(ids), data.draw(st.one_of(st.none(), ids))
    part, slot = data.draw(st.integers(0, 65535)), data.draw(st.integers(0, 1 << 40))
    number, lane = data.draw(st.integers(0, NUMBERS - 1)), data.draw(st.integers(0, wire.MAX_QUEUE_PAIRS - 1))
    packed = pack_order(number, lane, Order(TOKEN, src_ids, dst_ids, part, slot))
    head, rest = packed[:HEAD_BYTES], packed[HEAD_BYTES:]
    assert ids_bytes(head) == len(rest)
    got_number, got_lane, got = unpack_order(head, rest)
    assert (got_number, got_lane, got.token, got.part, got.slot) == (number, lane, TOKEN, part, slot)
    assert np.array_equal(got.src_ids, src_ids)
    assert (got.dst_ids is None) == (dst_ids is None)
    assert dst_ids is None or np.array_equal(got.dst_ids, dst_ids)


@pytest.mark.parametrize("number", [0, 1, NUMBERS - 1])
@pytest.mark.parametrize("is_refused", [True, False])
def test_an_answer_fits_an_immediate_and_is_read_as_it_was_given(number: int, is_refused: bool) -> None:
    immediate = pack_answer(number, is_refused=is_refused)
    assert 0 <= immediate < 1 << 32
    assert unpack_answer(immediate) == (number, is_refused)


@settings(deadline=None)
@given(st.binary(min_size=HEAD_BYTES, max_size=HEAD_BYTES))
def test_no_head_of_an_order_asks_for_more_than_an_order_s_bytes(head: bytes) -> None:
    try:
        size = ids_bytes(head)
    except BadOrder:
        return
    assert 4 <= size <= 8 * MAX_UNITS


@pytest.mark.parametrize("mode", wire.MODES.values())
def test_a_request_is_read_as_it_was_made(mode: int) -> None:
    is_write = mode == wire.MODE_WRITE
    regions = [wire.RemoteRegion(1 << 40, 5, 1 << 30), wire.RemoteRegion(0, 6, 10)] if is_write else []
    pairs = [wire.PairAddress(9, 1), wire.PairAddress(10, 2)]
    request = wire.Request(PORT, mode, 8 if is_write else 0, pairs, regions)
    packed = wire.pack_request(TOKEN, request)
    assert wire.unpack_preface(packed[: wire.PREFACE_BYTES]) == TOKEN
    rest = packed[wire.PREFACE_BYTES + wire.REQUEST_HEAD_BYTES :]
    head = packed[wire.PREFACE_BYTES : wire.PREFACE_BYTES + wire.REQUEST_HEAD_BYTES]
    assert wire.request_rest_bytes(head) == len(rest)
    assert wire.unpack_request(head, rest) == request


def test_no_head_of_a_request_asks_for_more_than_a_request_s_bytes() -> None:
    rng, most = random.Random(0), wire.pairs_bytes(wire.MAX_QUEUE_PAIRS) + wire.regions_bytes(wire.MAX_REGIONS + 1)
    accepted = 0
    for _ in range(20_000):
        counts = rng.choice((0, 1, 64, 65)), rng.randrange(70), rng.choice((0, 1, 9000))
        wish = bytes([rng.choice((0, 1, 2))]) + b"".join(count.to_bytes(2, "little") for count in counts)
        head = bytes(wire.REQUEST_HEAD_BYTES - len(wish)) + wish
        try:
            assert wire.pairs_bytes(1) <= wire.request_rest_bytes(head) <= most
            accepted += 1
        except wire.BadHandshake:
            continue
    assert accepted


def test_what_is_no_request_and_what_is_of_another_version_are_told_apart() -> None:
    with pytest.raises(wire.BadHandshake):
        wire.unpack_preface(b"GET / HTTP/1.1".ljust(wire.PREFACE_BYTES))
    with pytest.raises(wire.OtherVersion, match="version 1, ours is 2"):
        wire.unpack_preface(b"KVRDMA\x00\x01" + TOKEN)
