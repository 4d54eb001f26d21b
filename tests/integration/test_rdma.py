"""RDMA on real verbs: in a VM with Soft-RoCE devices (`make test-rdma`), each rank on a device of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kv_transfer import KVLayout, RdmaOptions, RdmaUnavailable, Received, Sent, TransferFailed, TransferOptions
from kv_transfer.transports.rdma.device import Device
from tests.integration.kv_instances import RDMA_WRITE
from tests.integration.kv_pairs import Ranks, assert_moves
from tests.integration.kv_rank import LAYOUT, ROOT, WAIT_S, LocalRank, differing, pattern, wait_for

pytestmark = [
    pytest.mark.rdma,
    pytest.mark.skipif("RDMA_VM_NICS" not in os.environ, reason="runs in the VM: make test-rdma"),
]

# Big enough that something can happen to it while its bytes flow: a second of Soft-RoCE in an emulated machine.
BIG = KVLayout("transformers", "tiny", "float32", 8, 8, 64, 16, 256)
OPTIONS = TransferOptions(protocols=("rdma",), heartbeat_s=1.0, silence_s=10.0, drain_s=1.0, chunk_bytes=1 << 20)
# 4.096 µs * 2^13, eight times: a quarter of a second until a NIC gives a silent peer up.
IMPATIENT_EXPONENT = 13


@pytest.fixture(params=["rdma", RDMA_WRITE])
def mode(request: pytest.FixtureRequest) -> str:
    return "write" if request.param == RDMA_WRITE else "read"


def with_rdma(options: TransferOptions, mode: str, **rdma: Any) -> TransferOptions:
    return dataclasses.replace(options, rdma=RdmaOptions(mode=mode, **rdma))


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@contextlib.contextmanager
def wire_cut(number: int) -> Iterator[None]:
    """The switch's port of a device is down: what is sent from or to it is lost."""
    run("ip", "link", "set", f"port{number}", "down")
    try:
        yield
    finally:
        run("ip", "link", "set", f"port{number}", "up")


def received_packets(device: str) -> int:
    return int(Path(f"/sys/class/infiniband/{device}/ports/1/hw_counters/rcvd_pkts").read_text())


@pytest.mark.parametrize(("src_tp", "dst_tp"), [(2, 1), (1, 2)])
def test_each_rank_moves_its_part_over_its_own_device_and_port(
    ranks: Ranks, src_tp: int, dst_tp: int, mode: str
) -> None:
    shape = (30, 3, 2, 4, 2, 32)
    model_kv = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    ports = tuple(18700 + i for i in range(src_tp))

    def layouts(tp_size: int) -> list[KVLayout]:
        return [KVLayout("transformers", "m", "float32", 3, 2, 8, 4, 30, tp_size, rank) for rank in range(tp_size)]

    def shard(layout: KVLayout) -> np.ndarray:
        part = model_kv[..., layout.first_head : layout.first_head + layout.num_rank_heads, :]
        return np.ascontiguousarray(part).reshape(30, layout.block_bytes)

    sent_from = with_rdma(OPTIONS, "read", nics=("rxe0", "rxe2"), ports=ports)
    sent_to = with_rdma(OPTIONS, mode, nics=("rxe1", "rxe3"))
    sources = [ranks.local(layout, sent_from, "prefill", 1) for layout in layouts(src_tp)]
    destinations = [ranks.local(layout, sent_to, "decode", 2) for layout in layouts(dst_tp)]
    offers = [source.endpoint.transports["rdma"] for source in sources]
    assert [(offer["device"], offer["port"]) for offer in offers] == list(zip(("rxe0", "rxe2"), ports, strict=False))
    used = [f"rxe{2 * i + 1}" for i in range(dst_tp)] + [f"rxe{2 * i}" for i in range(src_tp)]
    before = {device: received_packets(device) for device in used}
    for source in sources:
        source.view[:] = shard(source.layout)
        source.send("r@1", range(12))
    for rank in destinations:
        rank.receive("r@1", [source.endpoint for source in sources], range(12, 24))
    for rank in destinations:
        received = rank.wait("r@1")
        assert isinstance(received, Received), received
        wanted = pattern(rank.layout, 2)
        wanted[12:24] = shard(rank.layout)[:12]
        assert differing(rank.layout, rank.view, wanted) == []
    assert all(received_packets(device) > before[device] for device in used)


