"""Where the blocks of one rank's pool lie in memory. Pure.

A pool is one or more regions, each one stretch of memory. In its region, block ``b`` of one (layer, plane) begins at
``offset + b * block_stride``; within the block, tokens and KV heads lie at strides of their own, and what is at one
(token, head) is a contiguous run of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kv_transfer.errors import InvalidLayout

BLOCK, LAYER, PLANE, TOKEN, HEAD = "block", "layer", "plane", "token", "head"
# Axes from the outermost to the innermost; what a layout does not declare as an axis is part of the run.
PACKINGS: Mapping[str, tuple[str, ...]] = {
    "block-major": (BLOCK, LAYER, PLANE, TOKEN, HEAD),
    "block-major-hnd": (BLOCK, LAYER, PLANE, HEAD, TOKEN),
    "layer-major": (LAYER, PLANE, BLOCK, TOKEN, HEAD),
    "layer-major-hnd": (LAYER, PLANE, BLOCK, HEAD, TOKEN),
}
MAX_REGIONS = 2 * 4096
MAX_REGION_BYTES = 2**46


class Base(NamedTuple):
    """Where one (layer, plane) lies: block 0 at ``offset`` of region ``region``, the next one ``block_stride`` on."""

    region: int
    offset: int
    block_stride: int


@dataclass(frozen=True, slots=True)
class Placement:
    """All strides and offsets are in bytes.

    Attributes:
        region_bytes: [num_regions]
        bases: [layers of this rank * kv_planes], by layer, then plane.
        token_stride, head_stride: the same in all layers; 0 where the layout has no such axis.
    """

    region_bytes: tuple[int, ...]
    bases: tuple[Base, ...]
    token_stride: int
    head_stride: int

    @property
    def num_bytes(self) -> int:
        return sum(self.region_bytes)

    def to_list(self) -> list[object]:
        """Plain JSON types; ``from_list`` reads them back."""
        return [list(self.region_bytes), [list(base) for base in self.bases], self.token_stride, self.head_stride]

    @classmethod
    def from_list(cls, data: object) -> Placement:
        """Read what ``to_list`` wrote, from a source that is not trusted; numbers are checked, not their meaning.

        Raises:
            InvalidLayout: it is of another shape, or has numbers that no pool has.
        """
        if not isinstance(data, Sequence) or isinstance(data, str | bytes) or len(data) != 4:
            raise InvalidLayout("placement", f"is {str(data)[:80]!r}: it must be a list of 4")
        regions, bases, token_stride, head_stride = data
        return cls(
            region_bytes=tuple(_numbers(regions, MAX_REGIONS)),
            bases=tuple(Base(*_numbers(base, 3, exactly=True)) for base in _items(bases, MAX_REGIONS)),
            token_stride=_numbers([token_stride], 1)[0],
            head_stride=_numbers([head_stride], 1)[0],
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """Counts that a placement is made for.

    Attributes:
        run_bytes: of each layer: bytes at one (token, head), or of the whole block where there are no such axes.
        num_tokens, num_heads: 1 where there is no such axis.
    """

    num_blocks: int
    num_planes: int
    num_tokens: int
    num_heads: int
    run_bytes: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.run_bytes)


def packed(shape: Shape, order: Sequence[str], *, split: Sequence[str] = ()) -> Placement:
    """Dense packing in the given order of axes, outermost first.

    Args:
        split: of ``layer`` and ``plane``, those that have a region of their own for each index: ``("layer",)`` is one
            tensor a layer, ``("layer", "plane")`` one for K and one for V of each layer. They must come first.
    Raises:
        InvalidLayout: the axes are not those five, or layers of different size lie inside of another axis.
    """
    if sorted(order) != sorted(PACKINGS["block-major"]):
        raise InvalidLayout("packing", f"orders {', '.join(order)}: it must order block, layer, plane, token and head")
    if set(order[: len(split)]) != set(split) or not set(split) <= {LAYER, PLANE}:
        raise InvalidLayout("packing", f"splits {', '.join(split)}: what is split must come first in the order")
    counts = {
        BLOCK: shape.num_blocks,
        LAYER: shape.num_layers,
        PLANE: shape.num_planes,
        TOKEN: shape.num_tokens,
        HEAD: shape.num_heads,
    }
    if len(set(shape.run_bytes)) > 1:
        return _packed_unevenly(shape, order, split)
    strides, size = {}, shape.run_bytes[0]
    for axis in reversed(order[len(split) :]):
        strides[axis] = size
        size *= counts[axis]
    bases = []
    for layer in range(shape.num_layers):
        for plane in range(shape.num_planes):
            index = {LAYER: layer, PLANE: plane}
            region = 0
            for axis in order[: len(split)]:
                region = region * counts[axis] + index[axis]
            offset = sum(index[axis] * strides[axis] for axis in index if axis in strides)
            bases.append(Base(region, offset, strides[BLOCK]))
    num_regions = 1
    for axis in split:
        num_regions *= counts[axis]
    return Placement((size,) * num_regions, tuple(bases), strides[TOKEN], strides[HEAD])


def _packed_unevenly(shape: Shape, order: Sequence[str], split: Sequence[str]) -> Placement:
    """Layers of different sizes: opaque blocks, one plane."""
    sizes, total = shape.run_bytes, sum(shape.run_bytes)
    starts = [sum(sizes[:layer]) for layer in range(len(sizes))]
    if LAYER in split:
        bases = [Base(layer, 0, size) for layer, size in enumerate(sizes)]
        return Placement(tuple(size * shape.num_blocks for size in sizes), tuple(bases), 0, 0)
    if order.index(LAYER) < order.index(BLOCK):
        bases = [Base(0, start * shape.num_blocks, size) for start, size in zip(starts, sizes, strict=True)]
    else:
        bases = [Base(0, start, total) for start in starts]
    return Placement((total * shape.num_blocks,), tuple(bases), 0, 0)


def check_placement(placement: Placement, shape: Shape) -> None:
    """Whether everything lies inside of its region, and no two things of a (layer, plane) in one place.

    Raises:
        InvalidLayout: says which part does not.
    """
    regions = placement.region_bytes
    if not 1 <= len(regions) <= MAX_REGIONS or not all(0 < size <= MAX_REGION_BYTES for size in regions):
        raise InvalidLayout("placement", f"has regions of {str(regions)[:80]} bytes")
    if len(placement.bases) != shape.num_layers * shape.num_planes:
        raise InvalidLayout(
            "placement",
            f"has {len(placement.bases)} bases: it must have one for each of {shape.num_layers} layers "
            f"and {shape.num_planes} planes",
        )
    if len(set(placement.bases)) != len(placement.bases):
        raise InvalidLayout("placement", "has two layers or planes in the same place")
    inner = [(placement.token_stride, shape.num_tokens), (placement.head_stride, shape.num_heads)]
    for index, base in enumerate(placement.bases):
        run = shape.run_bytes[index // shape.num_planes]
        extent = run
        for stride, count in sorted([*inner, (base.block_stride, shape.num_blocks)]):
            if count > 1 and stride < extent:
                raise InvalidLayout("placement", f"has a stride of {stride} bytes over parts of {extent} bytes")
            extent += (count - 1) * stride
        if base.region >= len(regions) or base.offset + extent > regions[base.region]:
            raise InvalidLayout("placement", f"has layer {index // shape.num_planes} reach beyond region {base.region}")


def _items(data: object, limit: int) -> Sequence[object]:
    if not isinstance(data, Sequence) or isinstance(data, str | bytes) or not 1 <= len(data) <= limit:
        raise InvalidLayout("placement", f"has {str(data)[:80]!r} where a list of at most {limit} must be")
    return data


def _numbers(data: object, limit: int, *, exactly: bool = False) -> list[int]:
    numbers = []
    for item in _items(data, limit):
        if type(item) is not int or not 0 <= item <= MAX_REGION_BYTES:
            raise InvalidLayout("placement", f"has {str(item)[:80]!r}: it must be a whole number of bytes")
        numbers.append(item)
    if exactly and len(numbers) != limit:
        raise InvalidLayout("placement", f"has {len(numbers)} numbers where {limit} must be")
    return numbers
