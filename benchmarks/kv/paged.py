"""Random blocks of a pool as engines have it: one region, layer by layer, K before V, then the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NUM_LAYERS = 16
NUM_PLANES = 2 * NUM_LAYERS


@dataclass(frozen=True)
class Paged:
    """
    Attributes:
        block_bytes: of one block in one layer, K or V: what lies together.
    """

    block_bytes: int
    pool_bytes: int
    packing: str = "layer-major"

    @property
    def num_blocks(self) -> int:
        return self.pool_bytes // (NUM_PLANES * self.block_bytes)

    def offsets(self, block_ids: np.ndarray) -> np.ndarray:
        """Where all that lies together begins, block by block; [num_blocks * NUM_PLANES], bytes."""
        planes = np.arange(NUM_PLANES, dtype=np.int64)
        if self.packing == "layer-major":
            starts = planes[None, :] * self.num_blocks + block_ids[:, None]
        else:
            starts = block_ids[:, None] * NUM_PLANES + planes[None, :]
        return (starts * self.block_bytes).ravel()

    def rounds(self, seed: int, total_bytes: int, slice_bytes: int) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        """Rounds of slices, (source ids, destination ids) each; no block is in two slices of a round."""
        rng = np.random.default_rng(seed)
        each = slice_bytes // (NUM_PLANES * self.block_bytes)
        count = total_bytes // slice_bytes
        while True:
            src, dst = (rng.permutation(self.num_blocks)[: each * count].reshape(count, each) for _ in range(2))
            yield list(zip(src, dst, strict=True))
