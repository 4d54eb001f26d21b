"""Which ranks of two instances have to do with each other, and which layers and heads go between them. Pure.

A head that several source ranks hold is taken from one of them. A rank is named by its number among all of its
instance's, stage by stage.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from kv_transfer.layout import KVLayout


class Grid(NamedTuple):
    """How an instance's ranks share the model out."""

    num_kv_heads: int
    tp_size: int
    stage_layers: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        return self.tp_size * len(self.stage_layers)


class Share(NamedTuple):
    """What one rank takes from another: neighbouring layers and heads, numbered as in the whole model."""

    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int


def grid_of(layout: KVLayout) -> Grid:
    return Grid(layout.num_kv_heads, layout.tp_size, layout.pp_layers or (layout.num_layers,))


def share_of(src: KVLayout, dst: KVLayout) -> Share | None:
    """What the destination rank takes from the source rank; None for nothing."""
    return _shares(grid_of(src), grid_of(dst), dst.rank).get(src.rank)


def source_ranks(src: KVLayout, dst: KVLayout) -> list[int]:
    """The ranks of the source instance that a destination rank has to do with, in order.

    Besides those that it takes bytes from: its share of the ones that nobody takes bytes from, since every rank must
    learn when it may free its blocks.

    Args:
        src: of any rank of the source instance.
    """
    return list(_source_ranks(grid_of(src), grid_of(dst), dst.rank))


def destination_ranks(src: KVLayout, dst: KVLayout) -> frozenset[int]:
    """The ranks of the destination instance that have to do with a source rank: those whose ``source_ranks`` name it.

    Args:
        dst: of any rank of the destination instance.
    """
    return _destination_ranks(grid_of(src), grid_of(dst), src.rank)


@lru_cache(maxsize=4096)
def _source_ranks(src: Grid, dst: Grid, dst_rank: int) -> tuple[int, ...]:
    idle = {rank for rank in _idle_ranks(src, dst) if rank % dst.num_ranks == dst_rank}
    return tuple(sorted(idle | set(_shares(src, dst, dst_rank))))


@lru_cache(maxsize=4096)
def _destination_ranks(src: Grid, dst: Grid, src_rank: int) -> frozenset[int]:
    return frozenset(rank for rank in range(dst.num_ranks) if src_rank in _source_ranks(src, dst, rank))


@lru_cache(maxsize=4096)
def _shares(src: Grid, dst: Grid, dst_rank: int) -> dict[int, Share]:
    """By source rank."""
    stage, tp_rank = divmod(dst_rank, dst.tp_size)
    starts = [0, *accumulate(dst.stage_layers)]
    heads = _heads_taken(src.num_kv_heads, src.tp_size, dst.tp_size, tp_rank)
    shares, end = {}, 0
    for src_stage, num_layers in enumerate(src.stage_layers):
        start, end = end, end + num_layers
        first, last = max(start, starts[stage]), min(end, starts[stage + 1])
        if first < last:
            for src_tp_rank, (first_head, num_heads) in heads.items():
                rank = src_stage * src.tp_size + src_tp_rank
                shares[rank] = Share(first, last - first, first_head, num_heads)
    return shares


def _heads_taken(num_kv_heads: int, src_tp_size: int, dst_tp_size: int, dst_rank: int) -> dict[int, tuple[int, int]]:
    """``{source TP rank: (first head, number of heads)}`` that a destination TP rank takes."""
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
def _idle_ranks(src: Grid, dst: Grid) -> frozenset[int]:
    busy = {rank for dst_rank in range(dst.num_ranks) for rank in _shares(src, dst, dst_rank)}
    return frozenset(range(src.num_ranks)) - busy
