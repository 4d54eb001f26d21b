"""From a plan and two mapped pools to the addresses that the copy kernel works on. Pure numpy.

A *family* is all the contiguous runs of a unit that have one length and lie in blocks of one stride on either side. A
regular pool has one family; its runs may be one (blocks that move whole), one for each layer and plane (tensors of
their own), or one for each row of heads (unequal TP). The addresses of unit 0's runs are worked out once for a link;
for a copy only a distance for each unit is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kv_transfer.plan import IntArray, PairPlan, Part, Side
from kv_transfer.transports.cuda_ipc.kernel import MAX_WORDS, WORD_TYPES

AddressArray = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class UnitStep:
    """How far a unit is from unit 0, on one side.

    Attributes:
        units_per_block: of this side's pool.
        block_stride, unit_stride: bytes from block to block, and from unit to unit of a block.
    """

    units_per_block: int
    block_stride: int
    unit_stride: int

    def offsets(self, ids: IntArray) -> IntArray:
        """Bytes from unit 0; [num_units]."""
        blocks, units = (ids, 0) if self.units_per_block == 1 else np.divmod(ids, self.units_per_block)
        found: IntArray = blocks * self.block_stride + units * self.unit_stride
        return found


@dataclass(frozen=True, slots=True)
class Family:
    """Runs of every unit that are copied together.

    Attributes:
        run_bytes: of each run.
        word_bytes: widest access that every address of it allows.
        src, dst: [num_runs], addresses of unit 0's runs.
    """

    run_bytes: int
    word_bytes: int
    src: AddressArray
    dst: AddressArray
    src_step: UnitStep
    dst_step: UnitStep

    @property
    def num_runs(self) -> int:
        return len(self.src)

    @property
    def run_words(self) -> int:
        return self.run_bytes // self.word_bytes

    @property
    def unit_bytes(self) -> int:
        return self.num_runs * self.run_bytes

    @property
    def units_per_launch(self) -> int:
        """At most; the kernel counts words in 31 bits. At least one: see ``families``."""
        return MAX_WORDS // (self.num_runs * self.run_words)


def families(
    parts: Iterable[Part], plan: PairPlan, src_bases: Sequence[int], dst_bases: Sequence[int]
) -> tuple[Family, ...]:
    """The families of some parts of a plan.

    Args:
        src_bases, dst_bases: addresses of the pools' regions.
    """
    return _gather(
        (
            part.shape[-1],
            (_runs(part, part.src, src_bases), _step(part.src, plan.src_units)),
            (_runs(part, part.dst, dst_bases), _step(part.dst, plan.dst_units)),
        )
        for part in parts
    )


@dataclass(frozen=True, slots=True)
class Packing:
    """One side of a plan on one pool, to be packed into a buffer, or unpacked out of one.

    Attributes:
        side: "src" or "dst": which one of the plan the pool is.
        bases: addresses of the pool's regions.
        is_out: whether units go out of the pool.
    """

    plan: PairPlan
    side: str
    bases: tuple[int, ...]
    is_out: bool

    def families(self, parts: Sequence[Part], packed: int) -> tuple[Family, ...]:
        """For some parts of units, which lie in the buffer at the address ``packed``, unit after unit."""
        step = UnitStep(1, *(2 * (sum(part.num_bytes for part in parts),)))
        units = self.plan.src_units if self.side == "src" else self.plan.dst_units
        found: list[tuple[int, End, End]] = []
        start = packed
        for part in parts:
            at = part.src if self.side == "src" else part.dst
            pool = _runs(part, at, self.bases), _step(at, units)
            run = part.shape[-1]
            buffer = np.arange(start, start + part.num_bytes, run, dtype=np.uint64), step
            found.append((run, pool, buffer) if self.is_out else (run, buffer, pool))
            start += part.num_bytes
        return _gather(found)

    def by_part(self, packed: int) -> tuple[Family, ...]:
        """One family for each part of the plan: for the order in which units are on their way, part after part.

        Each part's units follow one another from the address ``packed`` on; the caller adds where the part begins.
        """
        return tuple(_only(self.families([part], packed)) for part in self.plan.parts)


def _only(found: tuple[Family, ...]) -> Family:
    (family,) = found
    return family


End = tuple[AddressArray, UnitStep]


def _gather(runs: Iterable[tuple[int, End, End]]) -> tuple[Family, ...]:
    """Runs by their length and steps."""
    found: dict[tuple[int, UnitStep, UnitStep], list[tuple[AddressArray, AddressArray]]] = {}
    for run_bytes, (src, src_step), (dst, dst_step) in runs:
        found.setdefault((run_bytes, src_step, dst_step), []).append((src, dst))
    made = []
    for (run_bytes, src_step, dst_step), addresses in found.items():
        src, dst = (np.concatenate([pair[side] for pair in addresses]) for side in (0, 1))
        word_bytes = _word_bytes(run_bytes, src, dst, src_step, dst_step)
        # A unit of more words than the kernel counts is cut into families that it can.
        most = max(1, MAX_WORDS // (run_bytes // word_bytes))
        for first in range(0, len(src), most):
            piece = slice(first, first + most)
            made.append(Family(run_bytes, word_bytes, src[piece], dst[piece], src_step, dst_step))
    return tuple(made)


@dataclass(frozen=True, slots=True)
class Stretches:
    """Contiguous stretches of memory, for one copy each; all [num_stretches]."""

    src: IntArray
    dst: IntArray
    num_bytes: IntArray


def stretches(family: Family, src_ids: IntArray, dst_ids: IntArray) -> Stretches:
    """What a copy of units takes, with neighbours that touch on both sides as one."""
    src = np.add.outer(family.src_step.offsets(src_ids), family.src.astype(np.int64)).reshape(-1)
    dst = np.add.outer(family.dst_step.offsets(dst_ids), family.dst.astype(np.int64)).reshape(-1)
    run = family.run_bytes
    breaks = np.flatnonzero((np.diff(src) != run) | (np.diff(dst) != run)) + 1
    firsts = np.concatenate((np.zeros(min(1, len(src)), np.int64), breaks))
    counts = np.diff(np.concatenate((firsts, [len(src)])))
    return Stretches(src[firsts], dst[firsts], counts * run)


def mean_stretch_bytes(family: Family, src_ids: IntArray, dst_ids: IntArray) -> float:
    """Mean length of ``stretches``, without working them out where runs do not touch within a unit."""
    if not len(src_ids):
        return 0.0
    if family.num_runs > 1:
        return float(family.run_bytes)
    src, dst = family.src_step.offsets(src_ids), family.dst_step.offsets(dst_ids)
    breaks = np.count_nonzero((np.diff(src) != family.run_bytes) | (np.diff(dst) != family.run_bytes))
    return len(src_ids) * family.run_bytes / (int(breaks) + 1)


def _step(side: Side, units_per_block: int) -> UnitStep:
    if units_per_block == 1:
        return UnitStep(1, side.block_stride, side.block_stride)
    return UnitStep(units_per_block, side.block_stride, side.unit_stride)


def _runs(part: Part, side: Side, bases: Sequence[int]) -> AddressArray:
    """Addresses of unit 0's runs, in the order of the part's dimensions."""
    offsets = np.zeros(1, np.uint64)
    for count, stride in zip(part.shape[:-1], side.strides, strict=True):
        offsets = np.add.outer(offsets, np.arange(count, dtype=np.uint64) * np.uint64(stride)).reshape(-1)
    found: AddressArray = offsets + np.uint64(bases[side.region] + side.offset)
    return found


def _word_bytes(run_bytes: int, src: AddressArray, dst: AddressArray, src_step: UnitStep, dst_step: UnitStep) -> int:
    numbers = [run_bytes, src_step.block_stride, src_step.unit_stride, dst_step.block_stride, dst_step.unit_stride]
    common = math.gcd(*numbers, int(np.bitwise_or.reduce(src)), int(np.bitwise_or.reduce(dst)))
    return next(size for size in sorted(WORD_TYPES, reverse=True) if common % size == 0)
