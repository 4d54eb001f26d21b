"""What every registered transport must do, between separate processes: one suite, run on each of them unasked."""

from __future__ import annotations

import dataclasses
import random
from functools import partial

import numpy as np
import pytest

from kv_transfer import (
    NOT_WANTED,
    KVLayout,
    Received,
    Sent,
    TransferFailed,
    TransferOptions,
)
from kv_transfer.protocol import MAX_AUX_BYTES
from tests.integration.kv_instances import PAIRS, Move, lane_options, lanes
from tests.integration.kv_pairs import Ranks, assert_moved, move_half
from tests.integration.kv_rank import LAYOUT, differing, pattern, wait_for


@pytest.fixture(params=lanes())
def options(request: pytest.FixtureRequest) -> TransferOptions:
    """Options with one transport only."""
    return lane_options(request.param)


def some_ids(rng: random.Random, layout: KVLayout, count: int) -> list[int]:
    """Scattered ids with some stretches of neighbours, in random order."""
    chosen: list[int] = []
    while len(chosen) < count:
        start, length = rng.randrange(layout.num_blocks), rng.randrange(1, 6)
        chosen += [b for b in range(start, min(start + length, layout.num_blocks)) if b not in chosen]
    return chosen[:count]


@pytest.mark.parametrize("seed", range(3))
def test_every_byte_arrives_and_no_other_byte_changes(options: TransferOptions, ranks: Ranks, seed: int) -> None:
    rng = random.Random(seed)
    source = ranks.remote(LAYOUT, options, "prefill", seed=1)
    destination = ranks.local(LAYOUT, options, "decode", seed=2)
    src_ids, dst_ids = some_ids(rng, LAYOUT, 120), some_ids(rng, LAYOUT, 120)
    wanted = pattern(LAYOUT, 2)
    wanted[dst_ids] = pattern(LAYOUT, 1)[src_ids]
    destination.receive("r@1", [source.endpoint], dst_ids)
    source.send("r@1", src_ids, aux=b"\x00first token")
    received = destination.wait("r@1")
    assert isinstance(received, Received)
    assert received.aux == b"\x00first token"
    assert received.stats.lane == options.protocols[0]
    assert received.stats.num_bytes == 120 * LAYOUT.block_bytes
    assert differing(LAYOUT, destination.view, wanted) == []
    sent = source.wait("r@1")
    assert isinstance(sent, Sent)
    assert sent.stats.num_bytes == received.stats.num_bytes
    assert destination.counters()[f"bytes_received_{options.protocols[0]}"] == received.stats.num_bytes


def test_a_block_zeroed_in_one_layer_on_its_way_is_seen_by_the_comparison(
    options: TransferOptions, ranks: Ranks
) -> None:
    source = ranks.local(LAYOUT, options, "prefill", seed=1)
    destination = ranks.remote(LAYOUT, options, "decode", seed=2)
    source.send("r@1", list(range(100)))
    size = LAYOUT.layer_block_bytes
    source.view[17, 2 * size : 3 * size] = 0
    destination.receive("r@1", [source.endpoint], list(range(100, 200)))
    assert isinstance(destination.wait("r@1"), Received)
    wanted = pattern(LAYOUT, 2)
    wanted[100:200] = pattern(LAYOUT, 1)[:100]
    assert differing(LAYOUT, destination.view, wanted) == [(2, 117)]


@pytest.mark.parametrize("order", ["reserve first", "reserve in between", "reserve last"])
def test_chunks_arrive_before_and_after_the_reservation(options: TransferOptions, ranks: Ranks, order: str) -> None:
    rng = random.Random(order)
    source, destination = ranks.local(LAYOUT, options, "prefill", 3), ranks.remote(LAYOUT, options, "decode", 4)
    src_ids, dst_ids = some_ids(rng, LAYOUT, 50), some_ids(rng, LAYOUT, 50)
    if order == "reserve first":
        destination.receive("r@1", [source.endpoint], dst_ids)
    source.open_send("r@1", 50)
    # Chunks need not come in order of their indices.
    for number, first in enumerate((10, 0, 30, 20, 40)):
        if order == "reserve in between" and number == 2:
            destination.receive("r@1", [source.endpoint], dst_ids)
        source.send_blocks("r@1", first, src_ids[first : first + 10])
    source.finish_send("r@1")
    if order == "reserve last":
        destination.receive("r@1", [source.endpoint], dst_ids)
    assert_moved(source, destination, "r@1")
    wanted = pattern(LAYOUT, 4)
    wanted[dst_ids] = source.view[src_ids]
    assert differing(LAYOUT, destination.view, wanted) == []


