"""Peers that die, stall or cannot be reached: who learns of it, when, and whose bytes stay whose."""

from __future__ import annotations

import dataclasses
import selectors
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest

from kv_transfer import KVLayout, RankEndpoint, Received, Sent, TransferFailed, TransferOptions
from tests.cuda_twin import TwinRuntime
from tests.integration.kv_instances import lane_options, lanes
from tests.integration.kv_memory import cuda_runtime
from tests.integration.kv_pairs import AnyRank, Ranks, assert_moves, move_half, move_other_half
from tests.integration.kv_rank import IN_VM, LAYOUT, WAIT_S, LocalRank, RemoteRank, differing, pattern, wait_for

# RDMA needs devices: it takes part in the VM that has them (make test-rdma).
LANES = lanes()
# A device's twin takes minutes for what follows; tests/integration/test_cuda_ipc.py stops it at chosen points instead.
FAST_LANES = tuple(lane for lane in LANES if lane != "cuda_ipc" or not isinstance(cuda_runtime(), TwinRuntime))
# Big enough that a stop or a kill hits a transfer while its bytes flow.
BIG = KVLayout("transformers", "tiny", "float32", 8, 8, 64, 16, 512)


def quick(lane: str, **other: float) -> TransferOptions:
    """Peers that give up on each other soon."""
    silence_s = 6.0 if IN_VM else 2.0
    given: dict[str, Any] = {"secret": None, "heartbeat_s": 0.2, "silence_s": silence_s, "drain_s": 0.5, **other}
    return dataclasses.replace(lane_options(lane), **given)


def begin_big(source: AnyRank, destination: AnyRank) -> None:
    """A transfer of all of BIG; returns while its bytes flow.

    One block is held back, so that it cannot be over meanwhile, however fast the others move.
    """
    first = destination.view[0].copy()
    source.open_send("r@1", BIG.num_blocks)
    source.send_blocks("r@1", 0, range(BIG.num_blocks - 1))
    destination.receive("r@1", [source.endpoint], range(BIG.num_blocks))
    wait_for(lambda: not np.array_equal(destination.view[0], first))


def abort_beside_a_stopped_source(source: RemoteRank, destination: LocalRank) -> None:
    """The destination aborts, and uses its memory for something of seed 9; only then the source wakes."""
    source.stop()
    destination.abort("r@1", "lease lost")
    assert isinstance(destination.wait("r@1"), TransferFailed)
    destination.fill(9)
    source.resume()
    assert isinstance(source.wait("r@1"), TransferFailed)


@pytest.mark.parametrize("lane", LANES)
def test_a_source_killed_in_mid_transfer_fails_it_and_the_next_source_works(lane: str, ranks: Ranks) -> None:
    source = ranks.remote(LAYOUT, quick(lane), "prefill", 1)
    destination = ranks.local(LAYOUT, quick(lane), "decode", 2)
    move_half(source, destination, "r@1")
    source.kill()
    failed = destination.wait("r@1")
    assert isinstance(failed, TransferFailed)
    assert failed.peer == source.endpoint.describe()
    destination.fill(7)
    assert_moves(ranks.remote(LAYOUT, quick(lane), "prefill", 3), destination, "r@2")


@pytest.mark.parametrize("lane", LANES)
def test_a_destination_killed_in_mid_transfer_fails_it_and_the_next_destination_works(lane: str, ranks: Ranks) -> None:
    source = ranks.local(LAYOUT, quick(lane), "prefill", 1)
    destination = ranks.remote(LAYOUT, quick(lane), "decode", 2)
    move_half(source, destination, "r@1")
    destination.kill()
    failed = source.wait("r@1")
    assert isinstance(failed, TransferFailed)
    assert "decode" in failed.peer
    assert_moves(source, ranks.remote(LAYOUT, quick(lane), "decode", 3), "r@2")


@pytest.mark.parametrize("lane", FAST_LANES)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_peer_killed_while_bytes_flow_fails_the_transfer(lane: str, side: str, ranks: Ranks) -> None:
    options = quick(lane, chunk_bytes=1 << 20)
    if side == "source":
        victim = source = ranks.remote(BIG, options, "prefill", 1)
        survivor = destination = ranks.local(BIG, options, "decode", 2)
    else:
        survivor = source = ranks.local(BIG, options, "prefill", 1)
        victim = destination = ranks.remote(BIG, options, "decode", 2)
    begin_big(source, destination)
    victim.kill()
    assert isinstance(survivor.wait("r@1"), TransferFailed)


