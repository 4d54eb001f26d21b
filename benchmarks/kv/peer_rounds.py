"""What every peer's script does: the rounds of slices, each beside as much memcpy, and the rows of its report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks.kv.memcpy import CopyLoop
from benchmarks.kv.paged import NUM_PLANES, Paged

MIB = 1 << 20
# Rounds of one block size that have not begun by then are left out.
_BUDGET_S = 8.0
# Moves slices: (source offsets, destination offsets, bytes at each).
Mover = Callable[[np.ndarray, np.ndarray, int], None]


class Numbers:
    """The script's arguments: MiB of the pool, of a round and of a slice; rounds; block sizes in KiB."""

    def __init__(self) -> None:
        self.pool_mib, self.total_mib, self.slice_mib, self.rounds, *self.block_kib = (int(a) for a in sys.argv[1:])


def measure(lane: str, numbers: Numbers, move: Mover, src: np.ndarray, dst: np.ndarray) -> None:
    """All block sizes of one lane; prints a row for each.

    Args:
        src: of the other process, or a copy of its bytes: what memcpy reads, and what must have arrived.
        dst: what ``move`` fills.
    """
    copy = CopyLoop()
    for kib in numbers.block_kib:
        paged = Paged(kib << 10, numbers.pool_mib * MIB)
        rates, limits = [], []
        give_up = time.perf_counter() + _BUDGET_S
        rounds = paged.rounds(kib, numbers.total_mib * MIB, numbers.slice_mib * MIB)
        for number, slices in zip(range(numbers.rounds + 1), rounds, strict=False):
            if rates and time.perf_counter() > give_up:
                break
            others = slices[len(slices) // 2 :] + slices[: len(slices) // 2]
            for one, other in zip(slices, others, strict=True):
                src_at, dst_at = paged.offsets(one[0]), paged.offsets(one[1])
                began = time.perf_counter()
                move(src_at, dst_at, paged.block_bytes)
                seconds = time.perf_counter() - began
                for start, end in zip(src_at[:: len(src_at) // 8], dst_at[:: len(dst_at) // 8], strict=True):
                    if not np.array_equal(src[start : start + paged.block_bytes], dst[end : end + paged.block_bytes]):
                        raise RuntimeError("blocks did not arrive as they were sent")
                offsets = paged.offsets(other[0]), paged.offsets(other[1])
                copied_s = copy.seconds(src, dst, offsets, paged.block_bytes)
                if number:
                    size = len(one[0]) * NUM_PLANES * paged.block_bytes
                    rates.append(round(size / seconds / 1e9, 3))
                    limits.append(round(size / copied_s / 1e9, 3))
        row = {"lane": lane, "block_kib": kib, "gb_s": rates, "memcpy_gb_s": limits}
        print("RUN " + json.dumps(row), flush=True)


def pattern(size: int) -> np.ndarray:
    """What the sending pool holds."""
    return np.arange(size // 8, dtype=np.uint64).view(np.uint8)
