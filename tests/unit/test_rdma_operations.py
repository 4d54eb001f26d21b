"""Reads and writes carry just the bytes that a plan moves, whatever the layouts; carried out here by plain copies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import KVLayout
from kv_transfer.layout import placement_of
from kv_transfer.plan import plan_pair
from kv_transfer.transports.rdma.operations import Operation, group, merged_operations, moves_of
from kv_transfer.transports.rdma.staging import NUM_SLOTS, Staging
from kv_transfer.views import HostView
from tests.integration.kv_instances import PAIRS

Way = Callable[[Iterable[Operation], np.ndarray, np.ndarray], None]
HEADS = KVLayout("e", "m", "float16", 12, 8, 64, 16, 9)


class Device:
    """Stands in for the one thing that staging asks of a device."""

    def register_staging(self, address: int, num_bytes: int, *, is_writable: bool) -> Any:
        return SimpleNamespace(lkey=1, rkey=2)

    def deregister(self, region: Any) -> None:
        pass


def regions(layout: KVLayout, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in placement_of(layout).region_bytes]


def read(operations: Iterable[Operation], source: np.ndarray, target: np.ndarray) -> None:
    for operation in operations:
        begin = operation.remote
        for offset, size in operation.pieces:
            target[offset : offset + size] = source[begin : begin + size]
            begin += size


def write(operations: Iterable[Operation], source: np.ndarray, target: np.ndarray) -> None:
    for operation in operations:
        begin = operation.remote
        for offset, size in operation.pieces:
            target[begin : begin + size] = source[offset : offset + size]
            begin += size


def carry(offsets: tuple[np.ndarray, np.ndarray], memory: tuple[np.ndarray, np.ndarray], *args: int, way: Way) -> None:
    """Both are of the source and of the destination; ``args`` are bytes a stretch, and most pieces and bytes."""
    stretch_bytes, max_pieces, max_bytes = args
    remote_offsets, local_offsets = offsets if way is read else offsets[::-1]
    limits = {"max_pieces": max_pieces, "max_bytes": max_bytes}
    way(merged_operations(remote_offsets, local_offsets, stretch_bytes, **limits), *memory)


def check_pair(src: KVLayout, dst: KVLayout, way: Way, seed: int = 0) -> None:
    plan = plan_pair(src, dst)
    if plan.is_empty:
        return
    rng = random.Random(seed)
    src_units, dst_units = src.num_blocks * plan.src_units, dst.num_blocks * plan.dst_units
    count = min(src_units, dst_units, 13)
    src_ids, dst_ids = (np.array(rng.sample(range(n), count)) for n in (src_units, dst_units))
    sources, got, wanted = regions(src, 1), regions(dst, 2), regions(dst, 2)
    packed = HostView(plan, "src", src.num_blocks, sources).gather(src_ids)
    HostView(plan, "dst", dst.num_blocks, wanted).scatter(dst_ids, packed)
    view = HostView(plan, "dst", dst.num_blocks, got)
    parts = [moves_of(part, plan.src_units, plan.dst_units) for part in plan.parts]
    staged = [part for part in parts if not part.is_direct]
    staging = Staging(Device(), staged, is_writable=False) if staged else None  # type: ignore[arg-type]
    for number, part in enumerate(parts):
        source, target = sources[part.part.src.region], got[part.part.dst.region]
        if part.is_direct:
            offsets = part.sources(src_ids), part.targets(dst_ids)
            carry(offsets, (source, target), part.stretch_bytes, 4, 5000, way=way)
            continue
        assert staging is not None
        for start in range(0, count, staging.units_per_slot(part)):
            some = slice(start, start + staging.units_per_slot(part))
            slot = staging.take()
            assert slot is not None
            offsets = part.sources(src_ids[some]), slot + part.staged(len(src_ids[some]))
            carry(offsets, (source, staging._bytes), part.stretch_bytes, 1, 1 << 20, way=way)
            staging.scatter(slot, part, view.parts[number], dst_ids[some])
            staging.give_back(slot)
    for one, other in zip(got, wanted, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("way", [read, write])
@pytest.mark.parametrize("pair", PAIRS)
def test_operations_carry_what_the_plan_moves(pair: str, way: Way) -> None:
    sources, destinations = PAIRS[pair]
    for src in sources:
        for dst in destinations:
            check_pair(src, dst, way)


@pytest.mark.parametrize(("src_tp", "dst_tp"), [(1, 2), (2, 1), (1, 8), (8, 1), (4, 2)])
@pytest.mark.parametrize("packing", ["block-major", "layer-major", "block-major-hnd"])
@pytest.mark.parametrize("way", [read, write])
def test_operations_carry_slices_of_heads(src_tp: int, dst_tp: int, packing: str, way: Way) -> None:
    for src_rank in range(src_tp):
        for dst_rank in range(dst_tp):
            src = replace(HEADS, packing=packing, tp_size=src_tp, tp_rank=src_rank)
            check_pair(src, replace(HEADS, tp_size=dst_tp, tp_rank=dst_rank), way)


def test_whole_blocks_are_one_operation_each_and_neighbours_one_together() -> None:
    plan = plan_pair(HEADS, HEADS)
    (part,) = (moves_of(part, 1, 1) for part in plan.parts)
    offsets = part.sources(np.array([5, 1, 2, 3, 8])), part.targets(np.array([0, 4, 5, 6, 2]))
    operations = list(merged_operations(*offsets, part.stretch_bytes, max_pieces=8, max_bytes=1 << 30))
    size = HEADS.block_bytes
    assert operations == [
        Operation(size, ((4 * size, 3 * size),)),
        Operation(5 * size, ((0, size),)),
        Operation(8 * size, ((2 * size, size),)),
    ]


def test_what_is_one_stretch_at_the_peer_is_scattered_or_gathered_by_one_operation() -> None:
    sources, targets = np.arange(5) * 10, np.array([400, 100, 110, 300, 0])
    operations = list(merged_operations(sources, targets, 10, max_pieces=3, max_bytes=1000))
    assert operations == [Operation(0, ((400, 10), (100, 20), (300, 10))), Operation(40, ((0, 10),))]
    assert [operation.num_bytes for operation in operations] == [40, 10]


def test_a_long_stretch_is_cut_at_the_largest_operation() -> None:
    operations = list(merged_operations(np.array([0]), np.array([7]), 25, max_pieces=8, max_bytes=10))
    assert operations == [Operation(0, ((7, 10),)), Operation(10, ((17, 10),)), Operation(20, ((27, 5),))]
    assert [len(some) for some in group(operations, 2)] == [2, 1]


@settings(deadline=None)
@given(st.data())
def test_merged_operations_move_each_stretch_to_its_place(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 9))
    sources = data.draw(st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=20))
    targets = data.draw(st.lists(st.integers(0, 30), unique=True, min_size=len(sources), max_size=len(sources)))
    source, got = np.arange(300, dtype=np.int64) % 251, np.full(300, -1)
    limits = {"max_pieces": data.draw(st.integers(1, 4)), "max_bytes": data.draw(st.integers(1, 40))}
    operations = list(merged_operations(np.array(sources) * size, np.array(targets) * size, size, **limits))
    read(operations, source, got)
    wanted = np.full(300, -1)
    for one, other in zip(sources, targets, strict=True):
        wanted[other * size : (other + 1) * size] = source[one * size : (one + 1) * size]
    assert np.array_equal(got, wanted)
    assert all(len(o.pieces) <= limits["max_pieces"] and o.num_bytes <= limits["max_bytes"] for o in operations)


def test_slots_run_out_and_come_back() -> None:
    layout = replace(HEADS, tp_size=2)
    plan = plan_pair(HEADS, layout)
    staging = Staging(Device(), [moves_of(part, 1, 1) for part in plan.parts], is_writable=True)  # type: ignore[arg-type]
    slots = [staging.take() for _ in range(NUM_SLOTS + 1)]
    assert slots[-1] is None and len(set(slots)) == NUM_SLOTS + 1
    assert slots[0] is not None
    staging.give_back(slots[0])
    assert staging.take() == slots[0]