@pytest.mark.parametrize("lane", LANES)
def test_blocks_reused_while_their_reader_is_stopped_are_not_taken_for_the_transfers(lane: str, ranks: Ranks) -> None:
    source = ranks.local(LAYOUT, quick(lane), "prefill", 1)
    destination = ranks.remote(LAYOUT, quick(lane), "decode", 2)
    assert_moves(source, destination, "warm@1")
    before = destination.view.copy()
    source.open_send("r@1", 40)
    source.send_blocks("r@1", 0, range(20))
    destination.receive("r@1", [source.endpoint], range(100, 140))
    wait_for(lambda: np.array_equal(destination.view[100:120], source.view[:20]))
    destination.stop()
    # The rest, and the end, lie in the stopped peer's sockets when it wakes: all that it needs to go on.
    source.send_blocks("r@1", 20, range(20, 40))
    source.finish_send("r@1", b"token")
    source.abort("r@1", "lease lost")
    assert isinstance(source.wait("r@1"), TransferFailed)
    source.fill(5)
    destination.resume()
    assert isinstance(destination.wait("r@1"), TransferFailed)
    outside = [*range(100), *range(140, LAYOUT.num_blocks)]
    assert differing(LAYOUT, destination.view[outside], before[outside]) == []
    assert_moves(source, destination, "r@2")


@pytest.mark.parametrize("lane", FAST_LANES)
def test_a_source_that_was_stopped_while_bytes_flowed_changes_no_byte_after_the_abort(lane: str, ranks: Ranks) -> None:
    options = quick(lane, chunk_bytes=1 << 20)
    source = ranks.remote(BIG, options, "prefill", 1)
    destination = ranks.local(BIG, options, "decode", 2)
    begin_big(source, destination)
    abort_beside_a_stopped_source(source, destination)
    assert_moves(source, destination, "r@2", others_hold=9)


@pytest.mark.parametrize("lane", FAST_LANES)
def test_nothing_is_written_after_an_abort_where_blocks_are_packed_and_unpacked(lane: str, ranks: Ranks) -> None:
    options = quick(lane, chunk_bytes=1 << 20, checksum="crc32")
    token_major = dataclasses.replace(BIG, block_size=32, num_blocks=256)
    head_major = dataclasses.replace(BIG, packing="block-major-hnd")
    source = ranks.remote(token_major, options, "prefill", 1)
    destination = ranks.local(head_major, options, "decode", 2)
    first = destination.view[:2].copy()
    source.send("r@1", range(token_major.num_blocks))
    destination.receive("r@1", [source.endpoint], range(head_major.num_blocks))
    wait_for(lambda: not np.array_equal(destination.view[:2], first))
    abort_beside_a_stopped_source(source, destination)
    destination.receive("r@2", [source.endpoint], [3, 2])
    source.send("r@2", [5])
    assert isinstance(destination.wait("r@2"), Received)
    wanted = pattern(head_major, 9)
    block = source.view[5].reshape(8, 2, 2, 16, 8, 256)
    wanted[[3, 2]] = block.transpose(2, 0, 1, 4, 3, 5).reshape(2, -1)
    assert differing(head_major, destination.view, wanted) == []


@pytest.mark.parametrize("lane", LANES)
def test_a_rank_that_dies_fails_its_transfers_on_every_rank_and_leaves_the_others_free(lane: str, ranks: Ranks) -> None:
    halves = [dataclasses.replace(LAYOUT, tp_size=2, tp_rank=rank) for rank in range(2)]
    survivor = ranks.local(halves[0], quick(lane), "prefill", 1)
    victim = ranks.remote(halves[1], quick(lane), "prefill", 2)
    destination = ranks.local(LAYOUT, quick(lane), "decode", 3)
    for source in (survivor, victim):
        source.open_send("r@1", 10)
        source.send_blocks("r@1", 0, range(5))
    destination.receive("r@1", [survivor.endpoint, victim.endpoint], range(10))
    untouched = destination.view[0].copy()
    wait_for(lambda: not np.array_equal(destination.view[0], untouched))
    victim.kill()
    failed = destination.wait("r@1")
    assert isinstance(failed, TransferFailed)
    assert failed.peer == victim.endpoint.describe()
    told = survivor.wait("r@1")
    assert isinstance(told, TransferFailed)
    assert "the destination gave up" in told.reason
    destination.fill(4)
    next_victim = ranks.local(halves[1], quick(lane), "prefill", 5)
    destination.receive("r@2", [survivor.endpoint, next_victim.endpoint], range(10))
    for source in (survivor, next_victim):
        source.send("r@2", range(10))
        assert isinstance(source.wait("r@2"), Sent)
    assert isinstance(destination.wait("r@2"), Received)


@pytest.mark.parametrize("lane", LANES)
def test_a_peer_that_stands_still_is_taken_for_gone_by_the_other_side(lane: str, ranks: Ranks) -> None:
    source = ranks.local(LAYOUT, quick(lane), "prefill", 1)
    destination = ranks.remote(LAYOUT, quick(lane), "decode", 2)
    move_half(source, destination, "r@1")
    destination.stop()
    failed = source.wait("r@1")
    assert isinstance(failed, TransferFailed)
    assert "nothing was heard" in failed.reason
    destination.resume()
    assert isinstance(destination.wait("r@1"), TransferFailed)
    assert_moves(source, destination, "r@2")


def test_either_side_alone_fails_at_its_deadline(ranks: Ranks) -> None:
    source = ranks.local(LAYOUT, quick("tcp"), "prefill")
    destination = ranks.local(LAYOUT, quick("tcp"), "decode")
    source.send("alone@1", [1], deadline_s=0.3)
    destination.receive("other@1", [source.endpoint], [1], deadline_s=0.3)
    for rank, transfer_id in ((source, "alone@1"), (destination, "other@1")):
        failed = rank.wait(transfer_id)
        assert isinstance(failed, TransferFailed)
        assert "deadline of 0.3 s" in failed.reason