def test_a_device_taken_down_in_mid_transfer_fails_it_and_leaves_every_other_byte_alone(
    ranks: Ranks, mode: str
) -> None:
    spare, impatient = "rxe5", {"timeout_exponent": IMPATIENT_EXPONENT}
    source = ranks.remote(BIG, with_rdma(OPTIONS, mode, nics=(spare,), **impatient), "p", 1)
    options = with_rdma(OPTIONS, mode, nics=("rxe1",), **impatient)
    destination = ranks.local(BIG, options, "decode", 2)
    first = destination.view[100].copy()
    half = BIG.num_blocks // 2
    source.send("r@1", range(half))
    destination.receive("r@1", [source.endpoint], range(100, 100 + half))
    wait_for(lambda: not np.array_equal(destination.view[100], first))
    # It returns only when nobody has the device open any more.
    deletion = subprocess.Popen(["rdma", "link", "delete", spare])
    with wire_cut(5):
        ended = destination.wait("r@1")
        if isinstance(ended, Received):
            assert differing(BIG, destination.view[100 : 100 + half], source.view[:half]) == []
        else:
            assert isinstance(ended, TransferFailed)
        source.wait("r@1")
        outside = [*range(100), *range(100 + half, BIG.num_blocks)]
        assert differing(BIG, destination.view[outside], pattern(BIG, 2)[outside]) == []
        destination.fill(7)
        source.close()
        assert deletion.wait(WAIT_S) == 0
        assert differing(BIG, destination.view, pattern(BIG, 7)) == []
    run("rdma", "link", "add", spare, "type", "rxe", "netdev", "eth5")
    other = ranks.local(BIG, dataclasses.replace(OPTIONS, rdma=RdmaOptions(nics=("rxe0",))), "prefill", 3)
    assert_moves(other, destination, "r@2")


@pytest.mark.parametrize("comes_back", [True, False])
def test_an_abort_does_not_wait_for_what_a_peer_never_answers(ranks: Ranks, comes_back: bool, mode: str) -> None:
    # What is lost on the wire is asked for again after seventeen seconds, and given up after two minutes.
    patient = dataclasses.replace(with_rdma(OPTIONS, mode, timeout_exponent=22), silence_s=20.0)
    source, destination = ranks.pair(BIG, patient)
    assert_moves(source, destination, "warm@1")
    wanted = destination.view.copy()
    for transfer_id, begin in (("given up@1", 100), ("other@1", 180)):
        source.send(transfer_id, range(begin, begin + 60))
    with contextlib.ExitStack() as wire:
        wire.enter_context(wire_cut(0))
        posted = destination.counters()["rdma_batches_posted_total"]
        destination.receive("given up@1", [source.endpoint], range(100, 160))
        wait_for(lambda: destination.counters()["rdma_batches_posted_total"] > posted)
        destination.receive("other@1", [source.endpoint], range(180, 240))
        if comes_back:
            wire.close()
        began = time.monotonic()
        destination.abort("given up@1", "its user has left")
        assert isinstance(destination.wait("given up@1"), TransferFailed)
        assert time.monotonic() - began < 15, "less than the NIC waits for an answer, once"
        destination.view[100:160] = wanted[100:160] = 0xEE
        other = destination.wait("other@1")
    if comes_back:
        assert isinstance(other, Received), other
        wanted[180:240] = source.view[180:240]
    else:
        assert isinstance(other, TransferFailed)
        destination.view[180:240] = wanted[180:240] = 0xDD
    assert differing(BIG, destination.view, wanted) == []
    assert destination.counters()["rdma_rebuilds_total"] >= 1


def test_thousands_of_transfers_leave_nothing_behind(ranks: Ranks, mode: str) -> None:
    layout = KVLayout("transformers", "tiny", "float32", 2, 2, 8, 4, 1000)
    options = with_rdma(OPTIONS, mode)
    source, destination = ranks.pair(layout, options)
    count = int(os.environ.get("RDMA_TRANSFERS", "10000"))

    def move(first: int, count: int) -> None:
        for start in range(first, first + count, 100):
            for i in range(start, start + 100):
                destination.receive(f"r{i}", [source.endpoint], [(7 * i) % 1000])
                source.send(f"r{i}", [(3 * i) % 1000])
            for i in range(start, start + 100):
                assert isinstance(destination.wait(f"r{i}"), Received)
                assert isinstance(source.wait(f"r{i}"), Sent)

    def held() -> dict[str, int]:
        """What the devices hold, this process's descriptors, and its resident memory in MiB."""
        gc.collect()
        shown = json.loads(run("rdma", "-j", "resource", "show"))
        totals = {kind: sum(int(device[kind]) for device in shown) for kind in ("qp", "cq", "mr", "pd")}
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {**totals, "fds": len(os.listdir("/proc/self/fd")), "mib": pages * resource.getpagesize() >> 20}

    nothing = held()
    move(0, 500)
    before = held()
    assert before["qp"] >= nothing["qp"] + 4 and before["mr"] >= 2
    move(500, count)
    after = held()
    print(f"after {count} transfers: {after}, before: {before}")
    assert {k: after[k] for k in after if k != "mib"} == {k: before[k] for k in before if k != "mib"}
    assert after["mib"] <= before["mib"] + 4
    assert destination.counters()["received_total"] == 500 + count


