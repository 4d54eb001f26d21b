"""How fast do KV blocks move between two processes, compared with a memcpy loop over such blocks?

A prefill process and a decode process, each with a pool. A round opens several transfers of random blocks at a time and
takes the time from the first ``open_receive`` to the last ``Received``; then a numpy loop copies as many other random
blocks (the same ones would still lie in the cache), one at a time, out of the mapped source pool. Rounds alternate, so
that both see the same machine; medians are compared. The latency is that of a transfer of a single block, with nothing
else under way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Report, at_least, parser, table
from kv_transfer import (
    KVLayout,
    KVPool,
    Messenger,
    RankEndpoint,
    Received,
    Sent,
    TransferOptions,
)

BLOCK_KIB = (4, 8, 16, 32, 64)
LANES = ("shm", "tcp")
SHM_TARGET, SHM_FROM_KIB = 0.9, 32
TCP_TARGET, TCP_FROM_KIB = 0.4, 64
TIMEOUT_S = 120.0


def layout(block_kib: int, pool_mib: int) -> KVLayout:
    """Blocks of 16 tokens, 4 layers, float32, as many as fit."""
    num_layers, block_size, head_dim = 4, 16, 4
    head_bytes = num_layers * 2 * block_size * head_dim * 4
    return KVLayout(
        engine="benchmark",
        model="none",
        dtype="float32",
        num_layers=num_layers,
        num_kv_heads=block_kib * 1024 // head_bytes,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=pool_mib * 1024 // block_kib,
    )


class Rank:
    """A filled pool and a messenger; ``wait`` counts final events."""

    def __init__(self, shape: KVLayout, lane: str, name: str) -> None:
        self.pool = KVPool.allocate(shape)
        self.pool.as_array()[:] = np.arange(shape.num_blocks, dtype=np.uint64).astype(np.uint8)[:, None]
        self._news = threading.Event()
        self.messenger = Messenger(self.pool, TransferOptions(protocols=(lane,)), name=name, on_event=self._news.set)
        self.messenger.start()

    def wait(self, count: int) -> None:
        """Until ``count`` transfers have ended well."""
        until = time.monotonic() + TIMEOUT_S
        while count:
            self._news.clear()
            for event in self.messenger.poll():
                if not isinstance(event, Sent | Received):
                    raise RuntimeError(f"a transfer failed: {event.reason}")
                count -= 1
            if count and not self._news.wait(until - time.monotonic()):
                raise TimeoutError("a transfer does not end")

    def close(self) -> None:
        self.messenger.close()
        self.pool.close()


def serve(pipe: Connection, shape: KVLayout, lane: str) -> None:
    """The prefill process: offers what it is told to, and answers when all is on offer, and when all is sent."""
    rank = Rank(shape, lane, "prefill")
    pipe.send((rank.messenger.endpoint.to_dict(), os.getpid(), rank.pool.fd))
    while (jobs := pipe.recv()) is not None:
        for transfer_id, block_ids in jobs:
            rank.messenger.open_send(transfer_id, num_blocks=len(block_ids), deadline_s=TIMEOUT_S)
            rank.messenger.send_blocks(transfer_id, 0, block_ids)
            rank.messenger.finish_send(transfer_id, b"")
        pipe.send("offered")
        rank.wait(len(jobs))
        pipe.send("sent")
    rank.close()


def measure(lane: str, block_kib: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """All rounds of one lane and one block size."""
    shape = layout(block_kib, args.pool_mib)
    context = multiprocessing.get_context("spawn")
    pipe, far_pipe = context.Pipe()
    process = context.Process(target=serve, args=(far_pipe, shape, lane))
    process.start()
    rank = Rank(shape, lane, "decode")
    rng = np.random.default_rng(0)
    runs: list[dict[str, object]] = []
    try:
        record, pid, fd = pipe.recv()
        endpoint = RankEndpoint.from_dict(record)
        src = np.memmap(f"/proc/{pid}/fd/{fd}", np.uint8, "r", shape=(shape.num_blocks, shape.block_bytes))
        per_transfer = args.transfer_mib * 1024 // block_kib
        for number in range(args.rounds + 1):
            src_ids, dst_ids = (
                rng.permutation(shape.num_blocks)[: per_transfer * args.transfers].reshape(args.transfers, -1)
                for _ in range(2)
            )
            jobs = [(f"{number}.{i}", src_ids[i]) for i in range(args.transfers)]
            pipe.send(jobs)
            assert pipe.recv() == "offered"
            began = time.perf_counter()
            for (transfer_id, _), block_ids in zip(jobs, dst_ids, strict=True):
                rank.messenger.open_receive(transfer_id, [endpoint], block_ids, deadline_s=TIMEOUT_S)
            rank.wait(len(jobs))
            moved_s = time.perf_counter() - began
            assert pipe.recv() == "sent"
            dst = rank.pool.as_array()
            if not np.array_equal(dst[dst_ids.ravel()[:64]], src[src_ids.ravel()[:64]]):
                raise RuntimeError("blocks did not arrive as they were sent")
            others = (rng.permutation(shape.num_blocks)[: src_ids.size] for _ in range(2))
            copied_s = copy_loop(src, dst, *others)
            if number:  # the first round connects, and touches every page for the first time
                size = src_ids.size * shape.block_bytes / 1e9
                runs.append(
                    {
                        "lane": lane,
                        "block_kib": block_kib,
                        "gigabytes": round(size, 4),
                        "transfer_gb_s": round(size / moved_s, 3),
                        "memcpy_gb_s": round(size / copied_s, 3),
                    }
                )
        for number in range(args.rounds * 5):
            pipe.send([(f"one.{number}", np.array([number]))])
            assert pipe.recv() == "offered"
            began = time.perf_counter()
            rank.messenger.open_receive(f"one.{number}", [endpoint], [number], deadline_s=TIMEOUT_S)
            rank.wait(1)
            runs.append(
                {"lane": lane, "block_kib": block_kib, "latency_us": round((time.perf_counter() - began) * 1e6, 1)}
            )
            assert pipe.recv() == "sent"
        pipe.send(None)
        process.join(TIMEOUT_S)
    finally:
        rank.close()
        if process.is_alive():
            process.kill()
    return runs


def copy_loop(src: np.ndarray, dst: np.ndarray, src_ids: Sequence[int], dst_ids: Sequence[int]) -> float:
    """Seconds that one thread takes to copy the blocks one at a time."""
    pairs = list(zip(np.asarray(src_ids).tolist(), np.asarray(dst_ids).tolist(), strict=True))
    source = np.asarray(src)
    began = time.perf_counter()
    for src_id, dst_id in pairs:
        dst[dst_id] = source[src_id]
    return time.perf_counter() - began


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--pool-mib", type=int, default=512)
    flags.add_argument("--transfer-mib", type=int, default=32, help="size of one transfer")
    flags.add_argument("--transfers", type=int, default=8, help="open at a time")
    flags.add_argument("--rounds", type=int, default=11)
    args = flags.parse_args()
    if args.quick:
        args.pool_mib, args.transfer_mib, args.transfers, args.rounds = 128, 16, 4, 5
    if args.transfer_mib * args.transfers > args.pool_mib:
        flags.error("the transfers of one round must fit the pool")
    report = Report("transfer", {k: v for k, v in vars(args).items() if k != "json"})
    rows = []
    for lane in LANES:
        for block_kib in BLOCK_KIB:
            runs = measure(lane, block_kib, args)
            report.runs += runs
            moved, copied, latency = (
                [float(str(run[key])) for run in runs if key in run]
                for key in ("transfer_gb_s", "memcpy_gb_s", "latency_us")
            )
            ratio = statistics.median(moved) / statistics.median(copied)
            rows.append(
                (
                    f"{lane} {block_kib} KiB",
                    f"{max(moved):.2f}",
                    f"{statistics.median(moved):.2f}",
                    f"{statistics.median(copied):.2f}",
                    f"{ratio:.2f}",
                    f"{statistics.median(latency):.0f}",
                )
            )
            if lane == "shm" and block_kib >= SHM_FROM_KIB:
                report.targets.append(at_least(f"shm / memcpy, {block_kib} KiB blocks", ratio, SHM_TARGET))
            if lane == "tcp" and block_kib >= TCP_FROM_KIB:
                report.targets.append(at_least(f"tcp / memcpy, {block_kib} KiB blocks", ratio, TCP_TARGET))
    print(table(("GB/s", "best", "median", "memcpy median", "ratio", "latency us"), rows))
    report.finish(args.json)


if __name__ == "__main__":
    main()