def test_an_address_where_nobody_listens_fails_the_transfer(ranks: Ranks) -> None:
    source = LocalRank(LAYOUT, quick("tcp"), "prefill")
    source.close()
    destination = ranks.local(LAYOUT, quick("tcp"), "decode")
    destination.receive("r@1", [source.endpoint], [1])
    failed = destination.wait("r@1")
    assert isinstance(failed, TransferFailed)
    assert "cannot connect" in failed.reason


class Wire:
    """Carries bytes to a port of this host, until it is cut or falls silent."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._ends: dict[socket.socket, socket.socket] = {}
        self._silent = threading.Event()
        self._cut = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def silence(self) -> None:
        """From now on what comes in stays here."""
        self._silent.set()

    def cut(self) -> None:
        """Close all that goes through it now; new connections work."""
        self._cut.set()

    def change(self, data: bytes) -> bytes:
        """What becomes of bytes on their way; either way."""
        return data

    def close(self) -> None:
        self._closing.set()
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            if self._cut.is_set():
                self._cut.clear()
                self._hang_up()
            for key, _ in self._selector.select(0.02):
                if key.fileobj is self._listener:
                    self._accept()
                elif not self._silent.is_set():
                    self._carry(key.fileobj)
                else:
                    time.sleep(0.02)
        self._hang_up()
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        near = self._listener.accept()[0]
        far = socket.create_connection(("127.0.0.1", self._target))
        for one, other in ((near, far), (far, near)):
            self._ends[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _carry(self, sock: object) -> None:
        if not isinstance(sock, socket.socket) or sock not in self._ends:
            return
        try:
            data = self.change(sock.recv(1 << 16))
            self._ends[sock].sendall(data)
        except OSError:
            data = b""
        if not data:
            other = self._ends.pop(sock)
            self._ends.pop(other, None)
            for end in (sock, other):
                self._selector.unregister(end)
                end.close()

    def _hang_up(self) -> None:
        for sock in list(self._ends):
            self._selector.unregister(sock)
            sock.close()
        self._ends.clear()


def through(endpoint: RankEndpoint, *, control: Wire | None = None, data: Wire | None = None) -> RankEndpoint:
    """The same rank, reached over wires."""
    changed = endpoint.to_dict()
    if control is not None:
        changed["control_port"] = control.port
    if data is not None:
        changed["transports"] = {"tcp": {"port": data.port}}
    return RankEndpoint.from_dict(changed)


@pytest.mark.parametrize("lane", LANES)
def test_a_link_that_falls_silent_fails_its_transfers_on_both_sides_and_no_others(lane: str, ranks: Ranks) -> None:
    source = ranks.local(LAYOUT, quick(lane), "prefill", 1)
    far = ranks.local(LAYOUT, quick(lane), "decode", 2)
    near = ranks.local(LAYOUT, quick(lane), "decode", 3)
    wire = Wire(source.endpoint.control_port)
    ranks.callback(wire.close)
    move_half(source, far, "far@1", at=through(source.endpoint, control=wire))
    move_half(source, near, "near@1")
    wire.silence()
    assert isinstance(far.wait("far@1"), TransferFailed)
    assert isinstance(source.wait("far@1"), TransferFailed)
    move_other_half(source, near, "near@1")


@pytest.mark.parametrize("which", ["control", "data"])
def test_a_connection_that_breaks_fails_its_transfers_and_is_made_anew_for_the_next(which: str, ranks: Ranks) -> None:
    source, destination = ranks.pair(LAYOUT, quick("tcp"))
    control = Wire(source.endpoint.control_port)
    data = Wire(int(source.endpoint.transports["tcp"]["port"]))
    ranks.callback(control.close)
    ranks.callback(data.close)
    endpoint = through(source.endpoint, control=control, data=data)
    move_half(source, destination, "r@1", at=endpoint)
    (control if which == "control" else data).cut()
    assert isinstance(destination.wait("r@1"), TransferFailed)
    assert isinstance(source.wait("r@1"), TransferFailed)
    destination.fill(8)
    destination.receive("r@2", [endpoint], range(10))
    source.send("r@2", range(10))
    assert isinstance(destination.wait("r@2"), Received)
    assert differing(LAYOUT, destination.view[:10], source.view[:10]) == []


@pytest.mark.parametrize("lane", LANES)
def test_a_pause_of_both_sides_that_is_longer_than_the_allowed_silence_costs_no_transfer(
    lane: str, ranks: Ranks
) -> None:
    source = ranks.remote(LAYOUT, quick(lane), "prefill", 1)
    destination = ranks.remote(LAYOUT, quick(lane), "decode", 2)
    move_half(source, destination, "r@1")
    for rank in (source, destination):
        rank.stop()
    # What is waited for is the passing of time itself.
    time.sleep(1.5 * quick(lane).silence_s)
    for rank in (source, destination):
        rank.resume()
    move_other_half(source, destination, "r@1")
