"""How fast do KV blocks move between two processes, beside one thread that copies them, and beside NIXL and Mooncake?

A prefill process and a decode process, each with a pool of 16 layers with K and V. A slice of random blocks is one
transfer, timed from the request to the acknowledged end; beside each, in turn, as many other random blocks are copied
by one thread, one memcpy for what lies together. A row's ratio is the median over such pairs. The peers move the same
slices, in processes of their own.
"""

from __future__ import annotations

import argparse
import itertools
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Report, at_least, at_most, parser, table
from benchmarks.kv.memcpy import CopyLoop
from benchmarks.kv.paged import NUM_PLANES, Paged
from benchmarks.kv.peers import run_peer
from benchmarks.kv.ranks import FarSide, Side, all_ranks, flat_layout, paged_layout
from kv_transfer import KVLayout, Received

MIB = 1 << 20
BLOCK_KIB = (4, 16, 32, 64)
LANES = ("shm", "tcp")
THROUGHPUT = {"shm": {4: 0.75, 16: 0.85, 32: 0.85, 64: 0.85}, "tcp": {4: 0.4, 16: 0.5, 32: 0.7, 64: 0.7}}
LATENCY_US = {("shm", 1): 250, ("shm", 64): 500, ("tcp", 1): 400, ("tcp", 64): 900}
OVER_PEER = {("shm", "nixl"): 1.6, ("tcp", "nixl tcp"): 2.5, ("tcp", "mooncake"): 2.0}


