"""How much of a device's bandwidth does the RDMA transport reach, and what does a read or a write cost on the CPU?

Beside it, in the same run and on the same two devices, perftest's ib_write_bw and ib_read_bw with messages of the
block's size. Ours is everything: messenger, plan, control channel, acknowledgement, and in write mode the orders. Of
scattered blocks no two are neighbours, so that each is an operation of its own; merged ones all are, on both sides. The
figures of a Soft-RoCE device in a VM say nothing about hardware; the ratio says what the transport adds.

Without an RDMA device it says so and ends; --vm runs it in the test VM (see tests/rdma_vm).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Report, at_least, parser, table
from kv_transfer import KVLayout, KVPool, Messenger, RankEndpoint, RdmaOptions, Received, Sent, TransferOptions
from kv_transfer.options import RDMA_MODES
from kv_transfer.plan import plan_pair
from kv_transfer.sysfs import rdma_ports
from kv_transfer.topology import choose_gid
from kv_transfer.transports.rdma.device import MAX_BATCH
from kv_transfer.transports.rdma.operations import group, merged_operations, moves_of
from kv_transfer.transports.rdma.requests import LocalRegion, WorkRequests
from kv_transfer.transports.rdma.verbs import load_verbs
from kv_transfer.transports.rdma.wire import RemoteRegion

BLOCK_KIB = (4, 16, 32, 64)
QUEUE_PAIRS = (1, 4)
# Transfers of one block each: what does one cost that has no bytes to speak of?
SINGLE_BLOCKS = 10
TARGETS = {16: 0.5, 64: 0.8}
TIMEOUT_S = 300.0
VM_TIMEOUT_S = 1500.0


def layout(block_kib: int, pool_mib: int) -> KVLayout:
    num_layers, block_size, head_dim = 4, 16, 4
    head_bytes = num_layers * 2 * block_size * head_dim * 4
    heads, blocks = block_kib * 1024 // head_bytes, pool_mib * 1024 // block_kib
    return KVLayout("benchmark", "none", "float32", num_layers, heads, head_dim, block_size, blocks)


class Rank:
    def __init__(self, shape: KVLayout, device: str, queue_pairs: int, mode: str) -> None:
        self.pool = KVPool.allocate(shape)
        self.pool.as_array()[:] = np.arange(shape.num_blocks, dtype=np.uint64).astype(np.uint8)[:, None]
        self._news = threading.Event()
        rdma = RdmaOptions(nics=(device,), queue_pairs=queue_pairs, mode=mode)
        options = TransferOptions(protocols=("rdma",), rdma=rdma, silence_s=60.0)
        self.messenger = Messenger(self.pool, options, name="rank", on_event=self._news.set)
        self.messenger.start()

    def wait(self) -> None:
        """Until one transfer has ended well."""
        until = time.monotonic() + TIMEOUT_S
        while True:
            self._news.clear()
            for event in self.messenger.poll():
                if not isinstance(event, Sent | Received):
                    raise RuntimeError(f"a transfer failed: {event.reason}")
                return
            if not self._news.wait(until - time.monotonic()):
                raise TimeoutError("a transfer does not end")

    def num_posted(self, mode: str) -> int:
        """Reads or writes; the destination posts the ones, the source the others."""
        return int(self.messenger.counters().get(f"rdma_{mode}s_posted_total", 0))

    def close(self) -> None:
        self.messenger.close()
        self.pool.close()


def serve(pipe: Connection, shape: KVLayout, device: str, queue_pairs: int, mode: str) -> None:
    """The source process: sends what it is told to."""
    rank = Rank(shape, device, queue_pairs, mode)
    pipe.send(rank.messenger.endpoint.to_dict())
    while (job := pipe.recv()) is not None:
        transfer_id, block_ids = job
        before, cpu = rank.num_posted("write"), time.process_time()
        rank.messenger.open_send(transfer_id, num_blocks=len(block_ids), deadline_s=TIMEOUT_S)
        rank.messenger.send_blocks(transfer_id, 0, block_ids)
        rank.messenger.finish_send(transfer_id, b"")
        pipe.send("offered")
        rank.wait()
        pipe.send((rank.num_posted("write") - before, time.process_time() - cpu))
    rank.close()


def ours(
    block_kib: int, queue_pairs: int, mode: str, devices: Sequence[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """All rounds, scattered and merged, and single blocks."""
    shape = layout(block_kib, 2 * args.mib)
    context = multiprocessing.get_context("spawn")
    pipe, far_pipe = context.Pipe()
    process = context.Process(target=serve, args=(far_pipe, shape, devices[0], queue_pairs, mode))
    process.start()
    rank = Rank(shape, devices[1], queue_pairs, mode)
    rng = np.random.default_rng(0)
    runs: list[dict[str, Any]] = []
    settings = {"mode": mode, "block_kib": block_kib, "queue_pairs": queue_pairs}

    def move(transfer_id: str, src_ids: Any, dst_ids: Any) -> tuple[float, int, float]:
        """Seconds, operations posted, and seconds of CPU of both sides."""
        pipe.send((transfer_id, src_ids))
        assert pipe.recv() == "offered"
        before = rank.num_posted("read")
        began, cpu = time.perf_counter(), time.process_time()
        rank.messenger.open_receive(transfer_id, [endpoint], dst_ids, deadline_s=TIMEOUT_S)
        rank.wait()
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        posts, source_cpu_s = pipe.recv()
        if not np.array_equal(rank.pool.as_array()[dst_ids, 0], src_ids.astype(np.uint8)):
            raise RuntimeError("blocks did not arrive as they were sent")
        return seconds, posts + rank.num_posted("read") - before, cpu_s + source_cpu_s

    try:
        endpoint = RankEndpoint.from_dict(pipe.recv())
        for number in range(-1, args.rounds):
            for kind in ("scattered", "merged"):
                ids = np.arange(shape.num_blocks // 2)
                src_ids, dst_ids = (
                    (rng.permutation(2 * ids), rng.permutation(2 * ids)) if kind == "scattered" else (ids, ids)
                )
                seconds, posts, cpu_s = move(f"{kind}.{number}", src_ids, dst_ids)
                if number >= 0:  # the round before has connected
                    found = {
                        "mb_s": round(len(src_ids) * shape.block_bytes / seconds / 1e6, 2),
                        "posts": posts,
                        "posts_per_s": round(posts / seconds),
                        "cpu_us_per_post": round(cpu_s / posts * 1e6, 2),
                    }
                    runs.append({"what": kind, **settings, **found})
        for number in range(SINGLE_BLOCKS):
            seconds, _, cpu_s = move(f"single.{number}", np.array([number]), np.array([number]))
            found = {"ms": round(1000 * seconds, 2), "cpu_ms": round(1000 * cpu_s, 2)}
            runs.append({"what": "one block", **settings, **found})
        pipe.send(None)
        process.join(TIMEOUT_S)
    finally:
        rank.close()
        if process.is_alive():
            process.kill()
    return runs


def perftest(
    tool: str, block_kib: int, queue_pairs: int, devices: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """One run of ib_write_bw or ib_read_bw between the two devices."""
    gids = {port.device: choose_gid(port) for port in rdma_ports() if port.device in devices}
    count = max(5 * queue_pairs, args.mib * 1024 // block_kib // queue_pairs)
    address = ".".join(str(int(gids[devices[0]].value.replace(":", "")[i : i + 2], 16)) for i in (24, 26, 28, 30))

    def command(device: str, *rest: str) -> list[str]:
        flags = ["-s", str(block_kib * 1024), "-n", str(count), "-q", str(queue_pairs), "-F"]
        return [tool, "-d", device, "-x", str(gids[device].index), *flags, *rest]

    server = subprocess.Popen(command(devices[0]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + TIMEOUT_S
        while True:
            done = subprocess.run(
                command(devices[1], address), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
            found = re.findall(r"^\s*\d+\s+\d+\s+([\d.]+)\s+([\d.]+)\s", done.stdout, re.MULTILINE)
            if found:
                # perftest's megabytes have 2**20 bytes.
                mb_s = float(found[-1][1]) * 2**20 / 1e6
                return {"what": tool, "block_kib": block_kib, "queue_pairs": queue_pairs, "mb_s": round(mb_s, 2)}
            if time.monotonic() > until or server.poll() is not None:
                raise RuntimeError(f"{tool} gives no figure: {done.stdout[-500:]} {done.stderr[-500:]}")
            # The server may not listen yet.
            time.sleep(0.2)
    finally:
        server.kill()
        server.wait()


def cost_of_posting(block_kib: int, mode: str, *, is_merged: bool) -> float:
    """µs of CPU for an operation, planning included, up to the call into the driver; needs pyverbs and no device."""
    verbs = load_verbs()
    shape = layout(block_kib, 64)
    plan = plan_pair(shape, shape)
    (part,) = (moves_of(part, plan.src_units, plan.dst_units) for part in plan.parts)
    opcode = verbs.enums.IBV_WR_RDMA_READ if mode == "read" else verbs.enums.IBV_WR_RDMA_WRITE
    requests = WorkRequests(verbs, opcode, MAX_BATCH, 16)
    rng = np.random.default_rng(0)
    ids = np.arange(shape.num_blocks)
    sources, targets = (ids, ids) if is_merged else (rng.permutation(ids), rng.permutation(ids))
    remote, local = RemoteRegion(0, 1, shape.pool_bytes), LocalRegion(0, 1, 1, shape.pool_bytes)
    immediate = None if mode == "read" else 1

    class Pair:
        def post_send(self, request: Any) -> None:
            """Nothing: what the driver does is not ours."""

    posts, began = 0, time.process_time()
    while time.process_time() - began < 1.0:
        offsets = part.sources(sources), part.targets(targets)
        ends = offsets if mode == "read" else offsets[::-1]
        operations = list(merged_operations(*ends, part.stretch_bytes, max_pieces=1, max_bytes=1 << 20))
        for some in group(operations, MAX_BATCH):
            requests.post(Pair(), some, remote=remote, local=local, wr_id=1, immediate=immediate)
        posts += len(operations)
    return (time.process_time() - began) / posts * 1e6


def measure(report: Report, args: argparse.Namespace) -> None:
    devices = [port.device for port in rdma_ports() if port.is_active][:2]
    devices = devices * 2 if len(devices) == 1 else devices
    rows = []
    for block_kib in args.block_kib:
        for queue_pairs in QUEUE_PAIRS:
            beside = [perftest(tool, block_kib, queue_pairs, devices, args) for tool in ("ib_write_bw", "ib_read_bw")]
            runs = [run for mode in RDMA_MODES for run in ours(block_kib, queue_pairs, mode, devices, args)]
            beside += [perftest(tool, block_kib, queue_pairs, devices, args) for tool in ("ib_write_bw", "ib_read_bw")]
            report.runs += [*beside, *runs]

            def median(
                what: str,
                key: str = "mb_s",
                mode: str | None = None,
                found: Sequence[dict[str, Any]] = (*beside, *runs),
            ) -> float:
                return statistics.median(run[key] for run in found if (run["what"], run.get("mode")) == (what, mode))

            write, read = median("ib_write_bw"), median("ib_read_bw")
            for mode in RDMA_MODES:
                for kind in ("scattered", "merged"):
                    speed = median(kind, mode=mode)
                    rows.append(
                        (
                            f"{mode}, {block_kib} KiB {kind}, {queue_pairs} QP",
                            f"{speed:.1f}",
                            f"{write:.1f}",
                            f"{read:.1f}",
                            f"{speed / write:.2f}",
                            f"{median(kind, 'posts_per_s', mode):.0f}",
                            f"{median(kind, 'cpu_us_per_post', mode):.0f}",
                            f"{median('one block', 'ms', mode):.1f}",
                        )
                    )
                    if block_kib in TARGETS and kind == "scattered":
                        name = f"{mode} of ib_write_bw, {block_kib} KiB scattered, {queue_pairs} QP"
                        report.targets.append(at_least(name, speed / write, TARGETS[block_kib]))
    header = ("", "MB/s", "ib_write_bw", "ib_read_bw", "x write", "posts/s", "CPU us/post", "ms/one block")
    print(table(header, rows))


def in_vm(args: argparse.Namespace) -> int:
    from tests.rdma_vm.image import ready_image
    from tests.rdma_vm.vm import Machine, run

    with tempfile.TemporaryDirectory(prefix="bench-rdma-") as directory:
        flags = ["--json", f"{directory}/found.json", *(["--quick"] if args.quick else [])]
        flags += ["--mib", str(args.mib), "--rounds", str(args.rounds), "--block-kib", *map(str, args.block_kib)]
        machine = Machine(num_nics=2, timeout_s=VM_TIMEOUT_S, writable=(Path(directory),))
        code = run([sys.executable, "-m", "benchmarks.rdma", *flags], machine, ready_image())
        if code == 0 and args.json:
            shutil.copy(f"{directory}/found.json", args.json)
        return code


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--mib", type=int, default=64, help="moved in a round")
    flags.add_argument("--block-kib", type=int, nargs="+", default=BLOCK_KIB, choices=BLOCK_KIB, metavar="KIB")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--vm", action="store_true", help="run in the test VM, on Soft-RoCE devices")
    flags.add_argument("--posting", action="store_true", help="only the CPU time of posting; needs no device")
    args = flags.parse_args()
    if args.vm:
        return in_vm(args)
    if args.quick:
        args.mib, args.rounds, args.block_kib = min(args.mib, 8), min(args.rounds, 3), (16, 64)
    if not args.posting and not any(port.is_active for port in rdma_ports()):
        print("no RDMA device here; --vm runs it in the test VM, --posting measures what needs none")
        return 0
    report = Report("rdma", {k: v for k, v in vars(args).items() if k != "json"})
    if not args.posting:
        if shutil.which("ib_write_bw") is None:
            flags.error("perftest is not installed: apt-get install perftest")
        measure(report, args)
    for is_merged in (False, True):
        for block_kib in BLOCK_KIB:
            for mode in RDMA_MODES:
                cost = cost_of_posting(block_kib, mode, is_merged=is_merged)
                what = f"posting, {'merged' if is_merged else 'scattered'}"
                found = {"block_kib": block_kib, "mode": mode, "cpu_us_per_post": round(cost, 3)}
                report.runs.append({"what": what, **found})
                print(f"{what}, {block_kib} KiB blocks: {cost:.2f} us of CPU a {mode}, up to the driver")
    report.finish(args.json)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
