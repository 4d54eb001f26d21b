"""BlockCopier against a loop that copies byte by byte what the plan says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import copying
from kv_transfer.copying import BlockCopier
from kv_transfer.plan import PairPlan

WHOLE = PairPlan(0, 0, 1, 24, 24, 0, 24, 0)
SLICED = PairPlan(0, 0, 3, 4, 8, 4, 12, 8)


def pools(plan: PairPlan) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    src = rng.integers(0, 256, (20, plan.num_rows * plan.src_row_bytes), dtype=np.uint8)
    dst = rng.integers(0, 256, (25, plan.num_rows * plan.dst_row_bytes), dtype=np.uint8)
    src.flags.writeable = False
    return src, dst


@pytest.fixture(params=[0, 48, 1 << 20], ids=["always by runs", "mixed", "always gathered"])
def run_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(copying, "RUN_BYTES", request.param)
    monkeypatch.setattr(copying, "PIECE_BYTES", 100)
    return int(request.param)


@pytest.mark.parametrize("plan", [WHOLE, SLICED], ids=["whole blocks", "slices"])
@pytest.mark.usefixtures("run_bytes")
def test_the_right_bytes_arrive_and_no_other_changes(plan: PairPlan) -> None:
    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.tuples(st.integers(0, 19), st.integers(1, 5)), max_size=6), st.permutations(range(25)))
    def check(stretches: list[tuple[int, int]], order: list[int]) -> None:
        src_ids = np.array(
            list(dict.fromkeys(b for first, n in stretches for b in range(first, min(first + n, 20)))), dtype=np.int64
        )
        half = len(src_ids) // 2
        dst_ids = np.array([*sorted(order[:half]), *order[half : len(src_ids)]], dtype=np.int64)
        src, dst = pools(plan)
        wanted = dst.copy()
        for src_id, dst_id in zip(src_ids, dst_ids, strict=True):
            for row in range(plan.num_rows):
                start = row * plan.src_row_bytes + plan.src_offset
                piece = src[src_id, start : start + plan.width]
                start = row * plan.dst_row_bytes + plan.dst_offset
                wanted[dst_id, start : start + plan.width] = piece
        assert BlockCopier(plan, src, dst).copy(src_ids, dst_ids, lambda: False)
        assert np.array_equal(dst, wanted)

    check()


def test_it_stops_between_pieces_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", 24)
    src, dst = pools(WHOLE)
    before = dst.copy()
    answers = iter([False, False, True])
    assert not BlockCopier(WHOLE, src, dst).copy(np.arange(5), np.arange(5), lambda: next(answers))
    assert np.array_equal(dst[:2], src[:2])
    assert np.array_equal(dst[2:], before[2:])
