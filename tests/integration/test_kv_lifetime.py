"""What is left of a messenger when it is closed, and what a process does that forgot to."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from kv_transfer import (
    InvalidTransfer,
    KVPool,
    Messenger,
    MessengerClosed,
    Received,
    TransferFailed,
    TransferOptions,
)
from kv_transfer.leases import Lease
from kv_transfer.receiving import Leg, ReceiveTransfer
from kv_transfer.sending import SendTransfer
from tests.integration.kv_instances import RDMA_WRITE, lane_options, lanes
from tests.integration.kv_rank import LAYOUT, ROOT, LocalRank, differing


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def mapped_pools() -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("kv-pool")


@pytest.mark.parametrize("lane", ["shm", "tcp", *(("rdma", RDMA_WRITE) if "RDMA_VM_NICS" in os.environ else ())])
def test_closing_gives_back_every_thread_descriptor_and_mapping(lane: str) -> None:
    def round_trip() -> None:
        options = lane_options(lane)
        source, destination = LocalRank(LAYOUT, options, "p", 1), LocalRank(LAYOUT, options, "d", 2)
        destination.receive("r@1", [source.endpoint], [1, 2, 3])
        source.send("r@1", [4, 5, 6])
        assert isinstance(destination.wait("r@1"), Received)
        destination.receive("never@1", [source.endpoint], [1])
        destination.close()
        source.close()
        assert isinstance(destination.messenger.poll()[0], TransferFailed)

    round_trip()
    threads, descriptors, mappings = threading.active_count(), open_descriptors(), mapped_pools()
    for _ in range(3):
        round_trip()
    gc.collect()
    assert threading.active_count() == threads
    assert open_descriptors() == descriptors
    assert mapped_pools() == mappings


@pytest.mark.parametrize("checksum", ["none", "crc32"])
@pytest.mark.parametrize("lane", lanes())
def test_a_thousand_transfers_and_a_hundred_aborted_ones_leave_nothing_behind(lane: str, checksum: str) -> None:
    options = lane_options(lane, checksum=checksum)
    source, destination = LocalRank(LAYOUT, options, "p", 1), LocalRank(LAYOUT, options, "d", 2)
    try:
        exchange(source, destination, "warm", 50)
        before = resources()
        for part in range(20):
            exchange(source, destination, f"r{part}", 55)
        assert resources() == before
        assert before["records"] == 0
        for rank in (source, destination):
            assert rank.counters()["transfers_open"] == 0
            assert sum(rank.counters()[f"{way}_total"] for way in ("sent", "received")) >= 1000
        # Every block is free again: the last transfer may take all of them.
        destination.receive("all", [source.endpoint], range(LAYOUT.num_blocks))
        source.send("all", range(LAYOUT.num_blocks))
        assert isinstance(destination.wait("all"), Received)
        assert differing(LAYOUT, destination.view, source.view) == []
    finally:
        destination.close()
        source.close()


def exchange(source: LocalRank, destination: LocalRank, name: str, count: int) -> None:
    """So many transfers at a time; every eleventh is aborted, by one side and then the other, in mid-transfer."""
    ids = [f"{name}-{i}" for i in range(count)]
    aborted = ids[5::11]
    for index, transfer_id in enumerate(ids):
        blocks = range(4 * index, 4 * index + 4)
        destination.receive(transfer_id, [source.endpoint], blocks)
        source.open_send(transfer_id, 4)
        source.send_blocks(transfer_id, 0, blocks[:2])
    for index, transfer_id in enumerate(aborted):
        (source, destination)[index % 2].abort(transfer_id, "its user has left")
    for index, transfer_id in enumerate(ids):
        if transfer_id not in aborted:
            source.send_blocks(transfer_id, 2, range(4 * index + 2, 4 * index + 4))
            source.finish_send(transfer_id)
    for transfer_id in ids:
        received, sent = destination.wait(transfer_id), source.wait(transfer_id)
        assert isinstance(received, TransferFailed) == isinstance(sent, TransferFailed) == (transfer_id in aborted)


def resources() -> dict[str, int]:
    """What a leak would add to: a socket is a descriptor, a segment a descriptor or a mapping."""
    return {
        "descriptors": open_descriptors(),
        "threads": threading.active_count(),
        "mappings": mapped_pools(),
        "records": sum(type(o) in (SendTransfer, ReceiveTransfer, Lease, Leg) for o in gc.get_objects()),
    }


def test_a_process_that_never_closes_its_messenger_ends_all_the_same() -> None:
    program = textwrap.dedent("""
        from tests.integration.kv_rank import LAYOUT, LocalRank
        from kv_transfer import TransferOptions
        options = TransferOptions()
        source, destination = LocalRank(LAYOUT, options, "p", 1), LocalRank(LAYOUT, options, "d", 2)
        source.open_send("r@1", 2)
        destination.receive("r@1", [source.endpoint], [1, 2])
        print("leaving")
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


def test_a_closed_messenger_says_so_and_can_be_closed_again() -> None:
    with KVPool.allocate(LAYOUT) as pool:
        messenger = Messenger(pool, TransferOptions(), name="m")
        with pytest.raises(MessengerClosed):
            _ = messenger.endpoint
        with pytest.raises(MessengerClosed):
            messenger.open_send("r@1", num_blocks=1, deadline_s=1)
        messenger.start()
        messenger.close()
        messenger.close()
        with pytest.raises(MessengerClosed):
            messenger.open_receive("r@2", [messenger.endpoint], [1], deadline_s=1)
        assert messenger.counters()["transfers_open"] == 0


def test_a_call_that_makes_no_sense_is_refused_where_it_is_made() -> None:
    with KVPool.allocate(LAYOUT) as pool, Messenger(pool, TransferOptions(), name="m") as messenger:
        with pytest.raises(InvalidTransfer, match="open_send comes first"):
            messenger.send_blocks("r@1", 0, [1])
        with pytest.raises(InvalidTransfer, match="no source"):
            messenger.open_receive("r@1", [], [1], deadline_s=1)
        messenger.open_send("r@1", num_blocks=1, deadline_s=5)
        with pytest.raises(InvalidTransfer, match="pool of 257 blocks"):
            messenger.send_blocks("r@1", 0, [257])
        with pytest.raises(InvalidTransfer, match="1048577 bytes"):
            messenger.finish_send("r@1", bytes(2**20 + 1))
        messenger.abort("unknown@1", "whatever")
