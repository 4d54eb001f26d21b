"""Which blocks of the KV pool are free. Pure bookkeeping."""

from __future__ import annotations


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold ``num_tokens``."""
    return -(-num_tokens // block_size)


class BlockAllocator:
    """Hands out block ids, lowest first while the pool is fresh, then the most recently freed."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks; the caller checked ``num_free``."""
        assert 0 <= count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        for block_id in taken:
            self._is_free[block_id] = False
        return taken

    def free(self, block_ids: list[int]) -> None:
        """Give blocks back; each was allocated and not freed since."""
        for block_id in reversed(block_ids):
            assert not self._is_free[block_id], f"block {block_id} freed twice"
            self._is_free[block_id] = True
            self._free.append(block_id)
