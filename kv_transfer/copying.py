"""Copies blocks between two pools that are both in this process's address space."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kv_transfer.memory import ByteArray
from kv_transfer.plan import IntArray, PairPlan, merge_runs

# Gathered and scattered at a time: small enough to stay in a core's cache between the two.
PIECE_BYTES = 1 << 20
# Stretches of this length on average are copied one by one.
RUN_BYTES = 32 << 10


class BlockCopier:
    """Carries out one plan; for one thread.

    Small blocks that are not neighbours are gathered into a scratch buffer and scattered from there, two numpy calls a
    piece: a call for each would cost more than its copy, and get the interpreter's lock back each time.
    """

    def __init__(self, plan: PairPlan, src_pool: ByteArray, dst_pool: ByteArray) -> None:
        """Pools are [num_blocks, block_bytes]; ``src_pool`` may be read-only."""
        self._bytes_per_block = plan.bytes_per_block
        src, dst = plan.src_rows(src_pool), plan.dst_rows(dst_pool)
        self._scratch: ByteArray | None = None
        if plan.is_whole_block:
            src, dst = src[:, 0], dst[:, 0]
            self._scratch = np.empty((self._blocks_per_piece, plan.bytes_per_block), np.uint8)
        self._src, self._dst = src, dst

    @property
    def _blocks_per_piece(self) -> int:
        return max(1, PIECE_BYTES // self._bytes_per_block)

    def copy(self, src_ids: IntArray, dst_ids: IntArray, stopped: Callable[[], bool]) -> bool:
        """Copy blocks; ids are [num_blocks] and valid. Whether all were: it ends early once ``stopped`` says so."""
        runs = merge_runs(src_ids, dst_ids)
        num_bytes = len(src_ids) * self._bytes_per_block
        if runs and num_bytes >= RUN_BYTES * len(runs):
            most = max(1, PIECE_BYTES * len(runs) // num_bytes)
            for start in range(0, len(runs), most):
                if stopped():
                    return False
                self._copy_runs(runs[start : start + most])
            return True
        most = self._blocks_per_piece
        for start in range(0, len(src_ids), most):
            if stopped():
                return False
            self._copy_scattered(src_ids[start : start + most], dst_ids[start : start + most])
        return True

    def _copy_runs(self, runs: list[tuple[int, int, int]]) -> None:
        src, dst = self._src, self._dst
        for src_id, dst_id, count in runs:
            if count == 1:
                # A fifth cheaper than a slice of one.
                dst[dst_id] = src[src_id]
            else:
                dst[dst_id : dst_id + count] = src[src_id : src_id + count]

    def _copy_scattered(self, src_ids: IntArray, dst_ids: IntArray) -> None:
        if self._scratch is not None:
            # Not take() on slices of rows: it would first make a contiguous copy of the whole pool.
            piece = self._scratch[: len(src_ids)]
            np.take(self._src, src_ids, axis=0, out=piece, mode="clip")
            self._dst[dst_ids] = piece
        else:
            self._dst[dst_ids] = self._src[src_ids]
