"""The RDMA transport on simulated verbs, in this process: batches, staging, cancelling, connecting anew, letting go."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from kv_transfer import RdmaOptions, Received, TransferFailed, TransferOptions
from kv_transfer.options import RDMA_MODES
from kv_transfer.transports.rdma.wire import MAGIC, PREFACE_BYTES, VERSION
from tests.integration.kv_instances import PAIRS, Move
from tests.integration.kv_pairs import Ranks, assert_moved
from tests.integration.kv_rank import LAYOUT, WAIT_S, LocalRank, differing, pattern, wait_for
from tests.simulated_verbs import Fabric

# Other work of a busy machine must not make peers look silent.
OPTIONS = TransferOptions(protocols=("rdma",), secret="a secret", chunk_bytes=8192, silence_s=30.0)
SMALL = RdmaOptions(queue_pairs=1, queue_depth=3, max_pieces=2, max_read_bytes=4096)


@pytest.fixture(params=RDMA_MODES)
def options(request: pytest.FixtureRequest) -> TransferOptions:
    return dataclasses.replace(OPTIONS, rdma=RdmaOptions(mode=request.param))


@pytest.fixture
def ranks(fabric: Fabric) -> Iterator[Ranks]:
    """Closed before the fabric looks at what is left."""
    with Ranks() as made:
        yield made


@pytest.mark.parametrize("rdma", [RdmaOptions(), SMALL], ids=["usual", "small"])
@pytest.mark.parametrize("pair", PAIRS)
def test_every_byte_of_every_pair_of_layouts_arrives(
    ranks: Ranks, options: TransferOptions, pair: str, rdma: RdmaOptions
) -> None:
    options = dataclasses.replace(options, rdma=dataclasses.replace(rdma, mode=options.rdma.mode))
    sources, destinations = PAIRS[pair]

    Move(sources, destinations, partial(ranks.local, options=options), num_tokens=70).move("r@1", b"first token")


@pytest.mark.parametrize("limits", [{}, {"max_sge": 1, "max_sge_rd": 1}, {"max_qp_wr": 2}, {"max_cqe": 3}])
def test_a_device_s_limits_are_kept(
    fabric: Fabric, ranks: Ranks, options: TransferOptions, limits: dict[str, int]
) -> None:
    fabric.device = limits
    source, destination = ranks.pair(LAYOUT, options)
    src_ids, dst_ids = list(range(0, 200, 2)), list(range(199, 99, -1))
    destination.receive("r@1", [source.endpoint], dst_ids)
    source.send("r@1", src_ids)
    assert_moved(source, destination, "r@1")
    wanted = pattern(LAYOUT, 2)
    wanted[dst_ids] = pattern(LAYOUT, 1)[src_ids]
    assert differing(LAYOUT, destination.view, wanted) == []


def test_neighbours_at_the_other_end_are_one_read_or_write(
    fabric: Fabric, ranks: Ranks, options: TransferOptions
) -> None:
    options = dataclasses.replace(options, chunk_bytes=1 << 20)
    source, destination = ranks.pair(LAYOUT, options)
    apart, near = [7, 3, 9, 1, 50, 51, 52, 53], [*range(20, 24), *range(30, 34)]
    src_ids, dst_ids = (near, apart) if options.rdma.mode == "read" else (apart, near)
    destination.receive("r@1", [source.endpoint], dst_ids)
    source.send("r@1", src_ids)
    assert isinstance(destination.wait("r@1"), Received)
    assert (fabric.num_reads, fabric.num_writes) == ((2, 0) if options.rdma.mode == "read" else (0, 2))
    assert differing(LAYOUT, destination.view[dst_ids], source.view[src_ids]) == []


def test_a_cancelled_transfer_ends_while_what_moves_it_does_not_and_the_others_are_moved_again(
    fabric: Fabric, ranks: Ranks, options: TransferOptions
) -> None:
    source, destination = ranks.pair(LAYOUT, options)
    for transfer_id, first in (("given up@1", 0), ("other@1", 100)):
        source.send(transfer_id, range(first, first + 40))
    fabric.is_stuck = True
    destination.receive("given up@1", [source.endpoint], range(40))
    wait_for(lambda: fabric.num_held > 0)
    destination.receive("other@1", [source.endpoint], range(100, 140))
    destination.abort("given up@1", "its user has left")
    fabric.is_stuck = False
    assert isinstance(destination.wait("given up@1"), TransferFailed)
    destination.view[:40] = 0xEE
    fabric.release()
    assert (destination.view[:40] == 0xEE).all()
    assert isinstance(destination.wait("other@1"), Received)
    assert (destination.view[:40] == 0xEE).all()
    assert differing(LAYOUT, destination.view[100:140], source.view[100:140]) == []
    assert destination.counters()["rdma_rebuilds_total"] == 1
    assert bool(fabric.num_lost) == (options.rdma.mode == "write")


def test_an_error_costs_no_transfer_once_and_the_link_when_nothing_works_any_more(
    fabric: Fabric, ranks: Ranks, options: TransferOptions
) -> None:
    source, destination = ranks.pair(LAYOUT, options)
    for number, failures in enumerate((0, 1, 1_000_000, 0)):
        transfer_id = f"r{number}@1"
        fabric.fail_next = failures
        destination.receive(transfer_id, [source.endpoint], range(40))
        source.send(transfer_id, range(60, 100))
        ended = destination.wait(transfer_id)
        source.wait(transfer_id)
        fabric.fail_next = 0
        if failures < 2:
            assert isinstance(ended, Received), ended
            assert differing(LAYOUT, destination.view[:40], source.view[60:100]) == []
            destination.fill(number + 5)
        else:
            assert isinstance(ended, TransferFailed)
            assert "the peer's NIC does not answer" in ended.reason


def test_who_was_not_let_in_gets_no_queue_pair(fabric: Fabric, ranks: Ranks) -> None:
    source = ranks.local(LAYOUT, OPTIONS, "prefill")
    port = int(source.endpoint.transports["rdma"]["port"])
    pairs = fabric.open["QP"]
    for said in (b"GET / HTTP/1.1\r\n\r\n" + bytes(PREFACE_BYTES), MAGIC + bytes([VERSION]) + bytes(1000)):
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as sock:
            sock.sendall(said)
            # Hung up on, at most after one byte of refusal.
            while sock.recv(64):
                pass
    wait_for(lambda: source.counters().get("rdma_strangers_total", 0) == 2)
    assert fabric.open["QP"] == pairs


def test_the_queue_pairs_of_a_peer_go_when_it_does(fabric: Fabric, ranks: Ranks, options: TransferOptions) -> None:
    source = ranks.local(LAYOUT, options, "prefill", seed=1)
    before = fabric.in_use()
    threads = threading.active_count()
    for number in range(3):
        destination = LocalRank(LAYOUT, options, "decode", seed=2)
        destination.receive(f"r{number}@1", [source.endpoint], [1])
        source.send(f"r{number}@1", [2])
        assert isinstance(destination.wait(f"r{number}@1"), Received)
        destination.close()
    wait_for(lambda: fabric.in_use() == before and threading.active_count() == threads)


def test_a_port_that_is_taken_or_missing_is_named(fabric: Fabric) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        options = dataclasses.replace(OPTIONS, rdma=RdmaOptions(ports=(number,)))
        with pytest.raises(Exception, match=f"port {number} for RDMA peers"):
            LocalRank(LAYOUT, options, "prefill")
    with pytest.raises(Exception, match=r"has 2 ports: give 1"):
        LocalRank(LAYOUT, dataclasses.replace(OPTIONS, rdma=RdmaOptions(ports=(1, 2))), "prefill")
