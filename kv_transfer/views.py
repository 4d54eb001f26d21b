"""One side of a plan on one pool: where the bytes of units are, for whoever copies, sends or receives them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kv_transfer.plan import IntArray, PairPlan, Part, Side

ByteArray = npt.NDArray[np.uint8]
AnyArray = npt.NDArray[np.generic]
# Addresses and lengths of stretches of memory, as the C library wants them; [num_stretches, 2].
Iovecs = npt.NDArray[np.uint64]

# Contiguous runs from this length on are sent and received where they lie; shorter ones are packed first.
DIRECT_RUN_BYTES = 2048
# Units of which a part has this many bytes are copied one by one: cheaper than a temporary array of them all.
_SINGLE_BYTES = 8 << 10


def has_long_runs(parts: Sequence[Part]) -> bool:
    return all(part.shape[-1] >= DIRECT_RUN_BYTES for part in parts)


class BlockView(ABC):
    """Ids are of units, [num_units], and valid. Methods belong to one thread.

    Attributes:
        unit_bytes: of each unit, over all parts.
    """

    def __init__(self, plan: PairPlan) -> None:
        self.unit_bytes = plan.unit_bytes

    @abstractmethod
    def gather(self, ids: IntArray, out: ByteArray | None = None) -> ByteArray:
        """The units' bytes as they are on their way, packed into ``out`` or a new array; [num_units * unit_bytes]."""

    @abstractmethod
    def scatter(self, ids: IntArray, data: ByteArray) -> None:
        """Put what ``gather`` has packed on the other side where it belongs. It is there when this returns."""


class HostView(BlockView):
    """Of a pool that this process can address.

    Attributes:
        is_direct: whether ``iovecs`` is worth its while.
    """

    def __init__(self, plan: PairPlan, side: str, num_blocks: int, regions: Sequence[ByteArray]) -> None:
        """
        Args:
            side: "src" or "dst": which one of the plan the pool is.
            regions: as in its placement; those of a source may be read-only.
        """
        super().__init__(plan)
        self.is_direct = has_long_runs(plan.parts)
        units = plan.src_units if side == "src" else plan.dst_units
        self.parts = [
            PartView(part, part.src if side == "src" else part.dst, num_blocks, units, regions) for part in plan.parts
        ]

    def iovecs(self, ids: IntArray) -> Iovecs:
        """The units' bytes as they are on their way, where they lie in the pool; none of them empty.

        Good as long as the view is.
        """
        found = [part.iovecs(ids) for part in self.parts]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def gather(self, ids: IntArray, out: ByteArray | None = None) -> ByteArray:
        if out is None:
            out = np.empty(len(ids) * self.unit_bytes, np.uint8)
        for view, packed in self._packed(ids, out):
            view.read(ids, packed)
        return out

    def scatter(self, ids: IntArray, data: ByteArray) -> None:
        for view, packed in self._packed(ids, data):
            view.write(ids, packed)

    def _packed(self, ids: IntArray, data: ByteArray) -> list[tuple[PartView, AnyArray]]:
        """Each part of the pool, and the stretch of ``data`` that has it."""
        found, start = [], 0
        for view in self.parts:
            end = start + len(ids) * view.part.num_bytes
            found.append((view, view.as_packed(data[start:end], len(ids))))
            start = end
        return found


