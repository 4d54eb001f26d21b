"""Which sequences run in the next forward pass, and how many tokens of each. Pure: no state, no I/O.

Sequences that generate come first, a token each, oldest first; what is left of the token budget goes to prompts,
oldest first, in chunks. A sequence takes the blocks of all its known tokens when its first chunk is scheduled, and
one more block whenever its newest token needs it. When that block is missing, the newest running sequences are
preempted: they give their blocks back and are computed again later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.batching.blocks import num_blocks_for


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the scheduler knows of a sequence.

    Attributes:
        num_tokens: known tokens (prompt, and output so far).
        num_computed: of them, with KV in the pool; less than ``num_tokens``.
        num_blocks: blocks held.
        preemptible: its blocks may be taken back (nobody outside the engine reads them).
    """

    key: str
    num_tokens: int
    num_computed: int
    num_blocks: int
    preemptible: bool = True


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute the next ``num_tokens`` tokens of a sequence, after allocating ``num_new_blocks`` for it."""

    key: str
    num_tokens: int
    num_new_blocks: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. ``preempted`` lose their blocks before any of ``chunks`` allocates."""

    chunks: tuple[Chunk, ...] = ()
    preempted: tuple[str, ...] = ()


def plan_step(
    running: Sequence[Candidate],
    waiting: Sequence[Candidate],
    *,
    num_free_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> StepPlan:
    """Plan the next step.

    Args:
        running: sequences that hold blocks and have tokens to compute, oldest first.
        waiting: sequences without blocks, oldest first; they start in this order, none overtakes.
    """
    chunks: list[Chunk] = []
    preempted: list[str] = []
    budget = max_num_batched_tokens
    free = num_free_blocks
    alive = list(running)

    for candidate in running:
        if candidate.num_tokens - candidate.num_computed != 1:
            continue
        if budget == 0 or len(chunks) == max_num_seqs or candidate.key in preempted:
            continue
        missing = max(0, num_blocks_for(candidate.num_tokens, block_size) - candidate.num_blocks)
        while missing > free:
            victim = next((c for c in reversed(alive) if c.preemptible), None)
            # The oldest of those that could give way is the one that asks: it waits for blocks held elsewhere.
            if victim is None or alive.index(victim) <= alive.index(candidate):
                break
            alive.remove(victim)
            preempted.append(victim.key)
            free += victim.num_blocks
        if missing > free:
            continue
        chunks.append(Chunk(candidate.key, 1, missing))
        free -= missing
        budget -= 1

    num_generating = len(chunks)
    for candidate in alive:
        remaining = candidate.num_tokens - candidate.num_computed
        if remaining == 1 or budget == 0 or len(chunks) == max_num_seqs:
            continue
        chunks.append(Chunk(candidate.key, min(remaining, budget), 0))
        budget -= chunks[-1].num_tokens

    if not preempted:
        for candidate in waiting:
            needed = num_blocks_for(candidate.num_tokens, block_size)
            # A block of growth is left to each that generates, or the newcomer would soon be preempted for it.
            if budget == 0 or len(chunks) == max_num_seqs or needed + num_generating > free:
                break
            chunks.append(Chunk(candidate.key, min(candidate.num_tokens, budget), needed))
            budget -= chunks[-1].num_tokens
            free -= needed
    return StepPlan(tuple(chunks), tuple(preempted))
