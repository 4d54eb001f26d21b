"""Which of the waiting requests an engine takes now. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChunkedPrefill:
    """Caps of an engine that computes prompts in chunks, each of them for one call of ``get_requests``.

    Attributes:
        max_num_partial_prefills: prompts, of any length.
        max_long_partial_prefills: prompts longer than ``long_prefill_token_threshold``.
    """

    max_num_partial_prefills: int
    max_long_partial_prefills: int
    long_prefill_token_threshold: int


@dataclass(frozen=True, slots=True)
class Offer:
    """What an engine says that it has room for.

    Attributes:
        available_blocks: free KV blocks.
        block_size: tokens.
        reserved_output_blocks: to be kept free for the output of each request.
        max_num_batched_tokens: prompt tokens of one batch; only looked at without chunked prefill.
        batch: requests.
    """

    available_blocks: int
    block_size: int
    reserved_output_blocks: int
    max_num_batched_tokens: int
    batch: int
    chunked_prefill: ChunkedPrefill | None = None

    @property
    def is_nothing(self) -> bool:
        """Not even the shortest request could be admitted."""
        return self.batch < 1 or self.available_blocks <= self.reserved_output_blocks


def num_admitted(prompt_lengths: Iterable[int], offer: Offer) -> int:
    """How many of the waiting requests are admitted, from the first on; none overtakes another.

    Blocks must be there for all that are admitted. The token cap lets the first one pass, so that a prompt beyond it is
    computed by itself, not never.

    Args:
        prompt_lengths: [num_waiting] tokens, oldest request first.
    """
    if offer.is_nothing:
        return 0
    count = num_blocks = num_tokens = num_long = 0
    for length in prompt_lengths:
        num_blocks += -(-length // offer.block_size) + offer.reserved_output_blocks
        num_tokens += length
        if count == offer.batch or num_blocks > offer.available_blocks:
            break
        if offer.chunked_prefill is not None:
            num_long += length > offer.chunked_prefill.long_prefill_token_threshold
            if (
                num_long > offer.chunked_prefill.max_long_partial_prefills
                or count == offer.chunked_prefill.max_num_partial_prefills
            ):
                break
        elif num_tokens > offer.max_num_batched_tokens and count > 0:
            break
        count += 1
    return count
