"""Copies blocks between two pools that this process can reach."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kv_transfer.plan import IntArray, merge_runs
from kv_transfer.views import AnyArray, BlockView, HostView, PartView

# Gathered and scattered at a time: small enough to stay in a core's cache between the two.
PIECE_BYTES = 1 << 20
# Stretches of this length on average are copied one by one.
RUN_BYTES = 32 << 10

Stopped = Callable[[], bool]


class BlockCopier:
    """Carries out one plan; for one thread.

    Small parts of units that are not neighbours are gathered into a scratch buffer and scattered from there, two numpy
    calls a piece: a call for each would cost more than its copy, and get the interpreter's lock back each time.
    """

    def __init__(self, src: BlockView, dst: BlockView) -> None:
        """Both are of one plan."""
        self._src, self._dst = src, dst
        self._pairs: list[tuple[PartView, PartView]] | None = None
        if isinstance(src, HostView) and isinstance(dst, HostView):
            self._pairs = list(zip(src.parts, dst.parts, strict=True))
        self._scratch = np.empty(max(PIECE_BYTES, src.unit_bytes), np.uint8)

    def copy(self, src_ids: IntArray, dst_ids: IntArray, stopped: Stopped) -> bool:
        """Copy units; ids are [num_units] and valid. Whether all were: it ends early once ``stopped`` says so."""
        if self._pairs is None:
            return self._copy_through_scratch(src_ids, dst_ids, stopped)
        runs = merge_runs(src_ids, dst_ids)
        return all(self._copy_part(pair, (src_ids, dst_ids), runs, stopped) for pair in self._pairs)

    def _copy_through_scratch(self, src_ids: IntArray, dst_ids: IntArray, stopped: Stopped) -> bool:
        size = self._src.unit_bytes
        most = max(1, PIECE_BYTES // size)
        for start in range(0, len(src_ids), most):
            if stopped():
                return False
            piece = slice(start, start + most)
            packed = self._src.gather(src_ids[piece], self._scratch[: len(src_ids[piece]) * size])
            self._dst.scatter(dst_ids[piece], packed)
        return True

    def _copy_part(
        self,
        pair: tuple[PartView, PartView],
        ids: tuple[IntArray, IntArray],
        runs: list[tuple[int, int, int]],
        stopped: Stopped,
    ) -> bool:
        (src, dst), (src_ids, dst_ids) = pair, ids
        size = src.part.num_bytes
        if runs and len(src_ids) * size >= RUN_BYTES * len(runs) and src.is_flat and dst.is_flat:
            most = max(1, PIECE_BYTES * len(runs) // (len(src_ids) * size))
            for start in range(0, len(runs), most):
                if stopped():
                    return False
                _copy_runs(src.array, dst.array, runs[start : start + most])
            return True
        most = max(1, PIECE_BYTES // size)
        for start in range(0, len(src_ids), most):
            if stopped():
                return False
            piece = slice(start, start + most)
            if src.is_big:
                for src_place, dst_place in zip(src.places(src_ids[piece]), dst.places(dst_ids[piece]), strict=True):
                    dst.array[dst_place] = src.array[src_place]
                continue
            count = len(src_ids[piece])
            packed = src.as_packed(self._scratch[: count * size], count)
            src.read(src_ids[piece], packed)
            dst.write(dst_ids[piece], packed)
        return True


def _copy_runs(src: AnyArray, dst: AnyArray, runs: list[tuple[int, int, int]]) -> None:
    for src_id, dst_id, count in runs:
        if count == 1:
            # A fifth cheaper than a slice of one.
            dst[dst_id] = src[src_id]
        else:
            dst[dst_id : dst_id + count] = src[src_id : src_id + count]
