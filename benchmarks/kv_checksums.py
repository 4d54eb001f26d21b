"""What do checksums by (layer, block) cost a transfer?

One prefill process, and a decode rank for each way of checking; slices of random blocks go to each of them in turn. A
row's ratio is the median over slices that moved one after the other, checked and not.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Report, at_most, parser, table
from benchmarks.kv.paged import NUM_PLANES, Paged
from benchmarks.kv.ranks import FarSide, Side, paged_layout
from kv_transfer.checksums import CHECKSUMS, NONE

MIB = 1 << 20
LANES = ("shm", "tcp")
# CPU seconds a GB that checking may add, both sides together: each of them reads every byte once more.
CEILING = {"crc32": 0.5, "xxh3": 0.2}


def move(far: FarSide, near: Side, name: str, blocks: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Seconds from the request to the end on both sides; CPU seconds of both."""
    src, dst = blocks
    before = near.usage()["cpu_s"] + far.ask(("usage", None))["cpu_s"]
    far.offer([(name, src)])
    began = time.monotonic()
    near.receive([(name, dst)], far.endpoints)
    near.wait(1)
    ended = max(time.monotonic(), far.wait_sent())
    return ended - began, near.usage()["cpu_s"] + far.ask(("usage", None))["cpu_s"] - before


def measure(args: argparse.Namespace, report: Report, lane: str, kib: int) -> list[tuple[object, ...]]:
    paged = Paged(kib << 10, args.pool_mib * MIB, args.packing)
    layout = paged_layout(paged)
    rates: dict[str, list[float]] = {name: [] for name in CHECKSUMS}
    cpu = dict.fromkeys(CHECKSUMS, 0.0)
    moved = 0
    with ExitStack() as stack:
        far = FarSide([layout], lane)
        stack.callback(far.close)
        sides = {name: Side([layout], lane, f"decode {name}", name) for name in CHECKSUMS}
        for side in sides.values():
            stack.callback(side.close)
        numbers = itertools.count()
        rounds = paged.rounds(kib, args.total_mib * MIB, args.slice_mib * MIB)
        for number, slices in zip(range(args.rounds + 1), rounds, strict=False):
            for blocks in slices:
                size = len(blocks[0]) * NUM_PLANES * paged.block_bytes
                for name, side in sides.items():
                    seconds, used = move(far, side, f"t{next(numbers)}", blocks)
                    if number:  # the first round connects, and touches every page for the first time
                        rates[name].append(size / seconds / 1e9)
                        cpu[name] += used
                moved += size if number else 0
    rows = []
    for name in CHECKSUMS:
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates[NONE], strict=True))
        cost = cpu[name] / moved * 1e9
        rate = statistics.median(rates[name])
        rows.append((f"{lane} {kib} KiB", name, f"{rate:.2f}", f"{ratio:.2f}", f"{cost:.2f}"))
        report.runs.append(
            {"lane": lane, "block_kib": kib, "checksum": name, "gb_s": rates[name], "cpu_s_per_gb": round(cost, 4)}
        )
        if name != NONE:
            added = cost - cpu[NONE] / moved * 1e9
            report.targets.append(at_most(f"{lane} {kib} KiB {name}: CPU s/GB on top", added, CEILING[name]))
    return rows


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--pool-mib", type=int, default=256)
    flags.add_argument("--total-mib", type=int, default=128, help="moved in a round, by each way")
    flags.add_argument("--slice-mib", type=int, default=32, help="moved by one transfer")
    flags.add_argument("--rounds", type=int, default=8)
    flags.add_argument("--packing", default="block-major")
    args = flags.parse_args()
    if args.quick:
        args.pool_mib, args.total_mib, args.rounds = 128, 64, 3
    report = Report("kv_checksums", {k: v for k, v in vars(args).items() if k != "json"})
    rows = [row for lane in LANES for kib in (16, 64) for row in measure(args, report, lane, kib)]
    print(table(["lane, block", "checksum", "GB/s", "x unchecked", "CPU s/GB"], rows))
    report.finish(args.json)


if __name__ == "__main__":
    main()
