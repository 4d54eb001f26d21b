"""Which bytes go from a source rank's blocks to a destination rank's blocks. Pure.

What moves is counted in units: a block where both sides have blocks of one size, else the largest stretch of tokens
that blocks of either side are made of. Units of a pool are numbered through, block by block. A plan holds the parts
that every unit is made of, each one a strided copy, as few and as contiguous as the two placements allow. It depends
on no block id, and is made once for a pair.

The bytes of several units on their way are ordered by part, then unit, then the part's dimensions. Both sides come to
the same plan from the same two layouts, so that a stream needs no description.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kv_transfer.layout import KVLayout, check_compatible, placement_of
from kv_transfer.pairing import Share, share_of
from kv_transfer.placement import Base

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Side:
    """Where one part of the units lies in a pool; offsets and strides are in bytes.

    Attributes:
        region: of the pool.
        offset: of block 0's first unit.
        block_stride, unit_stride: from block to block, and from unit to unit of a block.
        strides: of the part's dimensions but the last.
    """

    region: int
    offset: int
    block_stride: int
    unit_stride: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """The same rectangle of bytes out of every unit.

    Attributes:
        shape: the last dimension is of contiguous bytes on both sides.
    """

    shape: tuple[int, ...]
    src: Side
    dst: Side

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape)

    @property
    def is_run(self) -> bool:
        """Whether it is contiguous on both sides."""
        return len(self.shape) == 1


@dataclass(frozen=True, slots=True)
class PairPlan:
    """What one destination rank takes out of each unit of one source rank.

    Without parts: no bytes, but the pair still agrees on the transfer's end.

    Attributes:
        parts: of each unit, in the order in which they are on their way.
        layers: of each unit, ``(model-wide layer, parts)``: the same bytes, cut at the layers.
        src_units, dst_units: that one block of either side is made of.
        unit_bytes: of each unit, over all parts.
    """

    src_rank: int
    dst_rank: int
    parts: tuple[Part, ...]
    layers: tuple[tuple[int, tuple[Part, ...]], ...]
    src_units: int
    dst_units: int
    unit_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit_bytes", sum(part.num_bytes for part in self.parts))

    @property
    def is_empty(self) -> bool:
        return not self.parts


@lru_cache(maxsize=512)
def plan_pair(src: KVLayout, dst: KVLayout) -> PairPlan:
    """The plan between the ranks that the two layouts name.

    Raises:
        LayoutMismatch: their blocks do not mean the same.
    """
    check_compatible(dst, src)
    share = share_of(src, dst)
    unit_tokens = math.gcd(src.block_size, dst.block_size)
    src_units, dst_units = src.block_size // unit_tokens, dst.block_size // unit_tokens
    if share is None:
        return PairPlan(src.rank, dst.rank, (), (), src_units, dst_units)
    layers = _layers(src, dst, share, unit_tokens)
    return PairPlan(
        src_rank=src.rank,
        dst_rank=dst.rank,
        parts=_fold_layers([part for _, parts in layers for part in parts], len(layers)),
        layers=tuple((layer, tuple(_coalesce(part) for part in parts)) for layer, parts in layers),
        src_units=src_units,
        dst_units=dst_units,
    )


def hold_the_same(num_blocks: int, block_size: int, other_num_blocks: int, other_block_size: int) -> bool:
    """Whether some number of tokens needs just so many blocks of one size, and so many of another."""
    least, most = (num_blocks - 1) * block_size, num_blocks * block_size
    return least < other_num_blocks * other_block_size and (other_num_blocks - 1) * other_block_size < most


def units_of(block_ids: IntArray, units_per_block: int) -> IntArray:
    """Numbers of the units that blocks are made of, in order; what is negative stays so."""
    if units_per_block == 1:
        return block_ids
    return (block_ids[:, None] * units_per_block + np.arange(units_per_block)).reshape(-1)


def merge_runs(src_ids: IntArray, dst_ids: IntArray) -> list[tuple[int, int, int]]:
    """Stretches over which both ids rise by one: ``[(first source id, first destination id, number of blocks)]``."""
    if len(src_ids) < 2:
        return [(int(src), int(dst), 1) for src, dst in zip(src_ids, dst_ids, strict=True)]
    breaks = np.flatnonzero((np.diff(src_ids) != 1) | (np.diff(dst_ids) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((starts, [len(src_ids)])))
    return list(zip(src_ids[starts].tolist(), dst_ids[starts].tolist(), counts.tolist(), strict=True))


def _layers(src: KVLayout, dst: KVLayout, share: Share, unit_tokens: int) -> list[tuple[int, list[Part]]]:
    """By layer: the planes' parts, or one part for both where it can be."""
    src_place, dst_place = placement_of(src), placement_of(dst)
    dims = []
    if src.has_token_axis:
        dims.append((unit_tokens, src_place.token_stride, dst_place.token_stride))
    if src.has_head_axis:
        dims.append((share.num_heads, src_place.head_stride, dst_place.head_stride))
    skipped = (share.first_head - src.first_head) * src_place.head_stride if src.has_head_axis else 0
    left_out = (share.first_head - dst.first_head) * dst_place.head_stride if dst.has_head_axis else 0
    planes, found = src.kv_planes, []
    for layer in range(share.first_layer, share.first_layer + share.num_layers):
        at_src, at_dst = layer - src.first_layer, layer - dst.first_layer
        run = src.shape.run_bytes[at_src]
        parts = []
        for src_base, dst_base in zip(
            src_place.bases[at_src * planes : (at_src + 1) * planes],
            dst_place.bases[at_dst * planes : (at_dst + 1) * planes],
            strict=True,
        ):
            parts.append(
                Part(
                    shape=(*(count for count, _, _ in dims), run),
                    src=_side(src_base, skipped, unit_tokens * src_place.token_stride, [s for _, s, _ in dims]),
                    dst=_side(dst_base, left_out, unit_tokens * dst_place.token_stride, [d for _, _, d in dims]),
                )
            )
        found.append((layer, _fold(parts)))
    return found


