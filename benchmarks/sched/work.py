"""What the users of a run ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

NUM_PROMPT_TOKENS = 256
PROMPT = tuple(range(1000, 1000 + NUM_PROMPT_TOKENS))


@dataclass(frozen=True)
class Load:
    """Requests of 256 prompt tokens.

    Attributes:
        name: makes their ids differ from those of other loads.
        window: requests under way at a time (closed loop).
        rate: requests a second instead of a window (open loop).
        num_tokens: output tokens of each; the first comes from prefill.
    """

    name: str
    num_requests: int
    window: int = 0
    rate: float | None = None
    num_tokens: int = 2

    def ids(self) -> Iterator[str]:
        return (f"{self.name}-{i}" for i in range(self.num_requests))
