"""Which reads carry the parts of a plan: neighbours merged, one read for what is one stretch at the source. Pure.

A part that is contiguous on both sides, or in runs that are long enough, is read right into the pool. Of one in short
runs, such as some heads of every token, a stretch that encloses many runs is read into staging memory, and the runs are
picked from there: a read for each run would cost more than the bytes in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kv_transfer.plan import IntArray, Part, Side
from kv_transfer.views import DIRECT_RUN_BYTES

# Of a stretch that is read into staging memory, at least so much is wanted.
MIN_DENSITY = 1 / 16
MAX_STRETCH_BYTES = 1 << 20
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Read:
    """One RDMA READ: a stretch of a region of the source's pool, into one or several of a region of ours.

    Attributes:
        source: offset in the source's region.
        pieces: (offset in the local region, bytes), in the order of the source's bytes.
    """

    source: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.pieces)


@dataclass(frozen=True, slots=True)
class PartReads:
    """How one part of a plan is read.

    Attributes:
        is_direct: right into the pool; else into staging memory.
        stretch_bytes: read at a time; a run, or what encloses the runs of the dimensions that are not in ``outer``.
        outer: dimensions of the part of which every index is a stretch of its own.
        pitch: from stretch to stretch in staging memory.
    """

    part: Part
    src_units: int
    dst_units: int
    is_direct: bool
    stretch_bytes: int
    outer: tuple[int, ...]
    pitch: int

    @property
    def staged_unit_bytes(self) -> int:
        """Of staging memory, for one unit."""
        return self.pitch * math.prod(self.part.shape[dim] for dim in self.outer)

    def sources(self, src_ids: IntArray) -> IntArray:
        """Offsets of all stretches in the source's region, by unit, then by the outer dimensions."""
        return _offsets(self.part, self.part.src, src_ids, self.src_units, self.outer)

    def targets(self, dst_ids: IntArray) -> IntArray:
        """Where they go in the pool's region, if direct; in the same order."""
        return _offsets(self.part, self.part.dst, dst_ids, self.dst_units, self.outer)

    def staged(self, num_units: int) -> IntArray:
        """Where they go in a staging slot; in the same order."""
        count = num_units * math.prod(self.part.shape[dim] for dim in self.outer)
        return np.arange(count, dtype=np.int64) * self.pitch

    def staged_strides(self) -> tuple[int, ...]:
        """How the part's bytes lie in a staging slot: stride of a unit, then of each dimension but the last."""
        strides = list(self.part.src.strides)
        step = self.pitch
        for dim in reversed(self.outer):
            strides[dim] = step
            step *= self.part.shape[dim]
        return (self.staged_unit_bytes, *strides)


def reads_of(part: Part, src_units: int, dst_units: int) -> PartReads:
    """The way in which a part is read.

    Args:
        src_units, dst_units: that one block of either side is made of.
    """
    run, dims = part.shape[-1], range(len(part.shape) - 1)
    if part.is_run or run >= DIRECT_RUN_BYTES:
        return PartReads(part, src_units, dst_units, True, run, tuple(dims), run)
    # From the inside out, as long as what lies in between is not too much.
    stretch, wanted, outer = run, run, set(dims)
    for dim in sorted(dims, key=lambda d: part.src.strides[d]):
        count = part.shape[dim]
        longer, more = (count - 1) * part.src.strides[dim] + stretch, wanted * count
        if more < MIN_DENSITY * longer or longer > MAX_STRETCH_BYTES:
            break
        stretch, wanted = longer, more
        outer.discard(dim)
    if stretch == run:
        return PartReads(part, src_units, dst_units, True, run, tuple(dims), run)
    pitch = -(-stretch // _ALIGNMENT) * _ALIGNMENT
    return PartReads(part, src_units, dst_units, False, stretch, tuple(sorted(outer)), pitch)


def merged_reads(
    sources: IntArray, targets: IntArray, stretch_bytes: int, *, max_pieces: int, max_bytes: int
) -> Iterator[Read]:
    """Reads that carry each stretch from its source to its target; in the order of the source's region.

    Args:
        sources, targets: offsets, [num_stretches]; none overlap.
        max_pieces, max_bytes: of one read.
    """
    order = np.argsort(sources, kind="stable")
    sources, targets = sources[order], targets[order]
    # Stretches that are neighbours on both sides; then those are joined that are neighbours at the source.
    breaks = np.flatnonzero((np.diff(sources) != stretch_bytes) | (np.diff(targets) != stretch_bytes)) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((starts, [len(sources)])))
    begin = end = size = 0
    pieces: list[tuple[int, int]] = []
    for first_source, first_target, num_bytes in zip(
        sources[starts].tolist(), targets[starts].tolist(), (counts * stretch_bytes).tolist(), strict=True
    ):
        source, target, left = first_source, first_target, num_bytes
        while left:
            if pieces and (source != end or len(pieces) == max_pieces or size == max_bytes):
                yield Read(begin, tuple(pieces))
                pieces, size = [], 0
            if not pieces:
                begin = source
            taken = min(left, max_bytes - size)
            pieces.append((target, taken))
            size += taken
            source, target, left = source + taken, target + taken, left - taken
            end = source
    if pieces:
        yield Read(begin, tuple(pieces))


def group(reads: Sequence[Read], most: int) -> Iterator[tuple[Read, ...]]:
    """Neighbouring reads, ``most`` at a time."""
    for start in range(0, len(reads), most):
        yield tuple(reads[start : start + most])


def _offsets(part: Part, side: Side, ids: IntArray, units: int, dims: Sequence[int]) -> IntArray:
    blocks, rest = np.divmod(ids, units)
    found: IntArray = side.offset + blocks * side.block_stride + rest * side.unit_stride
    for dim in dims:
        found = np.add.outer(found, np.arange(part.shape[dim], dtype=np.int64) * side.strides[dim])
    return found.reshape(-1)