@contextmanager
def pair(source: list[KVLayout], destination: list[KVLayout], lane: str) -> Iterator[tuple[FarSide, Side]]:
    far = FarSide(source, lane)
    near = Side(destination, lane, "decode")
    try:
        yield far, near
    finally:
        near.close()
        far.close()


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.report = Report("kv_transfer", {k: v for k, v in vars(args).items() if k != "json"})
        self.rows: list[tuple[object, ...]] = []
        self.copy = CopyLoop()
        self.medians: dict[tuple[str, int], float] = {}
        self._numbers = itertools.count()

    def move(self, far: FarSide, near: Side, slices: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, list[float]]:
        """Seconds from the first request to the last end on both sides, and each transfer's own."""
        ids = [f"t{next(self._numbers)}" for _ in slices]
        far.offer([(i, src) for i, (src, _) in zip(ids, slices, strict=True)])
        began = time.monotonic()
        near.receive([(i, dst) for i, (_, dst) in zip(ids, slices, strict=True)], far.endpoints)
        events = near.wait(len(slices))
        ended = time.monotonic()
        return max(ended, far.wait_sent()) - began, [e.stats.seconds for e in events if isinstance(e, Received)]

    def add(self, name: str, value: str, note: str = "", **run: object) -> None:
        print(f"  {name}: {value} {note}", file=sys.stderr, flush=True)
        self.rows.append((name, value, note))
        self.report.runs.append({"name": name, **run})

    def throughput(self, lane: str, kib: int, packing: str) -> None:
        args = self.args
        paged = Paged(kib << 10, args.pool_mib * MIB, packing)
        layout = paged_layout(paged)
        rates, limits, ratios = [], [], []
        with pair([layout], [layout], lane) as (far, near):
            src, dst = far.pool(), near.pools[0].regions[0]
            rounds = paged.rounds(kib, args.total_mib * MIB, args.slice_mib * MIB)
            cpu, moved = 0.0, 0
            for number, slices in zip(range(args.rounds + 1), rounds, strict=False):
                # Half a round apart, so that neither finds what the other has just brought into the cache.
                others = slices[len(slices) // 2 :] + slices[: len(slices) // 2]
                for one, other in zip(slices, others, strict=True):
                    before = near.usage()["cpu_s"] + far.ask(("usage", None))["cpu_s"]
                    seconds, _ = self.move(far, near, [one])
                    used = near.usage()["cpu_s"] + far.ask(("usage", None))["cpu_s"] - before
                    check(paged, src, dst, one)
                    offsets = paged.offsets(other[0]), paged.offsets(other[1])
                    copied_s = self.copy.seconds(src, dst, offsets, paged.block_bytes)
                    size = len(one[0]) * NUM_PLANES * paged.block_bytes
                    if number:  # the first round connects, and touches every page for the first time
                        cpu, moved = cpu + used, moved + size
                        rates.append(size / seconds / 1e9)
                        limits.append(size / copied_s / 1e9)
                        ratios.append(copied_s / seconds)
            beside = max(near.usage()["beside_mib"], far.ask(("usage", None))["beside_mib"])
            bare = [self.bare_tcp(far, near) for _ in range(args.rounds)] if lane == "tcp" else []
        rate, limit, ratio = (statistics.median(x) for x in (rates, limits, ratios))
        beside_bare = f", {rate / statistics.median(bare):.2f} x a bare socket" if bare else ""
        name = f"{lane} {kib} KiB" + ("" if packing == "layer-major" else f" {packing}")
        self.add(
            name,
            f"{rate:.2f} GB/s",
            f"{ratio:.2f} x memcpy ({limit:.2f}){beside_bare}, CPU {cpu / moved * 1e9:.2f} s/GB, {beside:.0f} MiB",
            lane=lane,
            block_kib=kib,
            packing=packing,
            gb_s=[round(x, 3) for x in rates],
            memcpy_gb_s=[round(x, 3) for x in limits],
            bare_tcp_gb_s=[round(x, 3) for x in bare],
            cpu_s_per_gb=round(cpu / moved * 1e9, 4),
            beside_mib=round(beside, 1),
        )
        self.report.targets.append(at_most(f"{name}: MiB beside the pools", beside, 64))
        if packing == "layer-major":
            self.medians[lane, kib] = rate
            self.report.targets.append(at_least(f"{name}: x memcpy", ratio, THROUGHPUT[lane][kib]))

    def bare_tcp(self, far: FarSide, near: Side) -> float:
        """GB/s of one connection that carries one stretch of one pool into one of the other, and knows nothing else."""
        size = self.args.slice_mib * MIB
        target = memoryview(near.pools[0].regions[0])[:size]
        with socket.create_connection(("127.0.0.1", far.ask(("bare", size)))) as sock:
            began, done = time.monotonic(), 0
            while done < size:
                done += sock.recv_into(target[done:])
            return size / (time.monotonic() - began) / 1e9

    def latency(self, lane: str) -> None:
        """Beside it, what a message there and one back cost these two processes, after pauses of the same kind."""
        layout = flat_layout(16, 4096)
        rng = np.random.default_rng(0)
        with pair([layout], [layout], lane) as (far, near):
            trips = self.round_trips(far, rng)
            self.add(f"{lane} bare round trip", f"{statistics.median(trips):.0f} us", us=[round(t, 1) for t in trips])
            for count in (1, 64):
                times = []
                for _ in range(self.args.latency_rounds):
                    src, dst = (rng.permutation(layout.num_blocks)[:count] for _ in range(2))
                    times.append(self.move(far, near, [(src, dst)])[0] * 1e6)
                times = times[len(times) // 10 :]
                median = statistics.median(times)
                name = f"{lane} latency, {count} x 16 KiB"
                p10, p90 = np.percentile(times, [10, 90])
                self.add(name, f"{median:.0f} us", f"p10 {p10:.0f}, p90 {p90:.0f}", us=[round(t, 1) for t in times])
                self.report.targets.append(at_most(f"{name}: us", median, LATENCY_US[lane, count]))

    def round_trips(self, far: FarSide, rng: np.random.Generator) -> list[float]:
        """Microseconds of each, over a socket that both wait for in the plainest way."""
        times = []
        with socket.create_connection(("127.0.0.1", far.ask(("echo", None)))) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(self.args.latency_rounds):
                for _ in range(2):
                    rng.permutation(4096)
                began = time.monotonic()
                sock.sendall(b"there")
                sock.recv(16)
                times.append((time.monotonic() - began) * 1e6)
        return times[len(times) // 10 :]

    def concurrency(self, lane: str) -> None:
        paged = Paged(16 << 10, 64 * 8 * MIB)
        layout = paged_layout(paged)
        per = 8 * MIB // (NUM_PLANES * paged.block_bytes)
        rng = np.random.default_rng(1)
        ratios, spreads = [], []
        with pair([layout], [layout], lane) as (far, near):
            for number in range(self.args.rounds + 1):
                src, dst = (rng.permutation(paged.num_blocks) for _ in range(2))
                one_s, _ = self.move(far, near, [(src, dst)])
                parts = [(src[i : i + per], dst[i : i + per]) for i in range(0, len(src), per)]
                many_s, each = self.move(far, near, parts)
                if number:
                    ratios.append(one_s / many_s)
                    spreads.append(max(each) / statistics.mean(each))
        ratio, spread = statistics.median(ratios), statistics.median(spreads)
        name = f"{lane} 64 transfers of 8 MiB"
        self.add(name, f"{ratio:.2f} x one big one", f"slowest {spread:.2f} x the mean", ratios=ratios, spreads=spreads)
        self.report.targets.append(at_least(f"{name}: x one big one", ratio, 0.9))
        self.report.targets.append(at_most(f"{name}: slowest / mean", spread, 1.5))

    def tensor_parallel(self, lane: str) -> None:
        """Ranks of a side share a process; block_bytes are of TP 2, so that the whole model's bytes are the same."""
        pool = self.args.pool_mib * MIB // 4
        layouts = {tp: paged_layout(Paged((64 << 10) // tp, pool, "layer-major"), tp) for tp in (2, 4)}
        blocks = min(layout.num_blocks for layout in layouts.values())
        rng = np.random.default_rng(2)
        found: dict[tuple[int, int], list[float]] = {(s, d): [] for s in layouts for d in layouts}
        with ExitStack() as stack:
            pairs = {
                (s, d): stack.enter_context(pair(all_ranks(layouts[s]), all_ranks(layouts[d]), lane))
                for s in layouts
                for d in layouts
            }
            for number in range(self.args.rounds + 1):
                for key, (far, near) in pairs.items():
                    src, dst = (rng.permutation(blocks)[: blocks // 2] for _ in range(2))
                    seconds, _ = self.move(far, near, [(src, dst)])
                    if number:
                        found[key].append(blocks // 2 * 64 * 1024 * NUM_PLANES / seconds / 1e9)
        for src_tp, dst_tp in ((4, 2), (2, 4)):
            ratios = [a / b for a, b in zip(found[src_tp, dst_tp], found[dst_tp, dst_tp], strict=True)]
            ratio = statistics.median(ratios)
            name = f"{lane} TP {src_tp} -> {dst_tp}, head-sliced"
            rate = statistics.median(found[src_tp, dst_tp])
            self.add(name, f"{rate:.2f} GB/s", f"{ratio:.2f} x TP {dst_tp} -> {dst_tp}", gb_s=found[src_tp, dst_tp])
            self.report.targets.append(at_least(f"{name}: x equal TP", ratio, 0.6))

    def growth(self, lane: str) -> None:
        """A request larger than half the pool goes in parts, one after the other, into the same blocks."""
        paged = Paged(16 << 10, self.args.pool_mib * MIB)
        layout = paged_layout(paged)
        block = NUM_PLANES * paged.block_bytes
        part = self.args.pool_mib * MIB // 2 // block
        rng = np.random.default_rng(3)
        times = {}
        with pair([layout], [layout], lane) as (far, near):
            self.move(far, near, [(np.arange(part), np.arange(part))])
            for mib in self.args.request_mib:
                left, total = mib * MIB // block, 0.0
                while left:
                    count = min(left, part)
                    src, dst = (rng.permutation(paged.num_blocks)[:count] for _ in range(2))
                    total += self.move(far, near, [(src, dst)])[0]
                    left -= count
                times[mib] = total
        text = ", ".join(f"{mib} MiB {seconds * 1e3:.1f}" for mib, seconds in times.items())
        # Fixed cost aside: the slope between neighbours from 64 MiB on, the steepest over the flattest.
        large = [(m, t) for m, t in times.items() if m >= 64]
        per_byte = [t / m for m, t in large]
        self.add(f"{lane} growth", "ms", text, ms={m: round(t * 1e3, 3) for m, t in times.items()})
        self.report.targets.append(
            at_most(f"{lane} growth: time a byte from 64 MiB on, most / least", max(per_byte) / min(per_byte), 1.5)
        )

    def peers(self, lane: str) -> None:
        """One rank fetches a block from each of 1, 8 and 64 others, all at once."""
        threads, times = {}, {}
        layout = flat_layout(16, 64)
        for count in (1, 8, 64):
            far = FarSide([layout] * count, lane)
            near = Side([layout], lane, "decode")
            try:
                for turn in ("connecting", "connected"):
                    far.ask(("each", turn))
                    began = time.monotonic()
                    for index, endpoint in enumerate(far.endpoints):
                        near.messengers[0].open_receive(f"{turn}.{index}", [endpoint], [index], deadline_s=60)
                    near.wait(count)
                    times[count] = max(time.monotonic(), far.wait_sent()) - began
                threads[count] = int(near.usage()["threads"])
            finally:
                near.close()
                far.close()
        text = ", ".join(f"{count} peers {seconds * 1e3:.1f}" for count, seconds in times.items())
        self.add(f"{lane} a block of each peer", "ms", f"{text}; threads {threads}", threads=threads, seconds=times)
        self.report.targets.append(
            at_most(f"{lane} threads more with 64 peers than with 1", threads[64] - threads[1], 0)
        )

    def others(self) -> None:
        args = self.args
        for package in ("nixl", "mooncake"):
            outcome = run_peer(package, [args.pool_mib, args.total_mib, args.slice_mib, args.rounds, *BLOCK_KIB])
            if isinstance(outcome, str):
                self.add(package, "skipped", outcome)
                continue
            best: dict[tuple[str, int], float] = {}
            for run in outcome:
                lane, kib = str(run["lane"]), int(run["block_kib"])
                rate, limit = statistics.median(run["gb_s"]), statistics.median(run["memcpy_gb_s"])
                self.add(f"{lane} {kib} KiB", f"{rate:.2f} GB/s", f"{rate / limit:.2f} x memcpy ({limit:.2f})", **run)
                kind = package if package == "mooncake" else "nixl tcp" if "tcp" in lane else "nixl"
                best[kind, kib] = max(best.get((kind, kib), 0.0), rate)
            for (ours, theirs), target in OVER_PEER.items():
                for kib in BLOCK_KIB:
                    if (theirs, kib) in best and (ours, kib) in self.medians:
                        ratio = self.medians[ours, kib] / best[theirs, kib]
                        self.report.targets.append(at_least(f"{ours} {kib} KiB: x {theirs}", ratio, target))


def check(paged: Paged, src: np.ndarray, dst: np.ndarray, moved: tuple[np.ndarray, np.ndarray]) -> None:
    """A few of the blocks that were moved, byte by byte."""
    some = slice(None, None, max(1, len(moved[0]) // 8))
    for start, end in zip(paged.offsets(moved[0][some]), paged.offsets(moved[1][some]), strict=True):
        if not np.array_equal(src[start : start + paged.block_bytes], dst[end : end + paged.block_bytes]):
            raise RuntimeError("blocks did not arrive as they were sent")


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--pool-mib", type=int, default=512)
    flags.add_argument("--total-mib", type=int, default=256, help="moved in a round")
    flags.add_argument("--slice-mib", type=int, default=128, help="moved by one transfer")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--latency-rounds", type=int, default=400)
    flags.add_argument(
        "--only", nargs="*", help="names of parts: throughput latency concurrency tp growth peers others"
    )
    args = flags.parse_args()
    args.request_mib = [1, 8, 64, 256, 1024, 4096]
    if args.quick:
        args.pool_mib, args.total_mib, args.slice_mib, args.rounds, args.latency_rounds = 256, 128, 64, 2, 100
        args.request_mib = [1, 8, 64, 256]
    bench = Bench(args)
    print(f"limit: {bench.copy.name}", file=sys.stderr)
    parts: dict[str, Callable[[], None]] = {
        "throughput": lambda: [
            bench.throughput(lane, kib, packing)
            for lane in LANES
            for packing in ("layer-major", "block-major")
            for kib in BLOCK_KIB
        ],
        "latency": lambda: [bench.latency(lane) for lane in LANES],
        "concurrency": lambda: [bench.concurrency(lane) for lane in LANES],
        "tp": lambda: [bench.tensor_parallel(lane) for lane in LANES],
        "growth": lambda: [bench.growth(lane) for lane in LANES],
        "peers": lambda: [bench.peers(lane) for lane in LANES],
        "others": bench.others,
    }
    for name, part in parts.items():
        if not args.only or name in args.only:
            part()
    print(table(("", "median", ""), bench.rows))
    bench.report.finish(args.json)


if __name__ == "__main__":
    threading.current_thread().name = "benchmark"
    main()
