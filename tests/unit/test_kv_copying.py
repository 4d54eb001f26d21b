"""BlockCopier in each of its ways against a loop over single bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import copying, views
from kv_transfer.copying import BlockCopier
from kv_transfer.layout import KVLayout
from kv_transfer.plan import PairPlan, plan_pair
from kv_transfer.views import HostView
from tests import kv_oracle

# One layer, one plane, one token of 24 bytes in a block; or two layers, of which every token's half moves.
WHOLE = KVLayout("e", "m", "uint8", 1, 1, 24, 1, 20, kv_planes=1)
HALVES = KVLayout("e", "m", "uint8", 2, 2, 4, 3, 20, kv_planes=1)
CASES = {
    "whole blocks": (WHOLE, replace(WHOLE, num_blocks=25)),
    "slices": (replace(HALVES, tp_size=2, tp_rank=1), replace(HALVES, num_blocks=25)),
    "units of one token": (replace(HALVES, block_size=2), replace(HALVES, num_blocks=25, packing="layer-major")),
}


def pools(src: KVLayout, dst: KVLayout) -> tuple[PairPlan, kv_oracle.Memory, kv_oracle.Memory]:
    rng = np.random.default_rng(0)
    source, destination = kv_oracle.memory_of(src, rng), kv_oracle.memory_of(dst, rng)
    source[0].flags.writeable = False
    return plan_pair(src, dst), source, destination


@pytest.fixture(params=[0, 48, 1 << 20], ids=["always by runs", "mixed", "always gathered"])
def run_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(copying, "RUN_BYTES", request.param)
    monkeypatch.setattr(copying, "PIECE_BYTES", 100)
    return int(request.param)


@pytest.mark.parametrize("single_bytes", [0, 1 << 20], ids=["unit by unit", "all at once"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("run_bytes")
def test_the_right_bytes_arrive_and_no_other_changes(
    case: str, single_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "_SINGLE_BYTES", single_bytes)

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(st.integers(0, 19), st.integers(1, 5)), max_size=6), st.permutations(range(25)))
    def check(stretches: list[tuple[int, int]], order: list[int]) -> None:
        src_ids = np.array(
            list(dict.fromkeys(b for first, n in stretches for b in range(first, min(first + n, 20)))), dtype=np.int64
        )
        half = len(src_ids) // 2
        dst_ids = np.array([*sorted(order[:half]), *order[half : len(src_ids)]], dtype=np.int64)
        src, dst = CASES[case]
        plan, source, destination = pools(src, dst)
        wanted = [region.copy() for region in destination]
        for src_id, dst_id in zip(src_ids.tolist(), dst_ids.tolist(), strict=True):
            copy_unit(plan, source, wanted, src_id, dst_id)
        copier = BlockCopier(
            HostView(plan, "src", src.num_blocks, source), HostView(plan, "dst", dst.num_blocks, destination)
        )
        assert copier.copy(src_ids, dst_ids, lambda: False)
        assert all(np.array_equal(*both) for both in zip(destination, wanted, strict=True))

    check()


def copy_unit(
    plan: PairPlan, source: kv_oracle.Memory, destination: kv_oracle.Memory, src_id: int, dst_id: int
) -> None:
    for part in plan.parts:
        src_block, src_unit = divmod(src_id, plan.src_units)
        dst_block, dst_unit = divmod(dst_id, plan.dst_units)
        from_byte = part.src.offset + src_block * part.src.block_stride + src_unit * part.src.unit_stride
        to_byte = part.dst.offset + dst_block * part.dst.block_stride + dst_unit * part.dst.unit_stride
        for index in np.ndindex(*part.shape):
            at_src = from_byte + sum(i * s for i, s in zip(index, (*part.src.strides, 1), strict=True))
            at_dst = to_byte + sum(i * s for i, s in zip(index, (*part.dst.strides, 1), strict=True))
            destination[part.dst.region][at_dst] = source[part.src.region][at_src]


def test_it_stops_between_pieces_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", 24)
    src, dst = CASES["whole blocks"]
    plan, source, destination = pools(src, dst)
    before = destination[0].copy()
    answers = iter([False, False, True])
    copier = BlockCopier(HostView(plan, "src", 20, source), HostView(plan, "dst", 25, destination))
    assert not copier.copy(np.arange(5), np.arange(5), lambda: next(answers))
    assert np.array_equal(destination[0][:48], source[0][:48])
    assert np.array_equal(destination[0][48:], before[48:])
