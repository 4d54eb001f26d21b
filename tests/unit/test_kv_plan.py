"""The plan against a direct re-sharding of the whole model's KV."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.errors import LayoutMismatch
from kv_transfer.layout import KVLayout
from kv_transfer.plan import destination_ranks, merge_runs, plan_pair, source_ranks


def layouts(num_kv_heads: int, tp_size: int, num_blocks: int, **other: int) -> list[KVLayout]:
    shape = {"num_layers": 2, "head_dim": 3, "block_size": 2, "kv_planes": 2, **other}
    return [
        KVLayout(
            "transformers",
            "m",
            "bfloat16",
            num_kv_heads=num_kv_heads,
            num_blocks=num_blocks,
            tp_size=tp_size,
            tp_rank=rank,
            **shape,
        )
        for rank in range(tp_size)
    ]


def shard(model_kv: np.ndarray, layout: KVLayout) -> np.ndarray:
    """One rank's pool, cut straight out of [blocks, layers, planes, tokens, all heads, head bytes]."""
    first = layout.first_head
    part = model_kv[:, :, :, :, first : first + layout.num_rank_heads]
    return np.ascontiguousarray(part).reshape(model_kv.shape[0], layout.block_bytes)


@st.composite
def tp_pairs(draw: st.DrawFn) -> tuple[int, int, int]:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    sizes = st.sampled_from([n for n in range(1, 17) if heads % n == 0 or n % heads == 0])
    return heads, draw(sizes), draw(sizes)


@settings(deadline=None, max_examples=150)
@given(tp_pairs(), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_applying_the_plan_gives_what_a_direct_resharding_gives(
    pair: tuple[int, int, int], kv_planes: int, seed: int
) -> None:
    heads, src_tp, dst_tp = pair
    rng = np.random.default_rng(seed)
    num_blocks, num_moved = 7, 4
    sources = layouts(heads, src_tp, num_blocks, kv_planes=kv_planes)
    destinations = layouts(heads, dst_tp, num_blocks + 2, kv_planes=kv_planes)
    head_bytes = sources[0].head_bytes
    model_kv = rng.integers(0, 256, (num_blocks, 2, kv_planes, 2, heads, head_bytes), dtype=np.uint8)
    src_ids = rng.permutation(num_blocks)[:num_moved]
    dst_ids = rng.permutation(num_blocks + 2)[:num_moved]
    for dst in destinations:
        got = np.zeros((dst.num_blocks, dst.block_bytes), np.uint8)
        written = np.zeros_like(got)
        for rank in source_ranks(heads, src_tp, dst_tp, dst.tp_rank):
            plan = plan_pair(sources[rank], dst)
            src_pool = shard(model_kv, sources[rank])
            for src_id, dst_id, count in merge_runs(src_ids, dst_ids):
                plan.dst_rows(got)[dst_id : dst_id + count] = plan.src_rows(src_pool)[src_id : src_id + count]
                plan.dst_rows(written)[dst_id : dst_id + count] += 1
        wanted = np.zeros_like(got)
        wanted[dst_ids] = shard(model_kv, dst)[src_ids]
        assert np.array_equal(got, wanted)
        assert (written[dst_ids] == 1).all(), "every byte is taken exactly once"
        assert written.sum() == num_moved * dst.block_bytes


@settings(deadline=None)
@given(tp_pairs())
def test_both_sides_name_the_same_pairs_and_every_source_rank_has_one(pair: tuple[int, int, int]) -> None:
    heads, src_tp, dst_tp = pair
    from_destinations = {(s, d) for d in range(dst_tp) for s in source_ranks(heads, src_tp, dst_tp, d)}
    from_sources = {(s, d) for s in range(src_tp) for d in destination_ranks(heads, src_tp, dst_tp, s)}
    assert from_destinations == from_sources
    assert {s for s, _ in from_sources} == set(range(src_tp))
    assert {d for _, d in from_sources} == set(range(dst_tp))


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [1, 4])
def test_equal_tp_sizes_move_whole_blocks_rank_by_rank(tp_size: int, heads: int) -> None:
    ranks = layouts(heads, tp_size, 3)
    for rank in range(tp_size):
        assert source_ranks(heads, tp_size, tp_size, rank) == [rank]
        assert plan_pair(ranks[rank], ranks[rank]).is_whole_block


def test_replicated_heads_are_fetched_from_different_copies() -> None:
    sources, destinations = layouts(2, 8, 1), layouts(2, 4, 1)
    taken = [{r for r in source_ranks(2, 8, 4, d) if plan_pair(sources[r], destinations[d]).width} for d in range(4)]
    assert taken == [{0}, {2}, {4}, {6}]


def test_an_incompatible_pair_has_no_plan() -> None:
    src, dst = layouts(2, 1, 3)[0], layouts(2, 1, 3)[0]
    with pytest.raises(LayoutMismatch, match="block_size"):
        plan_pair(src, dataclasses.replace(dst, block_size=4))


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