class PartView:
    """One part of all units of a pool.

    Attributes:
        array: [num_units, ...], of words; [num_blocks, units of a block, ...] where units are not evenly spaced.
        is_flat: which of the two.
    """

    def __init__(
        self, part: Part, side: Side, num_blocks: int, units_per_block: int, regions: Sequence[ByteArray]
    ) -> None:
        self.part = part
        self.is_flat = units_per_block == 1 or side.block_stride == units_per_block * side.unit_stride
        self._side, self._units = side, units_per_block
        self._region = regions[side.region]
        self._bytes = self._region.data
        self._unit_stride = side.unit_stride if units_per_block > 1 else side.block_stride
        # Copied as words where both sides allow, so that the dimensions of either are the same.
        numbers = [part.shape[-1]]
        for one in (part.src, part.dst):
            numbers += [one.offset, one.block_stride, one.unit_stride, *one.strides]
        self._word = np.dtype(np.uint64) if not any(number % 8 for number in numbers) else np.dtype(np.uint8)
        *counts, run = part.shape
        self._shape = (*counts, run // self._word.itemsize)
        units = (num_blocks * units_per_block,) if self.is_flat else (num_blocks, units_per_block)
        unit_strides = (self._unit_stride,) if self.is_flat else (side.block_stride, side.unit_stride)
        self.array: AnyArray = np.ndarray(
            (*units, *self._shape),
            self._word,
            self._region.data,
            side.offset,
            (*unit_strides, *side.strides, self._word.itemsize),
        )

    @property
    def is_big(self) -> bool:
        """Whether a unit has so much of it that units are best copied one by one."""
        return self.part.num_bytes >= _SINGLE_BYTES

    def places(self, ids: IntArray) -> list[Any]:
        """Where units are in ``array``, one by one."""
        if self.is_flat:
            return list(ids.tolist())
        return list(zip(*(index.tolist() for index in np.divmod(ids, self._units)), strict=True))

    def as_packed(self, data: ByteArray, num_units: int) -> AnyArray:
        """Packed bytes in the shape of ``array``; [num_units, ...], no copy."""
        if data.ctypes.data % self._word.itemsize:
            packed: AnyArray = np.ndarray((num_units, *self._shape), self._word, data.data)
            return packed
        return data.view(self._word).reshape(num_units, *self._shape)

    def read(self, ids: IntArray, packed: AnyArray) -> None:
        """Copy units out."""
        if self.is_big:
            for index, place in enumerate(self.places(ids)):
                packed[index] = self.array[place]
        elif not self.is_flat:
            packed[...] = self.array[ids // self._units, ids % self._units]
        elif self.array.flags.c_contiguous:
            # Of anything else, take() would first make a contiguous copy of the whole pool.
            np.take(self.array, ids, axis=0, out=packed, mode="clip")
        else:
            packed[...] = self.array[ids]

    def write(self, ids: IntArray, packed: AnyArray) -> None:
        """Copy units in."""
        if self.is_big:
            for index, place in enumerate(self.places(ids)):
                self.array[place] = packed[index]
        elif not self.is_flat:
            self.array[ids // self._units, ids % self._units] = packed
        else:
            self.array[ids] = packed

    def iovecs(self, ids: IntArray) -> Iovecs:
        """Contiguous stretches, those that touch as one; in the order of units, then of the part's dimensions."""
        return stretches(self._starts(ids) + self._region.ctypes.data, self.part.shape, self._side.strides)

    def runs(self, ids: IntArray) -> Iterator[list[memoryview]]:
        """Run by run, in the order of the part's dimensions: the stretch that each unit has of it."""
        starts = self._run_starts(ids).reshape(len(ids), -1)
        run, data = self.part.shape[-1], self._bytes
        for column in range(starts.shape[1]):
            yield [data[start : start + run] for start in starts[:, column].tolist()]

    def _run_starts(self, ids: IntArray) -> IntArray:
        """Where each run of each unit begins; [num_units, ...]."""
        return _run_starts(self._starts(ids), self.part.shape, self._side.strides)

    def _starts(self, ids: IntArray) -> IntArray:
        """Where the part begins in each unit."""
        side = self._side
        if self.is_flat:
            return side.offset + ids * self._unit_stride
        blocks, units = np.divmod(ids, self._units)
        starts: IntArray = side.offset + blocks * side.block_stride + units * side.unit_stride
        return starts


def stretches(starts: IntArray, shape: Sequence[int], strides: Sequence[int]) -> Iovecs:
    """Contiguous stretches of parts that begin at ``starts``, those that touch as one; see ``Part`` for the rest."""
    starts, run = _run_starts(starts, shape, strides).reshape(-1), shape[-1]
    if not len(starts):
        return np.empty((0, 2), np.uint64)
    # Where one ends and the next one does not touch it.
    breaks = np.flatnonzero(starts[1:] - starts[:-1] != run)
    found = np.empty((len(breaks) + 1, 2), np.uint64)
    found[0, 0] = starts[0]
    found[1:, 0] = starts[breaks + 1]
    found[:-1, 1] = starts[breaks] + run
    found[-1, 1] = starts[-1] + run
    found[:, 1] -= found[:, 0]
    return found


def _run_starts(starts: IntArray, shape: Sequence[int], strides: Sequence[int]) -> IntArray:
    for count, stride in zip(shape[:-1], strides, strict=True):
        starts = np.add.outer(starts, np.arange(count, dtype=np.int64) * stride)
    return starts