def _side(base: Base, moved: int, unit_stride: int, strides: Iterable[int]) -> Side:
    return Side(base.region, base.offset + moved, base.block_stride, unit_stride, tuple(strides))


def _fold_layers(parts: list[Part], num_layers: int) -> tuple[Part, ...]:
    """Parts of all layers as one part where they are evenly spaced; K and V each by itself, if need be."""
    per_layer, rest = divmod(len(parts), num_layers)
    if rest:
        return tuple(_coalesce(part) for part in parts)
    folded = [_fold(parts[plane::per_layer]) for plane in range(per_layer)]
    if all(len(found) == 1 for found in folded):
        return tuple(_coalesce(found[0]) for found in folded)
    return tuple(_coalesce(part) for part in parts)


def _fold(parts: list[Part]) -> list[Part]:
    """Parts of one shape at even distances on either side, as one part with one dimension more; else as they are."""
    first = parts[0]
    if len(parts) == 1:
        return parts
    for part in parts[1:]:
        if part.shape != first.shape or not _is_shifted(part.src, first.src) or not _is_shifted(part.dst, first.dst):
            return parts
    distances = []
    for offsets in ([part.src.offset for part in parts], [part.dst.offset for part in parts]):
        found = {later - earlier for earlier, later in pairwise(offsets)}
        if len(found) != 1 or min(found) <= 0:
            return parts
        distances.append(found.pop())
    src, dst = (
        Side(side.region, side.offset, side.block_stride, side.unit_stride, (distance, *side.strides))
        for side, distance in zip((first.src, first.dst), distances, strict=True)
    )
    return [Part((len(parts), *first.shape), src, dst)]


def _is_shifted(side: Side, other: Side) -> bool:
    """Whether two differ in nothing but their offset."""
    return (side.region, side.block_stride, side.unit_stride, side.strides) == (
        other.region,
        other.block_stride,
        other.unit_stride,
        other.strides,
    )


def _coalesce(part: Part) -> Part:
    """The same bytes with as few dimensions as can be, the destination's largest stride first."""
    *counts, run = part.shape
    dims = sorted(zip(part.dst.strides, part.src.strides, counts, strict=True), reverse=True)
    merged: list[tuple[int, int, int]] = [(1, 1, run)]
    for dst_stride, src_stride, count in reversed(dims):
        inner_dst, inner_src, inner_count = merged[-1]
        if count == 1:
            continue
        if (dst_stride, src_stride) == (inner_count * inner_dst, inner_count * inner_src):
            merged[-1] = inner_dst, inner_src, inner_count * count
        else:
            merged.append((dst_stride, src_stride, count))
    merged.reverse()
    return Part(
        shape=tuple(count for _, _, count in merged),
        src=_with_strides(part.src, [src for _, src, _ in merged[:-1]]),
        dst=_with_strides(part.dst, [dst for dst, _, _ in merged[:-1]]),
    )


def _with_strides(side: Side, strides: Sequence[int]) -> Side:
    return Side(side.region, side.offset, side.block_stride, side.unit_stride, tuple(strides))