def test_blocks_move_while_later_ones_are_still_computed(options: TransferOptions, ranks: Ranks) -> None:
    source, destination = ranks.remote(LAYOUT, options, "prefill", 5), ranks.local(LAYOUT, options, "decode", 6)
    destination.receive("r@1", [source.endpoint], list(range(40)))
    source.open_send("r@1", 40)
    source.send_blocks("r@1", 0, list(range(100, 120)))
    wait_for(lambda: np.array_equal(destination.view[:20], source.view[100:120]))
    source.send_blocks("r@1", 20, list(range(50, 70)))
    source.finish_send("r@1")
    assert isinstance(destination.wait("r@1"), Received)
    assert differing(LAYOUT, destination.view[20:40], source.view[50:70]) == []


def test_two_hundred_transfers_at_a_time_each_get_their_own_bytes(options: TransferOptions, ranks: Ranks) -> None:
    layout = KVLayout("transformers", "tiny", "float32", 2, 2, 8, 4, 1000)
    source, destination = ranks.remote(layout, options, "prefill", 7), ranks.local(layout, options, "decode", 8)
    rng = random.Random(0)
    src_ids, dst_ids = list(range(1000)), list(range(1000))
    rng.shuffle(src_ids)
    rng.shuffle(dst_ids)
    ids = [f"r{i}@1" for i in range(200)]
    for i, transfer_id in enumerate(ids):
        blocks = src_ids[5 * i : 5 * i + 5]
        if i % 2:
            source.send(transfer_id, blocks, aux=transfer_id.encode())
        destination.receive(transfer_id, [source.endpoint], dst_ids[5 * i : 5 * i + 5])
    for i, transfer_id in enumerate(ids):
        if not i % 2:
            source.send(transfer_id, src_ids[5 * i : 5 * i + 5], aux=transfer_id.encode())
    for transfer_id in ids:
        received = destination.wait(transfer_id)
        assert isinstance(received, Received), received
        assert received.aux == transfer_id.encode()
    for transfer_id in ids:
        assert isinstance(source.wait(transfer_id), Sent)
    wanted = np.empty_like(destination.view)
    wanted[dst_ids] = pattern(layout, 7)[src_ids]
    assert differing(layout, destination.view, wanted) == []


def test_blocks_larger_than_a_chunk_and_than_a_socket_buffer_arrive(options: TransferOptions, ranks: Ranks) -> None:
    layout = KVLayout("transformers", "tiny", "float32", 16, 8, 128, 16, 24)
    assert layout.block_bytes == 2 << 20
    small = dataclasses.replace(options, chunk_bytes=1 << 20, window_chunks=3, tcp_streams=2)
    source, destination = ranks.remote(layout, small, "prefill", 1), ranks.local(layout, small, "decode", 2)
    src_ids, dst_ids = [3, 4, 5, 1, 9, 20, 21, 22, 23], [0, 1, 2, 13, 12, 11, 6, 7, 8]
    source.send("r@1", src_ids)
    destination.receive("r@1", [source.endpoint], dst_ids)
    assert isinstance(destination.wait("r@1"), Received)
    assert differing(layout, destination.view[dst_ids], pattern(layout, 1)[src_ids]) == []
    untouched = [b for b in range(24) if b not in dst_ids]
    assert differing(layout, destination.view[untouched], pattern(layout, 2)[untouched]) == []


@pytest.mark.parametrize("pair", PAIRS)
def test_layouts_of_all_kinds_exchange_blocks(options: TransferOptions, ranks: Ranks, pair: str) -> None:
    make = partial(ranks.local, options=options)
    Move(*PAIRS[pair], make, num_tokens=25).move("r@1", b"first token")


