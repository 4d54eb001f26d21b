"""Checksums by (layer, block), on every registered transport: what arrives is what was hashed, or both sides know."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from kv_transfer import RankEndpoint, Received, TransferFailed, TransferOptions
from kv_transfer import sessions as sessions_module
from kv_transfer.checker import Checker
from kv_transfer.checksums import LayerSums, Sums
from kv_transfer.errors import InvalidOptions
from kv_transfer.plan import IntArray
from tests.integration.kv_instances import PAIRS, Move, lane_options, lanes
from tests.integration.kv_pairs import Ranks, assert_moved
from tests.integration.kv_rank import LAYOUT, WAIT_S, differing
from tests.integration.test_kv_faults import Wire, through


@pytest.fixture(params=lanes())
def options(request: pytest.FixtureRequest) -> TransferOptions:
    return lane_options(request.param, checksum="crc32")


def flip_after_hashing(monkeypatch: pytest.MonkeyPatch, flip: Callable[[], None]) -> None:
    """Do something to a source's memory between the moment it is hashed and the moment that a peer may read it."""
    original = Checker.sign

    class Flipped(LayerSums):
        def __init__(self, sums: LayerSums) -> None:
            self._sums = sums

        def of(self, ids: IntArray) -> Sums:
            found = self._sums.of(ids)
            flip()
            return found

    def sign(self: Checker, sums: LayerSums, *args: object) -> None:
        original(self, Flipped(sums), *args)

    monkeypatch.setattr(Checker, "sign", sign)


@pytest.mark.parametrize("pair", ["TP 2 in 2 stages to TP 1 in 3", "blocks of 6 to blocks of 4 tokens, TP 2 to 1"])
@pytest.mark.parametrize("checksum", ["crc32", "xxh3"])
def test_checked_blocks_arrive_whatever_their_layouts(
    options: TransferOptions, ranks: Ranks, pair: str, checksum: str
) -> None:
    make = partial(ranks.local, options=lane_options(options.protocols[0], checksum=checksum))
    Move(*PAIRS[pair], make, num_tokens=27, cached=lambda index: index == 1).move("r@1", b"token")


def test_a_byte_that_changes_after_it_was_hashed_fails_the_transfer_on_both_sides(
    options: TransferOptions,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, destination = ranks.pair(LAYOUT, options)
    unharmed = ranks.local(LAYOUT, options, "other", 3)

    def flip() -> None:
        source.view[107, LAYOUT.layer_block_bytes + 5] ^= 0x10

    # Its blocks are hashed before any flip, and it goes on after it.
    unharmed.receive("other@1", [source.endpoint], range(2))
    source.open_send("other@1", 2)
    source.send_blocks("other@1", 0, [1])
    flip_after_hashing(monkeypatch, flip)
    destination.receive("r@1", [source.endpoint], range(40))
    source.send("r@1", range(100, 140))
    with caplog.at_level(logging.ERROR, "kv_transfer"):
        failures = [side.wait("r@1") for side in (destination, source)]
    for failed in failures:
        assert isinstance(failed, TransferFailed)
        assert (
            f"checksum mismatch in layer 1: block 107 of {source.endpoint.describe()} did not arrive as it was in "
            f"block 7 of {destination.endpoint.describe()}" in failed.reason
        )
    assert "transfer r@1: checksum mismatch in layer 1" in caplog.text
    assert destination.counters()["checksum_mismatch_total"] == 1
    monkeypatch.undo()
    source.send_blocks("other@1", 1, [2])
    source.finish_send("other@1")
    assert_moved(source, unharmed, "other@1")
    destination.receive("r@2", [source.endpoint], range(40))
    source.send("r@2", range(100, 140))
    assert isinstance(destination.wait("r@2"), Received), "the same blocks, hashed as they are now"
    assert differing(LAYOUT, destination.view[:40], source.view[100:140]) == []


class FlippingWire(Wire):
    """Changes one bit of the first piece that is too big for anything but blocks."""

    flipped = False

    def change(self, data: bytes) -> bytes:
        if self.flipped or len(data) < LAYOUT.block_bytes:
            return data
        self.flipped = True
        at = len(data) // 2
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


@pytest.mark.parametrize("checksum", ["crc32", "xxh3", "none"])
def test_a_bit_that_flips_on_its_way_is_found_when_it_is_looked_for(ranks: Ranks, checksum: str) -> None:
    options = lane_options("tcp", checksum=checksum)
    source, destination = ranks.pair(LAYOUT, options)
    wire = FlippingWire(int(source.endpoint.transports["tcp"]["port"]))
    ranks.callback(wire.close)
    endpoint: RankEndpoint = through(source.endpoint, data=wire)
    destination.receive("r@1", [endpoint], range(40))
    source.send("r@1", range(100, 140))
    event = destination.wait("r@1")
    if checksum == "none":
        assert isinstance(event, Received)
        assert len(differing(LAYOUT, destination.view[:40], source.view[100:140])) == 1, "the flip is real"
        return
    for failed in (event, source.wait("r@1")):
        assert isinstance(failed, TransferFailed)
        assert "checksum mismatch in layer" in failed.reason


def test_a_source_that_cannot_hash_says_what_it_lacks(
    ranks: Ranks, options: TransferOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(options, checksum="none")
    source, destination = ranks.local(LAYOUT, plain, "prefill", 1), ranks.local(LAYOUT, options, "decode", 2)

    def load(name: str) -> object:
        raise InvalidOptions("checksum", f"{name} is not here")

    monkeypatch.setattr(sessions_module, "load_digest", load)
    source.open_send("r@1", 2)
    destination.receive("r@1", [source.endpoint], [1, 2])
    failed = destination.wait("r@1", WAIT_S)
    assert isinstance(failed, TransferFailed)
    assert "prefill" in failed.reason
    assert "crc32 is not here" in failed.reason
