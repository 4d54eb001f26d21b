"""Which reads or writes carry the parts of a plan: neighbours merged, one for what is one stretch at the peer. Pure.

A part that is contiguous on both sides, or in runs that are long enough, goes right into the pool. Of one in short
runs, such as some heads of every token, a stretch that encloses many runs goes into staging memory of the destination,
and the runs are picked from there: an operation for each run would cost more than the bytes in between.

Both ends of a pair come to the same answer, which is part of the handshake's version (see ``wire``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from kv_transfer.plan import IntArray, Part, Side
from kv_transfer.views import DIRECT_RUN_BYTES

# Of a stretch that goes into staging memory, at least so much is wanted.
MIN_DENSITY = 1 / 16
MAX_STRETCH_BYTES = 1 << 20
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Operation:
    """One RDMA READ or WRITE: one stretch of a region of the peer's, and one or several of a region of ours.

    Attributes:
        remote: offset in the peer's region.
        pieces: (offset in the local region, bytes), in the order of the remote bytes.
    """

    remote: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.pieces)


@dataclass(frozen=True, slots=True)
class PartMoves:
    """How one part of a plan moves.

    Attributes:
        is_direct: right into the pool; else into staging memory of the destination.
        stretch_bytes: moved at a time; a run, or what encloses the runs of the dimensions that are not in ``outer``.
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


def moves_of(part: Part, src_units: int, dst_units: int) -> PartMoves:
    """The way in which a part moves.

    Args:
        src_units, dst_units: that one block of either side is made of.
    """
    run, dims = part.shape[-1], range(len(part.shape) - 1)
    if part.is_run or run >= DIRECT_RUN_BYTES:
        return PartMoves(part, src_units, dst_units, True, run, tuple(dims), run)
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
        return PartMoves(part, src_units, dst_units, True, run, tuple(dims), run)
    pitch = -(-stretch // _ALIGNMENT) * _ALIGNMENT
    return PartMoves(part, src_units, dst_units, False, stretch, tuple(sorted(outer)), pitch)


def merged_operations(
    remote_offsets: IntArray, local_offsets: IntArray, stretch_bytes: int, *, max_pieces: int, max_bytes: int
) -> Iterator[Operation]:
    """Operations between each remote stretch and its local one; in the order of the peer's region.

    Args:
        remote_offsets, local_offsets: offsets, [num_stretches]; none overlap.
        max_pieces, max_bytes: of one operation.
    """
    order = np.argsort(remote_offsets, kind="stable")
    remote_offsets, local_offsets = remote_offsets[order], local_offsets[order]
    # Stretches that are neighbours on both sides; then those are joined that are neighbours at the peer.
    breaks = np.flatnonzero((np.diff(remote_offsets) != stretch_bytes) | (np.diff(local_offsets) != stretch_bytes)) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((starts, [len(remote_offsets)])))
    begin = end = size = 0
    pieces: list[tuple[int, int]] = []
    for first_remote, first_local, num_bytes in zip(
        remote_offsets[starts].tolist(), local_offsets[starts].tolist(), (counts * stretch_bytes).tolist(), strict=True
    ):
        remote, local, left = first_remote, first_local, num_bytes
        while left:
            if pieces and (remote != end or len(pieces) == max_pieces or size == max_bytes):
                yield Operation(begin, tuple(pieces))
                pieces, size = [], 0
            if not pieces:
                begin = remote
            taken = min(left, max_bytes - size)
            pieces.append((local, taken))
            size += taken
            remote, local, left = remote + taken, local + taken, left - taken
            end = remote
    if pieces:
        yield Operation(begin, tuple(pieces))


def group(operations: Iterable[Operation], most: int) -> Iterator[tuple[Operation, ...]]:
    """Neighbouring operations, ``most`` at a time."""
    rest = iter(operations)
    while some := tuple(islice(rest, most)):
        yield some


def _offsets(part: Part, side: Side, ids: IntArray, units: int, dims: Sequence[int]) -> IntArray:
    blocks, rest = np.divmod(ids, units)
    found: IntArray = side.offset + blocks * side.block_stride + rest * side.unit_stride
    for dim in dims:
        found = np.add.outer(found, np.arange(part.shape[dim], dtype=np.int64) * side.strides[dim])
    return found.reshape(-1)
