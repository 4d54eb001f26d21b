"""The plan against an oracle that works out every byte's address by itself; and what a plan looks like."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_transfer.copying import BlockCopier
from kv_transfer.errors import LayoutMismatch
from kv_transfer.layout import KVLayout
from kv_transfer.pairing import destination_ranks, source_ranks
from kv_transfer.placement import packed
from kv_transfer.plan import PairPlan, hold_the_same, merge_runs, plan_pair, units_of
from kv_transfer.views import HostView
from tests import kv_oracle
from tests.kv_layouts import Pair, pairs, tp_sizes

# Generated pairs of instances, each moved in three ways; `make fuzz` takes thousands.
NUM_EXAMPLES = int(os.environ.get("SPLITWISE_PLAN_EXAMPLES", "350"))


def views(plan: PairPlan, src: KVLayout, src_memory: kv_oracle.Memory, dst: KVLayout, dst_memory: kv_oracle.Memory):
    return HostView(plan, "src", src.num_blocks, src_memory), HostView(plan, "dst", dst.num_blocks, dst_memory)


def copy(source: HostView, destination: HostView, src_ids: np.ndarray, dst_ids: np.ndarray) -> None:
    assert BlockCopier(source, destination).copy(src_ids, dst_ids, lambda: False)


def pack(source: HostView, destination: HostView, src_ids: np.ndarray, dst_ids: np.ndarray) -> None:
    destination.scatter(dst_ids, source.gather(src_ids))


def stream(source: HostView, destination: HostView, src_ids: np.ndarray, dst_ids: np.ndarray) -> None:
    """As a socket does: both ends have stretches of memory, cut at different places."""
    sent = b"".join(ctypes.string_at(address, size) for address, size in source.iovecs(src_ids).tolist())
    for address, size in destination.iovecs(dst_ids).tolist():
        ctypes.memmove(address, sent[:size], size)
        sent = sent[size:]
    assert not sent


def moved_units(plan: PairPlan, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    src_units = units_of(np.array(pair.src_ids, np.int64), plan.src_units)
    dst_units = units_of(np.array(pair.dst_ids, np.int64), plan.dst_units)
    count = min(len(src_units), len(dst_units))
    wanted = dst_units[:count] >= 0
    return src_units[:count][wanted], dst_units[:count][wanted]


@pytest.mark.parametrize("move", [copy, pack, stream])
def test_every_byte_arrives_where_the_layouts_say_and_no_other_byte_changes(move) -> None:
    @settings(deadline=None, max_examples=NUM_EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(pairs(), st.integers(0, 2**32 - 1))
    def check(pair: Pair, seed: int) -> None:
        rng = np.random.default_rng(seed)
        src, dst = pair.sources[0], pair.destinations[0]
        src_room, dst_room = len(pair.src_ids) * src.block_size, len(pair.dst_ids) * dst.block_size
        assert hold_the_same(len(pair.src_ids), src.block_size, len(pair.dst_ids), dst.block_size)
        kv = kv_oracle.model_kv(src, max(src_room, dst_room), rng)
        memories = []
        for rank in pair.sources:
            memories.append(kv_oracle.memory_of(rank, rng))
            kv_oracle.put(rank, memories[-1], kv, pair.src_ids, src_room)
        for rank in pair.destinations:
            got = kv_oracle.memory_of(rank, rng)
            wanted = [region.copy() for region in got]
            kv_oracle.put(rank, wanted, kv, pair.dst_ids, min(src_room, dst_room))
            num_bytes = 0
            for number in source_ranks(src, rank):
                plan = plan_pair(pair.sources[number], rank)
                assert (plan.src_rank, plan.dst_rank) == (number, rank.rank)
                if plan.is_empty:
                    continue
                src_ids, dst_ids = moved_units(plan, pair)
                num_bytes += len(dst_ids) * plan.unit_bytes
                if len(dst_ids):
                    move(*views(plan, pair.sources[number], memories[number], rank, got), src_ids, dst_ids)
                by_layer = sum(part.num_bytes for _, parts in plan.layers for part in parts)
                assert by_layer == plan.unit_bytes
            for region, (mine, right) in enumerate(zip(got, wanted, strict=True)):
                assert np.array_equal(mine, right), f"region {region}"
            unit_bytes = rank.block_bytes // plan.dst_units
            held = units_of(np.array(pair.dst_ids), plan.dst_units)[
                : min(src_room, dst_room) * plan.dst_units // rank.block_size
            ]
            assert num_bytes == int((held >= 0).sum()) * unit_bytes, "every byte is taken exactly once"

    check()


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(pairs())
def test_both_sides_name_the_same_pairs_and_every_rank_has_one(pair: Pair) -> None:
    src, dst = pair.sources[0], pair.destinations[0]
    from_destinations = {(s, d.rank) for d in pair.destinations for s in source_ranks(src, d)}
    from_sources = {(s.rank, d) for s in pair.sources for d in destination_ranks(s, dst)}
    assert from_destinations == from_sources
    assert {s for s, _ in from_sources} == set(range(len(pair.sources)))
    assert {d for _, d in from_sources} == set(range(len(pair.destinations)))


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(pairs(), st.integers(0, 2**32 - 1))
def test_the_bytes_of_a_layer_are_in_the_same_order_on_both_sides(pair: Pair, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dst = pair.destinations[-1]
    src = pair.sources[source_ranks(pair.sources[0], dst)[-1]]
    plan = plan_pair(src, dst)
    if plan.is_empty:
        return
    src_memory, dst_memory = kv_oracle.memory_of(src, rng), kv_oracle.memory_of(dst, rng)
    src_ids, dst_ids = moved_units(plan, pair)
    if not len(dst_ids):
        return
    source, destination = views(plan, src, src_memory, dst, dst_memory)
    pack(source, destination, src_ids, dst_ids)
    for _, parts in plan.layers:
        cut = dataclasses.replace(plan, parts=parts)
        source, destination = views(cut, src, src_memory, dst, dst_memory)
        assert np.array_equal(source.gather(src_ids), destination.gather(dst_ids))


def layouts(tp_size: int, **other: object) -> list[KVLayout]:
    shape = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 16, "num_blocks": 64, **other}
    return [KVLayout("e", "m", "bfloat16", tp_size=tp_size, tp_rank=rank, **shape) for rank in range(tp_size)]


@pytest.mark.parametrize("tp_size", tp_sizes(4))
@pytest.mark.parametrize("heads", [1, 4])
def test_equal_ranks_move_a_block_as_one_run_rank_by_rank(tp_size: int, heads: int) -> None:
    ranks = layouts(tp_size, num_kv_heads=heads)
    for rank in ranks:
        assert source_ranks(rank, rank) == [rank.rank]
        plan = plan_pair(rank, rank)
        assert [part.shape for part in plan.parts] == [(rank.block_bytes,)]
        assert (plan.src_units, plan.dst_units, len(plan.layers)) == (1, 1, 32)


def test_layers_in_a_pool_of_their_own_order_move_as_one_strided_copy_a_block() -> None:
    (rank,) = layouts(1, packing="layer-major")
    plan = plan_pair(rank, rank)
    assert [part.shape for part in plan.parts] == [(64, 16 * 8 * 128 * 2)]


def test_one_tensor_a_layer_moves_as_one_part_a_layer() -> None:
    (dense,) = layouts(1)
    order = ("layer", "block", "plane", "token", "head")
    rank = dataclasses.replace(dense, placement=packed(dense.shape, order, split=("layer",)))
    plan = plan_pair(rank, rank)
    assert [part.shape for part in plan.parts] == [(2 * 16 * 8 * 128 * 2,)] * 32
    assert [part.src.region for part in plan.parts] == list(range(32))
    onto_dense = plan_pair(rank, dense)
    assert [part.shape for part in onto_dense.parts] == [(2 * 16 * 8 * 128 * 2,)] * 32


def test_replicated_heads_are_fetched_from_different_copies() -> None:
    sources, destinations = layouts(8, num_kv_heads=2), layouts(4, num_kv_heads=2)
    taken = [{r for r in source_ranks(sources[0], d) if not plan_pair(sources[r], d).is_empty} for d in destinations]
    assert taken == [{0}, {2}, {4}, {6}]


def test_stages_take_their_layers_from_the_stages_that_have_them() -> None:
    sources = [layouts(1, num_layers=6, pp_layers=(1, 5), pp_rank=r)[0] for r in range(2)]
    destinations = [layouts(1, num_layers=6, pp_layers=(3, 3), pp_rank=r)[0] for r in range(2)]
    assert [source_ranks(sources[0], d) for d in destinations] == [[0, 1], [1]]
    assert [layer for layer, _ in plan_pair(sources[1], destinations[0]).layers] == [1, 2]


MISMATCHES = [
    ({}, {"block_size": 8, "axes": "none"}, "axes"),
    ({"axes": "head"}, {"axes": "head", "block_size": 8}, "block_size"),
    ({"axes": "none"}, {"axes": "none", "opaque_format": "other"}, "opaque_format"),
    ({"axes": "token", "tp_size": 2}, {"axes": "token", "tp_size": 1}, "tp_size"),
    ({}, {"kv_planes": 1}, "kv_planes"),
    ({}, {"dtype": "float16"}, "dtype"),
    ({}, {"num_layers": 31}, "num_layers"),
    (
        {"axes": "none", "kv_planes": 1, "opaque_bytes": (5,) * 32},
        {"axes": "none", "kv_planes": 1, "opaque_bytes": (5,) * 31 + (6,)},
        "opaque_bytes",
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "field"), MISMATCHES, ids=[m[2] for m in MISMATCHES])
def test_blocks_that_do_not_mean_the_same_have_no_plan_and_the_error_names_the_field(ours, theirs, field: str) -> None:
    (plain,) = layouts(1)
    src, dst = dataclasses.replace(plain, **theirs), dataclasses.replace(plain, **ours)
    with pytest.raises(LayoutMismatch) as caught:
        plan_pair(src, dst)
    assert caught.value.field == field
    assert caught.value.mine == str(getattr(dst, field))
    assert caught.value.theirs == str(getattr(src, field))


def test_layers_of_different_size_move_whole() -> None:
    sizes = (24, 7, 4096)
    rng = np.random.default_rng(0)
    plain = layouts(1, num_layers=3, axes="none", kv_planes=1, opaque_bytes=sizes, num_blocks=5)[0]
    split = dataclasses.replace(
        plain, placement=packed(plain.shape, ("layer", "block", "plane", "token", "head"), split=("layer",))
    )
    plan = plan_pair(split, plain)
    src, dst = kv_oracle.memory_of(split, rng), kv_oracle.memory_of(plain, rng)
    copy(*views(plan, split, src, plain, dst), np.array([4, 0]), np.array([1, 3]))
    pool = dst[0].reshape(5, sum(sizes))
    for src_id, dst_id in ((4, 1), (0, 3)):
        blocks = [region.reshape(5, size)[src_id] for region, size in zip(src, sizes, strict=True)]
        assert np.array_equal(pool[dst_id], np.concatenate(blocks))


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), unique=True))
def test_merged_runs_cover_the_same_pairs_in_order_and_are_maximal(src: list[int]) -> None:
    rng = np.random.default_rng(len(src))
    dst = rng.permutation(13)[: len(src)]
    if len(src) > 2:
        src = sorted(src)
        dst = np.sort(dst)
    runs = merge_runs(np.array(src, np.int64), dst.astype(np.int64))
    pairs = [(s + i, d + i) for s, d, n in runs for i in range(n)]
    assert pairs == list(zip(src, dst.tolist(), strict=True))
    for (s0, d0, n0), (s1, d1, _) in itertools.pairwise(runs):
        assert (s0 + n0, d0 + n0) != (s1, d1)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20))
def test_blocks_of_two_sizes_hold_the_same_exactly_when_some_number_of_tokens_needs_both(a, a_size, b, b_size) -> None:
    lengths = range(1, a * a_size + 1)
    wanted = any(-(-n // a_size) == a and -(-n // b_size) == b for n in lengths)
    assert hold_the_same(a, a_size, b, b_size) == wanted
