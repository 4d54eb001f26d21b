"""Which bytes go from a source rank's blocks to a destination rank's blocks. Pure.

Blocks are ``[layer][plane][token]`` rows of KV heads. Where both ranks hold the same heads a block moves whole;
otherwise the same slice of every row moves. A head that several source ranks hold is taken from one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kv_transfer.layout import KVLayout, check_compatible
from kv_transfer.memory import ByteArray

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PairPlan:
    """What one destination rank takes out of each block of one source rank.

    A block is seen as ``num_rows`` rows; ``width`` bytes move of each. Zero width: no bytes, but the pair still
    agrees on the transfer's end, because every source rank must learn when it may free its blocks.
    """

    src_rank: int
    dst_rank: int
    num_rows: int
    width: int
    src_row_bytes: int
    src_offset: int
    dst_row_bytes: int
    dst_offset: int

    @property
    def is_whole_block(self) -> bool:
        return self.num_rows == 1 and self.width == self.src_row_bytes == self.dst_row_bytes

    @property
    def bytes_per_block(self) -> int:
        return self.num_rows * self.width

    def src_rows(self, pool: ByteArray) -> ByteArray:
        """What moves out of a source pool [num_blocks, block_bytes], as a view [num_blocks, num_rows, width]."""
        rows = pool.reshape(pool.shape[0], self.num_rows, self.src_row_bytes)
        return rows[:, :, self.src_offset : self.src_offset + self.width]

    def dst_rows(self, pool: ByteArray) -> ByteArray:
        """Where it goes in a destination pool [num_blocks, block_bytes], as a view [num_blocks, num_rows, width]."""
        rows = pool.reshape(pool.shape[0], self.num_rows, self.dst_row_bytes)
        return rows[:, :, self.dst_offset : self.dst_offset + self.width]


def plan_pair(src: KVLayout, dst: KVLayout) -> PairPlan:
    """The plan between the ranks that the two layouts name.

    Raises:
        LayoutMismatch: their blocks do not mean the same.
    """
    check_compatible(dst, src)
    ranks = src.tp_rank, dst.tp_rank
    heads = _heads_taken(dst.num_kv_heads, src.tp_size, dst.tp_size, dst.tp_rank).get(src.tp_rank)
    if heads is None:
        return PairPlan(*ranks, src.rows_per_block, 0, src.row_bytes, 0, dst.row_bytes, 0)
    first, count = heads
    if count == src.num_rank_heads == dst.num_rank_heads:
        return PairPlan(*ranks, 1, src.block_bytes, src.block_bytes, 0, dst.block_bytes, 0)
    return PairPlan(
        *ranks,
        num_rows=src.rows_per_block,
        width=count * src.head_bytes,
        src_row_bytes=src.row_bytes,
        src_offset=(first - src.first_head) * src.head_bytes,
        dst_row_bytes=dst.row_bytes,
        dst_offset=(first - dst.first_head) * dst.head_bytes,
    )


def source_ranks(num_kv_heads: int, src_tp_size: int, dst_tp_size: int, dst_rank: int) -> list[int]:
    """The source ranks that a destination rank has to do with, in rank order.

    Besides those that it takes bytes from: its share of the ones that nobody takes bytes from.
    """
    taken = set(_heads_taken(num_kv_heads, src_tp_size, dst_tp_size, dst_rank))
    return sorted(
        taken | {r for r in _idle_ranks(num_kv_heads, src_tp_size, dst_tp_size) if r % dst_tp_size == dst_rank}
    )


def destination_ranks(num_kv_heads: int, src_tp_size: int, dst_tp_size: int, src_rank: int) -> list[int]:
    """The destination ranks that have to do with a source rank: those whose ``source_ranks`` name it."""
    return [d for d in range(dst_tp_size) if src_rank in source_ranks(num_kv_heads, src_tp_size, dst_tp_size, d)]


def merge_runs(src_ids: IntArray, dst_ids: IntArray) -> list[tuple[int, int, int]]:
    """Stretches over which both ids rise by one: ``[(first source id, first destination id, number of blocks)]``."""
    if len(src_ids) == 0:
        return []
    breaks = np.flatnonzero((np.diff(src_ids) != 1) | (np.diff(dst_ids) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((starts, [len(src_ids)])))
    return list(zip(src_ids[starts].tolist(), dst_ids[starts].tolist(), counts.tolist(), strict=True))


@lru_cache(maxsize=4096)
def _heads_taken(num_kv_heads: int, src_tp_size: int, dst_tp_size: int, dst_rank: int) -> dict[int, tuple[int, int]]:
    """``{source rank: (first head, number of heads)}`` that a destination rank takes; the heads are neighbours."""
    src_copies = max(1, src_tp_size // num_kv_heads)
    dst_copies = max(1, dst_tp_size // num_kv_heads)
    first = dst_rank * num_kv_heads // dst_tp_size
    count = max(1, num_kv_heads // dst_tp_size)
    # Copies of a head are shared out over the ranks that want it; with equal TP sizes, each takes from its own rank.
    copy = dst_rank % dst_copies * src_copies // dst_copies
    taken: dict[int, tuple[int, int]] = {}
    for head in range(first, first + count):
        rank = head * src_tp_size // num_kv_heads + copy
        start, so_far = taken.get(rank, (head, 0))
        taken[rank] = start, so_far + 1
    return taken


@lru_cache(maxsize=256)
def _idle_ranks(num_kv_heads: int, src_tp_size: int, dst_tp_size: int) -> frozenset[int]:
    busy = {r for d in range(dst_tp_size) for r in _heads_taken(num_kv_heads, src_tp_size, dst_tp_size, d)}
    return frozenset(range(src_tp_size)) - busy
