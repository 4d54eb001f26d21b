"""The plan of a step: a table of cases, and properties that hold for any mix of sequences."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batching.blocks import BlockAllocator, num_blocks_for
from engine.batching.scheduler import Candidate, Chunk, StepPlan, plan_step

BLOCK_SIZE = 4


def decoding(key: str, num_tokens: int, num_blocks: int | None = None) -> Candidate:
    held = num_blocks_for(num_tokens, BLOCK_SIZE) if num_blocks is None else num_blocks
    return Candidate(key, num_tokens, num_tokens - 1, held)


def prompt(key: str, num_tokens: int, num_computed: int = 0, preemptible: bool = True) -> Candidate:
    held = num_blocks_for(num_tokens, BLOCK_SIZE) if num_computed else 0
    return Candidate(key, num_tokens, num_computed, held, preemptible)


CASES: dict[str, tuple[dict[str, Any], StepPlan]] = {
    "nothing to do": ({}, StepPlan()),
    "decodes run before an older prompt's next chunk": (
        {"running": [prompt("a", 100, 8), decoding("b", 5)], "max_num_batched_tokens": 8},
        StepPlan((Chunk("b", 1, 0), Chunk("a", 7, 0))),
    ),
    "a prompt takes all its blocks with its first chunk": (
        {"waiting": [prompt("a", 17)], "max_num_batched_tokens": 8},
        StepPlan((Chunk("a", 8, 5),)),
    ),
    "what the budget leaves goes to the next prompt": (
        {"waiting": [prompt("a", 6), prompt("b", 6), prompt("c", 1)], "max_num_batched_tokens": 8},
        StepPlan((Chunk("a", 6, 2), Chunk("b", 2, 2))),
    ),
    "a small prompt does not overtake one that does not fit": (
        {"waiting": [prompt("a", 40), prompt("b", 1)], "num_free_blocks": 5},
        StepPlan(),
    ),
    "a sequence takes a new block when its newest token needs one": (
        {"running": [decoding("a", 9, 2)], "num_free_blocks": 1},
        StepPlan((Chunk("a", 1, 1),)),
    ),
    "a newcomer leaves a block of growth to each that generates": (
        {"running": [decoding("a", 4)], "waiting": [prompt("b", 8)], "num_free_blocks": 2},
        StepPlan((Chunk("a", 1, 0),)),
    ),
    "a newcomer may have the last block when none generates": (
        {"waiting": [prompt("b", 8)], "num_free_blocks": 2},
        StepPlan((Chunk("b", 8, 2),)),
    ),
    "the newest is preempted for the oldest": (
        {"running": [decoding("a", 9, 2), decoding("b", 6), decoding("c", 7)], "num_free_blocks": 0},
        StepPlan((Chunk("a", 1, 1), Chunk("b", 1, 0)), ("c",)),
    ),
    "nobody starts in a step that preempts": (
        {"running": [decoding("a", 9, 2), decoding("c", 15)], "waiting": [prompt("d", 1)], "num_free_blocks": 0},
        StepPlan((Chunk("a", 1, 1),), ("c",)),
    ),
    "a half computed prompt is preempted too": (
        {"running": [decoding("a", 9, 2), prompt("b", 12, 4)], "num_free_blocks": 0},
        StepPlan((Chunk("a", 1, 1),), ("b",)),
    ),
    "a prefill run keeps its blocks, and who needs one waits": (
        {"running": [decoding("a", 9, 2), prompt("b", 12, 4, preemptible=False)], "num_free_blocks": 0},
        StepPlan((Chunk("b", 8, 0),)),
    ),
    "the newest does not preempt itself or an older one": (
        {"running": [decoding("a", 6), decoding("b", 9, 2)], "num_free_blocks": 0},
        StepPlan((Chunk("a", 1, 0),)),
    ),
    "at most max_num_seqs run, oldest first": (
        {"running": [decoding("a", 6), decoding("b", 6), decoding("c", 6)], "waiting": [prompt("d", 1)],
         "max_num_seqs": 2},
        StepPlan((Chunk("a", 1, 0), Chunk("b", 1, 0))),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "expected"), CASES.values(), ids=CASES.keys())
def test_plan_of_a_step(case: dict[str, Any], expected: StepPlan) -> None:
    limits = {"num_free_blocks": 100, "block_size": BLOCK_SIZE, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    assert plan_step(**{"running": [], "waiting": [], **limits, **case}) == expected


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    running = []
    for i in range(draw(st.integers(0, 6))):
        num_tokens = draw(st.integers(1, 30))
        num_computed = draw(st.integers(1, num_tokens)) - 1
        held = num_blocks_for(num_tokens, BLOCK_SIZE)
        if 1 <= num_computed == num_tokens - 1 and draw(st.booleans()):
            held = num_blocks_for(num_computed, BLOCK_SIZE)
        running.append(Candidate(f"r{i}", num_tokens, num_computed, held, draw(st.booleans())))
    waiting = [prompt(f"w{i}", draw(st.integers(1, 30))) for i in range(draw(st.integers(0, 4)))]
    return {
        "running": running,
        "waiting": waiting,
        "num_free_blocks": draw(st.integers(0, 12)),
        "block_size": BLOCK_SIZE,
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.integers(6, 40)),
    }


@given(situations())
def test_a_plan_keeps_every_limit(situation: dict[str, Any]) -> None:
    plan = plan_step(**situation)
    candidates = {c.key: c for c in [*situation["running"], *situation["waiting"]]}
    freed = sum(candidates[key].num_blocks for key in plan.preempted)
    keys = [chunk.key for chunk in plan.chunks]

    assert len(keys) == len(set(keys)) <= situation["max_num_seqs"]
    assert not set(keys) & set(plan.preempted)
    assert sum(chunk.num_tokens for chunk in plan.chunks) <= situation["max_num_batched_tokens"]
    assert sum(chunk.num_new_blocks for chunk in plan.chunks) <= situation["num_free_blocks"] + freed
    assert all(candidates[key].preemptible and candidates[key].num_blocks for key in plan.preempted)
    for chunk in plan.chunks:
        candidate = candidates[chunk.key]
        end = candidate.num_computed + chunk.num_tokens
        assert candidate.num_computed < end <= candidate.num_tokens
        assert end <= (candidate.num_blocks + chunk.num_new_blocks) * BLOCK_SIZE


@given(situations())
def test_whoever_is_preempted_is_newer_than_all_that_run(situation: dict[str, Any]) -> None:
    plan = plan_step(**situation)
    order = [c.key for c in situation["running"] if c.preemptible]
    if plan.preempted:
        first_victim = min(order.index(key) for key in plan.preempted)
        assert set(order[first_victim:]) == set(plan.preempted)
        assert plan.chunks, "blocks are only taken for somebody who then runs"


@given(situations())
def test_the_oldest_sequence_runs_or_waits_for_blocks_that_nobody_may_take(situation: dict[str, Any]) -> None:
    running = situation["running"]
    plan = plan_step(**situation)
    if running and running[0].key not in {chunk.key for chunk in plan.chunks}:
        oldest = running[0]
        if oldest.num_tokens - oldest.num_computed == 1:
            assert oldest.num_blocks * BLOCK_SIZE < oldest.num_tokens
            assert not any(c.preemptible for c in running[1:])
        else:
            assert len(plan.chunks) == situation["max_num_seqs"] or (
                sum(chunk.num_tokens for chunk in plan.chunks) == situation["max_num_batched_tokens"]
            )


@given(
    st.lists(st.tuples(st.integers(1, 25), st.integers(1, 25), st.integers(0, 20)), min_size=1, max_size=8),
    st.integers(13, 30),
    st.integers(1, 5),
    st.integers(5, 40),
)
def test_every_sequence_that_fits_the_pool_alone_comes_to_its_end(
    arrivals: list[tuple[int, int, int]], num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    """A whole engine but for the model: sequences of (prompt, output, step of arrival) in a pool that is too small."""
    allocator = BlockAllocator(num_blocks)
    length = {f"s{i}": num_prompt for i, (num_prompt, _, _) in enumerate(arrivals)}
    computed = dict.fromkeys(length, 0)
    blocks: dict[str, list[int]] = {key: [] for key in length}
    order = sorted(length, key=lambda key: arrivals[int(key[1:])][2])
    unfinished = set(length)
    for now in range(2000):
        present = [key for key in order if key in unfinished and arrivals[int(key[1:])][2] <= now]
        candidates = [Candidate(key, length[key], computed[key], len(blocks[key])) for key in present]
        plan = plan_step(
            [c for c in candidates if c.num_blocks],
            [c for c in candidates if not c.num_blocks],
            num_free_blocks=allocator.num_free,
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        assert plan.chunks or not present
        for key in plan.preempted:
            allocator.free(blocks[key])
            blocks[key], computed[key] = [], 0
        for chunk in plan.chunks:
            blocks[chunk.key] += allocator.allocate(chunk.num_new_blocks)
            computed[chunk.key] += chunk.num_tokens
            assert computed[chunk.key] <= len(blocks[chunk.key]) * BLOCK_SIZE
            if computed[chunk.key] == length[chunk.key]:
                length[chunk.key] += 1
                num_prompt, num_output, _ = arrivals[int(chunk.key[1:])]
                if length[chunk.key] == num_prompt + num_output:
                    allocator.free(blocks[chunk.key])
                    blocks[chunk.key] = []
                    unfinished.remove(chunk.key)
        if not unfinished:
            break
    assert not unfinished
    assert allocator.num_free == num_blocks