def test_a_peer_without_rdma_is_reached_by_tcp_with_a_warning_and_a_count(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    both = dataclasses.replace(OPTIONS, protocols=("rdma", "tcp"))
    source = ranks.local(LAYOUT, dataclasses.replace(OPTIONS, protocols=("tcp",)), "prefill", 1)
    destination = ranks.local(LAYOUT, both, "decode", 2)
    with caplog.at_level(logging.WARNING, "kv_transfer"):
        assert_moves(source, destination, "r@1")
    assert destination.counters()["downgrades_total"] == 1
    assert "goes over tcp instead of rdma: rdma: the peer does not offer it" in caplog.text


def test_a_host_whose_named_device_is_missing_goes_on_over_tcp_only_where_that_is_allowed(
    ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    absent = dataclasses.replace(OPTIONS, protocols=("rdma", "tcp"), rdma=RdmaOptions(nics=("mlx5_0",)))
    with pytest.raises(RdmaUnavailable, match="no such device here; those that are: rxe0, rxe1"):
        LocalRank(LAYOUT, absent, "prefill")
    with caplog.at_level(logging.ERROR, "kv_transfer"):
        source = ranks.local(LAYOUT, dataclasses.replace(absent, optional=("rdma",)), "prefill", 1)
    assert "goes on without rdma, over tcp: RDMA device 'mlx5_0'" in caplog.text
    assert source.counters()["lanes_missing_total"] == 1
    assert list(source.endpoint.transports) == ["tcp"]


def test_a_port_that_is_down_a_gid_that_is_not_set_and_a_device_that_is_not_there_are_told_apart() -> None:
    number = int(os.environ["RDMA_VM_NICS"]) - 1
    run("ip", "link", "set", f"eth{number}", "down")
    try:
        with pytest.raises(RdmaUnavailable, match=rf"'rxe{number}': its state is DOWN: bring its link up"):
            Device(RdmaOptions(nics=(f"rxe{number}",)), 0)
    finally:
        run("ip", "link", "set", f"eth{number}", "up")
    with pytest.raises(RdmaUnavailable, match="GID index 200 is not set; those that are: 0, 1"):
        Device(RdmaOptions(nics=("rxe0",), gid_index=200), 0)
    with pytest.raises(RdmaUnavailable, match="'mlx5_7': there is no such device here; those that are: rxe0"):
        Device(RdmaOptions(nics=("mlx5_7",)), 0)


def test_a_limit_of_locked_memory_that_is_too_low_is_named_with_its_remedy() -> None:
    program = textwrap.dedent("""
        import resource
        from kv_transfer import KVPool, Messenger, TransferOptions, TransportFailed
        from tests.integration.kv_rank import LAYOUT
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        pool = KVPool.allocate(LAYOUT)
        try:
            Messenger(pool, TransferOptions(protocols=("rdma",)), name="m").start()
        except TransportFailed as exc:
            print(exc)
    """)
    # root without the capability that lifts the limit
    unprivileged = ("setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock")
    done = subprocess.run(
        [*unprivileged, sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "may lock only 65536 bytes of memory: raise the limit (ulimit -l unlimited" in done.stdout, done
    assert "Traceback" not in done.stderr


def test_loading_pyverbs_leaves_this_process_s_logging_as_it_was() -> None:
    program = textwrap.dedent("""
        import logging
        from kv_transfer.transports.rdma.verbs import load_verbs
        load_verbs()
        print(logging.getLogger().handlers, logging.getLogger().level)
    """)
    assert run(sys.executable, "-c", program) == f"[] {logging.WARNING}\n"
