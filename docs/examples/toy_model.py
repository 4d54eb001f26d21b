"""A toy language model with a real KV cache.

Every token leaves a K and a V vector in a block. The next token depends on each byte of all of them: one wrong block,
or one wrong byte in it, changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 4  # tokens
NUM_BLOCKS = 1024
HEAD_DIM = 16
KV_SHAPE = (NUM_BLOCKS, 2, BLOCK_SIZE, HEAD_DIM)  # bytes; of each block first K, then V
VOCAB_SIZE = 50_021  # a prime: no byte's difference times its weight is a multiple of it

_place = np.indices((2, NUM_BLOCKS * BLOCK_SIZE, HEAD_DIM))
WEIGHTS = 1 + (_place[0] * 27_644_437 + _place[1] * 7_919 + _place[2] * 131) % (VOCAB_SIZE - 1)
FEATURES = np.arange(2 * HEAD_DIM).reshape(2, HEAD_DIM)


class ToyModel:
    """``kv``: uint8, KV_SHAPE; whoever made it keeps it."""

    def __init__(self, kv: npt.NDArray[np.uint8]) -> None:
        self.kv = kv

    def forward(self, tokens: Sequence[int], start: int, blocks: Sequence[int]) -> int:
        """Write the KV of ``tokens``, which stand at ``start`` onward; returns the token that follows them.

        ``blocks`` are the sequence's, in order; positions before ``start`` are in them already.
        """
        end = start + len(tokens)
        for position, token in enumerate(tokens, start):
            vectors = (token + 1) * (2 * FEATURES + 3) + position * 37
            self.kv[blocks[position // BLOCK_SIZE], :, position % BLOCK_SIZE] = vectors % 251
        seen = self.kv[list(blocks)].swapaxes(0, 1).reshape(2, -1, HEAD_DIM)[:, :end]
        return int((seen * WEIGHTS[:, :end]).sum() % VOCAB_SIZE)


@dataclass(frozen=True)
class Prompt:
    name: str
    token_ids: tuple[int, ...]
    max_tokens: int


def prompts(count: int) -> list[Prompt]:
    """``count`` prompts of 1 to 40 tokens that want 24 to 55 more."""
    return [
        Prompt(f"r{i}", tuple((i * 7 + k * 13) % VOCAB_SIZE for k in range(1 + i * 17 % 40)), 24 + i * 5 % 32)
        for i in range(count)
    ]