@pytest.mark.parametrize("pair", ["TP 2 in 2 stages to TP 1 in 3", "blocks of 6 to blocks of 4 tokens, TP 2 to 1"])
@pytest.mark.parametrize("held", ["a prefix", "every second block", "all"])
def test_blocks_that_decode_has_already_are_not_sent(
    options: TransferOptions, ranks: Ranks, pair: str, held: str
) -> None:
    cached = {"a prefix": lambda i: i < 3, "every second block": lambda i: i % 2 == 1, "all": lambda i: True}[held]
    move = Move(*PAIRS[pair], partial(ranks.local, options=options), num_tokens=30, cached=cached)
    move.move("r@1", b"first token")
    assert (move.num_bytes == 0) == (held == "all")


def test_a_cached_prefix_of_another_process_stays_as_it_is(options: TransferOptions, ranks: Ranks) -> None:
    source, destination = ranks.local(LAYOUT, options, "prefill", 1), ranks.remote(LAYOUT, options, "decode", 2)
    destination.receive("r@1", [source.endpoint], [NOT_WANTED] * 30 + list(range(100, 110)))
    source.send("r@1", range(40), aux=b"token")
    received, sent = destination.wait("r@1"), source.wait("r@1")
    assert isinstance(received, Received)
    assert isinstance(sent, Sent)
    assert received.stats.num_bytes == sent.stats.num_bytes == 10 * LAYOUT.block_bytes
    wanted = pattern(LAYOUT, 2)
    wanted[100:110] = pattern(LAYOUT, 1)[30:40]
    assert differing(LAYOUT, destination.view, wanted) == []


def test_the_largest_auxiliary_payload_arrives_with_the_last_chunk(options: TransferOptions, ranks: Ranks) -> None:
    source, destination = ranks.remote(LAYOUT, options, "prefill", 1), ranks.local(LAYOUT, options, "decode", 2)
    aux = random.Random(0).randbytes(MAX_AUX_BYTES)
    destination.receive("r@1", [source.endpoint], [5])
    source.send("r@1", [7], aux=aux)
    received = destination.wait("r@1")
    assert isinstance(received, Received)
    assert received.aux == aux


@pytest.mark.parametrize("who", ["source", "destination"])
def test_an_abort_by_either_side_ends_both_and_leaves_other_transfers_alone(
    options: TransferOptions, ranks: Ranks, who: str
) -> None:
    source, destination = ranks.remote(LAYOUT, options, "prefill", 1), ranks.local(LAYOUT, options, "decode", 2)
    for transfer_id, first in (("req-1@1", 0), ("req-10@1", 100)):
        source.open_send(transfer_id, 40)
        source.send_blocks(transfer_id, 0, list(range(first, first + 20)))
        destination.receive(transfer_id, [source.endpoint], list(range(first, first + 40)))
    (source if who == "source" else destination).abort("req-1@1", "its user has left")
    for side in (source, destination):
        failed = side.wait("req-1@1")
        assert isinstance(failed, TransferFailed)
        assert "its user has left" in failed.reason
    destination.view[:40] = 0xEE
    source.send_blocks("req-10@1", 20, list(range(200, 220)))
    source.finish_send("req-10@1")
    assert_moved(source, destination, "req-10@1")
    wanted = pattern(LAYOUT, 1)
    assert differing(LAYOUT, destination.view[100:140], wanted[[*range(100, 120), *range(200, 220)]]) == []
    assert (destination.view[:40] == 0xEE).all(), "nothing is written after TransferFailed"


@pytest.mark.parametrize("who", ["source", "destination"])
def test_closing_a_messenger_fails_what_is_open_on_both_sides(options: TransferOptions, ranks: Ranks, who: str) -> None:
    source, destination = ranks.pair(LAYOUT, options)
    closed = source if who == "source" else destination
    move_half(source, destination, "r@1")
    closed.messenger.close()
    assert isinstance(destination.wait("r@1"), TransferFailed)
    assert isinstance(source.wait("r@1"), TransferFailed)
