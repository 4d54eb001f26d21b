from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.batching.blocks import BlockAllocator, num_blocks_for

NUM_BLOCKS = 20


class AllocatorMachine(RuleBasedStateMachine):
    """Allocating and freeing in any order: no block twice, none lost."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.held: list[list[int]] = []

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.allocator.num_free))
        block_ids = self.allocator.allocate(count)
        assert len(block_ids) == count
        self.held.append(block_ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.allocator.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_block_has_one_place(self) -> None:
        taken = [block_id for block_ids in self.held for block_id in block_ids]
        assert len(taken) == len(set(taken))
        assert all(0 <= block_id < NUM_BLOCKS for block_id in taken)
        assert self.allocator.num_free == NUM_BLOCKS - len(taken)

    def teardown(self) -> None:
        for block_ids in self.held:
            self.allocator.free(block_ids)
        assert self.allocator.num_free == NUM_BLOCKS


TestAllocator = AllocatorMachine.TestCase


@given(st.integers(0, 1000), st.integers(1, 64))
def test_blocks_hold_their_tokens_and_no_block_is_empty(num_tokens: int, block_size: int) -> None:
    num_blocks = num_blocks_for(num_tokens, block_size)
    assert num_blocks * block_size >= num_tokens
    assert num_blocks == 0 or (num_blocks - 1) * block_size < num_tokens
