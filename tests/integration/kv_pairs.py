"""Ranks for a test, closed when it ends; and what two of them have in common: a transfer, begun or made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import pytest

from kv_transfer import BlockPool, KVLayout, RankEndpoint, Received, Sent, TransferOptions
from tests.integration.kv_rank import LocalRank, RemoteRank, differing, pattern, wait_for

AnyRank: TypeAlias = LocalRank | RemoteRank


class Ranks(contextlib.ExitStack):
    """Makes ranks; closes them, and whatever else is pushed on it, last first."""

    def local(
        self, layout: KVLayout, options: TransferOptions, name: str, seed: int = 0, *, pool: BlockPool | None = None
    ) -> LocalRank:
        rank = LocalRank(layout, options, name, seed, pool=pool)
        self.callback(rank.close)
        return rank

    def remote(self, layout: KVLayout, options: TransferOptions, name: str, seed: int = 0) -> RemoteRank:
        rank = RemoteRank(layout, options, name, seed)
        self.callback(rank.close)
        return rank

    def pair(self, layout: KVLayout, options: TransferOptions) -> tuple[LocalRank, LocalRank]:
        """A source of seed 1 and a destination of seed 2, both in this process."""
        return self.local(layout, options, "prefill", 1), self.local(layout, options, "decode", 2)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with Ranks() as made:
        yield made


def assert_moves(source: AnyRank, destination: AnyRank, transfer_id: str, *, others_hold: int | None = None) -> None:
    """A transfer between the two, of one layout, works to the last byte.

    Args:
        others_hold: the seed that the destination was filled with; all its other bytes must still be of that.
    """
    src_ids = list(range(20, 60))
    dst_ids = src_ids[::-1]
    destination.receive(transfer_id, [source.endpoint], dst_ids)
    source.send(transfer_id, src_ids)
    assert_moved(source, destination, transfer_id)
    assert_same(source.layout, destination.view[dst_ids], source.view[src_ids])
    if others_hold is not None:
        wanted = pattern(destination.layout, others_hold)
        wanted[dst_ids] = source.view[src_ids]
        assert_same(destination.layout, destination.view, wanted)


def assert_same(layout: KVLayout, got: np.ndarray, wanted: np.ndarray) -> None:
    wrong = differing(layout, got, wanted)
    assert wrong == [], f"(layer, block) that differ: {wrong}"


def assert_moved(source: AnyRank, destination: AnyRank, transfer_id: str) -> None:
    """Both sides say that it went well."""
    received = destination.wait(transfer_id)
    assert isinstance(received, Received), received
    sent = source.wait(transfer_id)
    assert isinstance(sent, Sent), sent


def move_half(source: AnyRank, destination: AnyRank, transfer_id: str, *, at: RankEndpoint | None = None) -> None:
    """Begin a transfer of blocks 0 to 9 into the same; returns when the first half is there, the only one sent yet.

    Args:
        at: where the destination reaches the source, if not where this says.
    """
    source.open_send(transfer_id, 10)
    source.send_blocks(transfer_id, 0, range(5))
    destination.receive(transfer_id, [at or source.endpoint], range(10))
    wait_for(lambda: np.array_equal(destination.view[:5], source.view[:5]))


def move_other_half(source: AnyRank, destination: AnyRank, transfer_id: str) -> None:
    """The rest of what ``move_half`` began arrives."""
    source.send_blocks(transfer_id, 5, range(5, 10))
    source.finish_send(transfer_id)
    assert_moved(source, destination, transfer_id)
